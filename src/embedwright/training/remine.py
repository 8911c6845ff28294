"""Mines the hard negatives of a stage inside a run: before its first step, and again every `mine.every` steps.

The result lies in `<run.out>/mined/<stage>/<step>/`. A run that resumes reads it from there.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from embedwright.config import ConfigError
from embedwright.data.answers import Answers
from embedwright.data.tables.table import open_examples, write_examples
from embedwright.encoders.open import open_encoder
from embedwright.encoders.protocol import Encoder, as_encoder
from embedwright.encoders.sharded import shared
from embedwright.files import whole_folder, write_json
from embedwright.mining.mine import mine
from embedwright.mining.pool import positives_of
from embedwright.mining.rules import NAMED
from embedwright.model.embedder import Embedder
from embedwright.processes import Processes
from embedwright.training.batches.blend import Rows, Source
from embedwright.training.batches.sources import corpus_of, entry_of, is_mined, trainable, with_sampling_weights
from embedwright.training.recipe import Recipe
from embedwright.training.run.checkpoint import RunState
from embedwright.training.stages import PREVIOUS, ContrastiveStage, Stage

logger = logging.getLogger(__name__)

_WHOLE = "run.json"  # written last; says which run this belongs to


def refresh_every(stage: Stage) -> int:
    """Returns how many steps of a stage share their negatives: all, unless the stage mines again on the way."""
    every = None if stage.mine is None else stage.mine.every
    return every or stage.optim.steps


def refreshed(
    recipe: Recipe,
    stage: ContrastiveStage,
    sources: Sequence[Source],
    state: RunState,
    begin: int,
    model: Embedder,
    processes: Processes,
    say: Callable[[str], None] | None = None,
) -> list[Source]:
    """Returns the stage's sources with the negatives for the steps from `begin` on. `state` is where the run stands.

    Negatives that rows came with are replaced, and rows keep their order. Rows of a task without in-batch negatives
    that got none are left out until the stage mines again, unless it follows a teacher. If the number of rows changes,
    the order of draws changes too, so a pass may give a row twice or not at all.

    Each process encodes a part of the texts; rank 0 searches and writes, and the others read its files.

    Raises ConfigError if the mined files are gone together with the weights that mined them, or where no row of a
    source got a negative that it needs.
    """
    asked = stage.mine
    assert asked is not None
    folder = recipe.out / "mined" / stage.name / f"{begin:07d}"
    teacher = {name: found for name, found in state.facts.get("teacher", {}).items() if name in asked.teachers}
    run = {"recipe": state.recipe, "data": state.data, "model": state.model, "teacher": teacher}
    there = processes.on_rank_0(
        lambda: (folder / _WHOLE).is_file() and json.loads((folder / _WHOLE).read_text()) == run
    )
    mined = [number for number, source in enumerate(sources) if is_mined(source)]
    if not there:
        if asked.teacher == PREVIOUS and begin < state.step:
            raise ConfigError(
                f"{folder} is gone, and the weights of step {begin} that mined it are too: start in a new run.out"
            )

        def work(teachers: list[Encoder | str]) -> None:
            shutil.rmtree(folder, ignore_errors=True)  # left by another run
            with whole_folder(folder) as temp:
                answers = Answers(Rows(sources))
                for number in mined:
                    _mine(recipe, stage, sources[number], answers, teachers[0], temp / f"{number:02d}", say)
                write_json(temp / _WHOLE, run)

        shared(lambda: [_teacher(asked.teacher, model)], processes, work)
    fresh = list(sources)
    with processes.together():
        for number in mined:
            source = sources[number]
            table = open_examples(folder / f"{number:02d}.parquet", seed=recipe.seed)
            own = replace(source, table=table, rows=np.arange(len(table)))
            fresh[number] = trainable(stage, own, f"stages.{stage.name}, mined after step {begin}: {source.name}")
    return with_sampling_weights(stage, fresh)


def _teacher(name: str, model: Embedder) -> Encoder | str:
    """Returns the teacher as `mine` takes it: a model, or the name of a baseline."""
    if name in NAMED:
        return name
    return model if name == PREVIOUS else as_encoder(open_encoder(name))


def _mine(
    recipe: Recipe,
    stage: ContrastiveStage,
    source: Source,
    answers: Answers,
    teacher: Encoder | str,
    out: Path,
    say: Callable[[str], None] | None,
) -> None:
    asked = stage.mine
    assert asked is not None
    corpus = corpus_of(entry_of(stage, source))
    rows = (source.table[int(row)] for row in source.rows)
    bare = [
        replace(row, negatives=(), positive_scores=None, negative_scores=None) if row.positives else row for row in rows
    ]
    tasks = source.tasks or {source.task.name: source.task}
    found, report = mine(
        bare,
        positives_of(source.table) if corpus is None else corpus,
        teacher,
        rule=asked.rule,
        margin=asked.margin,
        negatives=asked.negatives,
        depth=asked.depth,
        tasks=tasks,  # as training reads them, even if without an instruction that the catalogue has
        sampled=asked.sampled,
        sample_from=asked.sample_from,
        answers=answers,
        seed=recipe.seed,
    )
    write_examples(out.with_suffix(".parquet"), found, tasks)
    write_json(out.with_suffix(".json"), report.to_json())
    counts = report.counts()
    line = f"{stage.name}: mined {counts['negatives']} negatives for {counts['queries']} rows of {source.task.name}"
    logger.info("%s", line)
    if say is not None:
        say(line)
