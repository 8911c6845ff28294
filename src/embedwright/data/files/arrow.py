"""Examples as batches of Arrow: the columns of their files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from embedwright.data.schema import Example, Passage

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


def batches_of(examples: Iterable[Example], size: int) -> Iterator[pa.RecordBatch]:
    """Yields the examples as batches of `size` rows; the last may have fewer."""
    rows = iter(examples)
    while chunk := list(itertools.islice(rows, size)):
        yield pa.RecordBatch.from_pylist([_record(example) for example in chunk], schema=SCHEMA)


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
