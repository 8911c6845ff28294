from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwright.evaluation.results import Result, Results
from embedwright.studies.ablate.file import Study
from embedwright.studies.ablate.table import compared, render

SCORES = {"plain": {1: 0.50, 2: 0.54}, "warm": {1: 0.60, 2: 0.63}}


def results(value: float, seed: int) -> Results:
    """Twenty queries whose mean is `value`."""
    spread = np.random.default_rng(seed).normal(0, 0.05, 20)
    items = {"score": value + spread - spread.mean(), "id": np.arange(20).astype(str)}
    return Results("s", (Result("docs", "retrieval", "nDCG@10", value, items=items),), 1.0)


@pytest.fixture
def study(ablation: Callable[..., Path]) -> dict[str, Any]:
    paper = {"what": "MTEB", "source": "Table 2", "scores": {"plain": 72.31, "warm": 71.71}}
    said = Study(ablation(paper=paper, equivalent=0.5)).said
    cells = [{"arm": arm, "seed": seed, "mean": SCORES[arm][seed]} for arm in SCORES for seed in SCORES[arm]]
    found = {arm: {seed: results(value, seed) for seed, value in some.items()} for arm, some in SCORES.items()}
    facts = {"study": "tiny", "baseline": "plain", "scored_on": "dev", "paper": paper, "smoke": False, "trials": []}
    return facts | {"cells": cells, "missing": [], "failed": {}, "comparison": compared(said, found)}


def test_arms_stand_beside_the_paper_with_interval_and_smallest_visible_difference(study: dict[str, Any]) -> None:
    [row] = study["comparison"]["rows"]
    assert row["difference"] == pytest.approx(9.5) and row["low"] < 9.5 < row["high"] and row["smallest"] > 0
    assert study["comparison"]["equivalent"] == 0.5 and row["p_equivalent"] > 0.05
    title, head, plain, warm, paper = render(study).splitlines()
    assert title == "tiny: dev, in points, differences from plain" and paper == "paper: MTEB (Table 2)"
    assert "smallest visible" in head and "its difference" in head
    assert plain.split() == ["plain", "2", "52.00", "-", "-", "-", "-", "-", "72.31", "-"]
    cells = warm.split()
    assert cells[:4] == ["warm", "2", "61.50", "+9.50"] and cells[-2:] == ["71.71", "-0.60"]
    assert f"{row['low']:+.2f} to {row['high']:+.2f}" in warm and f"{row['smallest']:.2f}" in cells


def test_rates_that_were_tried_are_told_with_the_default(study: dict[str, Any]) -> None:
    tried = {"plain": {0.33: 0.4, 1: 0.5, 3: 0.45}, "warm": {0.33: 0.4, 1: 0.5, 3: 0.6}}
    trials = [{"arm": arm, "rate": rate, "mean": mean} for arm, some in tried.items() for rate, mean in some.items()]
    plain, warm = render(study | {"trials": trials}).splitlines()[-2:]
    assert plain == "rates of plain: x0.33 40.00, x1 50.00, x3 45.00; best x1, default 50.00"
    assert warm == "rates of warm: x0.33 40.00, x1 50.00, x3 60.00; best x3, at the edge of the grid, default 50.00"


def test_a_rate_that_failed_is_told_and_is_no_best_one(study: dict[str, Any]) -> None:
    trials: list[dict[str, Any]] = [{"arm": "warm", "rate": 0.33, "mean": 0.4}, {"arm": "warm", "rate": 1, "mean": 0.5}]
    trials += [{"arm": "warm", "rate": 3, "failed": "it diverged"}, {"arm": "plain", "rate": 1, "failed": "so it did"}]
    warm, plain = render(study | {"trials": trials}).splitlines()[-2:]
    assert warm == "rates of warm: x0.33 40.00, x1 50.00, x3 failed; best x1, default 50.00"
    assert plain == "rates of plain: x1 failed"


def test_each_task_has_a_line_below_the_mean_and_the_shared_stages_are_a_row(ablation: Callable[..., Path]) -> None:
    """The mean stays; one task falls as far as the other rises."""

    def two(seed: int, change: float) -> Results:
        one, other = results(0.5 + change, seed).rows[0], results(0.5 - change, seed + 9).rows[0]
        return Results("s", (one, replace(other, task="topics")), 1.0)

    said = Study(ablation()).said
    change = {"plain": 0.0, "warm": 0.2, "shared-stages": 0.1}
    found = {arm: {seed: two(seed, change[arm]) for seed in (1, 2)} for arm in change}
    facts = {"study": "tiny", "baseline": "plain", "scored_on": "dev", "paper": None, "smoke": False, "trials": []}
    cells = [{"arm": arm, "seed": seed, "mean": 0.5} for arm in ("plain", "warm") for seed in (1, 2)]
    shared = [{"arm": "shared-stages", "seed": seed, "mean": 0.5} for seed in (1, 2, 100)]
    facts |= {"cells": cells, "shared_stages": shared, "missing": [], "failed": {}}
    lines = [line.split()[:5] for line in render(facts | {"comparison": compared(said, found)}).splitlines()]
    assert ["shared-stages", "2", "50.00"] in [line[:3] for line in lines]
    for task, sign in (("docs", 1), ("topics", -1)):
        for arm in ("warm", "shared-stages"):
            score = 50 + sign * 100 * change[arm]
            assert [task, "nDCG@10", arm, f"{score:.2f}", f"{score - 50:+.2f}"] in lines


def test_what_is_missing_or_has_failed_is_said(study: dict[str, Any], ablation: Callable[..., Path]) -> None:
    some = study | {"failed": {"s/b/seed-1": "failed: hunger"}, "missing": ["b/1"], "cells": [], "comparison": None}
    assert render(some).splitlines() == ["NOT WHOLE, missing cells: b/1", "s/b/seed-1: failed: hunger"]
    smoke = render(study | {"smoke": True})
    assert smoke == "tiny: smoke test of 4 cells; its scores mean nothing"
    said = Study(ablation()).said
    assert compared(said, {"warm": {1: results(0.5, 1)}}) is None and compared(said, {}) is None
