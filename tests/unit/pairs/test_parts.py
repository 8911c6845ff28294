"""Parts on disk: what comes back is what was made, and only what is missing is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from embedwright.data.schema import Example, Passage
from embedwright.pairs.parts import Counts, Parts

ROWS = [
    Example(
        "a", "t", "query \u2028 two\n", (Passage("p", "id"), Passage("é")), (Passage("n"),), (0.1, 1 / 3), (2e-300,)
    ),
    Example("b", "t-x", "q", (Passage("p", "class a\x1fclass b"),), score=2.5, language="en"),
]


def test_examples_and_counts_come_back_as_they_were(tmp_path: Path) -> None:
    calls = []

    def make(counts: Counts) -> Iterator[Example]:
        calls.append(1)
        yield from ROWS
        counts["examples"] = 2

    for _ in range(2):
        counts, rows = Parts(tmp_path / "parts", {"seed": 1}).part("one-0", make)
        assert (counts, list(rows)) == ({"examples": 2}, ROWS)
    assert calls == [1]
    Parts(tmp_path / "parts", {"seed": 2}).part("one-0", make)
    assert calls == [1, 1]


def test_a_part_that_fails_is_not_there(tmp_path: Path) -> None:
    def fails(counts: Counts) -> Iterator[Example]:
        yield ROWS[0]
        raise KeyboardInterrupt

    parts = Parts(tmp_path / "parts", {})
    with pytest.raises(KeyboardInterrupt):
        parts.part("one-0", fails)
    assert [path.name for path in parts.folder.iterdir()] == ["facts.json"]
    parts.remove()
    assert not parts.folder.exists()
