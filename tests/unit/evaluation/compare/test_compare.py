"""Differences and their intervals: against scipy's tests where one has the same question, else by simulation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, v_measure_score

from embedwright.errors import InputError
from embedwright.evaluation.compare import compare as module
from embedwright.evaluation.compare.compare import MEAN, NONE_SHOWN, Candidate, Comparison, Difference, compare
from embedwright.evaluation.results import Result, Results

Floats = np.ndarray[Any, np.dtype[np.float64]]


def task(name: str, score: Floats, kind: str = "retrieval", with_items: bool = True) -> Result:
    items = {"score": score, "id": np.arange(len(score))} if with_items else {}
    return Result(name, kind, "nDCG@10", float(np.mean(score)), items=items)


def candidate(name: str, *tasks: Result, suite: str = "dev") -> Candidate:
    return Candidate(name, {None: [Results(suite, tasks, 1.0)]})


def of_seeds(name: str, seeds: Mapping[int, Floats], with_items: bool = True) -> Candidate:
    return Candidate(
        name, {seed: [Results("dev", (task("t", score, "x", with_items),), 1.0)] for seed, score in seeds.items()}
    )


def only(comparison: Comparison) -> Difference:
    (row,) = comparison.rows
    return row


# ---------------------------------------------------------------------------------------------------- one task


def test_a_difference_of_means_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    ours = rng.random(300)
    theirs = np.clip(ours + rng.normal(0.02, 0.1, 300), 0, 1)
    row = only(compare([candidate("a", task("t", ours)), candidate("b", task("t", theirs))]))
    expected = stats.ttest_rel(theirs, ours)
    low, high = expected.confidence_interval()
    assert row.difference == pytest.approx(100 * (theirs - ours).mean(), abs=1e-9)
    assert (row.low, row.high) == pytest.approx((100 * low, 100 * high), abs=0.03)  # of a width of 2.3
    assert row.p == pytest.approx(expected.pvalue, rel=0.3)
    assert (row.baseline, row.score) == pytest.approx((100 * ours.mean(), 100 * theirs.mean()))
    assert row.smallest == pytest.approx(2.81 * row.error, rel=0.01)  # type: ignore[operator]
    assert row.over == "items"


def test_the_interval_is_near_scipys_percentile_interval() -> None:
    rng = np.random.default_rng(2)
    gold = rng.integers(0, 5, 200).astype(float)
    cosines = [gold + rng.normal(0, scale, 200) for scale in (2.5, 2.0)]
    sides = [
        candidate(
            name,
            Result("t", "sts", "s", stats.spearmanr(gold, cosine)[0], items={"cosine": cosine, "gold": gold}),
        )
        for name, cosine in zip("ab", cosines, strict=True)
    ]
    expected = stats.bootstrap(
        (gold, *cosines),
        lambda y, a, b: stats.spearmanr(y, b)[0] - stats.spearmanr(y, a)[0],
        paired=True,
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    row, width = only(compare(sides)), np.ptp([*expected.confidence_interval]) * 100
    assert row.error == pytest.approx(100 * expected.standard_error, rel=0.08)
    assert (row.low, row.high) == pytest.approx([100 * end for end in expected.confidence_interval], abs=width / 10)


def test_equal_results_differ_by_nothing_and_nothing_is_claimed() -> None:
    score = np.random.default_rng(3).random(50)
    sides = [candidate(name, task("t", score), task("u", score, "sts")) for name in "ab"]
    for row in compare(sides).rows:
        assert (row.difference, row.low, row.high, row.p, row.p_holm, row.claim) == (0, 0, 0, 1, 1, NONE_SHOWN)
        assert row.p_equivalent is None
    assert {row.claim for row in compare(sides, equivalent=0.5).rows} == {"within 0.5"}


@pytest.mark.parametrize("items", [3, 500])
def test_the_same_items_in_another_order_differ_by_nothing(items: int) -> None:
    rng = np.random.default_rng(18)
    for _ in range(20):
        score, order = rng.random(items), rng.permutation(items)
        other = Result(
            "t", "retrieval", "nDCG@10", sum(score[order]) / items, items={"score": score[order], "id": order}
        )
        row = only(compare([candidate("a", task("t", score)), candidate("b", other)], draws=100))
        assert (row.difference, row.error, row.p, row.claim) == (0, 0, 1, NONE_SHOWN)


def test_a_single_item_shows_no_noise() -> None:
    sides = [candidate(name, task("t", np.array([score]))) for name, score in (("a", 0.1), ("b", 0.9))]
    assert only(compare(sides)).over == ""


def test_the_same_seed_gives_the_same_comparison() -> None:
    rng = np.random.default_rng(4)
    sides = [candidate(name, task("t", rng.random(50))) for name in "abc"]
    first = compare(sides, draws=200)
    assert compare(sides, draws=200).to_json() == first.to_json()
    assert compare(sides, draws=200, seed=2).rows[0].error != first.rows[0].error
    assert compare(sides, draws=100).rows[0].error != first.rows[0].error
    # one more beside it changes nothing but Holm's correction
    assert compare(sides[:2], draws=200).rows[0] == replace(first.rows[0], p_holm=first.rows[0].p)
    assert json.loads(first.to_json())["rows"][1]["candidate"] == "c"


def test_a_task_without_items_has_a_difference_without_an_interval() -> None:
    sides = [
        candidate(name, task("t", np.full(5, value), with_items=False)) for name, value in (("a", 0.5), ("b", 0.6))
    ]
    row = only(compare(sides, equivalent=100))
    assert row.difference == pytest.approx(10)
    assert (row.over, row.low, row.p, row.p_holm, row.p_equivalent, row.smallest, row.claim) == ("", *[None] * 5, "")


def test_items_that_give_another_score_are_not_used() -> None:
    score = np.linspace(0, 1, 50)
    odd = replace(task("t", score), value=0.4)
    comparison = compare([candidate("a", task("t", score)), candidate("b", odd)])
    assert only(comparison).over == ""
    assert comparison.left_out == ("b: dev/t has no interval: its items give another score",)


# ---------------------------------------------------------------------------------------------------- claims


def sides_apart(*shifts: float, noise: float = 0.05) -> list[Candidate]:
    rng = np.random.default_rng(5)
    base = rng.random(400)
    tasks = [base, *(base + shift + rng.normal(0, noise, 400) for shift in shifts)]
    return [candidate(f"m{number}", task("t", score)) for number, score in enumerate(tasks)]


def test_claims_need_a_corrected_p_value() -> None:
    rows = compare(sides_apart(0.02, -0.02, 0.0005)).rows
    assert [row.claim for row in rows] == ["higher", "lower", NONE_SHOWN]
    p = sorted(row.p for row in rows if row.p is not None)
    assert sorted(row.p_holm for row in rows if row.p_holm is not None) == pytest.approx(
        [3 * p[0], max(3 * p[0], 2 * p[1]), p[2]]
    )
    # alone it is shown; as one of many it is not
    alone, *_ = compare(sides_apart(0.0055, *[0.0] * 9)[:2]).rows
    among, *_ = compare(sides_apart(0.0055, *[0.0] * 9)).rows
    assert (alone.p, alone.claim, among.claim) == (among.p, "higher", NONE_SHOWN)
    assert alone.low is not None
    assert alone.low > 0


def test_no_difference_is_claimed_only_by_the_two_one_sided_tests() -> None:
    clear, wide = compare(sides_apart(0.0002, noise=0.01), equivalent=0.5), compare(sides_apart(0.0), equivalent=0.5)
    assert only(clear).claim == "within 0.5"
    assert only(wide).claim == NONE_SHOWN  # its interval covers 0, and much more than 0.5
    assert only(compare(sides_apart(0.003, noise=0.01), equivalent=0.5)).claim == "higher, within 0.5"
    for bound in (0, -0.5, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"equivalent: {bound:g} points is no bound"):
            compare(sides_apart(0.0), equivalent=bound)


# ---------------------------------------------------------------------------------------------------- seeds


def test_seeds_without_items_are_compared_by_a_paired_t_test() -> None:
    rng = np.random.default_rng(6)
    ours = rng.normal(0.5, 0.05, 5)
    theirs = ours + rng.normal(0.01, 0.01, 5)
    sides = [
        of_seeds(name, {seed: np.array([score]) for seed, score in enumerate(scores)}, with_items=False)
        for name, scores in (("a", ours), ("b", theirs))
    ]
    row, expected = only(compare(sides)), stats.ttest_rel(theirs, ours)
    assert row.over == "seeds"
    assert row.p == pytest.approx(expected.pvalue, rel=0.1)
    assert (row.low, row.high) == pytest.approx(
        [100 * end for end in expected.confidence_interval()],
        abs=0.05 * abs(row.high - row.low),  # type: ignore[operator]
    )
    # other numbers are no pairs
    apart = Candidate("b", {seed + 100: results for seed, results in sides[1].seeds.items()})
    row = only(compare([sides[0], apart]))
    half = 100 * stats.t.ppf(0.975, 4) * np.hypot(stats.sem(ours), stats.sem(theirs))
    assert row.high - row.low == pytest.approx(2 * half)  # type: ignore[operator]
    assert row.p is not None
    assert row.p > stats.ttest_ind(theirs, ours, equal_var=False).pvalue  # Welch's is known to be too sure


def test_seeds_are_paired_by_number_whatever_their_order() -> None:
    rng = np.random.default_rng(7)
    ours = {seed: rng.random(40) for seed in (1, 2, 10)}
    theirs = {seed: ours[seed] + 0.01 for seed in (10, 1, 2)}
    row = only(compare([of_seeds("a", ours), of_seeds("b", theirs)]))
    assert row.difference == pytest.approx(1)
    assert row.over == ""  # nothing moves: neither items nor seeds show any noise


def test_a_task_that_a_seed_lacks_is_left_out() -> None:
    scores = {seed: np.random.default_rng(seed).random(20) for seed in (1, 2)}
    whole = of_seeds("a", scores)
    more = [Results("dev", (task("u", scores[1]),), 1.0)]
    part = Candidate("b", {1: [*whole.seeds[1], *more], 2: whole.seeds[2]})
    comparison = compare([whole, part])
    assert [row.task for row in comparison.rows] == ["t"]
    assert comparison.left_out == ("b: dev/u is of 1 seeds, not of 2",)


# ---------------------------------------------------------------------------------------------------- means


@pytest.mark.parametrize(("count", "over"), [(3, "items"), (6, "tasks, items")])
def test_means_over_types_and_tasks(count: int, over: str) -> None:
    """Of few tasks, the interval is about these; of many, also about others like them."""
    rng = np.random.default_rng(8)
    kinds = [*["retrieval"] * count, "sts"]
    scores = [[rng.random(200) for _ in kinds] for _ in range(2)]
    sides = [
        candidate(name, *(task(f"t{n}", score, kind) for n, (score, kind) in enumerate(zip(own, kinds, strict=True))))
        for name, own in zip("ab", scores, strict=True)
    ]
    rows = compare(sides).rows
    differences = [100 * (theirs.mean() - ours.mean()) for ours, theirs in zip(*scores, strict=True)]
    means = {row.kind: row for row in rows if row.task == MEAN}
    assert [row.task for row in rows] == [*(f"t{n}" for n in range(count + 1)), *[MEAN] * 3]
    assert means["retrieval"].difference == pytest.approx(np.mean(differences[:-1]))
    assert means["types"].difference == pytest.approx((np.mean(differences[:-1]) + differences[-1]) / 2)
    assert means["tasks"].difference == pytest.approx(np.mean(differences))
    assert {row.over for row in means.values()} == {over}
    # the variances of the tasks inside their type, and of all items, add up
    *items, single = [row.error**2 for row in rows[: count + 1]]  # type: ignore[operator]
    of_type = sum(items) / count**2 + (np.var(differences[:-1], ddof=1) / count if "tasks" in over else 0)
    assert means["retrieval"].error == pytest.approx(np.sqrt(of_type), rel=0.03)
    assert means["types"].error == pytest.approx(np.sqrt(of_type + single) / 2, rel=0.03)
    assert means["tasks"].error == pytest.approx(np.sqrt(count**2 * of_type + single) / (count + 1), rel=0.03)


def test_the_mean_of_one_type_without_items_is_a_paired_t_test_over_its_tasks() -> None:
    rng = np.random.default_rng(9)
    ours = rng.random(12)
    theirs = ours + rng.normal(0.02, 0.03, 12)
    sides = [
        candidate(name, *(task(f"t{n}", np.array([score]), with_items=False) for n, score in enumerate(scores)))
        for name, scores in (("a", ours), ("b", theirs))
    ]
    *tasks, mean = compare(sides).rows
    assert {row.over for row in tasks} == {""}
    assert (mean.task, mean.kind, mean.metric, mean.over) == (MEAN, "tasks", "12 tasks", "tasks")
    assert mean.p == pytest.approx(stats.ttest_rel(theirs, ours).pvalue, rel=0.1)


def test_a_mean_has_no_interval_if_one_of_its_tasks_shows_no_noise() -> None:
    rng = np.random.default_rng(10)
    bare = [task("u", rng.random(5), "sts", with_items=False) for _ in range(2)]
    sides = [candidate(name, task("t", rng.random(50)), one) for name, one in zip("ab", bare, strict=True)]
    rows = compare(sides).rows
    assert [(row.task, row.over) for row in rows] == [("t", "items"), ("u", ""), (MEAN, "")]


def with_bare(rng: np.random.Generator, count: int, noise: float = 0.1) -> list[Candidate]:
    """Two equal models: `count` tasks with items, and one of another type without."""
    pairs = [(score := rng.normal(0.5, 0.1, 60), score + rng.normal(0, noise, 60)) for _ in range(count + 1)]
    return [
        candidate(
            name,
            *(task(f"t{n}", both[side]) for n, both in enumerate(pairs[1:])),
            task("bare", pairs[0][side], "summarization", with_items=False),
        )
        for side, name in enumerate("ab")
    ]


def test_a_mean_names_the_tasks_whose_items_it_leaves_out() -> None:
    rows = compare(with_bare(np.random.default_rng(19), 5)).rows
    assert (rows[5].task, rows[5].over, rows[5].without) == ("bare", "", ())
    kind, types, tasks = rows[6:]
    assert (kind.kind, kind.over, kind.without) == ("retrieval", "items", ())
    assert (types.kind, types.over, types.without) == ("types", "", ())  # half of it shows no noise
    assert (tasks.kind, tasks.over, tasks.without) == ("tasks", "items", ("bare",))
    assert tasks.error == pytest.approx(kind.error * 5 / 6, rel=1e-6)  # type: ignore[operator]
    # of many tasks, those of a type with several show their noise beside each other
    many = compare(with_bare(np.random.default_rng(19), 6)).rows[-1]
    assert (many.over, many.without) == ("tasks, items", ("bare",))


def test_a_mean_with_a_task_without_items_still_claims_little_that_is_false() -> None:
    rng = np.random.default_rng(20)
    rows = [compare(with_bare(rng, 4), draws=100).rows[-1] for _ in range(300)]
    assert {row.without for row in rows} == {("bare",)}  # at a fifth of the mean, the most there may be
    assert np.mean([row.p is not None and row.p < 0.05 for row in rows]) <= 0.11  # 0.08 is expected


def test_tasks_without_items_are_named_beside_seeds() -> None:
    rng = np.random.default_rng(21)
    sides = []
    for name in "ab":
        tasks = {seed: (task("t", rng.random(20)), task("u", rng.random(20), "x", False)) for seed in (1, 2, 3)}
        sides.append(Candidate(name, {seed: [Results("dev", both, 1.0)] for seed, both in tasks.items()}))
    assert [(row.task, row.over, row.without) for row in compare(sides).rows] == [
        ("t", "seeds, items", ()),
        ("u", "seeds", ("u",)),
        (MEAN, "seeds, items", ("u",)),
    ]


@pytest.mark.parametrize("side", [0, 1])
def test_the_items_that_one_seed_lacks_are_missed_by_name(side: int) -> None:
    """One file of items is gone: no row of that task covers items, which would else narrow its interval in silence."""
    rng = np.random.default_rng(22)
    sides = [of_seeds(name, {seed: rng.random(20) for seed in (1, 2, 3)}) for name in "ab"]
    [found] = sides[side].seeds[2]
    sides[side] = Candidate(
        "ab"[side], {**sides[side].seeds, 2: [replace(found, rows=(replace(found.rows[0], items={}),))]}
    )
    comparison = compare(sides)
    assert (only(comparison).over, only(comparison).without) == ("seeds", ("t",))
    assert comparison.left_out == (f"b: the items of dev/t are in no interval: {'ab'[side]} lacks some",)


def test_suites_have_means_of_their_own() -> None:
    score = np.linspace(0, 1, 20)
    seeds = {None: [Results(suite, (task("t", score), task("u", score)), 1.0) for suite in ("dev", "air")]}
    rows = compare([Candidate("a", seeds), Candidate("b", seeds)]).rows
    assert [(row.suite, row.metric) for row in rows if row.task == MEAN] == [("dev", "2 tasks"), ("air", "2 tasks")]


# ---------------------------------------------------------------------------------------------------- not the same


def test_only_what_both_have_is_compared_and_the_rest_is_named() -> None:
    score = np.linspace(0, 1, 20)
    ours = candidate("a", task("t", score), task("mine", score), task("data", score), task("size", score))
    theirs = candidate("b", task("t", score), task("data", score), task("yours", score), task("size", score[1:]))
    theirs.seeds[None][0].rows[1].items["id"][0] = 99  # type: ignore[index]
    comparison = compare([ours, theirs])
    assert [row.task for row in comparison.rows] == ["t"]
    assert comparison.left_out == (
        "b: dev/mine is of a alone",
        "b: dev/data has other items: 2 are in one alone, such as '0'",
        "b: dev/size has other items: their number, their kind or their splits differ",
        "b: dev/yours is of b alone",
    )


def test_what_has_no_score_is_left_out_by_name() -> None:
    score = np.linspace(0, 1, 20)
    nan = replace(task("u", score, with_items=False), value=float("nan"))
    whole = candidate("a", task("t", score), task("u", score), task("v", score))
    part = candidate("b", task("t", score), nan, replace(task("v", score), value=float("inf")))
    reasons = ["b: dev/u has a score that is no number", "b: dev/v has a score that is no number"]
    for sides in ([whole, part], [part, whole]):
        comparison = compare(sides)
        assert [row.task for row in comparison.rows] == ["t"]
        assert [*comparison.left_out] == reasons
        comparison.to_json()
    with pytest.raises(InputError, match="nothing to compare with b: dev/u has a score that is no number"):
        compare([candidate("b", nan), candidate("a", task("u", score))])


def test_nothing_in_common_is_an_error_that_says_why() -> None:
    score = np.linspace(0, 1, 20)
    with pytest.raises(InputError, match="b has nothing to compare with a: dev/t is of a alone; other/t is of b alone"):
        compare([candidate("a", task("t", score)), candidate("b", task("t", score), suite="other")])
    with pytest.raises(InputError, match="a baseline and at least one other"):
        compare([candidate("a", task("t", score))])


# ---------------------------------------------------------------------------------------------------- coverage


def covered(row: Difference, truth: float) -> bool:
    assert row.low is not None
    assert row.high is not None
    return row.low <= 100 * truth <= row.high


def simulated_seeds(rng: np.random.Generator, seeds: int, items: int, spread: float, truth: float) -> list[Candidate]:
    """Two recipes: items are hard or easy for both, seeds are good or bad, and every score has its own noise."""
    item, gain = rng.normal(0.5, 0.2, items), rng.normal(truth, 0.2, items)
    ours = {seed: item + rng.normal(0, spread) + rng.normal(0, 0.1, items) for seed in range(seeds)}
    theirs = {seed: item + gain + rng.normal(0, spread) + rng.normal(0, 0.1, items) for seed in range(seeds)}
    return [of_seeds("a", ours), of_seeds("b", theirs)]


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (3, 0.0), (3, 0.1)])
def test_intervals_cover_the_truth(seeds: int, spread: float) -> None:
    rng = np.random.default_rng(11)
    found = [covered(only(compare(simulated_seeds(rng, seeds, 60, spread, 0.03), draws=300)), 0.03) for _ in range(150)]
    assert 0.90 <= np.mean(found) <= 1


def simulated_task(kind: str, rng: np.random.Generator, items: int) -> list[Candidate]:
    gold = rng.integers(0, 2 if kind == "pair" else 5, items)
    sides = []
    for name, quality in (("a", 0.6), ("b", 0.8)):
        if kind == "clustering":
            # every run of k-means is a little better or worse
            kept = [rng.random(items) < quality - 0.2 + rng.normal(0, 0.02) for _ in range(3)]
            cluster = np.stack([np.where(keep, gold, rng.integers(0, 5, items)) for keep in kept])
            value = float(np.mean([v_measure_score(gold, run) for run in cluster]))
            result = Result("t", kind, "m", value, items={"cluster": cluster, "gold": gold})
        else:
            cosine = quality * gold + rng.normal(0, 1, items)
            value = average_precision_score(gold, cosine) if kind == "pair" else stats.spearmanr(gold, cosine)[0]
            labels = gold if kind == "pair" else gold.astype(float)
            result = Result("t", kind, "m", float(value), items={"cosine": cosine, "gold": labels})
        sides.append(candidate(name, result))
    return sides


def claims_of_one_against(seeds: int, runs: int) -> float:
    """Compares one run of a recipe with several of the same recipe, often; returns how often a claim is made."""
    rng, claims = np.random.default_rng(15), 0
    for _ in range(runs):
        item = rng.normal(0.5, 0.05, 100)
        found = {seed: item + rng.normal(0, 0.02) + rng.normal(0, 0.01, 100) for seed in range(seeds + 1)}
        one, several = of_seeds("a", {0: found.pop(0)}), of_seeds("b", found)
        sides = [one, several] if rng.random() < 0.5 else [several, one]
        claims += only(compare(sides, draws=100)).claim != NONE_SHOWN
    return claims / runs


@pytest.mark.parametrize("seeds", [3, 10])
def test_one_run_is_as_noisy_as_those_with_other_seeds(seeds: int) -> None:
    assert claims_of_one_against(seeds, 200) <= 0.07


def test_the_noise_of_one_run_is_that_of_the_other_sides_seeds() -> None:
    scores = np.random.default_rng(16).normal(0.5, 0.05, 5)
    several = of_seeds("b", {seed: scores[[seed]] for seed in range(5)}, with_items=False)
    one = of_seeds("a", {7: np.array([0.5])}, with_items=False)
    expected = stats.ttest_ind(scores, [0.5])  # one variance, which the single value says nothing about
    for sides in ([one, several], [several, one]):
        row = only(compare(sides))
        assert (row.over, row.p) == ("seeds", pytest.approx(expected.pvalue, rel=1e-6))
    # a model that was not trained has no seeds that could differ
    row = only(compare([candidate("a", task("t", np.array([0.5]), "x", with_items=False)), several]))
    assert row.p == pytest.approx(stats.ttest_1samp(scores, 0.5).pvalue, rel=1e-6)


@pytest.mark.parametrize("items", [(2,), (2, 200), (3, 200)])
def test_intervals_of_few_items_cover_the_truth(items: tuple[int, ...]) -> None:
    rng, found = np.random.default_rng(17), []
    for _ in range(300):
        scores = [(score := rng.normal(0.5, 0.1, n), score + rng.normal(0, 0.1, n)) for n in items]
        tasks = [[task(f"t{n}", both[side]) for n, both in enumerate(scores)] for side in (0, 1)]
        found.append(covered(compare([candidate("a", *tasks[0]), candidate("b", *tasks[1])], draws=200).rows[-1], 0))
    assert 0.91 <= np.mean(found) <= 0.99


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sts", "pair", "clustering"])
def test_intervals_of_every_metric_cover_the_truth(kind: str) -> None:
    rng = np.random.default_rng(12)
    rows = [only(compare(simulated_task(kind, rng, 400), draws=500)) for _ in range(300)]
    truth = float(np.mean([row.difference for row in rows])) / 100
    # what runs of k-means do by chance to single items counts twice, as noise of runs and of items
    assert 0.92 <= np.mean([covered(row, truth) for row in rows]) <= (1 if kind == "clustering" else 0.98)


@pytest.mark.long
@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (2, 0.02), (3, 0.05), (5, 0.05), (5, 0.3)])
def test_intervals_over_seeds_cover_the_truth(seeds: int, spread: float) -> None:
    rng = np.random.default_rng(13)
    found = [
        covered(only(compare(simulated_seeds(rng, seeds, 200, spread, 0.03), draws=1000)), 0.03) for _ in range(500)
    ]
    assert 0.94 <= np.mean(found) <= 1


@pytest.mark.long
def test_a_true_difference_of_the_smallest_size_is_found_in_four_of_five() -> None:
    rng = np.random.default_rng(14)
    smallest = 0.01 * (only(compare(simulated_seeds(rng, 1, 200, 0.0, 0.0))).smallest or 0)
    found = [
        (only(compare(simulated_seeds(rng, 1, 200, 0.0, smallest), draws=1000)).p or 0) < module.statistics.LEVEL
        for _ in range(500)
    ]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)
