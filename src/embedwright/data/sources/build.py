"""Writes a public set, or a local copy of it, as examples: `data build` and `data labels`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from embedwright.data.answers import text_mark
from embedwright.data.files.class_names import class_names, names_of
from embedwright.data.files.folders import data_files, is_beside, is_data, is_one_set, stem_of
from embedwright.data.files.kinds import LabelledRows, detect_kind
from embedwright.data.files.quarantine import Quarantine
from embedwright.data.files.rows import Rows, read_rows
from embedwright.data.files.tasks import by_form, tasks_beside
from embedwright.data.labels import USUAL, LabelRules
from embedwright.data.schema import DataError, Example, Task
from embedwright.data.sources.catalog import BeirRows, Entry, EvidenceRows, find_task
from embedwright.data.sources.convert import Job, OpenTable, Table, convert
from embedwright.data.sources.corpus import write_corpus
from embedwright.data.tables.table import write_examples
from embedwright.errors import InputError, NotFoundError, OutOfReachError

log = logging.getLogger(__name__)

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}  # what `datasets` calls them


def build(
    entry: Entry,
    out: Path,
    *,
    source: Path | None = None,
    limit: int | None = None,
    share: float | None = None,
    corpus_out: Path | None = None,
    seed: int = 0,
    labels: LabelRules = USUAL,
    strict: bool = False,
) -> dict[str, int]:
    """Writes the examples of `entry` to `out` (.jsonl, .jsonl.gz or .parquet), whole or not at all. Returns the counts.

    It writes their tasks beside it. Rows come from the hub, streamed if some are drawn and no corpus is kept, or from
    `source`: a file (JSONL, .gz, Parquet) or a folder (the configs of a repository, or the files that `entry.files`
    names). `convert` says what `limit` does, and what is in memory; `share` is a limit by the set's number of samples
    (`Entry.drawn`). `corpus_out` gets the documents that mining searches (`write_corpus`), all of them under a `limit`,
    cut by a `share`. It is there whenever `out` is. `labels` says how labels become examples; the form of the set is
    `entry.form`. Bad rows are logged, counted and kept in `<out>.quarantine.jsonl`. A set that is not pinned to a
    commit is a warning, or under `strict` a DataError. Raises FileNotFoundError, ConnectionError if the hub is out of
    reach, and DataError if no example comes out.
    """
    quarantine_path = out.with_name(f"{out.name}.quarantine.jsonl")
    _check(entry, source, labels, corpus_out, strict)
    if share is not None:
        if limit is not None:
            raise InputError("a limit and a share are both given: leave one out")
        limit = entry.drawn(share)
    quarantine_path.unlink(missing_ok=True)
    with Quarantine(source or Path(entry.hub or entry.name), quarantine_path) as quarantine:
        job = Job(
            task=entry.name,
            entry=entry,
            seed=seed,
            limit=limit,
            labels=labels._replace(form=labels.form or entry.form),
            quarantine=quarantine,
        )
        streaming = limit is not None and corpus_out is None  # a corpus is read once more
        rows = partial(open_table, source=source, streaming=streaming, names=job.names)
        examples = _require_any(convert(job, rows), job)
        if corpus_out is not None:
            examples = _with_corpus(examples, corpus_out, job, rows, 1.0 if share is None else share)
        try:
            written = write_examples(out, examples, job.tasks)
        except DataError as error:
            raise error if source is None or str(source) in str(error) else DataError(f"{source}: {error}") from None
    counts = {key: count for key, count in job.report.items() if count or key == "rows"}
    return counts | {"examples": written, "quarantined": quarantine.count}


def label_file(
    path: Path,
    out: Path,
    *,
    task: str | None = None,
    words: Mapping[str, str] | None = None,
    labels: LabelRules = USUAL,
    seed: int = 0,
) -> dict[str, int]:
    """Does the same for rows {"text", "label"} in the file `path`. A label may be a list, and `id` may be there.

    `task` is the name of the task (default: the file's). The file beside `path`, or the catalogue, may describe it,
    under this name or the file's; what it says stays, but for what the form decides.
    `words`: see `labels.label_triples`.
    """
    if detect_kind(path) != "labelled":
        raise DataError(f'{path}: rows are not {{"text", "label"}}')
    rows = LabelledRows(text=("text",), label="label", words=dict(words) if words else None, id="id")
    name = task or stem_of(path)
    beside, stem = tasks_beside(path), stem_of(path)
    found = beside.get(name) or beside.get(stem)
    own = found and by_form(found, "label")  # `build` adds what another form says
    described = own or find_task(name) or find_task(stem) or Task(name=name, family="classification")
    entry = Entry(
        name=name,
        rows=rows,
        family=described.family,
        instructions=(described.instruction,),  # may be empty: the recipe that reads the examples can give it
        symmetric=bool(own and own.symmetric),  # what the catalogue says goes by the form that it chooses
        in_batch_negatives=described.in_batch_negatives,
        url=described.source or None,
        licence=described.licence or "unknown",
        target={"v2": "example"},
    )
    return build(entry, out, source=path, labels=labels._replace(form=labels.form or "auto"), seed=seed)


def open_table(table: Table, *, source: Path | None, streaming: bool, names: dict[str, Mapping[str, str]]) -> Rows:
    """Yields the rows of `table`, numbered from 1: of its repository, or of `source`, as `build` says.

    `names` gets the names of classes by column, where the set says them. Holds one batch of rows in memory. A local
    folder is read as it is, without a copy in the cache of `datasets`.
    """
    if source is not None and (source.is_file() or _is_plain(table, source)):
        yield from _local_rows(table, source, names)
        return
    number = 0
    for label, arguments in _parts(table, source):
        for row in _load(arguments | {"streaming": streaming or source is not None}, names):
            number += 1
            yield number, b"", row | {"_file": label} if label else row


def _is_plain(table: Table, folder: Path) -> bool:
    """Returns whether a folder holds files of rows, or what `datasets` saved; else it is a repository with configs."""
    if table.config is not None or table.files is not None:
        return False
    return is_one_set(folder) or any(map(is_data, folder.iterdir()))


def _local_rows(table: Table, source: Path, names: dict[str, Mapping[str, str]]) -> Rows:
    files = data_files(source, table.split)
    columns: set[str] = set()
    count = itertools.count(1)
    for file in files:
        named = {"_file": stem_of(file)} if table.files else {}
        for number, raw, row in read_rows(file):
            place = number if len(files) == 1 else next(count)
            if isinstance(row, DataError):
                yield place, raw, row
                continue
            for column in row.keys() - columns:
                columns.add(column)
                names |= {column: found} if (found := class_names(source, column)) else {}
            yield place, raw, row | named


def _parts(table: Table, source: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name of the file or nothing, arguments of `load_dataset`) for each part of a table.

    A table is a repository, or a folder that is laid out like one; or single files of it, in the order of their names.
    """
    if not table.files:
        where = {"path": str(source)} if source else {"path": table.hub, "revision": table.revision}
        yield "", where | {"name": table.config, "split": table.split}
        return
    if source is not None:
        found = [str(path) for path in sorted(source.glob(table.files)) if not is_beside(path)]
    else:
        from huggingface_hub import HfFileSystem

        pattern = f"datasets/{table.hub}@{table.revision or 'main'}/{table.files}"
        with _naming(str(table.hub)):
            found = [f"hf://{path}" for path in sorted(map(str, HfFileSystem().glob(pattern)))]
    if not found:
        raise NotFoundError(f"{source or table.hub}: no file {table.files}")
    for path in found:
        builder = BUILDERS.get(Path(path.removesuffix(".gz")).suffix)
        if builder is None:
            raise DataError(f"{path}: expected a file of {', '.join(BUILDERS)}")
        yield stem_of(Path(path)), {"path": builder, "data_files": path, "split": "train"}


def _load(arguments: dict[str, Any], names: dict[str, Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """Yields the rows that `load_dataset` gives. Errors name the set, and `names` gets those of its classes."""
    import datasets

    with _naming(arguments.get("data_files", arguments["path"])):
        rows = datasets.load_dataset(**arguments, trust_remote_code=False)
        features = rows.features.to_dict() if rows.features else {}
        names |= {column: found for column, feature in features.items() if (found := names_of(feature))}
        yield from rows


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Turns errors of `datasets` and of the hub into the errors that `build` promises, with the name of the set."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except ConnectionError as error:
        raise OutOfReachError(f"{where}: {error} (a local copy can be given as source)") from error
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        raise DataError(f"{where}: {error}") from error


def _check(entry: Entry, source: Path | None, labels: LabelRules, corpus_out: Path | None, strict: bool) -> None:
    """Raises for what cannot work, before anything is read, and warns of a set that is not pinned."""
    labelled = isinstance(entry.rows, LabelledRows)
    if labels.form is not None and not labelled:
        raise DataError(f"{entry.name}: its rows have no labels, so no form")
    if labels.known is not None and not labelled:
        raise DataError(f"{entry.name}: its rows have no labels to keep some of")
    if corpus_out is not None and labelled:
        raise DataError(f"{entry.name}: its rows have labels, so there is no corpus to mine from")
    if source is not None:
        if not source.exists():
            raise NotFoundError(f"{source} does not exist")
        if source.is_file() and isinstance(entry.rows, BeirRows | EvidenceRows):
            raise DataError(f"{source}: {entry.name} is made of several tables: give a folder with a config for each")
        return
    if entry.hub is None:
        raise DataError(
            f"{entry.name} is on no hub: give a local copy as source{f', from {entry.url}' if entry.url else ''}"
        )
    pinned = {entry.hub: entry.revision}
    if isinstance(entry.rows, EvidenceRows):
        pinned[entry.rows.pages.hub] = entry.rows.pages.revision
    for hub in (hub for hub, revision in pinned.items() if revision is None):
        message = f"{entry.name}: {hub} is not pinned to a commit (`revision`): its content may change"
        if strict:
            raise DataError(message)
        log.warning("%s", message)


def _with_corpus(examples: Iterator[Example], path: Path, job: Job, rows: OpenTable, share: float) -> Iterator[Example]:
    """Yields `examples`, then writes the corpus. The file of the examples gets its name only after that."""
    answers: set[int] = set()
    for example in examples:
        if share < 1:
            answers.update(text_mark(passage.text) for passage in example.positives)
        yield example
    job.report["corpus"] = write_corpus(path, job, rows, share=share, answers=answers)


def _require_any(examples: Iterator[Example], job: Job) -> Iterator[Example]:
    """Yields `examples`. Raises DataError if there is none, so that no file is written."""
    first = next(examples, None)
    if first is None:
        counts = {key: n for key, n in job.report.items() if n}
        raise DataError(f"{job.entry.name}: no example ({[*job.quarantine.reasons, counts or 'no row'][0]})")
    yield first
    yield from examples
