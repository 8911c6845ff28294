"""Tables of examples: `ExampleTable` maps what was converted once (`convert`), or reads our own Parquet in place."""

from __future__ import annotations

import json
import logging
import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedwright.cache import cache_folder
from embedwright.data.files.folders import data_files, is_beir, stem_of
from embedwright.data.files.kinds import detect_kind
from embedwright.data.files.tasks import Tasks, by_form, tasks_beside, tasks_file, write_tasks
from embedwright.data.schema import Example, Task
from embedwright.data.sources.catalog import find_task
from embedwright.data.tables.arrow import BATCH_ROWS, example_of, write_example_rows
from embedwright.data.tables.convert import Job, convert, fingerprint_of, quarantine_file
from embedwright.data.tables.documents import DocumentTable
from embedwright.data.tables.own import OwnParquet, are_own
from embedwright.files import locked, whole_file

log = logging.getLogger(__name__)
T = TypeVar("T")

# what opening no file, or a damaged one, raises
_NOT_THERE = (pa.ArrowInvalid, OSError, ValueError, KeyError, TypeError)


class ExampleTable:
    """Gives the examples of one data set from a mapped file, or from our own Parquet files as they are.

    It has `len`, `[i]` and iteration.

    `fingerprint` is the SHA-256 (hex) of content, task, seed and format, so equal fingerprints mean equal rows.
    `tasks` are what the file beside it describes, by name (and see `open_as_named`).
    `report` counts the rows read, the examples made, and what was left out, by reason. `below_threshold` leaves nothing
    out: it counts the scored pairs whose examples have no positive.
    `quarantine` is the file of the bad lines, if their number `quarantined` is not 0. `bad_lines` has the first few.
    """

    def __init__(self, path: Path, arrow: Path, own: OwnParquet | None = None, fingerprint: str = "") -> None:
        """With `own`, which have no report, there is no file `arrow`, and the `fingerprint` must be given."""
        self.path, self.arrow = path, arrow
        self.tasks = tasks_beside(path)
        if own is not None:
            self._reader: Any = own
            self._stream: Any = own
            self._starts = own.starts
            counts = {"rows": own.starts[-1], "examples": own.starts[-1], "quarantined": 0}
            meta: dict[str, Any] = {"fingerprint": fingerprint, "report": counts, "bad_lines": []}
        else:
            self._reader = pa.ipc.open_file(pa.memory_map(str(arrow)))
            self._stream = pa.ipc.open_file(pa.OSFile(str(arrow)))  # not mapped: pages read once would count as memory
            last = self._reader.get_batch_with_custom_metadata(self._reader.num_record_batches - 1)
            meta = json.loads(last.custom_metadata["embedwright"])
            self._starts = [*range(0, meta["report"]["examples"], BATCH_ROWS)]
        self.fingerprint: str = meta["fingerprint"]
        self.report: dict[str, int] = meta["report"]
        self.quarantined = self.report["quarantined"]
        self.bad_lines: list[str] = meta["bad_lines"]
        self.quarantine = quarantine_file(arrow)

    def __len__(self) -> int:
        return self.report["examples"]

    def __getitem__(self, index: SupportsIndex) -> Example:
        i = operator.index(index)
        i += len(self) if i < 0 else 0
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: row {operator.index(index)} of {len(self)}")
        number = self._batch_of(i)
        return example_of(self._reader.get_batch(number).slice(i - self._starts[number], 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Example]:
        for i in range(self._stream.num_record_batches):
            yield from map(example_of, self._stream.get_batch(i).to_pylist())

    def select(self, rows: Iterable[int]) -> Iterator[Example]:
        """Yields the examples of these rows, whose numbers ascend. Batches without one of them are not read."""
        for number, own in groupby(rows, self._batch_of):
            places = [row - self._starts[number] for row in own]
            yield from map(example_of, self._stream.get_batch(number).take(places).to_pylist())

    def without_negatives(self) -> Iterator[Example]:
        """Yields the examples with id, task, query and positives alone. It does not read the other columns."""
        for i in range(self._stream.num_record_batches):
            batch = _columns(self._stream, i, ["id", "task", "query", "positives"])
            yield from (example_of(row | {"negatives": ()}) for row in batch.to_pylist())

    def rows_by_task(self) -> dict[str, NDArray[np.int64]]:
        """Maps task name to its row numbers, ascending. Tasks come in the order of their first row."""
        tasks = self._column("task").combine_chunks().dictionary_encode()
        codes = tasks.indices.to_numpy()
        order = np.argsort(codes, kind="stable").astype(np.int64)
        ends = np.cumsum(np.bincount(codes, minlength=len(tasks.dictionary)))
        return dict(zip(tasks.dictionary.to_pylist(), np.split(order, ends[:-1]), strict=True))

    def queries(self) -> Iterator[str]:
        """Yields the query of each row. It does not read the other columns."""
        for i in range(self._stream.num_record_batches):
            yield from _columns(self._stream, i, ["query"]).column("query").to_pylist()

    def negatives_per_row(self) -> NDArray[np.int64]:
        """Returns how many negatives each example has, as int64 (rows,)."""
        return self._passages_per_row("negatives")

    def positives_per_row(self) -> NDArray[np.int64]:
        """Returns how many positives each example has: 0 of a pair with a score below the threshold."""
        return self._passages_per_row("positives")

    def has_score(self) -> NDArray[np.bool_]:
        """Returns whether each example has a score of its pair."""
        has: NDArray[np.bool_] = self._column("score").is_valid().to_numpy()
        return has

    def has_teacher_scores(self) -> NDArray[np.bool_]:
        """Returns whether each example has scores of its positives and of its negatives, as `mine` writes them."""
        has: NDArray[np.bool_] = np.ones(len(self), bool)
        for name in ("positive_scores", "negative_scores"):
            has &= pc.list_value_length(self._column(name)).fill_null(0).to_numpy() > 0
        return has

    def _passages_per_row(self, column: str) -> NDArray[np.int64]:
        part = f"{column}.list.element.id" if isinstance(self._reader, OwnParquet) else column  # without the texts
        counts: NDArray[Any] = pc.list_value_length(self._column(column, part)).fill_null(0).to_numpy()
        return counts.astype(np.int64)

    def first_positives(self) -> pa.ChunkedArray:
        return pc.struct_field(pc.list_element(self._column("positives"), 0), "text")

    def _column(self, name: str, part: str = "") -> pa.ChunkedArray:
        batches = (_columns(self._reader, i, [part or name]) for i in range(self._reader.num_record_batches))
        return pa.chunked_array([batch.column(name) for batch in batches])

    def _batch_of(self, row: int) -> int:
        return bisect_right(self._starts, row) - 1


class PartOfTable:
    """Some rows of a table, by their ascending numbers. It has `len`, and iteration reads these rows alone."""

    def __init__(self, table: ExampleTable, rows: Sequence[int]) -> None:
        self.table, self.rows = table, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        return self.table.select(self.rows)


def _columns(reader: Any, number: int, names: list[str]) -> pa.RecordBatch:
    own = isinstance(reader, OwnParquet)
    return reader.get_batch(number, names) if own else reader.get_batch(number).select(names)


def open_examples(
    path: Path | str,
    *,
    task: str | None = None,
    corpus: Path | str | DocumentTable | None = None,
    cache: Path | str | None = None,
    seed: int = 0,
    negatives: int = 7,
) -> ExampleTable:
    """Opens the training data at `path`: a data file of any kind (`kinds`), a folder of such, or a BEIR folder.

    Of a folder with several splits it reads `train`. The data is converted once into the folder `data` of `cache`
    (default: the one of `cache_folder`), under a name made of its content. `task` is that of rows that name none
    (default: the file's name; an empty text leaves them without one). `corpus` has the texts of documents given by id.
    `seed` and `negatives` are for examples made from labels. Bad lines are logged, counted and kept in `quarantine`.
    Raises FileNotFoundError, and DataError if no example comes out, or a corpus or BEIR folder has a bad line.
    """
    path, corpus = Path(path), Path(corpus) if isinstance(corpus, str) else corpus
    job = Job(path, corpus, stem_of(path) if task is None else task, seed, negatives)
    return _opened(job, Path(cache) if cache else cache_folder())


def open_documents(path: Path) -> ExampleTable:
    """Opens plain documents (`data.files.documents`) as rows without a query, whose positive is title and text.

    Cache, bad lines and errors are as in `open_examples`.
    """
    return _opened(Job(path, None, stem_of(path), 0, 0, plain=True), cache_folder())


def _opened(job: Job, cache: Path) -> ExampleTable:
    path, stem = job.path, stem_of(job.path)
    tasks_beside(path)  # first: an error there is not one of the table
    fingerprint = fingerprint_of(job, stem)
    arrow = cache / "data" / f"{stem[:80]}-{fingerprint[:16]}.arrow"
    try:
        table = ExampleTable(path, arrow)
    except _NOT_THERE:
        with locked(arrow.with_name(f".{arrow.name}.lock")):  # one process converts, the others wait for the file
            try:
                table = ExampleTable(path, arrow)
            except _NOT_THERE as error:
                if not isinstance(error, FileNotFoundError):
                    log.warning("%s: damaged (%s), made again", arrow, error)
                convert(job, arrow, fingerprint)
                return ExampleTable(path, arrow)
    for line in table.bad_lines:
        log.warning("%s", line)
    if table.quarantined:
        log.warning("%s: %d bad lines, kept unchanged in %s", path, table.quarantined, table.quarantine)
    return table


def open_as_named(path: Path, described: Tasks | None = None) -> ExampleTable:
    """Opens training data that will be written again: a row that names no task keeps none, unless one is described.

    Tasks are described beside the data, by `described`, by the catalogue, or by the form of labelled rows, and are then
    among the table's. The one of the file's name is that of such a row.
    What such a row trains as is said where it is trained: by the recipe, or by the name that its file then has. Our own
    Parquet is read in place. Training draws single rows, which a mapped file gives thirty times as fast.
    """
    stem = stem_of(path)
    own = {**tasks_beside(path), **(described or {})}.get(stem)
    task = stem if own or find_task(stem) or _is_labelled(path) else ""
    job = Job(path, None, task, 0, 7)
    if path.exists() and not job.is_beir and are_own(files := data_files(path)):
        table = ExampleTable(path, path, OwnParquet(files, task), fingerprint_of(job, stem))
    else:
        table = open_examples(path, task=task)
    if task:
        form = form_of(table)
        table.tasks[stem] = by_form(own or find_task(stem, form) or Task(name=stem), form)
    return table


def form_of(table: ExampleTable) -> str | None:
    """Returns the form, `label` or `example`, of labelled rows that are read as they are. Other rows have none."""
    if not _is_labelled(table.path):
        return None
    return "label" if table[0].positives[0].id is None else "example"  # whose positive is a text with a class


def _is_labelled(path: Path) -> bool:
    return not (path.is_dir() and is_beir(path)) and detect_kind(path) == "labelled"


def write_examples(path: Path | str, examples: Iterable[Example], tasks: Tasks | None = None) -> int:
    """Writes `examples` as Parquet (by suffix) or JSONL (.gz compresses), whole or not at all. Returns their number.

    Those of `tasks` that the examples name are written beside it (`tasks_file`).
    """
    path = Path(path)
    used: Counter[str] = Counter()
    with whole_file(path) as part:
        write_example_rows(part, _counted(examples, used, lambda example: example.task))
        # before the rows: a run that is stopped between the two leaves no row without its task
        write_tasks(tasks_file(path), (task for name, task in (tasks or {}).items() if name in used))
    return used.total()


def _counted(items: Iterable[T], counts: Counter[str], key: Callable[[T], str]) -> Iterator[T]:
    for item in items:
        counts[key(item)] += 1
        yield item
