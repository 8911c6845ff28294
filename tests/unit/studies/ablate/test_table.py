from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from embedwright.evaluation.results import Result, Results
from embedwright.studies.ablate.table import compared, render

SCORES = {"plain": {1: 0.50, 2: 0.54}, "warm": {1: 0.60, 2: 0.63}}


def results(value: float, seed: int) -> Results:
    """Twenty queries whose mean is `value`."""
    spread = np.random.default_rng(seed).normal(0, 0.05, 20)
    items = {"score": value + spread - spread.mean(), "id": np.arange(20).astype(str)}
    return Results("s", (Result("docs", "retrieval", "nDCG@10", value, items=items),), 1.0)


@pytest.fixture
def study() -> dict[str, Any]:
    paper = {"what": "MTEB", "source": "Table 2", "scores": {"plain": 72.31, "warm": 71.71}}
    cells = [{"arm": arm, "seed": seed, "mean": SCORES[arm][seed]} for arm in SCORES for seed in SCORES[arm]]
    found = {arm: {seed: results(value, seed) for seed, value in some.items()} for arm, some in SCORES.items()}
    facts = {"study": "tiny", "baseline": "plain", "scored_on": "dev", "paper": paper, "smoke": False, "trials": []}
    return facts | {"cells": cells, "missing": [], "failed": {}, "comparison": compared([("plain", found)], 0.5)[0]}


def test_arms_stand_beside_the_paper_with_interval_and_smallest_visible_difference(study: dict[str, Any]) -> None:
    [row] = study["comparison"]["rows"]
    assert row["difference"] == pytest.approx(9.5) and row["low"] < 9.5 < row["high"] and row["smallest"] > 0
    assert study["comparison"]["equivalent"] == 0.5 and row["p_equivalent"] > 0.05
    title, head, plain, warm, _, seen, paper = render(study).splitlines()
    found = f"a true difference of {row['smallest']:.2f} points, tested alone, is found in four cases of five"
    assert seen == f"2 pairs of seeds: {found}"
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
    assert plain == "rates of plain: x0.33 not run, x1 failed, x3 not run"


def test_a_trial_that_has_not_run_is_said_and_none_is_the_best_before_all_are_in(study: dict[str, Any]) -> None:
    trials: list[dict[str, Any]] = [{"arm": "warm", "rate": 0.33, "mean": 0.5401}]
    [warm] = render(study | {"trials": trials, "rates": [0.33, 1, 3]}).splitlines()[-1:]
    assert warm == "rates of warm: x0.33 54.01, x1 not run, x3 not run"
    trials += [{"arm": "warm", "rate": 1, "failed": "it diverged"}, {"arm": "warm", "rate": 3, "mean": 0.5}]
    [warm] = render(study | {"trials": trials, "rates": [0.33, 1, 3]}).splitlines()[-1:]
    assert warm == (
        "rates of warm: x0.33 54.01, x1 failed, x3 50.00; best x0.33, at the edge of the grid, default failed"
    )


def test_each_task_has_a_line_below_the_mean_and_the_shared_stages_are_a_row() -> None:
    """The mean stays; one task falls as far as the other rises."""

    def two(seed: int, change: float) -> Results:
        one, other = results(0.5 + change, seed).rows[0], results(0.5 - change, seed + 9).rows[0]
        return Results("s", (one, replace(other, task="topics")), 1.0)

    change = {"plain": 0.0, "warm": 0.2, "shared-stages": 0.1}
    found = {arm: {seed: two(seed, change[arm]) for seed in (1, 2)} for arm in change}
    facts = {"study": "tiny", "baseline": "plain", "scored_on": "dev", "paper": None, "smoke": False, "trials": []}
    cells = [{"arm": arm, "seed": seed, "mean": 0.5} for arm in ("plain", "warm") for seed in (1, 2)]
    shared = [{"arm": "shared-stages", "seed": seed, "mean": 0.5} for seed in (1, 2, 100)]
    facts |= {"cells": cells, "shared_stages": shared, "missing": [], "failed": {}}
    lines = [
        line.split()[:5] for line in render(facts | {"comparison": compared([("plain", found)], None)[0]}).splitlines()
    ]
    assert ["shared-stages", "2", "50.00"] in [line[:3] for line in lines]
    for task, sign in (("docs", 1), ("topics", -1)):
        for arm in ("warm", "shared-stages"):
            score = 50 + sign * 100 * change[arm]
            assert [task, "nDCG@10", arm, f"{score:.2f}", f"{score - 50:+.2f}"] in lines


