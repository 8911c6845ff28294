"""`ExampleTable`: any training data, converted once to rows of `Example` in an Arrow file, then memory-mapped.

Pairs, scored pairs and examples are converted row by row. Labelled and pair-labelled rows are held in memory while they
are converted: a negative may come from any line of the file.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import logging
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedwright.data.files.class_names import class_names
from embedwright.data.files.folders import data_files, is_beir, stem_of
from embedwright.data.files.kinds import (
    Kind,
    Quarantine,
    aside,
    beir_files,
    detect_kind,
    good_rows,
    parse_fields,
    read_beir,
    read_corpus,
)
from embedwright.data.files.tasks import Tasks, tasks_beside, tasks_file, write_tasks
from embedwright.data.labels import label_triples
from embedwright.data.schema import DataError, Example, Passage, parse_example, to_row
from embedwright.files import whole_file

log = logging.getLogger(__name__)
T = TypeVar("T")
Fields = dict[str, Any]  # the values of a row of a raw kind, checked by parse_fields

FORMAT = 2  # part of the cache key: raise it when a conversion or the schema changes
BATCH_ROWS = 256  # every batch of the file but the last has so many: row i is in batch i // BATCH_ROWS

_PASSAGES = pa.list_(pa.struct([("text", pa.large_string()), ("id", pa.large_string())]))
SCHEMA = pa.schema(
    {
        "id": pa.large_string(),
        "task": pa.large_string(),
        "query": pa.large_string(),
        "positives": _PASSAGES,
        "negatives": _PASSAGES,
        "positive_scores": pa.list_(pa.float64()),
        "negative_scores": pa.list_(pa.float64()),
        "score": pa.float64(),
        "language": pa.large_string(),
    }
)


class ExampleTable:
    """The examples of one data set, memory-mapped: `len`, `[i]`, iteration.

    `fingerprint`: SHA-256 (hex) of content, task, seed and format, so equal fingerprints mean equal rows.
    `tasks`: those that the file beside it describes, by name.
    `report`: rows read, examples made, and what was left out, by reason.
    `quarantine`: the file of the bad lines, where their number, `quarantined`, is not 0; `bad_lines` has the first few.
    """

    def __init__(self, path: Path, arrow: Path) -> None:
        self.path, self.arrow = path, arrow
        self.tasks = tasks_beside(path)
        self._reader = pa.ipc.open_file(pa.memory_map(str(arrow)))
        self._stream = pa.ipc.open_file(pa.OSFile(str(arrow)))  # not mapped: pages read once would count as memory
        meta = json.loads(self._reader.schema.metadata[b"embedwright"])
        self.fingerprint: str = meta["fingerprint"]
        self.report: dict[str, int] = meta["report"]
        self.quarantined = self.report["quarantined"]
        self.bad_lines: list[str] = meta.get("bad_lines", [])
        self.quarantine = _quarantine_path(arrow)

    def __len__(self) -> int:
        return self.report["examples"]

    def __getitem__(self, index: SupportsIndex) -> Example:
        i = operator.index(index)
        i += len(self) if i < 0 else 0
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: row {operator.index(index)} of {len(self)}")
        batch = self._reader.get_batch(i // BATCH_ROWS)
        return _example(batch.slice(i % BATCH_ROWS, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Example]:
        for i in range(self._stream.num_record_batches):
            yield from map(_example, self._stream.get_batch(i).to_pylist())

    def without_negatives(self) -> Iterator[Example]:
        """The examples with their id, task, query and positives alone; the other columns are not read."""
        for i in range(self._stream.num_record_batches):
            batch = self._stream.get_batch(i).select(["id", "task", "query", "positives"])
            yield from (_example(row | {"negatives": ()}) for row in batch.to_pylist())

    def rows_by_task(self) -> dict[str, NDArray[np.int64]]:
        """Task name -> its row numbers, ascending; tasks in the order of their first row."""
        batches = (self._reader.get_batch(i) for i in range(self._reader.num_record_batches))
        tasks = pa.chunked_array([batch.column("task") for batch in batches]).combine_chunks().dictionary_encode()
        codes = tasks.indices.to_numpy()
        order = np.argsort(codes, kind="stable").astype(np.int64)
        ends = np.cumsum(np.bincount(codes, minlength=len(tasks.dictionary)))
        return dict(zip(tasks.dictionary.to_pylist(), np.split(order, ends[:-1]), strict=True))

    def negatives_per_row(self) -> NDArray[np.int64]:
        """int64 (rows,): how many negatives each example brings."""
        batches = (self._reader.get_batch(i) for i in range(self._reader.num_record_batches))
        counts = [pc.list_value_length(batch.column("negatives")).fill_null(0) for batch in batches]
        return np.concatenate([count.to_numpy(zero_copy_only=False) for count in counts]).astype(np.int64)


def open_examples(
    path: Path | str,
    *,
    task: str | None = None,
    corpus: Path | str | None = None,
    cache: Path | str | None = None,
    seed: int = 0,
    negatives: int = 7,
) -> ExampleTable:
    """The training data at `path`: a data file of any kind of design section 9, a folder of such, or a BEIR folder.

    The formats are those of `files.rows`; of a folder with several splits it reads `train` (`files.folders`).

    Converted once into `<cache>/data` (default: $EMBEDWRIGHT_CACHE, else ~/.cache/embedwright), keyed by content.
    `task` is that of rows that name none (default: the file's name; an empty text leaves them without one). `corpus`
    has the texts of documents given by id. `seed` and `negatives` are for examples made from labels. Bad lines
    are logged, counted and kept in `quarantine`. Raises FileNotFoundError, and DataError where no example comes out, or
    a corpus or BEIR folder has a bad line.
    """
    path, corpus = Path(path), None if corpus is None else Path(corpus)
    stem = stem_of(path)
    job = _Job(path, corpus, stem, stem if task is None else task, seed, negatives, _split(path))
    fingerprint = _fingerprint(job)
    folder = Path(cache or os.environ.get("EMBEDWRIGHT_CACHE") or Path.home() / ".cache" / "embedwright") / "data"
    arrow = folder / f"{stem[:80]}-{fingerprint[:16]}.arrow"
    table = _open(path, arrow)
    if table is None:
        folder.mkdir(parents=True, exist_ok=True)
        _convert(job, arrow, fingerprint)
        return ExampleTable(path, arrow)
    for line in table.bad_lines:
        log.warning("%s", line)
    if table.quarantined:
        log.warning("%s: %d bad lines, kept unchanged in %s", path, table.quarantined, table.quarantine)
    return table


def open_as_named(path: Path) -> ExampleTable:
    """The training data at `path`, to be written again: a row that names no task, and has none described, has none.

    What it trains as is said where it is trained: by the recipe, or by the name that its file then has.
    """
    stem = stem_of(path)
    return open_examples(path, task=stem if stem in tasks_beside(path) else "")


def write_examples(path: Path | str, examples: Iterable[Example], tasks: Tasks | None = None) -> int:
    """Write `examples` as Parquet (by suffix) or JSONL (.gz compresses), whole or not at all. Returns their number.

    Those of `tasks` that the examples name are written beside it (`tasks_file`).
    """
    path = Path(path)
    used: set[str] = set()
    with whole_file(path) as part:
        count = _write(part, _noting(examples, used))
        # before the rows: a run that is stopped between the two leaves no row without its task
        write_tasks(tasks_file(path), (task for name, task in (tasks or {}).items() if name in used))
    return count


def _noting(examples: Iterable[Example], used: set[str]) -> Iterator[Example]:
    for example in examples:
        used.add(example.task)
        yield example


def _write(path: Path, examples: Iterable[Example]) -> int:
    count = 0
    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, SCHEMA) as writer:
            for batch in _batches(examples, 4096):
                writer.write_batch(batch)
                count += batch.num_rows
        return count
    with path.open("wb") as file:
        # No name and no time in the gzip header: the same examples give the same bytes.
        zipped = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if path.suffix == ".gz" else None
        for example in examples:
            line = json.dumps(to_row(example), ensure_ascii=False, allow_nan=False)
            (zipped or file).write(line.encode() + b"\n")
            count += 1
        if zipped is not None:
            zipped.close()
    return count


# ---------------------------------------------------------------------------------------------------- conversion


@dataclass(frozen=True, slots=True)
class _Job:
    """What decides the rows of a table."""

    path: Path
    corpus: Path | None
    stem: str
    task: str
    seed: int
    negatives: int
    split: str | None  # of a BEIR folder


def _split(path: Path) -> str | None:
    """Training reads the train split of a BEIR folder that has several."""
    return "train" if any((path / "qrels" / f"train.tsv{end}").is_file() for end in ("", ".gz")) else None


def _fingerprint(job: _Job) -> str:
    files = [
        *(beir_files(job.path, job.split) if _is_beir(job.path) else data_files(job.path)),
        *(data_files(job.corpus) if job.corpus else []),
    ]
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    names = [stem_of(file) for file in files] if job.path.is_dir() else []  # ids of rows are made of them
    words = None if _is_beir(job.path) else class_names(job.path, "label")  # may stand beside the files
    parts = [FORMAT, job.stem, job.task, job.seed, job.negatives, job.corpus is not None, digests, names, words]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _quarantine_path(arrow: Path) -> Path:
    return arrow.with_suffix(".quarantine.jsonl")


def _open(path: Path, arrow: Path) -> ExampleTable | None:
    """The table in the cache, or None where it is not there or is damaged."""
    try:
        return ExampleTable(path, arrow)
    except FileNotFoundError:
        return None
    except (pa.ArrowInvalid, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: damaged (%s), made again", arrow, error)
        return None


def _convert(job: _Job, arrow: Path, fingerprint: str) -> None:
    """Write the Arrow file of `job`."""
    rows, final = aside(arrow), aside(arrow)  # two, as the report is known at the end and stands at the start of a file
    report: Counter[str] = Counter(rows=0)
    try:
        with Quarantine(job.path, _quarantine_path(arrow)) as quarantine, pa.ipc.new_file(rows, SCHEMA) as writer:
            for batch in _batches(_examples(job, quarantine, report), BATCH_ROWS):
                writer.write_batch(batch)
                report["examples"] += batch.num_rows
        report["quarantined"] = quarantine.count
        counts = {key: n for key, n in report.items() if n or key in ("rows", "examples", "quarantined")}
        if not report["examples"]:
            raise DataError(f"{job.path}: no example ({quarantine.first_reason or counts})")
        meta = json.dumps({"fingerprint": fingerprint, "report": counts, "bad_lines": quarantine.reasons})
        schema = SCHEMA.with_metadata({"embedwright": meta})
        with (
            pa.OSFile(str(rows)) as source,  # not mapped: its pages would count as this process's memory
            pa.OSFile(str(final), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            reader = pa.ipc.open_file(source)
            for i in range(reader.num_record_batches):
                writer.write_batch(reader.get_batch(i).replace_schema_metadata(schema.metadata))
        final.replace(arrow)
    finally:
        rows.unlink(missing_ok=True)
        final.unlink(missing_ok=True)
    log.info("%s: %s", job.path, ", ".join(f"{key} {n}" for key, n in counts.items()))


def _examples(job: _Job, quarantine: Quarantine, report: Counter[str]) -> Iterator[Example]:
    if _is_beir(job.path):
        yield from _from_beir(job, report)
        return
    kind, files = detect_kind(job.path), data_files(job.path)
    if kind == "example":
        corpus = None if job.corpus is None else read_corpus(job.corpus)

        def parse(id_: str, row: Fields) -> Example:
            return parse_example(row, default_task=job.task, default_id=id_, corpus=corpus)

        yield from _counted(_parsed(files, parse, quarantine), report)
        return
    fields = _parsed(files, lambda id_, row: parse_fields(row, kind, default_id=id_), quarantine)
    yield from _from_raw(kind, _counted(fields, report), job, report)


def _parsed(files: Iterable[Path], parse: Callable[[str, Fields], T], quarantine: Quarantine) -> Iterator[T]:
    """`parse(an id for a row that has none, row)` of the good rows."""
    for file in files:
        yield from good_rows(file, partial(_with_id, parse, stem_of(file)), quarantine)


def _with_id(parse: Callable[[str, Fields], T], stem: str, number: int, row: Fields) -> T:
    return parse(f"{stem}:{number}", row)


def _is_beir(path: Path) -> bool:
    return path.is_dir() and is_beir(path)


def _counted(rows: Iterable[T], report: Counter[str]) -> Iterator[T]:
    for row in rows:
        report["rows"] += 1
        yield row


def _from_raw(kind: Kind, rows: Iterator[Fields], job: _Job, report: Counter[str]) -> Iterator[Example]:
    if kind == "pairs":
        for row in rows:
            yield Example(row["id"], job.task, row["query"], (Passage(row["positive"], row.get("positive_id")),))
    elif kind == "scored":
        yield from _from_scored(rows, job.task, report)
    elif kind == "pair-labelled":
        yield from _from_pair_labelled(rows, job.task, report)
    else:
        labelled = [(row["id"], row["text"], row["label"]) for row in rows]
        ids, texts = [id for id, _, _ in labelled], [(text, label) for _, text, label in labelled]
        try:
            words = class_names(job.path, "label")
            words = words if words and words.keys() >= {label for _, label in texts} else None
            examples, skipped = label_triples(
                texts, task=job.task, negatives=job.negatives, seed=job.seed, ids=ids, words=words
            )
        except DataError as error:
            raise DataError(f"{job.path}: {error}") from None
        report.update(skipped)
        yield from examples


def _from_scored(rows: Iterable[Fields], task: str, report: Counter[str]) -> Iterator[Example]:
    """Score >= 4 of 5: both directions (NV-Embed, section 3.3)."""
    for row in rows:
        if row["score"] < 4:
            report["score_below_4"] += 1
            continue
        for end, query, positive in (("ab", row["text1"], row["text2"]), ("ba", row["text2"], row["text1"])):
            yield Example(f"{row['id']}:{end}", task, query, (Passage(positive),), score=row["score"])


def _from_pair_labelled(rows: Iterable[Fields], task: str, report: Counter[str]) -> Iterator[Example]:
    """One example for each text1 with a label-1 pair, all its positives in it: so none of them becomes its negative."""
    groups: dict[str, tuple[list[str], dict[str, None], dict[str, None]]] = {}  # text1 -> ids, positives, negatives
    for row in rows:
        ids, *partners = groups.setdefault(row["text1"], ([], {}, {}))
        ids.append(row["id"])
        partners[1 - row["label"]][row["text2"]] = None
    for query, (ids, positives, negatives) in groups.items():
        if not positives:
            report["no_positive_partner"] += len(ids)
            continue
        wrong = [text for text in negatives if text not in positives]
        report["conflicting"] += len(negatives) - len(wrong)
        yield Example(ids[0], task, query, tuple(map(Passage, positives)), tuple(map(Passage, wrong)))


def _from_beir(job: _Job, report: Counter[str]) -> Iterator[Example]:
    beir = read_beir(job.path, job.split)
    for query, judged in _counted(beir.qrels.items(), report):
        relevant = [document for document, score in judged.items() if score > 0]
        positives = tuple(Passage(beir.corpus[document], document) for document in relevant if beir.corpus[document])
        report["empty_positive"] += len(relevant) - len(positives)
        if not positives or not beir.queries[query]:
            report["no_positive"] += 1
            continue
        yield Example(query, job.task, beir.queries[query], positives)


# ---------------------------------------------------------------------------------------------------- Arrow


def _batches(examples: Iterable[Example], size: int) -> Iterator[pa.RecordBatch]:
    rows = iter(examples)
    while chunk := list(itertools.islice(rows, size)):
        yield pa.RecordBatch.from_pylist([_record(example) for example in chunk], schema=SCHEMA)


def _record(example: Example) -> dict[str, Any]:
    record = {key: getattr(example, key) for key in SCHEMA.names}
    for key in ("positives", "negatives"):
        record[key] = [{"text": passage.text, "id": passage.id} for passage in record[key]]
    return record


def _example(row: Mapping[str, Any]) -> Example:
    values = dict(row)
    for key in ("positives", "negatives"):
        values[key] = tuple(Passage(**passage) for passage in values[key])
    for key in ("positive_scores", "negative_scores"):
        values[key] = None if values.get(key) is None else tuple(values[key])
    return Example(**values)
