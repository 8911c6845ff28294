"""Converts any training data, or plain documents, to rows of `Example` in an Arrow file, which `table` opens.

Pairs, scored pairs and examples are converted row by row. Labelled and pair-labelled rows are held in memory while they
are converted: a negative may come from any line of the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from embedwright.data.files.beir import beir_files, beir_splits, read_beir, read_corpus
from embedwright.data.files.class_names import class_names
from embedwright.data.files.columns import Row
from embedwright.data.files.conversion import Conversion
from embedwright.data.files.documents import COLUMNS, document_files, read_documents
from embedwright.data.files.folders import data_files, is_beir, stem_of
from embedwright.data.files.kinds import KINDS, ROW_BY_ROW, detect_kind, parse_fields
from embedwright.data.files.pieces import Piece, pieces_of, unchanged
from embedwright.data.files.quarantine import Quarantine, good_rows
from embedwright.data.labels import LabelRules
from embedwright.data.schema import DataError, Example, Passage, parse_example
from embedwright.data.tables.arrow import BATCH_ROWS, SCHEMA, batches_of, rebatched
from embedwright.data.tables.documents import DocumentTable
from embedwright.data.tables.workers import Facts, in_processes
from embedwright.files import scratch_folder, sha256_of, whole_file

log = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = 3  # part of the cache key: raise it when a conversion or the schema changes


@dataclass(frozen=True, slots=True)
class Job:
    """Holds what decides the rows of a table."""

    path: Path
    corpus: Path | DocumentTable | None
    task: str
    seed: int
    negatives: int
    plain: bool = False  # documents, not examples

    @property
    def is_beir(self) -> bool:
        return self.path.is_dir() and is_beir(self.path)

    @property
    def split(self) -> str | None:
        """Returns `train` if the BEIR folder has that split, which training reads."""
        return "train" if "train" in beir_splits(self.path) else None


def fingerprint_of(job: Job, stem: str) -> str:
    """Returns the SHA-256 (hex) of all that decides the rows: content, names that ids are made of, and settings."""
    if job.plain:
        found = {str(file.relative_to(job.path)): sha256_of(file) for file in document_files(job.path)}
        return hashlib.sha256(json.dumps([FORMAT, stem, found]).encode()).hexdigest()
    files = [
        *(beir_files(job.path, job.split) if job.is_beir else data_files(job.path)),
        *(data_files(job.corpus) if isinstance(job.corpus, Path) else []),
    ]
    digests = [sha256_of(file) for file in files]
    if isinstance(job.corpus, DocumentTable):
        digests.append(job.corpus.identity)
    names = [stem_of(file) for file in files] if job.path.is_dir() else []  # ids of rows are made of them
    words = None if job.is_beir else class_names(job.path, "label")  # may stand beside the files
    parts = [FORMAT, stem, job.task, job.seed, job.negatives, job.corpus is not None, digests, names, words]
    if not job.is_beir and detect_kind(job.path) == "scored":
        parts.append("all pairs")  # older versions left out pairs below the threshold
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def quarantine_file(arrow: Path) -> Path:
    """Returns where the bad lines of a table are kept."""
    return arrow.with_suffix(".quarantine.jsonl")


def convert(job: Job, arrow: Path, fingerprint: str) -> None:
    """Writes the Arrow file of `job`. Its last batch has no rows and carries the report, which is known at the end."""
    report: Counter[str] = Counter(rows=0)
    with whole_file(arrow) as part:
        with (
            Quarantine(job.path, quarantine_file(arrow)) as quarantine,
            pa.ipc.new_file(str(part), SCHEMA) as writer,
        ):
            try:
                for batch in _batches(job, quarantine, report, arrow):
                    writer.write_batch(batch)
                    report["examples"] += batch.num_rows
            except DataError as error:
                raise error if str(job.path) in str(error) else DataError(f"{job.path}: {error}") from None
            report["quarantined"] = quarantine.count
            counts = {key: n for key, n in report.items() if n or key in ("rows", "examples", "quarantined")}
            meta = {"fingerprint": fingerprint, "report": counts, "bad_lines": quarantine.reasons}
            empty = pa.RecordBatch.from_pylist([], schema=SCHEMA)
            writer.write_batch(empty, custom_metadata={"embedwright": json.dumps(meta)})
        if not report["examples"]:
            raise DataError(f"{job.path}: no example ({[*quarantine.reasons, counts][0]})")
    log.info("%s: %s", job.path, ", ".join(f"{key} {n}" for key, n in counts.items()))


def _batches(job: Job, quarantine: Quarantine, report: Counter[str], arrow: Path) -> Iterator[pa.RecordBatch]:
    """Yields the batches of `job`. Large data whose rows stand alone is converted by all cores."""
    files = [] if job.plain or job.is_beir else data_files(job.path)
    alone = files and not job.corpus and detect_kind(job.path) in ROW_BY_ROW
    if not (pieces := pieces_of(files) if alone else []):
        with unchanged(files):
            yield from batches_of(_examples(job, map(Piece, files), quarantine, report), BATCH_ROWS)
        return

    def made(folder: Path) -> Iterator[pa.RecordBatch]:
        for facts, file, batches in in_processes(convert_piece, pieces, asdict(job), folder):
            report.update(facts["report"])
            quarantine.extend(quarantine_file(file), facts["quarantined"], facts["reasons"])
            yield from batches

    with scratch_folder(arrow) as folder, unchanged(files):
        yield from rebatched(made(folder), BATCH_ROWS)


def convert_piece(piece: Piece, job: Facts, out: Path) -> Facts:
    """Writes the examples of a piece of a `Job`, and its bad lines beside them. Returns the counts."""
    report = Counter(rows=0)
    with Quarantine(piece.file, quarantine_file(out)) as quarantine, pa.ipc.new_file(str(out), SCHEMA) as writer:
        examples = _examples(Job(**{**job, "path": Path(job["path"])}), [piece], quarantine, report)
        for batch in batches_of(examples, BATCH_ROWS):
            writer.write_batch(batch)
    return {"report": report, "quarantined": quarantine.count, "reasons": quarantine.reasons}


def _examples(job: Job, pieces: Iterable[Piece], quarantine: Quarantine, report: Counter[str]) -> Iterator[Example]:
    conversion = Conversion(task=job.task, seed=job.seed, labels=LabelRules(negatives=job.negatives), report=report)
    if job.plain:
        for document in read_documents(job.path, COLUMNS, quarantine.add):
            report["rows"] += 1
            yield Example(document.id, job.task, "", (Passage(document.whole),))
        return
    if job.is_beir:
        beir = read_beir(job.path, job.split)
        report["rows"] = len(beir.qrels)
        relevant = {query: [d for d, score in judged.items() if score > 0] for query, judged in beir.qrels.items()}
        yield from conversion.judged(relevant, beir.queries, beir.corpus)
        return
    kind = detect_kind(job.path)
    spec = KINDS[kind].rows
    if spec is None:
        corpus = None
        if job.corpus is not None:
            corpus = read_corpus(job.corpus) if isinstance(job.corpus, Path) else dict(job.corpus.items())

        def parse_as_example(row: Row, row_id: str) -> Example:
            return parse_example(row, default_task=job.task, default_id=row_id, corpus=corpus)

        yield from _parsed(pieces, parse_as_example, quarantine, report)
    else:
        conversion.names["label"] = class_names(job.path, "label") or {}
        yield from spec.examples(_parsed(pieces, partial(parse_fields, kind), quarantine, report), conversion)


def _parsed(
    pieces: Iterable[Piece], parse: Callable[[Row, str], T], quarantine: Quarantine, report: Counter[str]
) -> Iterator[T]:
    """Yields `parse(row, an id for a row that has none)` of the good rows, and counts them."""
    for piece in pieces:
        for value in good_rows(piece.rows(), parse, stem_of(piece.file), quarantine, piece.file):
            report["rows"] += 1
            yield value