def told(seeds: dict[str, list[int]], other_items: bool = False) -> tuple[str, list[dict[str, Any]]]:
    """The table of a study in which `warm` is two points above `plain`, half a point more or less with the seed."""
    random = np.random.default_rng(3)
    scores = {
        arm: {seed: 0.50 + 0.02 * (arm == "warm") + random.normal(0, 0.005) for seed in some}
        for arm, some in seeds.items()
    }
    found = {
        arm: {seed: results(value, seed + 50 * (other_items and arm == "warm")) for seed, value in some.items()}
        for arm, some in scores.items()
    }
    cells = [{"arm": arm, "seed": seed, "mean": mean} for arm, some in scores.items() for seed, mean in some.items()]
    facts = {"study": "tiny", "baseline": "plain", "scored_on": "dev", "paper": None, "smoke": False, "trials": []}
    [comparison] = compared([("plain", found)], None)
    assert comparison is not None
    return render(facts | {"cells": cells, "missing": [], "failed": {}, "comparison": comparison}), comparison["rows"]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_table_says_what_its_seeds_could_see(count: int) -> None:
    """Of one seed nothing is claimed; of more, the smallest visible difference is that of the t-test, by scipy."""
    seeds = [*range(1, count + 1)]
    text, [row] = told({"plain": seeds, "warm": seeds}, other_items=count == 1)
    last = text.splitlines()[-1]
    if count == 1:
        assert last.startswith("one seed: an interval covers the items of these runs alone")
        assert "nothing is claimed of the arms" in last and row["over"] == "items" and "in four cases" not in text
    else:
        assert (
            row["over"] == "seeds, items"
            and f"{row['smallest']:.2f} points, tested alone, is found in four cases of five" in last
        )
        assert last.startswith(f"{count} pairs of seeds: a true difference of ")
        # the items spread alike on both sides, so the seeds are all of the noise
        half = row["high"] - row["difference"]
        error = half / stats.t.ppf(0.975, count - 1)
        assert row["error"] == pytest.approx(error, rel=1e-6)
        assert row["smallest"] == pytest.approx(half + stats.t.ppf(0.8, count - 1) * error, rel=1e-6)


def test_items_that_no_interval_covers_are_said(study: dict[str, Any]) -> None:
    assert "items" not in render(study)
    bare = {
        arm: {seed: replace(found, rows=(replace(found.rows[0], items={}),)) for seed, found in some.items()}
        for arm, some in ((arm, {seed: results(value, seed) for seed, value in SCORES[arm].items()}) for arm in SCORES)
    }
    [comparison] = compared([("plain", bare)], 0.5)
    assert "intervals without items, which are not kept: docs of warm" in render(study | {"comparison": comparison})


def test_the_claim_of_one_seed_is_of_its_runs(study: dict[str, Any]) -> None:
    row = study["comparison"]["rows"][0] | {"over": "items", "claim": "higher"}
    assert "higher, these runs" in render(study | {"comparison": study["comparison"] | {"rows": [row]}})
    assert "these runs" not in render(study)


def test_an_arm_is_compared_on_the_seeds_that_it_shares_with_the_baseline() -> None:
    """A study that was stopped: `warm` has run twice. It is as if the baseline had, too."""
    text, [row] = told({"plain": [1, 2, 3, 4], "warm": [1, 2]})
    random = np.random.default_rng(3)
    plain = [0.50 + random.normal(0, 0.005) for _ in range(4)]
    warm = [0.52 + random.normal(0, 0.005) for _ in range(2)]
    expected = stats.ttest_rel(warm, plain[:2])
    assert row["difference"] == pytest.approx(100 * np.subtract(warm, plain[:2]).mean())
    assert row["p"] == pytest.approx(expected.pvalue, rel=1e-6) and row["over"] == "seeds, items"
    assert "2 pairs of seeds: a true difference" in text


