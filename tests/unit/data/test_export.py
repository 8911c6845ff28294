from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from embedwright.data.export import export, to_columns
from embedwright.data.schema import DataError, Example, Passage
from embedwright.data.tables.table import write_examples


def example(i: int, positives: int, negatives: int, task: str = "t") -> Example:
    wrong = tuple(Passage(f"n{i}.{k}") for k in range(negatives))
    return Example(f"e{i}", task, f"q{i} 漢字", tuple(Passage(f"p{i}.{k}") for k in range(positives)), wrong)


EXAMPLES = [example(0, 1, 3), example(1, 2, 2), example(2, 1, 4)]


def columns(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def test_negatives_are_cut_to_what_every_example_has(tmp_path: Path) -> None:
    write_examples(tmp_path / "x.jsonl", EXAMPLES)
    counts = export(tmp_path / "x.jsonl", tmp_path / "out.parquet")
    assert counts == {"examples": 3, "rows": 4, "fewer_negatives": 0, "more_positives": 1, "negatives_cut": 3}
    assert pq.read_schema(tmp_path / "out.parquet").names == ["anchor", "positive", "negative_1", "negative_2"]
    assert columns(tmp_path / "out.parquet") == [
        {"anchor": "q0 漢字", "positive": "p0.0", "negative_1": "n0.0", "negative_2": "n0.1"},
        {"anchor": "q1 漢字", "positive": "p1.0", "negative_1": "n1.0", "negative_2": "n1.1"},
        {"anchor": "q1 漢字", "positive": "p1.1", "negative_1": "n1.0", "negative_2": "n1.1"},
        {"anchor": "q2 漢字", "positive": "p2.0", "negative_1": "n2.0", "negative_2": "n2.1"},
    ]


def test_examples_with_fewer_negatives_than_asked_for_are_left_out_and_counted() -> None:
    report: Counter[str] = Counter()
    rows = list(to_columns(EXAMPLES, 3, report))
    assert [row["anchor"] for row in rows] == ["q0 漢字", "q2 漢字"]
    assert report == Counter(examples=3, rows=2, fewer_negatives=1, negatives_cut=1)


def test_scored_pairs_without_a_positive_are_left_out_and_counted(tmp_path: Path) -> None:
    low = Example("low", "t", "q", (), (Passage("n"),), score=1.0)
    write_examples(tmp_path / "x.jsonl", [low, *EXAMPLES])
    counts = export(tmp_path / "x.jsonl", tmp_path / "out.parquet")
    assert (counts["examples"], counts["rows"], counts["below_threshold"], counts["negatives_cut"]) == (4, 4, 1, 3)
    assert "q" not in {row["anchor"] for row in columns(tmp_path / "out.parquet")}
    write_examples(tmp_path / "low.jsonl", [low])
    with pytest.raises(DataError, match="no scored pair reaches the threshold"):
        export(tmp_path / "low.jsonl", tmp_path / "out.parquet")


def test_no_negatives_give_pairs(tmp_path: Path) -> None:
    write_examples(tmp_path / "x.jsonl", [example(0, 1, 0), example(1, 1, 2)])
    counts = export(tmp_path / "x.jsonl", tmp_path / "out.parquet")
    assert counts["negatives_cut"] == 2
    assert columns(tmp_path / "out.parquet")[1] == {"anchor": "q1 漢字", "positive": "p1.0"}


def test_one_task_of_several(tmp_path: Path) -> None:
    write_examples(tmp_path / "x.jsonl", [example(0, 1, 1, "a"), example(1, 1, 3, "b"), example(2, 1, 2, "b")])
    counts = export(tmp_path / "x.jsonl", tmp_path / "out.parquet", task="b")
    assert (counts["examples"], counts["rows"], counts["negatives_cut"]) == (2, 2, 1)
    assert [row["negative_2"] for row in columns(tmp_path / "out.parquet")] == ["n1.1", "n2.1"]
    with pytest.raises(DataError, match="no task 'c'; it has a, b"):
        export(tmp_path / "x.jsonl", tmp_path / "out.parquet", task="c")


def test_batches_of_many_rows(tmp_path: Path) -> None:
    write_examples(tmp_path / "x.parquet", [example(i, 1, 1) for i in range(5000)])
    assert export(tmp_path / "x.parquet", tmp_path / "out.parquet")["rows"] == 5000
    assert [row["anchor"] for row in columns(tmp_path / "out.parquet")] == [f"q{i} 漢字" for i in range(5000)]


def test_what_cannot_be_exported_leaves_the_old_file(tmp_path: Path) -> None:
    write_examples(tmp_path / "x.jsonl", EXAMPLES)
    export(tmp_path / "x.jsonl", tmp_path / "out.parquet")
    before = (tmp_path / "out.parquet").read_bytes()
    with pytest.raises(DataError, match="no example has 5 negatives; the most is 4"):
        export(tmp_path / "x.jsonl", tmp_path / "out.parquet", negatives=5)
    with pytest.raises(ValueError, match=r"out\.jsonl: .*\.parquet"):
        export(tmp_path / "x.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="no format 'csv'"):
        export(tmp_path / "x.jsonl", tmp_path / "out.parquet", format="csv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negatives is -1"):
        export(tmp_path / "x.jsonl", tmp_path / "out.parquet", negatives=-1)
    assert (tmp_path / "out.parquet").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.parquet", "x.jsonl"]


def test_any_kind_of_training_data_is_exported(tmp_path: Path) -> None:
    rows = [{"text": f"{label}{i}", "label": label} for i in range(4) for label in "abc"]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert export(tmp_path / "labels.jsonl", tmp_path / "out.parquet", negatives=2)["rows"] == 12
    for row in columns(tmp_path / "out.parquet"):
        assert row["positive"][0] == row["anchor"][0] not in {row["negative_1"][0], row["negative_2"][0]}
