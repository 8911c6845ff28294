from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_index import Rounded

from embedwright.index.build import build_index
from embedwright.index.change import add
from embedwright.index.documents import Document, find_types, open_table, read_documents, take, write_documents
from embedwright.index.index import Index

ROWS = [{"id": 1, "text": "a", "n": 1, "x": 1, "s": "u", "many": [1]}, {"id": 2, "text": "b", "x": 0.5, "ok": True}]


def source(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_types_are_found_and_documents_come_back(tmp_path: Path) -> None:
    given = source(tmp_path / "c.jsonl", ROWS)
    types = find_types(given, ["all"])
    assert types == {"n": "int", "x": "float", "s": "text", "ok": "bool"}
    assert find_types(given, ["x"]) == {"x": "float"}
    read = list(read_documents(given, types))
    assert read[0] == Document("1", "", "a", {"n": 1, "x": 1.0, "s": "u", "ok": None})
    write_documents(tmp_path / "d.arrow", read, types, "digest")
    assert take(open_table([tmp_path / "d.arrow"], types), [1, 0]) == read[::-1]


def test_nan_is_a_missing_value(tmp_path: Path) -> None:
    table = pa.table({"id": ["a", "b"], "text": ["x", "y"], "v": [1.5, float("nan")]})
    pq.write_table(table, tmp_path / "c.parquet")
    out = build_index(Rounded(), tmp_path / "c.parquet", tmp_path / "i", metadata=["v"])
    (hits,) = Index.open(out).search(Rounded(), ["q"], where=["v!=9"])
    assert [hit.id for hit in hits] == ["a"]
    assert add(Rounded(), tmp_path / "c.parquet", out) == (0, 0)


def test_dates_are_texts_that_sort(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "day": pa.array([date(2020, 1, 2)])})
    pq.write_table(table, tmp_path / "c.parquet")
    types = find_types(tmp_path / "c.parquet", ["day"])
    assert next(read_documents(tmp_path / "c.parquet", types)).metadata == {"day": "2020-01-02"}


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        (ROWS, ["nn"], "no metadata column 'nn' .did you mean 'n'"),
        (ROWS, ["title"], "kept anyway"),
        (ROWS, ["many"], "it holds list"),
        ([{"text": "a", "n": 1}, {"text": "b", "n": "x"}], ["all"], "'n': it holds int and text"),
    ],
)
def test_bad_columns_are_named(tmp_path: Path, rows: list[dict[str, Any]], names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_types(source(tmp_path / "c.jsonl", rows), names)


@pytest.mark.parametrize(
    ("value", "message"), [("x", "c.jsonl:2: n: expected int, not 'x'"), (0.5, "expected int"), (2**63, "64 bits")]
)
def test_a_value_of_another_type_is_named(tmp_path: Path, value: Any, message: str) -> None:
    given = source(tmp_path / "c.jsonl", [{"text": "a", "n": 1}, {"text": "b", "n": value}])
    with pytest.raises(ValueError, match=message):
        list(read_documents(given, {"n": "int"}))
