"""Writes the corpus of a public set, which mining searches: all its documents, whichever rows are drawn."""

from __future__ import annotations

import itertools
import random
from collections.abc import Container, Iterator
from pathlib import Path

import pyarrow as pa

from embedwright.data.answers import id_mark, text_mark
from embedwright.data.files.beir import document_text
from embedwright.data.files.columns import value_at
from embedwright.data.files.rows import Rows
from embedwright.data.schema import DataError, id_of
from embedwright.data.sources.catalog import BeirRows, EvidenceRows
from embedwright.data.sources.convert import Job, OpenTable, corpus_of, row_of, table_of
from embedwright.data.tables.arrow import write_rows
from embedwright.data.tables.documents import write_documents
from embedwright.files import whole_file

SCHEMA = pa.schema({"_id": pa.large_string(), "text": pa.large_string()})
FIRST = 1000  # documents that a cut corpus has, however small the share

Documents = Iterator[tuple[str, str]]  # id and text


def write_corpus(
    path: Path, job: Job, open_table: OpenTable, *, share: float = 1.0, answers: Container[int] = ()
) -> int:
    """Writes rows {"_id", "text"} (.jsonl, .jsonl.gz or .parquet), whole or not at all. Returns their number.

    As .arrow it is what `open_corpus` reads in place: mining then makes no copy of it.

    A set with a corpus gives its documents that have text. Any other gives the passages of all its rows, each text
    once, under their ids, else under the id of the first row (`nq:17`, and `nq:17#2` for a second text of it).
    A `share` below 1 keeps the first FIRST documents, those whose `text_mark` is in `answers`, and that share of the
    others, which `job.seed` draws. Memory: one row; of a set without a corpus also 200 bytes for each different text.
    """
    table = corpus_of(job.entry)
    documents = _of_rows(job, open_table) if table is None else _of_table(open_table(table))
    rng = random.Random(f"{job.seed}:corpus")
    kept = (
        (id, text)
        for number, (id, text) in enumerate(documents)
        if share >= 1 or rng.random() < share or number < FIRST or text_mark(text) in answers
    )
    with whole_file(path) as part:
        if path.suffix == ".arrow":
            return write_documents(part, kept)
        return write_rows(part, ({"_id": id, "text": text} for id, text in kept), SCHEMA)


def _of_table(rows: Rows) -> Documents:
    for number, _, row in rows:
        with row_of("corpus", number, row) as sound:
            document, text = id_of(value_at(sound, "_id"), "_id"), document_text(sound)
        if text:
            yield document, text


def _of_rows(job: Job, open_table: OpenTable) -> Documents:
    spec = job.entry.rows
    assert not isinstance(spec, BeirRows | EvidenceRows)
    texts, ids = set[int](), set[int]()
    for number, _, row in open_table(table_of(job.entry)):
        if isinstance(row, DataError):
            continue
        try:
            fields = spec.fields(row, f"{job.entry.name}:{number}")
        except DataError:  # the conversion has put it into quarantine
            continue
        for passage in spec.documents(fields):
            if (mark := text_mark(passage.text)) in texts:
                continue
            texts.add(mark)
            own = passage.id or fields["id"]
            names = itertools.chain([own], (f"{own}#{n}" for n in itertools.count(2)))
            name = next(name for name in names if id_mark("", name) not in ids)
            ids.add(id_mark("", name))
            yield name, passage.text
