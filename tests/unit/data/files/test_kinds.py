from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedwright.data.clean.leaks import read_eval_texts
from embedwright.data.files import kinds
from embedwright.data.files.kinds import Kind, detect_kind, parse_fields
from embedwright.data.files.rows import read_rows
from embedwright.data.schema import DataError, Passage


def dump(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "misleading.parquet"])
def test_the_container_is_told_by_its_bytes(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = [{"query": "q1", "positive": "p1"}, {"query": "q2", "positive": "p2"}]
    text = b"".join(dump(row) + b"\n" for row in rows)
    if name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert [(number, row) for number, _, row in read_rows(path)] == list(enumerate(rows, start=1))
    assert detect_kind(path) == "pairs"


KINDS = {
    "example": {"query": "q", "positives": ["p"], "score": 3.0, "id": "a"},
    "pairs": {"query": "q", "positive": "p", "id": "a"},
    "labelled": {"text": "t", "label": "l"},
    "scored": {"text1": "a", "text2": "b", "score": 1},
    "pair-labelled": {"text1": "a", "text2": "b", "label": 1},
}


def test_every_kind_is_tried_here() -> None:
    assert KINDS.keys() == set(get_args(Kind)) == kinds.KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_told_by_the_keys_after_bad_lines(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.labeled.pairs.jsonl"
    path.write_bytes(
        b'nonsense\n{"text": "no label"}\n{"querry": "q", "positives": ["p"]}\n' + dump(KINDS[kind]) + b"\n"
    )
    assert detect_kind(path) == kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_of_every_kind_are_looked_for_as_leaks(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(dump(KINDS[kind]) + b"\n")
    found = [eval_text.text for eval_text in read_eval_texts([path])]
    assert found and all(isinstance(text, str) for text in found)


def test_a_file_without_a_good_row_names_the_first_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"querry": "q", "positives": ["p"]}\n[]\n')
    with pytest.raises(DataError, match=r"x\.jsonl: no good row \(line 1: unknown key 'querry', did you mean 'query'"):
        detect_kind(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="it is empty"):
        detect_kind(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        next(read_rows(tmp_path / "absent.jsonl"))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("scored", {"score": 5.5}, "score 5.5 is not on the scale"),
        ("scored", {"score": "4"}, "score: expected a number"),
        ("scored", {"score": None}, "no score"),
        ("pair-labelled", {"label": 2}, "label: expected 0 or 1"),
        ("pair-labelled", {"label": "1"}, "label: expected 0 or 1"),
        ("labelled", {"label": 1.5}, "label: 1.5 names no class"),
        ("labelled", {"text": " "}, "text is empty"),
        ("pairs", {"negatives": ["n"]}, "unknown key 'negatives'"),
    ],
)
def test_a_bad_value_of_a_raw_kind(kind: Kind, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_fields(kind, KINDS[kind] | change, "f:1")


def test_raw_values_come_checked_and_with_an_id() -> None:
    assert parse_fields("labelled", {"text": "t", "label": 3}, "f:1") == {"id": "f:1", "text": "t", "labels": ["3"]}
    row = {"query": "q", "positive": "p", "id": 5, "positive_id": "d1"}
    expected = {"id": "5", "query": "q", "positives": [Passage("p", "d1")], "negatives": []}
    assert parse_fields("pairs", row, "f:1") == expected


def test_a_parquet_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": texts, "label": ["x", "y", "z"]}), path)
    rows = [row for _, _, row in read_rows(path)]
    assert isinstance(rows[1], DataError) and "UTF-8" in str(rows[1])
    assert [rows[0], rows[2]] == [{"text": "good", "label": "x"}, {"text": "fine", "label": "z"}]


def test_a_cut_off_gzip_or_parquet_file_is_an_error_and_not_a_short_file(tmp_path: Path) -> None:
    rng = random.Random(0)
    zipped = gzip.compress(b"".join(dump({"text": str(rng.random()), "label": "x"}) + b"\n" for _ in range(1000)))
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(zipped[: len(zipped) // 2])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz:\d+: broken gzip stream"):
        list(read_rows(path))
    table = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a"]}), table)
    table.write_bytes(table.read_bytes()[:-6])
    with pytest.raises(DataError, match="broken Parquet file"):
        list(read_rows(table))
