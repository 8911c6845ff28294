"""The twins' plan and table: what runs, in which order, and what the tables say of it. No model is trained here."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from embedwright.config import ConfigError
from embedwright.errors import InputError

TWINS = Path(__file__).parents[2] / "benchmarks" / "twins"
STUDY: dict[str, Any] = {"name": "twins", "suite": "dev-mini", "smoke": False, "missing": ["t2/st-plain/seed-1"]}
LORA = {"lr": 1.0, "batch": 1.0, "method": "lora"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`script(name)`: a script of benchmarks/twins as a module."""
    monkeypatch.syspath_prepend(str(TWINS))
    yield importlib.import_module
    for name in ("run", "table", "st"):
        sys.modules.pop(name, None)


def test_the_plan_declares_trials_first_and_then_corners_in_turn_by_seed(script: Any) -> None:
    run = script("run")
    specs = list(run.cells(run.read_plan(TWINS / "plan.yaml")))
    t1 = [spec["id"].removeprefix("t1/") for spec in specs if spec["id"].startswith("t1/") and not spec["trial"]]
    assert t1[:4] == ["ours-ours/seed-1", "st-ours/seed-1", "ours-ours/seed-2", "st-ours/seed-2"] and len(t1) == 10
    kinds = [spec["trial"] for spec in specs if spec["id"].startswith("t2/")]
    assert kinds == sorted(kinds, reverse=True) and len({spec["id"] for spec in specs}) == len(specs)
    tried = {c: [s["setting"] for s in specs if s["trial"] and s["corner"] == c] for c in ("ours-ours", "st-ours")}
    assert tried["ours-ours"] == tried["st-ours"]  # as many trials for both, and the same
    assert {spec["seed"] for spec in specs if spec["trial"]}.isdisjoint(s["seed"] for s in specs if not s["trial"])
    t2 = [spec for spec in specs if spec["id"].startswith("t2/")]
    assert {spec["seconds"] for spec in t2 if not spec["trial"]} == {1800}
    assert {round(spec["seconds"]) for spec in t2 if spec["trial"]} == {594}


def test_both_recipes_and_the_smoke_plan_can_be_read(script: Any) -> None:
    from embedwright.training.recipe import Recipe

    assert script("run").read_plan(TWINS / "smoke.yaml").smoke
    shares = script("run").read_plan(TWINS / "plan.yaml").tests["t2"].shares
    for name in ("ours", "plain"):
        assert len(Recipe.load(TWINS / f"{name}.yaml").stages) == len(shares[name])


@pytest.mark.parametrize(
    ("written", "instead", "said"),
    [
        ("st-ours]", "st-our]", "st-our"),
        ("{lr: 0.5}, {lr: 1}, {lr: 2}]\n  t2", "{lr: 0.5}, {batch: 2}]\n  t2", "equal examples"),
        ("plain: [1.0]", "ours: [1.0]", "ours"),
        ("{ours: [0.6, 0.4], plain: [1.0]}", "{ours: [0.6, 0.4]}", "shares"),
        ("trial: 0.5", "trails: 0.5", "trial"),
    ],
)
def test_a_wrong_plan_is_refused(script: Any, tmp_path: Path, written: str, instead: str, said: str) -> None:
    text = (TWINS / "plan.yaml").read_text(encoding="utf-8")
    assert written in text
    (tmp_path / "plan.yaml").write_text(text.replace(written, instead))
    with pytest.raises(ConfigError, match=said):
        script("run").read_plan(tmp_path / "plan.yaml")


