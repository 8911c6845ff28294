"""The verdicts on the papers' claims are right where the truth is known, and the file of claims fits the studies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verdicts
import yaml
from scipy import stats

from embedwright.evaluation.results import Result, Results
from embedwright.studies.ablate.file import Study
from embedwright.studies.ablate.table import compared

ROOT = Path(__file__).parents[2]
CLAIMS = yaml.safe_load((ROOT / "docs" / "results" / "claims.yaml").read_text(encoding="utf-8"))

# What each arm has more than the baseline, in points, in `docs`, and how much it varies with the seed.
TRUTH = {"base": (0.0, 0.1), "worse": (-3.0, 0.3), "alike": (0.05, 0.1), "noisy": (0.3, 3.0), "better": (2.0, 0.3)}


def study(seeds: int, arms: dict[str, tuple[float, float]] = TRUTH) -> dict[str, Any]:
    """As `ablate` writes it. A second task, `topics`, has the same scores with all signs turned."""
    random = np.random.default_rng(4)
    change = {(arm, seed): random.normal(mean, sd) for arm, (mean, sd) in arms.items() for seed in range(seeds)}
    change["better", 0] = 2.2  # so that no arm has the one seed of another study
    spread = random.normal(0, 0.05, 50)

    def results(points: float) -> Results:
        rows = []
        for name, value in (("docs", 0.5 + points / 100), ("topics", 0.5 - points / 300)):
            items = {"score": value + spread - spread.mean(), "id": np.arange(50)}
            rows.append(Result(name, "retrieval", "nDCG@10", value, items=items))
        return Results("s", tuple(rows), 1.0)

    found = {arm: {seed: results(change[arm, seed]) for seed in range(seeds)} for arm in arms}
    further = {"worse": found["worse"], "better": found["better"]}
    comparison, pair = compared([("base", found), ("worse", further)], 0.5)
    cells = [{"arm": arm, "seed": seed, "tokens": 600_000 + 10 * seed} for arm, seed in change]
    said = {"study": "s", "cells": cells, "trials": [], "missing": [], "comparison": comparison, "pairs": [pair]}
    return said | {"change": change}


def claim(better: str, worse: str, task: str | None = "docs", name: str = "s") -> dict[str, Any]:
    return {"claim": "c", "study": name, "better": better, "worse": worse} | ({"task": task} if task else {})


def paper(difference: float) -> dict[str, Any]:
    return {"paper": {"where": "Table 3", "better": 71.0 + difference, "worse": 71.0}}


def test_each_verdict_is_that_of_the_truth() -> None:
    claims = [
        claim("base", "worse"),
        claim("better", "base"),
        claim("base", "better"),
        claim("alike", "base") | paper(0.6),
        claim("noisy", "base") | paper(0.36),
        claim("better", "worse"),
        claim("better", "worse", "topics"),
        claim("better", "gone"),
        claim("better", "noisy"),
        claim("better", "base", name="other"),
    ]
    found = verdicts.decided(claims, {"s": study(6)})
    assert [each["verdict"] for each in found] == [
        "holds here",
        "holds here",
        "does not hold here: the other way round",
        "does not hold here: no difference, within 0.5",
        "cannot be resolved at this size",
        "holds here",
        "does not hold here: the other way round",
        "not run yet: no seed of both arms",
        "not compared: the study has no such pair",
        "not run",
    ]


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        ({}, "no difference, within 0.5"),
        ({"paper": {"where": "section 2"}}, "no difference, within 0.5"),
        (paper(0.36), "no difference beyond 0.5; the paper's +0.36 is too small to be told apart"),
        (paper(0.5), "does not hold here: no difference, within 0.5"),
    ],
)
def test_equal_arms_refute_only_a_claim_of_the_bound_or_more(theirs: dict[str, Any], verdict: str) -> None:
    """A true difference of 0.36 is also within 0.5."""
    [found] = verdicts.decided([claim("alike", "base") | theirs], {"s": study(6)})
    assert found["verdict"] == verdict


def test_numbers_are_those_of_the_paired_t_test_corrected_by_holm() -> None:
    """By scipy and by hand: a difference, its interval and p-values, whichever of the two arms is the baseline.

    A claim that has not run counts in the correction, so that a verdict does not change with the rows still to come.
    """
    said = study(6)
    names = [("base", "worse"), ("alike", "base"), ("better", "worse")]
    found = verdicts.decided([*(claim(*arms) for arms in names), claim("base", "gone")], {"s": said})[:3]
    p: list[float] = []
    within: list[float] = []
    for each, (better, worse) in zip(found, names, strict=True):
        left, right = ([said["change"][arm, seed] for seed in range(6)] for arm in (better, worse))
        expected = stats.ttest_rel(left, right)
        low, high = expected.confidence_interval()
        assert each["difference"] == pytest.approx(np.mean(left) - np.mean(right))
        assert (each["low"], each["high"]) == pytest.approx((low, high), rel=1e-6)
        p.append(expected.pvalue)
        change = np.subtract(left, right)
        tests = [
            stats.ttest_1samp(change, bound, alternative=side) for bound, side in ((-0.5, "greater"), (0.5, "less"))
        ]
        within.append(max(test.pvalue for test in tests))
        assert each["seeds"] == 6 and each["tokens"] == [600_025, 600_025]
    for key, values in (("p_holm", p), ("p_equivalent", within)):
        order = np.argsort(values)
        by_hand = np.maximum.accumulate([min(1.0, (4 - rank) * values[place]) for rank, place in enumerate(order)])
        assert [found[place][key] for place in order] == pytest.approx(by_hand.tolist(), rel=1e-6)


def test_one_seed_decides_nothing() -> None:
    """Three points over 50 items whose noise is far below them."""
    said = study(1)
    for row in said["comparison"]["rows"]:
        row |= {"low": row["difference"] - 0.1, "high": row["difference"] + 0.1, "over": "items", "p": 1e-9}
    [found] = verdicts.decided([claim("base", "worse")], {"s": said})
    assert found["verdict"] == "cannot be resolved at this size: one run each" and found["seeds"] == 1
    assert found["smallest"] is None and "low" not in found  # both would be of the items alone
    assert "p_holm" not in found


def test_a_task_that_was_left_out_is_not_said_to_be_not_run() -> None:
    said = study(6)
    said["comparison"]["rows"] = [row for row in said["comparison"]["rows"] if row["task"] == "topics"]
    [found] = verdicts.decided([claim("better", "base")], {"s": said})
    assert found["verdict"] == "not compared: docs was left out"


def test_seeds_that_are_missing_are_marked(tmp_path: Path) -> None:
    said = study(6) | {"missing": ["better/7", "gone/6", "gone/7"]}
    said["shared_stages"] = [{"arm": "shared-stages", "seed": 100, "tokens": 9}]  # of the trials
    [found] = verdicts.decided([claim("better", "base")], {"s": said})
    assert (found["seeds"], found["planned"]) == (6, 8)
    assert " | 6 of 8 | " in " | ".join(verdicts._cells(claim("better", "base"), found))


def test_tokens_are_those_of_each_arm_on_shared_seeds_with_the_shared_stage() -> None:
    said = study(6)
    said["cells"] += [{"arm": "base", "seed": 99, "tokens": 10**9}]
    [found] = verdicts.decided([claim("better", "base")], {"s": said})
    assert found["tokens"] == [600_025, 600_025]
    for run in said["cells"]:
        run["tokens"] += 30_000 * (run["arm"] == "better")
    said["shared_stages"] = [{"arm": "shared-stages", "seed": seed, "tokens": 200_000} for seed in range(6)]
    [found] = verdicts.decided([claim("better", "base")], {"s": said})
    assert found["tokens"] == [830_025, 800_025]
    assert verdicts._cells(claim("better", "base"), found)[-2] == "830,025 and 800,025"


def test_an_arm_whose_best_rate_is_at_the_edge_of_the_grid_is_named(tmp_path: Path) -> None:
    said = study(6)
    del said["change"]
    rates = {"better": 3, "base": 1, "worse": 0.33}
    said["trials"] = [{"arm": "base", "rate": 1, "mean": 0.5}]
    for cell in said["cells"]:
        cell["rate"] = rates.get(cell["arm"], 1)
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump([claim("better", "worse"), claim("better", "base")]))
    (tmp_path / "ablations" / "s").mkdir(parents=True)
    (tmp_path / "ablations" / "s" / "study.json").write_text(json.dumps(said | {"rates": [0.33, 1, 3]}))
    both, one = verdicts.page(tmp_path)[3:5]
    assert "| **holds here**; rate at the grid's edge: better x3, worse x0.33 |" in both
    assert "| **holds here**; rate at the grid's edge: better x3 |" in one


def test_an_interval_without_items_is_marked(tmp_path: Path) -> None:
    said = study(6)
    del said["change"]
    for row in said["comparison"]["rows"]:
        row |= {"over": "seeds", "without": ["docs"]}
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump([claim("better", "base")]))
    (tmp_path / "ablations" / "s").mkdir(parents=True)
    (tmp_path / "ablations" / "s" / "study.json").write_text(json.dumps(said))
    assert ", without items of docs | 0.0" in verdicts.page(tmp_path)[3]


def test_a_claim_of_the_mean_takes_the_mean_over_tasks() -> None:
    said = study(6)
    [found] = verdicts.decided([claim("better", "base", None)], {"s": said})
    change = np.mean([said["change"]["better", seed] - said["change"]["base", seed] for seed in range(6)])
    assert found["difference"] == pytest.approx(change * (1 - 1 / 3) / 2)


def test_the_page_has_a_row_for_each_claim(tmp_path: Path) -> None:
    assert verdicts.page(tmp_path) == []
    rows = [
        claim("better", "base")
        | {"paper": {"where": "Table 3", "better": 72.31, "worse": 71.71}, "others": ["x: 60.2"]},
        claim("better", "base", name="other"),
    ]
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(rows))
    assert "| not run |" in verdicts.page(tmp_path)[3]
    (tmp_path / "ablations" / "s").mkdir(parents=True)
    said = study(6)
    del said["change"]
    (tmp_path / "ablations" / "s" / "study.json").write_text(json.dumps(said))
    lines = verdicts.page(tmp_path)
    assert lines[3].startswith("| c (`s: better - base, docs`) | **holds here** | +")
    assert lines[3].endswith("| 6 | 600,025 | +0.60 (72.31, 71.71; Table 3) |")
    assert "| not run | - | - | - | - | - | - | not in it |" in lines[4] and "- c: x: 60.2." in lines


@pytest.mark.parametrize("number", range(len(CLAIMS)))
def test_a_claim_is_of_arms_that_its_study_compares(number: int) -> None:
    """And the paper's numbers are those that stand in the study."""
    said = CLAIMS[number]
    assert {"claim", "study", "better", "worse"} <= said.keys() <= {*claim("", ""), "paper", "others"}
    files = sorted((ROOT / "recipes" / "ablations").glob("*.yaml"))
    studies = [one for one in (Study(file).said for file in files) if one.name == said["study"]]
    arms = {said["better"], said["worse"]}
    fitting = [one for one in studies if arms <= {*one.arms, "shared-stages"}]
    assert fitting, f"no study {said['study']} has {arms}"
    for one in fitting:
        assert one.baseline in arms or any({*pair} == arms for pair in one.pairs)
        assert one.equivalent == 0.5 or one.run_on == "8 GPUs"
        paper = said.get("paper", {"where": ""})
        theirs = one.paper.scores if one.paper and "task" not in said and "teachers" not in paper["where"] else {}
        for side in ("better", "worse"):
            if said[side] in theirs and "better" in paper:
                assert theirs[said[side]] == paper[side]
