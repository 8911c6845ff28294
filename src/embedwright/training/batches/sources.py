"""The data of a recipe's stages, opened and checked against the recipe before the first step."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedwright.config import ConfigError
from embedwright.data.files.folders import is_beir, stem_of
from embedwright.data.files.tasks import by_form, over
from embedwright.data.schema import SYNTHETIC, Task
from embedwright.data.sources.catalog import find_task
from embedwright.data.tables.documents import DocumentTable
from embedwright.data.tables.table import ExampleTable, form_of, open_documents, open_examples
from embedwright.errors import NotFoundError, error_prefix
from embedwright.mining.rules import RANDOM
from embedwright.training.batches.blend import Source, permuted, sampling_weight
from embedwright.training.recipe import Recipe, expand
from embedwright.training.stages import ContrastiveStage, DataPart, MaskedStage, Stage, TextPart
from embedwright.vectors.corpus import corpus_at, is_encoded

logger = logging.getLogger(__name__)


def open_sources(recipe: Recipe, *, lacking: Collection[str] = ()) -> list[list[Source]]:
    """Returns the sources of each stage. Raises FileNotFoundError or ConfigError, which name the wrong recipe key.

    A task is described by the first of these that knows it: the recipe entry that its rows come from (a bare name there
    refers to another entry's description), completed by the task file beside the rows; that task file; another entry of
    the recipe; the catalogue. `lacking` names stages whose data is partly missing: checks over all data of a stage are
    skipped for them.
    """
    known = _described(recipe)
    return [_stage_sources(recipe, stage, known, lacking) for stage in recipe.stages]


def drawable_rows(recipe: Recipe, stage: Stage, number: int) -> int:
    """Counts the rows of entry `number` of the stage's data that training can draw. Raises as `open_sources` does.

    Of plain text, it counts held-out documents too.
    """
    return sum(len(source.rows) for source in _checked_sources(recipe, stage, number, _described(recipe)))


def _described(recipe: Recipe) -> dict[str, Task]:
    entries = [entry for stage in recipe.stages for entry in stage.data]
    return {entry.task.name: entry.task for entry in entries if isinstance(entry.task, Task)}


def source_fingerprints(recipe: Recipe, stages: list[list[Source]]) -> dict[str, str]:
    """Returns each source's fingerprint by its stage and name, to say which one differs."""
    pairs = zip(recipe.stages, stages, strict=True)
    return {f"{stage.name}/{source.name}": data_fingerprint([[source]]) for stage, own in pairs for source in own}


def data_fingerprint(stages: list[list[Source]]) -> str:
    """Returns the fingerprint of all rows that can be drawn and their tasks. A resumed run refuses other data."""
    parts = []
    for source in (source for sources in stages for source in sources):
        asked = [task.model_dump_json() for task in (source.task, *source.tasks.values())]
        parts += [f"{source.name} {source.table.fingerprint}", *asked]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def entry_of(stage: Stage, source: Source) -> DataPart | TextPart:
    """Returns the entry of the stage's data that a source comes from: its number begins the source's name."""
    return stage.data[int(_number_of(source))]


def _number_of(source: Source) -> str:
    return source.name.partition("#")[0]


def open_table(recipe: Recipe, stage: ContrastiveStage, entry: DataPart) -> ExampleTable:
    """Opens the rows of one entry. Raises FileNotFoundError, ConfigError or DataError if it cannot be read."""
    corpus = expand(entry.corpus) if entry.corpus else None
    return open_examples(
        expand(entry.path),
        task=entry.task.name if isinstance(entry.task, Task) else entry.task,
        corpus=corpus_at(corpus) if corpus and is_encoded(corpus) else corpus,
        seed=recipe.seed,
        negatives=max(stage.hard_negatives, 1),
    )


def corpus_of(entry: DataPart | TextPart) -> DocumentTable | None:
    """Opens the documents that the rows of an entry are mined from: its `corpus`, or else those of its BEIR folder.

    None stands for the positives of the rows. Raises InputError if a document cannot be read.
    """
    path = expand(entry.corpus or entry.path)
    return corpus_at(path) if entry.corpus or (path.is_dir() and is_beir(path)) else None


def _stage_sources(recipe: Recipe, stage: Stage, known: dict[str, Task], lacking: Collection[str]) -> list[Source]:
    sources = [source for number in range(len(stage.data)) for source in _checked_sources(recipe, stage, number, known)]
    if not sources:  # a plan leaves out what is not there yet
        return []
    if isinstance(stage, MaskedStage):
        sources = _without_heldout(recipe, stage, sources)
    else:
        _warn_of_equal_names(recipe, stage, sources)
    if stage.name not in lacking:
        _check_together(recipe, stage, sources)
    return with_sampling_weights(stage, sources)


def _warn_of_equal_names(recipe: Recipe, stage: ContrastiveStage, sources: Sequence[Source]) -> None:
    """Warns of rows of two files that are one task by the name of their files alone."""
    first: dict[str, Path] = {}
    for source in sources:
        name, path, number = source.task.name, source.table.path, _number_of(source)
        if stage.data[int(number)].task or name != stem_of(path) or name in source.table.tasks:
            continue
        if (other := first.setdefault(name, path)) != path:
            logger.warning(
                "recipe %s: stages.%s.data.%s: the rows of %s are of one task, %r, with those of %s: equal ids are one "
                "document, and `same_task` takes negatives from both. Give each a `task` if they are two data sets",
                *(recipe.name, stage.name, number, path, name, other),
            )


def _check_together(recipe: Recipe, stage: Stage, sources: Sequence[Source]) -> None:
    """Raises ConfigError if a stage mines or follows scores, and none of its data is for that."""
    where = f"recipe {recipe.name}: stages.{stage.name}"
    if stage.mine is not None and not any(map(is_mined, sources)):
        raise ConfigError(f"{where}: none of its data can be mined (docs/mining.md)")
    if stage.loss.distill is not None and stage.loss.distill.score_weight and not _can_have_scores(stage, sources):
        raise ConfigError(
            f"{where}.loss.distill.score_weight: no row has positive_scores and negative_scores to follow: mine with a "
            "teacher that has scores, or leave it out (docs/losses.md)"
        )


def _can_have_scores(stage: Stage, sources: Sequence[Source]) -> bool:
    """Returns whether some row has a teacher's scores, or gets them when its negatives are mined."""
    for source in sources:
        if stage.mine is not None and is_mined(source):
            if stage.mine.teacher != RANDOM:
                return True
        elif source.table.has_teacher_scores()[source.rows].any():
            return True
    return False


def with_sampling_weights(stage: Stage, sources: Sequence[Source]) -> list[Source]:
    """Returns the sources of a stage, each with its sampling weight, by the rows that it can draw.

    An entry of `data` has one weight by all its rows, which its tasks divide by their rows.
    """
    rows: Counter[str] = Counter()
    for source in sources:
        rows[_number_of(source)] += len(source.rows)
    return [
        replace(
            source,
            sampling_weight=sampling_weight(
                entry_of(stage, source).weight, len(source.rows), stage.sampling_alpha, of=rows[_number_of(source)]
            ),
        )
        for source in sources
    ]


def _checked_sources(recipe: Recipe, stage: Stage, number: int, known: dict[str, Task]) -> list[Source]:
    where = f"recipe {recipe.name}: stages.{stage.name}.{stage.reads}.{number}"
    if isinstance(stage, MaskedStage):
        return [_text_source(recipe, stage.text[number], f"{number}#", where)]
    sources = [_check(recipe, stage, source, where) for source in _entry_sources(recipe, stage, number, known, where)]
    if stage.mine is not None and any(map(is_mined, sources)):  # else a run would meet a bad corpus after hours
        with error_prefix(f"{where}.{'corpus' if stage.data[number].corpus else 'path'}"):
            corpus_of(stage.data[number])
    return sources


def _entry_sources(
    recipe: Recipe, stage: ContrastiveStage, number: int, known: dict[str, Task], where: str
) -> list[Source]:
    entry = stage.data[number]
    try:
        table = open_table(recipe, stage, entry)
    except FileNotFoundError as error:
        raise NotFoundError(f"{where}: {error}") from error
    own, by_task = table.tasks, table.rows_by_task()
    given = _described(recipe).get(entry.task) if isinstance(entry.task, str) else entry.task
    meant = given.name if given else entry.task
    if meant is not None and meant not in by_task:
        raise ConfigError(f"{where}.task: no row is of task {meant!r}: the rows name {_some(by_task)}")
    form = form_of(table)
    sources = []
    described = [own[name] for name in by_task if name in own and not (given and name == meant)]
    for kind, tasks in _kinds(described, mined=stage.mine is not None).items():
        rows = np.sort(np.concatenate([by_task.pop(task.name) for task in tasks]))
        named = {task.name: task for task in tasks} if len(tasks) > 1 else {}
        kind = kind if named else tasks[0].name
        sources.append(Source(f"{number}#{kind}", table, rows, tasks[0], tasks=named))
    for name, rows in by_task.items():
        if given and name == meant:  # for these rows alone: another stage may describe the task otherwise
            task = over(own[name], given) if name in own else given
        else:
            if name not in known and (found := find_task(name, form)):
                known[name] = found
            if name not in known:
                family = by_form(Task(name=name), form).family
                logger.warning("%s: task %r is not described: taken as %s without an instruction", where, name, family)
                known[name] = Task(name=name)
            task = known[name]
        # the name keys the order of rows, which must not change when the data is moved
        sources.append(Source(f"{number}#{name}", table, rows, task))
    return [replace(source, task=by_form(source.task, form)) for source in sources]


def _some(names: Iterable[str]) -> str:
    first, *more = map(repr, names)
    return ", ".join([first, *more[:4], *["..."][: len(more) > 4]])


def _text_source(recipe: Recipe, entry: TextPart, name: str, where: str) -> Source:
    if recipe.strict and not entry.licence:
        raise ConfigError(f"{where}: the text has no licence, and the recipe is strict")
    try:
        table = open_documents(expand(entry.path))
    except FileNotFoundError as error:
        raise NotFoundError(f"{where}: {error}") from error
    task = Task(name=stem_of(table.path), licence=entry.licence)
    return Source(f"{name}{task.name}", table, np.arange(len(table)), task)


def _without_heldout(recipe: Recipe, stage: MaskedStage, sources: Sequence[Source]) -> list[Source]:
    """Returns the sources without the documents that the stage holds out, and without others of the same text."""
    total, where = sum(len(source.rows) for source in sources), f"recipe {recipe.name}: stages.{stage.name}.heldout"
    if stage.heldout >= total:
        raise ConfigError(f"{where}: {stage.heldout} of {total} documents leave none to train on")
    key = f"{recipe.seed}/{stage.name}/heldout"
    drawn = np.sort([permuted(i, total, key) for i in range(stage.heldout)])
    texts = pa.chunked_array([chunk for source in sources for chunk in source.table.first_positives().chunks])
    held = pc.is_in(texts, texts.take(pa.array(drawn, pa.int64()))).to_numpy()
    ends = np.cumsum([len(source.rows) for source in sources])
    kept = [np.flatnonzero(~part) for part in np.split(held, ends[:-1])]
    if empty := [source.table.path for source, rows in zip(sources, kept, strict=True) if not len(rows)]:
        raise ConfigError(f"{where}: no document of {empty[0]} is left to train on: hold out fewer, or give more text")
    return [replace(source, rows=rows) for source, rows in zip(sources, kept, strict=True)]


def heldout_texts(sources: Sequence[Source]) -> list[str]:
    """Returns the texts that a masked phase holds out, each once."""
    found: dict[str, None] = {}
    for source in sources:
        for row in np.setdiff1d(np.arange(len(source.table)), source.rows):
            found[source.table[int(row)].positives[0].text] = None
    return list(found)


def _kinds(tasks: Iterable[Task], mined: bool) -> dict[str, list[Task]]:
    """Groups tasks of equal family, `symmetric` and `in_batch_negatives`: synthetic rows have thousands of them.

    Where a stage mines, real and synthetic tasks are two kinds, since only the real ones are mined.
    """
    kinds: dict[str, list[Task]] = {}
    for task in tasks:
        kinds.setdefault(f"{task.family}/{task.symmetric}/{task.in_batch_negatives}", []).append(task)
    for kind, own in list(kinds.items()) if mined else ():
        synthetic = [task for task in own if _is_synthetic(task)]
        if 0 < len(synthetic) < len(own):  # a kind that is all of one keeps its name, which keys the order of rows
            kinds[kind] = [task for task in own if not _is_synthetic(task)]
            kinds[f"{kind}/synthetic"] = synthetic
    return kinds


def _is_synthetic(task: Task) -> bool:
    return task.source.startswith(SYNTHETIC)


def _check(recipe: Recipe, stage: ContrastiveStage, source: Source, where: str) -> Source:
    """Returns the source, with the rows that can train something once its negatives are there. Raises ConfigError if
    there is none, or strict asks for more.
    """
    for task in (source.task, *source.tasks.values()):
        if recipe.strict and not (task.instruction and task.licence):
            missing = "instruction" if not task.instruction else "licence"
            raise ConfigError(f"{where}: task {task.name!r} has no {missing}, and the recipe is strict")
    source = _with_pairs(stage, source, where)
    return source if stage.mine is not None and is_mined(source) else trainable(stage, source, where)


def _with_pairs(stage: ContrastiveStage, source: Source, where: str) -> Source:
    """Returns the source with the rows that the loss can learn from: all for CoSENT, those with a positive for InfoNCE.

    Raises ConfigError if there is none.
    """
    if stage.loss.scored == "cosent":
        return source
    rows = source.rows[source.table.positives_per_row()[source.rows] > 0]
    if not len(rows):
        raise ConfigError(
            f"{where}: no scored pair of task {source.task.name!r} reaches the threshold (docs/data.md), so that there "
            "is not a positive: use loss.scored: cosent, which learns from all pairs, or bring the scores to the scale"
        )
    return replace(source, rows=rows)


def is_mined(source: Source) -> bool:
    """Returns whether hard negatives can be mined for these rows: any other document is one that does not answer the
    query.

    That is not so of rows that share a label, or of pairs that are alike. Synthetic rows keep the negatives that were
    written for them.
    """
    task = source.task  # others of the source are of its kind
    return task.family in ("retrieval", "reranking") and not task.symmetric and not _is_synthetic(task)


def trainable(stage: ContrastiveStage, source: Source, where: str) -> Source:
    """Returns the source with the rows that have what the stage compares. Raises ConfigError if there is none."""
    task = source.task
    if (task.in_batch_negatives or stage.in_batch_negatives) != "none" or stage.loss.teachers:
        return source  # each row is compared with others of its batch, or follows the teacher
    has_negatives = source.table.negatives_per_row()[source.rows] > 0
    compares = has_negatives & (stage.hard_negatives > 0)
    if stage.loss.scored == "cosent":  # compares scored rows with each other
        compares |= source.table.has_score()[source.rows]
    usable = source.rows[compares]
    without = len(source.rows) - len(usable)
    if not len(usable):
        raise ConfigError(
            f"{where}: task {task.name!r} takes no in-batch negatives, and "
            + ("hard_negatives is 0" if has_negatives.any() else f"none of its {without} rows has negatives of its own")
            + ": it would train nothing (mine negatives, or allow in-batch ones)"
        )
    if without:
        total = len(source.rows)
        logger.warning("%s: %d of %d rows of task %r have no negatives: left out", where, without, total, task.name)
    return replace(source, rows=usable)
