from __future__ import annotations

import pytest

from embedwright.data.files.columns import text_at, value_at
from embedwright.data.schema import DataError


def test_values_below_a_column_are_found() -> None:
    row = {"texts": ["a", "b"], "answers": {"text": ["x"]}, "a.b": "dotted"}
    assert [value_at(row, path) for path in ("texts.1", "answers.text.0", "a.b")] == ["b", "x", "dotted"]
    for path in ("texts.2", "texts.x", "answers.start", "absent"):
        with pytest.raises(DataError, match=f"no column '{path}'"):
            value_at(row, path)


def test_columns_are_joined_and_empty_ones_left_out() -> None:
    row = {"title": "T", "text": "x", "none": None, "empty": "", "number": 3}
    assert text_at(row, ("title", "text")) == "T x"
    assert text_at(row, ("none", "text")) == text_at(row, ("empty", "text")) == "x"
    with pytest.raises(DataError, match="none and empty is empty"):
        text_at(row, ("none", "empty"))
    with pytest.raises(DataError, match="number: expected a text"):
        text_at(row, ("title", "number"))
