from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwright.training.run.curves import figure, write_curves

pytest.importorskip("matplotlib")


def record(stage: str, step: int, loss: float | None = 1.0, norm: float | None = 2.0) -> dict[str, Any]:
    return {"stage": stage, "step": step, "loss": loss, "lr": 0.1 / step, "grad_norm": norm}


def evaluation(stage: str, step: int, suite: str = "dev", **scores: float) -> dict[str, Any]:
    rows = [{"task": task, "metric": "spearman", "value": value} for task, value in scores.items()]
    return {"stage": stage, "step": step, "suite": suite, "results": {"suite": suite, "rows": rows}}


METRICS = [
    *(record("one", step, loss) for step, loss in ((1, 3.0), (2, None), (3, 1.0))),
    *(record("two", step, 0.5, None) for step in (1, 2)),
]


def points(line: Any) -> list[tuple[float, float]]:
    return list(zip(*(np.asarray(line.get_data(orig=True)[i], float).tolist() for i in (0, 1)), strict=True))


def curve(axes: Any) -> Any:
    return axes.lines[0]


def borders(axes: Any) -> list[float]:
    return [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == ":"]


def test_the_curves_are_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import would fail
    loss, rate, norm = figure(METRICS, []).axes
    np.testing.assert_array_equal(points(curve(loss)), [(1, 3.0), (2, np.nan), (3, 1.0), (4, 0.5), (5, 0.5)])
    np.testing.assert_array_equal(points(curve(rate)), [(i + 1, m["lr"]) for i, m in enumerate(METRICS)])
    np.testing.assert_array_equal(points(curve(norm)), [(1, 2.0), (2, 2.0), (3, 2.0), (4, np.nan), (5, np.nan)])
    assert [axes.get_ylabel() for axes in (loss, rate, norm)] == ["loss", "learning rate", "gradient norm"]
    assert all(borders(axes) == [0, 3] for axes in (loss, rate, norm))
    assert [(text.get_position()[0], text.get_text().strip()) for text in loss.texts] == [(0, "one"), (3, "two")]


def test_scores_stand_at_their_steps() -> None:
    evaluations = [
        evaluation("start", 0, docs=0.1, code=0.2),
        evaluation("one", 3, docs=0.3, code=0.4),
        evaluation("one", 3, "late", docs=0.9),
        evaluation("two", 2, docs=0.5, code=0.6),
        evaluation("three", 1, docs=0.0, code=0.0),  # of which the log has no step
    ]
    *_, scores = figure(METRICS, evaluations).axes
    drawn = {line.get_label(): points(line) for line in scores.lines if line.get_linestyle() != ":"}
    assert drawn == {
        "dev: docs (spearman)": [(0, 0.1), (3, 0.3), (5, 0.5)],
        "dev: code (spearman)": [(0, 0.2), (3, 0.4), (5, 0.6)],
        "late: docs (spearman)": [(3, 0.9)],
    }
    assert [text.get_text() for text in scores.get_legend().get_texts()] == list(drawn)
    assert borders(scores) == [0, 3]


def test_of_many_tasks_the_mean_is_drawn() -> None:
    values = np.random.default_rng(0).random((2, 11))
    evaluations = [
        evaluation(stage, step, **{f"t{i}": float(v) for i, v in enumerate(row)})
        for (stage, step), row in zip((("start", 0), ("two", 1)), values, strict=True)
    ]
    *_, scores = figure(METRICS, evaluations).axes
    (line,) = (line for line in scores.lines if line.get_linestyle() != ":")
    assert line.get_label() == "dev: mean of 11 tasks"
    np.testing.assert_allclose(points(line), [(0, values[0].mean()), (4, values[1].mean())])


def test_the_running_mean_of_a_long_stage_stays_within_it() -> None:
    random = np.random.default_rng(1)
    losses = [None if i in (7, 130) else float(x) for i, x in enumerate(random.random(99 + 110))]
    losses[120:145] = [None] * 25  # longer than what is averaged over
    stages = ["short"] * 99 + ["long"] * 110
    metrics = [record(stage, i + 1, loss) for i, (stage, loss) in enumerate(zip(stages, losses, strict=True))]
    loss, rate, norm = figure(metrics, []).axes
    (mean,) = (line for line in loss.lines if line.get_label() == "mean of 20 steps")
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["mean of 20 steps"]
    whole = np.array([np.nan if x is None else x for x in losses])
    for step, value in points(mean):
        window = whole[int(step) - 20 : int(step)]  # steps are counted from 1
        expected = np.nan if np.isnan(window).all() else np.nanmean(window)
        np.testing.assert_allclose(value, expected)
    assert [step for step, _ in points(mean)] == list(range(99 + 20, 99 + 110 + 1))
    assert [len(axes.lines) - 2 for axes in (loss, rate, norm)] == [2, 1, 2]  # besides the borders
    longer = [record("only", i + 1) for i in range(3000)]
    assert figure(longer, []).axes[0].lines[1].get_label() == "mean of 30 steps"


def test_the_picture_is_drawn_anew(tmp_path: Path) -> None:
    write_curves(tmp_path)
    assert not list(tmp_path.iterdir())  # no step, no picture
    pictures = []
    for metrics in (METRICS[:1], METRICS):
        lines = "".join(json.dumps(m) + "\n" for m in metrics) + '{"stage": "tw'  # torn by a kill
        (tmp_path / "metrics.jsonl").write_text(lines)
        write_curves(tmp_path)
        pictures.append((tmp_path / "curves.png").read_bytes())
        (tmp_path / "evaluations.jsonl").write_text(json.dumps(evaluation("start", 0, docs=0.1)) + "\n")
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and pictures[0] != pictures[1]
    assert not list(tmp_path.glob("*.part"))


def test_without_matplotlib_a_run_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(METRICS[0]) + "\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING):
        write_curves(tmp_path)
    assert "pip install 'embedwright[train]'" in caplog.text and not (tmp_path / "curves.png").exists()
