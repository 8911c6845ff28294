"""Examples go through Arrow unchanged."""

from __future__ import annotations

from embedwright.data.schema import Example, Passage
from embedwright.data.tables.arrow import SCHEMA, batches_of, example_of


def test_examples_come_back_from_batches_as_they_were() -> None:
    bare = Example("1", "t", "q", (Passage("p"),))
    full = Example(
        "2", "t", "q", (Passage("p", "d"),), (Passage("n"), Passage("m", "e")), (0.5,), (0.1, -2.0), 3.5, "en"
    )
    batches = list(batches_of([bare, full, bare], 2))
    assert [batch.num_rows for batch in batches] == [2, 1] and all(batch.schema == SCHEMA for batch in batches)
    assert [example_of(row) for batch in batches for row in batch.to_pylist()] == [bare, full, bare]
