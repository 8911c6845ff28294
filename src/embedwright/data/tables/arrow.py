"""Examples as batches of Arrow: the columns of their files. Writes rows of any columns as Parquet or JSON Lines."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedwright.data.schema import Example, Passage, to_row

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
MARK = {b"embedwright": b"examples 1"}  # in Parquet files of examples: they are known by it (`own`)
BATCH_ROWS = 256  # rows of a batch, and of a row group: so many are read to get one


def batches_of(examples: Iterable[Example], size: int) -> Iterator[pa.RecordBatch]:
    """Yields the examples as batches of `size` rows; the last may have fewer."""
    return _batches(map(_record, examples), SCHEMA, size)


def _batches(rows: Iterable[Mapping[str, Any]], schema: pa.Schema, size: int) -> Iterator[pa.RecordBatch]:
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, size)):
        yield pa.RecordBatch.from_pylist(chunk, schema=schema)


def rebatched(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """Yields the rows of these batches as batches of `size` rows; the last may have fewer."""
    rest: list[pa.RecordBatch] = []
    for batch in batches:
        while batch.num_rows >= (lacking := size - sum(part.num_rows for part in rest)):
            yield pa.concat_batches([*rest, batch.slice(0, lacking)])
            rest, batch = [], batch.slice(lacking)
        rest += [batch] if batch.num_rows else []
    if rest:
        yield pa.concat_batches(rest)


def write_example_rows(path: Path, examples: Iterable[Example]) -> int:
    """Writes examples as `write_rows` does; in JSON Lines, without the keys that are not set."""
    rows = map(_record if path.suffix == ".parquet" else to_row, examples)
    return write_rows(path, rows, SCHEMA.with_metadata(MARK), BATCH_ROWS)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema, group: int = 4096) -> int:
    """Writes rows as Parquet of this schema, or as JSON Lines (.gz compresses), by the suffix of `path`.

    Returns their number. `group`: rows of a row group of Parquet.
    """
    written = 0
    if path.suffix == ".parquet":
        # without statistics, which would repeat texts at the end of the file
        with pq.ParquetWriter(path, schema, write_statistics=False) as writer:
            for batch in _batches(rows, schema, group):
                writer.write_batch(batch)
                written += batch.num_rows
        return written
    with ExitStack() as stack:
        out: Any = stack.enter_context(path.open("wb"))
        if path.suffix == ".gz":  # no name and no time in its header: the same rows give the same bytes
            out = stack.enter_context(gzip.GzipFile("", "wb", fileobj=out, mtime=0))
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            written += 1
    return written


def _record(example: Example) -> dict[str, Any]:
    record = {key: getattr(example, key) for key in SCHEMA.names}
    for key in ("positives", "negatives"):
        record[key] = [{"text": passage.text, "id": passage.id} for passage in record[key]]
    return record


def example_of(row: Mapping[str, Any]) -> Example:
    """Returns the example that a row of such a batch holds, as `to_pylist` gives it."""
    values = dict(row)
    for key in ("positives", "negatives"):
        values[key] = tuple(Passage(**passage) for passage in values[key])
    for key in ("positive_scores", "negative_scores"):
        values[key] = None if values.get(key) is None else tuple(values[key])
    return Example(**values)
