"""Our own Parquet, read in place: it is the table that the same rows become by conversion, and nothing is copied."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from embedwright.data.files.tasks import write_tasks
from embedwright.data.schema import DataError, Example, Passage, Task
from embedwright.data.tables.own import OwnParquet
from embedwright.data.tables.table import ExampleTable, open_as_named, open_examples, write_examples


def example(i: int) -> Example:
    if i % 7 == 3:
        return Example(f"{i}", "scored", f"q{i}", (), (Passage(f"n{i}"),), score=i / 900)
    negatives = tuple(Passage(f"n{i}.{k} 漢字", f"d{k}" if k % 2 else None) for k in range(i % 4))
    scores = tuple(1 / (k + 3) for k in range(i % 4)) if i % 5 else None
    task, language = ("", "first", "second")[i % 3], "de" if i % 2 else None
    return Example(f"{i}", task, f"q{i}", (Passage(f"p{i}", f"d{i}"),), negatives, None, scores, language=language)


def all_of(table: ExampleTable) -> dict[str, Any]:
    picked = sorted(random.Random(0).sample(range(len(table)), 50))
    return {
        "fingerprint": table.fingerprint,
        "report": table.report,
        "tasks": table.tasks,
        "rows": list(table),
        "single": [table[i] for i in (0, -1, *picked)],
        "some": list(table.select(picked)),
        "bare": list(table.without_negatives()),
        "queries": list(table.queries()),
        "by task": {task: rows.tolist() for task, rows in table.rows_by_task().items()},
        "negatives": table.negatives_per_row().tolist(),
        "positives": table.positives_per_row().tolist(),
        "scored": table.has_score().tolist(),
    }


@pytest.mark.parametrize("described", [False, True])
def test_a_file_and_a_folder_of_parts_are_the_table_that_conversion_makes(
    described: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of parts end anywhere, some parts are empty, and rows without a task get that of the file."""
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    rows = [example(i) for i in range(900)]
    write_examples(tmp_path / "x.parquet", rows)
    ends = [0, 300, 300, 301, 900]
    for index in range(4):
        write_examples(tmp_path / f"parts/part-0000{index}-of-00004.parquet", rows[ends[index] : ends[index + 1]])
    for name in ("x.parquet", "parts"):
        stem = name.removesuffix(".parquet")
        if described:
            write_tasks(tmp_path / f"{name}.tasks.jsonl", [Task(name=stem, instruction="Find it")])
        in_place = all_of(open_as_named(tmp_path / name))
        assert not (tmp_path / "cache").exists()
        converted = all_of(open_examples(tmp_path / name, task=stem if described else "", cache=tmp_path / "other"))
        assert in_place == converted and len(in_place["rows"]) == 900
        assert {example.task for example in in_place["rows"]} == {
            stem if described else "",
            "first",
            "second",
            "scored",
        }


def test_parquet_of_others_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    write_examples(tmp_path / "x.parquet", map(example, range(10)))
    table = pq.read_table(tmp_path / "x.parquet")
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "without mark.parquet")
    pq.write_table(table.drop_columns(["language"]), tmp_path / "other columns.parquet")
    for count, name in enumerate(("without mark", "other columns"), start=1):
        assert len(open_as_named(tmp_path / f"{name}.parquet")) == 10
        assert len(list((tmp_path / "cache" / "data").glob("[!.]*.arrow"))) == count


def test_a_file_that_is_replaced_while_it_is_read_is_named(tmp_path: Path) -> None:
    write_examples(tmp_path / "x.parquet", map(example, range(600)))
    rows = iter(open_as_named(tmp_path / "x.parquet"))
    assert next(rows) == example(0)
    write_examples(tmp_path / "x.parquet", map(example, range(1, 601)))
    with pytest.raises(DataError, match=r"x\.parquet was replaced"):
        list(rows)


def test_the_footer_repeats_no_texts(tmp_path: Path) -> None:
    rows = [Example(f"{i}", "t", "a secret query " * 20, (Passage("p"),)) for i in range(600)]
    write_examples(tmp_path / "x.parquet", rows)
    meta = pq.read_metadata(tmp_path / "x.parquet")
    assert meta.num_row_groups == 3 and meta.row_group(0).column(2).statistics is None
    assert OwnParquet([tmp_path / "x.parquet"], "").starts == [0, 256, 512, 600]
    assert (tmp_path / "x.parquet").stat().st_size < 30_000
    assert open_as_named(tmp_path / "x.parquet").first_positives().to_pylist() == ["p"] * 600
