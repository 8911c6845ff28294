from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedwright.files import whole_folder
from embedwright.mining.report import Histogram, MiningReport
from embedwright.studies.report import pairs as report_pairs
from embedwright.studies.report.pairs import mining_charts, pair_charts
from embedwright.training.recipe import Recipe


class Axes:
    """Query and positive of row i lie on axis i, its two negatives at a cosine of 0.605 and 0.305 to it."""

    def __init__(self) -> None:
        self.asked: dict[str, str | None] = {}

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        self.asked |= dict.fromkeys(texts, task)
        vectors = np.zeros((len(texts), 20), dtype=np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            cosine = {"n": 0.605, "m": 0.305}.get(text[0], 1.0)
            vector[int(text[1:])], vector[-1] = cosine, (1 - cosine**2) ** 0.5
        return vectors


def recipe(path: Path, scored: str = "info_nce", **task: Any) -> Recipe:
    stage = {
        "name": "only",
        "data": [{"path": str(path), "task": {"name": "t", "instruction": "Find it", **task}}],
        "in_batch_negatives": "all",
        "hard_negatives": 1,
        "loss": {"scored": scored},
        "optim": {"lr": 1e-3, "steps": 1, "batch_queries": 2},
    }
    stages = [stage, {**stage, "name": "again"}]
    return Recipe.parse({"name": "r", "model": {"base": "b"}, "stages": stages, "run": {"out": "o"}})


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    found = [{"query": f"q{i}", "positives": [f"p{i}"], "negatives": [f"n{i}", f"m{i}"][: i % 3]} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


def counts(chart: dict[str, Any]) -> dict[str, dict[float, float]]:
    """Of each series, the percentages that are not 0, by the lower end of their bin."""
    return {
        line["name"].partition(" (")[0]: {round(x - 0.01, 2): y for x, y in zip(line["x"], line["y"], strict=True) if y}
        for line in chart["series"]
    }


def test_each_kind_of_pair_has_its_cosines(rows: Path, tmp_path: Path) -> None:
    encoder = Axes()
    charts = pair_charts(encoder, recipe(rows), tmp_path)
    assert len(charts) == 1  # the second stage has the same data
    assert counts(charts[0]) == {
        "positives": {1.0: 100},
        "hard negatives": {0.6: pytest.approx(100 * 8 / 12), 0.3: pytest.approx(100 * 4 / 12)},
        "random pairs": {0.0: 100},  # never the row's own positive
    }
    assert charts[0]["note"].startswith("In 100% of 8 sampled rows")
    assert encoder.asked["q1"] == "Find it" and encoder.asked["p1"] is None and encoder.asked["n1"] is None
    assert "q0" not in encoder.asked  # a row without negatives


def test_scored_pairs_without_a_positive_are_no_pair_of_a_row(rows: Path, tmp_path: Path) -> None:
    low = [{"query": f"q{i}", "positives": [], "negatives": [f"m{i}"], "score": 1.0} for i in range(12)]
    both = tmp_path / "both.jsonl"
    both.write_text(rows.read_text() + "".join(json.dumps(row) + "\n" for row in low))
    [plain], [charts] = (pair_charts(Axes(), recipe(file, "cosent"), tmp_path) for file in (rows, both))
    assert counts(charts) == counts(plain) and charts["note"] == plain["note"]


def test_a_symmetric_task_has_its_instruction_on_all_texts(rows: Path, tmp_path: Path) -> None:
    encoder = Axes()
    pair_charts(encoder, recipe(rows, symmetric=True), tmp_path)
    assert set(encoder.asked.values()) == {"Find it"}


def test_a_sample_is_drawn_from_the_whole_file(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_pairs, "SAMPLE", 3)
    encoder = Axes()
    assert "of 3 sampled rows" in pair_charts(encoder, recipe(rows), tmp_path)[0]["note"]
    asked = sorted(text for text in encoder.asked if text[0] == "q")
    assert len(asked) == 3 and asked != ["q1", "q2", "q4"]


def test_rows_that_a_stage_has_mined_are_read_from_the_run(rows: Path, tmp_path: Path) -> None:
    for step, row in ((0, 2), (8, 7)):
        folder = tmp_path / "mined" / "only" / f"{step:07d}"
        folder.mkdir(parents=True)
        mined = [{"query": f"q{i}", "positives": [f"p{i}"], "negatives": [f"m{row}"], "task": "t"} for i in (row, 9)]
        write_rows(folder / "00.parquet", mined)
    encoder = Axes()
    charts = pair_charts(encoder, recipe(rows), tmp_path)
    assert [chart["title"] for chart in charts] == ["Task t, negatives mined for only", "Task t"]
    assert counts(charts[0])["hard negatives"] == {0.3: 50, 0.0: 50}  # of the first stage: m7


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    from embedwright.data.schema import parse_example
    from embedwright.data.tables.table import write_examples

    write_examples(file, [parse_example(row, default_task="t", default_id=str(i)) for i, row in enumerate(rows)])


def test_the_runs_own_mining_is_drawn_from_its_reports(tmp_path: Path) -> None:
    histogram = Histogram()
    histogram.add("positives", np.array([0.95, 0.95, 0.52]))
    histogram.add("negatives", np.array([0.25]))
    folder = tmp_path / "mined" / "second" / "0000008"
    folder.mkdir(parents=True)
    report = MiningReport("perc", 0.95, 1, None, 1.0, 3, 9, negatives=1, scores=histogram.to_json())
    (folder / "00.json").write_text(json.dumps(report.to_json()))
    (folder / "run.json").write_text("{}")
    (chart,) = mining_charts(tmp_path)
    assert chart["title"] == "Mining for second, step 8"
    assert [line["name"] for line in chart["series"]] == ["positives (mean 0.81)", "negatives (mean 0.26)"]
    found = {round(x, 3): y for x, y in zip(chart["series"][0]["x"], chart["series"][0]["y"], strict=True) if y}
    assert found == {0.955: pytest.approx(200 / 3), 0.525: pytest.approx(100 / 3)}


def test_a_run_that_is_mining_or_was_killed_there_is_drawn_without_it(rows: Path, tmp_path: Path) -> None:
    with whole_folder(tmp_path / "mined" / "only" / "0000008") as folder:
        (folder / "00.json").write_text('{"half')
        (folder / "00.parquet").write_text("half")
        assert mining_charts(tmp_path) == []
        assert [chart["title"] for chart in pair_charts(Axes(), recipe(rows), tmp_path)] == ["Task t"]


def test_mining_that_scores_nothing_has_no_chart(tmp_path: Path) -> None:
    folder = tmp_path / "mined" / "second" / "0000008"
    folder.mkdir(parents=True)
    report = MiningReport("random", None, 0, None, 1.0, 3, 9, negatives=1, scores=Histogram().to_json())
    (folder / "00.json").write_text(json.dumps(report.to_json()))
    assert mining_charts(tmp_path) == []
