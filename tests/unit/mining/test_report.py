from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from embedwright.mining import report as mining_report
from embedwright.mining.report import Histogram, MiningReport, write_report


def report(histogram: Histogram) -> MiningReport:
    return MiningReport("perc", 0.95, 1, None, 0.5, 3, 9, candidates=12, scores=histogram.to_json())


def test_a_histogram_counts_scores_in_steps() -> None:
    histogram = Histogram()
    histogram.add("positives", np.array([], np.float32))
    histogram.add("positives", np.array([[0.715, 0.719], [0.999, -0.001]]))
    histogram.add("negatives", np.array([0.0, -0.021]))
    found = histogram.to_json()
    assert (found["step"], found["start"]) == (0.01, -0.03)
    at = {kind: {i: n for i, n in enumerate(found[kind]) if n} for kind in mining_report.KINDS}
    assert at == {"positives": {2: 1, 3 + 71: 2, 3 + 99: 1}, "removed_by_rule": {}, "negatives": {0: 1, 3: 1}}


@pytest.mark.parametrize(("largest", "step"), [(1.0000001, 0.01), (8, 0.1), (250, 10), (0.05, 0.001), (0, 0.01)])
def test_the_step_goes_by_the_first_scores(largest: float, step: float) -> None:
    histogram = Histogram()
    histogram.add("positives", np.array([largest, largest / 2]))
    histogram.add("negatives", np.array([1.5]))
    assert histogram.step == pytest.approx(step)


def test_report_and_picture_are_written_and_written_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    histogram = Histogram()
    for kind, scores in (("positives", [0.9, 0.8]), ("removed_by_rule", [0.85]), ("negatives", [0.5, 0.51, 0.6])):
        histogram.add(kind, np.array(scores))
    for found in (report(Histogram()), report(histogram)):
        write_report(found, tmp_path / "new")
        assert json.loads((tmp_path / "new" / "report.json").read_text()) == found.to_json()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["histogram.png", "report.json"]
    assert (tmp_path / "new" / "histogram.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining_report, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="matplotlib"):
        write_report(report(Histogram()), tmp_path / "new")
    assert not (tmp_path / "new").exists()