def test_arms_of_other_seeds_and_further_pairs_are_corrected_together() -> None:
    """Holm by hand over three arms, two of which have run four times and one twice, and a pair of two of them."""
    random = np.random.default_rng(1)
    seeds = {"plain": [1, 2, 3, 4], "a": [1, 2, 3, 4], "b": [1, 2], "c": [1, 2, 3, 4], "alone": [9]}
    found = {arm: {s: results(0.5 + random.normal(0, 0.01), s) for s in some} for arm, some in seeds.items()}
    comparison, pair, none = compared([("plain", found), ("b", {n: found[n] for n in "bc"}), ("alone", found)], 0.5)
    assert comparison is not None and pair is not None and none is None
    assert [row["candidate"] for row in comparison["rows"]] == ["a", "c", "b"]
    assert [(pair["baseline"], row["candidate"]) for row in pair["rows"]] == [("b", "c")]
    order = sorted([*comparison["rows"], *pair["rows"]], key=lambda row: row["p"])
    by_hand = np.maximum.accumulate([min(1.0, (4 - rank) * row["p"]) for rank, row in enumerate(order)])
    assert [row["p_holm"] for row in order] == pytest.approx(by_hand.tolist())


def test_a_further_pair_has_a_line_of_its_own(study: dict[str, Any]) -> None:
    scores = {arm: {1: results(SCORES[arm][1], 1), 2: results(SCORES[arm][2], 2)} for arm in SCORES}
    [pair] = compared([("warm", scores)], None)
    lines = render(study | {"pairs": [pair]}).splitlines()
    at = lines.index("against warm:")
    assert lines[at + 2].split()[:4] == ["plain", "2", "52.00", "-9.50"]
    assert "p is corrected for the 2 comparisons of this study (Holm)" in lines


def test_a_score_beside_a_difference_is_over_the_seeds_of_the_difference(study: dict[str, Any]) -> None:
    """Another seed of one arm is no part of its line; an arm that shares no seed has its own."""
    more = [{"arm": "warm", "seed": 3, "mean": 0.99}, {"arm": "alone", "seed": 9, "mean": 0.3}]
    lines = [line.split()[:4] for line in render(study | {"cells": [*study["cells"], *more]}).splitlines()]
    assert ["warm", "2", "61.50", "+9.50"] in lines and ["alone", "1", "30.00", "-"] in lines


def test_tasks_that_were_not_compared_are_named(study: dict[str, Any]) -> None:
    """Else a mean over fewer tasks would stand beside scores over all."""
    said = study | {"comparison": study["comparison"] | {"left_out": ["warm: s/other: other data"]}}
    assert "left out: warm: s/other: other data" in render(said).splitlines()


def test_read_outs_are_means_and_paired_differences(study: dict[str, Any]) -> None:
    cosine = {"plain": [0.30, 0.34], "warm": [0.50, 0.58]}
    cells = [
        cell | {"details": {"docs": {"mean_cosine": cosine[cell["arm"]][cell["seed"] - 1], "MRR@10": 0.1}, "sts": {}}}
        for cell in study["cells"]
    ]
    first = {"arm": "shared-stages", "mean": 0.4, "details": {"docs": {"mean_cosine": 0.2}}}
    shared = [first | {"seed": seed} for seed in (1, 2, 100)]
    lines = render(study | {"cells": cells, "shared_stages": shared}).splitlines()
    at = next(place for place, line in enumerate(lines) if line.startswith("read-outs"))
    assert lines[at + 2].split()[:5] == ["docs", "mean_cosine", "shared-stages", "20.00", "-12.00"]
    assert lines[at + 3].split() == ["docs", "mean_cosine", "plain", "32.00", "-", "-"]
    low, high = stats.t.interval(0.95, 1, 22, stats.sem([20, 24]))
    assert lines[at + 4].split() == [
        "docs",
        "mean_cosine",
        "warm",
        "54.00",
        "+22.00",
        f"{low:+.2f}",
        "to",
        f"{high:+.2f}",
    ]
    assert "read-outs" not in render(study) and "MRR" not in "".join(lines[at:])


def test_what_is_missing_or_has_failed_is_said(study: dict[str, Any]) -> None:
    missing = {"missing": ["b/1", "b/2"], "cells": [], "comparison": None}
    some = study | {"failed": {"s/b/seed-1": "failed: hunger"}} | missing
    assert render(some).splitlines() == ["NOT WHOLE, missing cells: b/*", "s/b/seed-1: failed: hunger"]
    arm = study["cells"][0]["arm"]
    assert render(study | {"missing": [f"{arm}/8", f"{arm}/9"]}).splitlines()[-1].endswith(f"cells: {arm}/8, {arm}/9")
    smoke = render(study | {"smoke": True})
    assert smoke == "tiny: smoke test of 4 cells; its scores mean nothing"
    assert compared([("plain", {"warm": {1: results(0.5, 1)}}), ("plain", {})], None) == [None, None]