def test_the_best_trial_is_taken_once_all_are_there_and_a_done_cell_is_not_run_again(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file = script("run"), TWINS / "plan.yaml"
    plan = run.read_plan(file)
    trials = [s for s in run.cells(plan) if s["trial"] and s["id"].startswith("t1/st-ours/")]
    for macro, spec in zip((0.5, None, 0.7), trials, strict=True):
        assert run.chosen(plan, "t1", "st-ours", tmp_path) is None
        found = {"failed": "diverged"} if macro is None else {"macro": macro, "took": {"pace": None}}
        run.write_json(tmp_path / spec["id"] / "result.json", spec | found)
    assert run.chosen(plan, "t1", "st-ours", tmp_path)["setting"] == LORA | {"lr": 2.0}

    calls: list[list[str]] = []

    def process(words: list[str], env: dict[str, str], **_: Any) -> Any:
        calls.append(words)
        assert os.sched_getaffinity(0) == run.CORES and env["OMP_NUM_THREADS"] == str(len(run.CORES))
        cell = json.loads((Path(words[-1]) / "cell.json").read_text())
        run.write_json(Path(words[-1]) / "result.json", cell)
        return run.subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(run.subprocess, "run", process)
    (spec,) = [s for s in run.cells(plan) if s["id"] == "t1/st-ours/seed-3"]
    leftover = tmp_path / spec["id"] / "half" / "done"
    leftover.mkdir(parents=True)  # of a process that was killed: it begins anew
    ran = spec | {"content": "a", "processor": "c", "base": "b"}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    os.sched_setaffinity(0, {min(run.CORES)})  # as a bound OpenMP leaves this thread
    try:
        for _ in range(2):
            run.one(plan, ran, file, tmp_path)
    finally:
        os.sched_setaffinity(0, run.CORES)
    assert len(calls) == 1 and not leftover.exists()
    assert json.loads((tmp_path / spec["id"] / "cell.json").read_text())["setting"]["lr"] == 2.0
    assert run.refuse_other(ran, run.OF_ALL, tmp_path)
    for key in run.OF_ALL:  # before any cell runs: other rows, or seconds of another processor
        with pytest.raises(InputError, match=f"another {key}: choose another --out"):
            run.refuse_other(ran | {key: "other"}, run.OF_ALL, tmp_path)
    with pytest.raises(InputError, match="another suite"):
        run.one(plan, ran | {"suite": "other"}, file, tmp_path)


@pytest.mark.parametrize("limit", [None, 50.0])
def test_the_rate_of_sentence_transformers_rises_and_falls_as_ours_by_steps_or_by_the_clock(
    script: Any, monkeypatch: pytest.MonkeyPatch, limit: float | None
) -> None:
    """Each of 100 steps takes half a second, so that both are the same."""
    from embedwright.training.engine.optim import learning_rate
    from embedwright.training.parts import OptimPart

    st, optim = script("st"), OptimPart(lr=1.0, warmup_steps=8, steps=100, batch_queries=2)
    clock, now = st.Clock(optim, limit), [1000.0]
    monkeypatch.setattr(st.time, "perf_counter", lambda: now[0])
    found = [clock.rate(0)]
    clock.on_step_begin(None, None, None)
    for step in range(1, 100):
        now[0] += 0.5
        found.append(clock.rate(step))
    expected = [learning_rate(optim, step) for step in range(100)]
    assert found == pytest.approx(expected, abs=0 if limit is None else 1 / 8 + 1e-9)
    assert found[0] == 1 / 8 and max(found) > 0.98 and found[-1] < 0.02


# ---- the table


def row(task: str, kind: str, difference: float, half: float) -> dict[str, Any]:
    ends = {"low": difference - half, "high": difference + half, "smallest": 1.4 * half}
    return {"task": task, "kind": kind, "difference": difference, "score": 60 + difference, "baseline": 60.0} | ends


ROWS = [
    row("amazon", "retrieval", -2.0, 0.5),
    row("r8", "classification", 9.0, 1.0),
    row("clinc", "classification", 5.0, 1.0),
    row("mean", "classification", 7.0, 1.0),
    row("mean", "types", 2.5, 0.6),
    row("mean", "tasks", 4.0, 0.6),
]


def study(seconds: float | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    took = {"training": 1900.0, "start": 30.0, "queries": 19000, "tokens": 950000, "steps": [100, 50], "peak_mb": 1234}
    cell = {"id": "t2/ours-ours/seed-1", "corner": "ours-ours", "trial": False, "setting": LORA, "macro": 0.625}
    trial = cell | {"id": "t2/ours-ours/trial-a", "trial": True, "macro": 0.61}
    lost = trial | {"id": "t2/ours-ours/trial-b", "setting": LORA | {"lr": 4.0}, "failed": "not finite"}
    del lost["macro"]
    test = {"pairs": [["ours-ours", "st-ours"], ["ours-ours", "st-plain"]], "seconds": seconds}
    compared = {"test": "t2", "corner": "ours-ours", "baseline": "st-ours", "seeds": [1, 2], "rows": rows}
    cells = [cell | {"took": took}, trial | {"took": took}, lost]
    return STUDY | {"tests": {"t2": test}, "cells": cells, "comparisons": [compared]}


def test_the_table_takes_the_mean_over_families_and_names_lost_ones_and_what_was_not_run(script: Any) -> None:
    text = "\n".join(script("table").render(study(1800.0, ROWS)))
    ours, other = "embedwright, our recipe", "sentence-transformers"
    assert f"| {ours} - {other}, our recipe | 2 | 62.50 | 60.00 | +2.50 | +1.90 to +3.10 | 0.84 | passes |" in text
    assert f"| {ours} - {other}, plain | 0 | - | - | - | - | - | not run |" in text
    assert "| retrieval | -2.00 | -2.50 to -1.50 | yes |" in text
    assert "| classification | +7.00 | +6.00 to +8.00 | no |" in text  # the family's mean, not one of its tasks
    assert "| 62.50 | lora | 100 + 50 | 1,900 | 30 | 10.0 | 500.0 | 1,234 |" in text
    assert f"| {ours} | **61.00** | failed |" in text and "Took more than their seconds: t2/ours-ours/seed-1" in text
    assert "Not run: t2/st-plain/seed-1." in text and "Failed: t2/ours-ours/trial-b (not finite)." in text
    assert "states of the code" not in text
    assert f"The best rate is the last of those tried: {ours}." in text  # of two
    both = study(1800.0, ROWS)
    both["cells"] = [cell | {"code": str(number)} for number, cell in enumerate(both["cells"][:2])]
    assert "The cells ran on 2 states of the code." in "\n".join(script("table").render(both))


@pytest.mark.parametrize(
    ("seconds", "difference", "half", "said"),
    [
        (1800.0, 0.5, 0.6, "fails"),
        (1800.0, 0.7, 0.6, "passes"),
        (None, 0.0, 0.4, "passes"),
        (None, -0.3, 0.4, "passes; its interval reaches below"),
        (None, -0.6, 2.0, "fails"),
    ],
)
def test_the_verdicts_are_those_of_the_tests(
    script: Any, seconds: float | None, difference: float, half: float, said: str
) -> None:
    assert script("table").verdict({"seconds": seconds}, row("mean", "types", difference, half)) == said


def test_the_page_says_not_run_without_files_and_takes_no_smoke_test(script: Any, tmp_path: Path) -> None:
    table = script("table")
    assert "Not run" in "\n".join(table.page(tmp_path))
    (tmp_path / "a.json").write_text(json.dumps(study(1800.0, ROWS)))
    assert "### T2, equal wall-clock, 1,800 s each" in "\n".join(table.page(tmp_path))
    (tmp_path / "b.json").write_text(json.dumps(study(None, ROWS) | {"smoke": True}))
    with pytest.raises(SystemExit, match="smoke"):
        table.page(tmp_path)


def test_the_page_of_results_shows_the_twins_beside_the_scores_of_their_cells(script: Any, tmp_path: Path) -> None:
    make_docs = script("make_docs")
    (tmp_path / "twins" / "t2").mkdir(parents=True)
    (tmp_path / "twins" / "twins.json").write_text(json.dumps(study(1800.0, ROWS)))
    (tmp_path / "twins" / "t2" / "result.json").write_text("{}")  # of a cell: no model of the suites' tables
    assert "### T2, equal wall-clock, 1,800 s each" in make_docs.results(tmp_path)
