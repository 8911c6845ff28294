"""The data of a recipe's stages, opened and checked against the recipe before the first step."""

from __future__ import annotations

import hashlib
import logging

from embedwright.config import ConfigError
from embedwright.data.example import Task
from embedwright.data.table import open_examples
from embedwright.training.blend import Source
from embedwright.training.recipe import DataPart, Recipe, StagePart, expand

logger = logging.getLogger(__name__)


def open_sources(recipe: Recipe) -> list[list[Source]]:
    """The sources of each stage. FileNotFoundError or ConfigError names the recipe key that is wrong."""
    known = {
        entry.task.name: entry.task for stage in recipe.stages for entry in stage.data if isinstance(entry.task, Task)
    }
    return [_stage_sources(recipe, stage, known) for stage in recipe.stages]


def data_fingerprint(stages: list[list[Source]]) -> str:
    """Of every row that can be drawn: a resumed run refuses to go on with other data."""
    parts = [f"{source.name} {source.table.fingerprint}" for sources in stages for source in sources]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _stage_sources(recipe: Recipe, stage: StagePart, known: dict[str, Task]) -> list[Source]:
    sources = []
    for number, entry in enumerate(stage.data):
        where = f"recipe {recipe.name}: stages.{stage.name}.data.{number}"
        for source in _entry_sources(recipe, stage, entry, known, where):
            _check(recipe, stage, source, where)
            sources.append(source)
    return sources


def _entry_sources(
    recipe: Recipe, stage: StagePart, entry: DataPart, known: dict[str, Task], where: str
) -> list[Source]:
    named = entry.task if isinstance(entry.task, str) else entry.task.name if entry.task else None
    try:
        table = open_examples(
            expand(entry.path),
            task=named,
            corpus=expand(entry.corpus) if entry.corpus else None,
            seed=recipe.seed,
            negatives=max(stage.hard_negatives, 1),
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: {error}") from error
    sources = []
    for name, rows in table.rows_by_task().items():
        if name not in known:
            logger.warning("%s: task %r is not described: taken as retrieval without an instruction", where, name)
            known[name] = Task(name=name)
        # an entry's own description is for its own rows: another stage may describe the task otherwise
        task = entry.task if isinstance(entry.task, Task) and entry.task.name == name else known[name]
        share = entry.weight * len(rows)
        sources.append(Source(f"{entry.path}#{name}", table, rows, task, share))
    return sources


def _check(recipe: Recipe, stage: StagePart, source: Source, where: str) -> None:
    task = source.task
    if recipe.strict and not (task.instruction and task.licence):
        missing = "instruction" if not task.instruction else "licence"
        raise ConfigError(f"{where}: task {task.name!r} has no {missing}, and the recipe is strict")
    if (task.in_batch_negatives or stage.in_batch_negatives) != "none":
        return
    without = int((source.table.negatives_per_row()[source.rows] == 0).sum())
    if stage.hard_negatives == 0 or without:
        raise ConfigError(
            f"{where}: task {task.name!r} takes no in-batch negatives, and "
            + (f"{without} of its {len(source.rows)} rows have none of their own" if without else "hard_negatives is 0")
            + ": such rows would train nothing (mine negatives, or allow in-batch ones)"
        )
