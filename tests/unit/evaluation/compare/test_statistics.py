"""The metrics of draws against scipy and sklearn on the drawn items, and the tests against scipy's."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, v_measure_score

from embedwright.evaluation.compare import statistics
from embedwright.evaluation.compare.statistics import Floats


def counts(draws: int, items: int, seed: int = 0) -> tuple[Floats, list[np.ndarray]]:
    """Draws of our own making: their counts, and the items that were taken."""
    taken = np.random.default_rng(seed).integers(0, items, size=(draws, items))
    return np.stack([np.bincount(row, minlength=items) for row in taken]).astype(float), list(taken)


@pytest.mark.parametrize(("items", "levels"), [(200, 1000), (60, 5), (7, 3)])
def test_metrics_of_draws_are_those_of_the_drawn_items(items: int, levels: int) -> None:
    rng = np.random.default_rng(items)
    of_draws, taken = counts(50, items)
    score = np.round(rng.random(items) * levels).astype(np.float32) / levels  # with ties
    grade, gold = rng.integers(0, 6, items).astype(float), rng.integers(0, 2, items)
    cluster, label = rng.integers(0, 4, items), rng.integers(0, 5, items)
    with warnings.catch_warnings(action="ignore"):  # a draw without a positive, or of one value
        expected = [
            (
                score[rows].astype(float).mean(),
                np.nan_to_num(stats.spearmanr(score[rows], grade[rows])[0]),
                np.nan_to_num(stats.pearsonr(score[rows].astype(float), grade[rows])[0]),
                average_precision_score(gold[rows], score[rows]),
                v_measure_score(label[rows], cluster[rows]),
            )
            for rows in taken
        ]
    found = [
        statistics.mean(of_draws, score),
        statistics.spearman(of_draws, score, grade),
        statistics.pearson(of_draws, score, grade),
        statistics.average_precision(of_draws, score, gold),
        statistics.v_measure(of_draws, cluster, label),
    ]
    np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=0, atol=1e-12)


def test_metrics_of_draws_that_leave_nothing_to_measure() -> None:
    one_item = np.array([[3.0, 0, 0]])
    assert statistics.spearman(one_item, np.arange(3.0), np.arange(3.0)).tolist() == [0]
    assert statistics.pearson(one_item, np.array([0.1, 1, 2]), np.arange(3.0)).tolist() == [0]
    assert statistics.pearson(one_item + 2, np.full(3, 0.1), np.arange(3.0)).tolist() == [0]
    assert statistics.average_precision(one_item, np.arange(3.0), np.array([0, 1, 1])).tolist() == [0]
    assert statistics.v_measure(one_item, np.arange(3), np.arange(3)).tolist() == [v_measure_score([0] * 3, [0] * 3)]


def test_a_draw_takes_as_many_items_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = statistics.resamples(np.random.default_rng(3), 20, 4000)
    assert (whole.sum(axis=1) == 20).all()
    assert whole.mean(axis=0) == pytest.approx(np.ones(20), abs=0.08)
    assert whole.var() == pytest.approx(1 - 1 / 20, abs=0.03)  # of a multinomial count
    monkeypatch.setattr(statistics, "CHUNK", 20 * 7)
    blocks = list(statistics.resamples(np.random.default_rng(3), 20, 4000))
    assert {len(block) for block in blocks} == {7, 4000 % 7}
    assert np.array_equal(np.concatenate(blocks), whole)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_noise_of_a_mean_is_that_of_a_bootstrap_that_takes_one_less(count: int) -> None:
    rng = np.random.default_rng(count)
    values = rng.normal(size=count)
    drawn = values[rng.integers(0, count, size=(40_000, count - 1))].mean(axis=1)
    assert statistics.of_mean(values) == (pytest.approx(drawn.var(), rel=0.03), count - 1)


@pytest.mark.parametrize("items", [2, 3, 30])
def test_the_noise_of_drawn_items_is_that_of_their_mean(items: int) -> None:
    values = np.random.default_rng(items).normal(size=items)
    (counts_BN,) = statistics.resamples(np.random.default_rng(1), items, 20_000)
    variance, degrees = statistics.of_mean(values)
    assert statistics.of_draws(statistics.mean(counts_BN, values)[None], [items]) == [
        (pytest.approx(variance, rel=0.04), degrees)
    ]


def test_the_noise_of_groups_has_the_degrees_of_welch() -> None:
    rng = np.random.default_rng(4)
    ours, theirs = rng.normal(size=3), rng.normal(scale=3, size=5)
    variance, degrees = statistics.of_groups([ours, theirs, np.ones(1)])
    expected = stats.ttest_ind(theirs, ours, equal_var=False)
    assert degrees == pytest.approx(expected.df)
    assert np.sqrt(variance) == pytest.approx((theirs.mean() - ours.mean()) / expected.statistic)
    assert statistics.of_groups([np.ones(1)])[0] == 0


def test_interval_and_p_value_of_one_source_are_those_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(size=12), rng.normal(0.6, size=12)
    difference, noise = float((theirs - ours).mean()), [statistics.of_mean(theirs - ours)]
    expected, half = stats.ttest_rel(theirs, ours), statistics.half_width(noise)
    assert statistics.error_of(noise) == pytest.approx(stats.sem(theirs - ours))
    assert statistics.p_value(difference, noise) == pytest.approx(expected.pvalue, rel=1e-6)
    assert (difference - half, difference + half) == pytest.approx(tuple(expected.confidence_interval()), rel=1e-9)
    assert statistics.p_value(30.0, [(1.0, 10**9)]) == pytest.approx(2 * stats.norm.sf(30), rel=1e-5)
    assert statistics.p_value(0.0, noise) == 1


@pytest.mark.parametrize("shift", [0.0, 0.3, -0.3, 0.7])
def test_equivalence_is_two_one_sided_t_tests(shift: float) -> None:
    values = np.random.default_rng(2).normal(shift, 0.5, size=20)
    above = stats.ttest_1samp(values, -0.5, alternative="greater").pvalue
    below = stats.ttest_1samp(values, 0.5, alternative="less").pvalue
    found = statistics.p_equivalent(float(values.mean()), [statistics.of_mean(values)], 0.5)
    assert found == pytest.approx(max(above, below), rel=1e-6)


def test_without_any_noise_only_what_is_equal_is_equivalent() -> None:
    assert (statistics.p_value(0.0, []), statistics.p_equivalent(0.0, [], 0.5)) == (1.0, 0.0)
    assert statistics.p_equivalent(0.5, [], 0.5) == 0.5
    assert statistics.p_equivalent(0.6, [], 0.5) == 1.0


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("of_seeds", [0.0, 0.3, 3.0, 10.0])
def test_the_interval_of_several_sources_covers_the_truth(seeds: int, of_seeds: float) -> None:
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(2000):
        noise = [(of_seeds * rng.chisquare(seeds - 1) / (seeds - 1), seeds - 1), (1.0, 400)]
        missed += abs(rng.normal(0, np.sqrt(of_seeds + 1))) > statistics.half_width(noise)
    assert 0.005 <= missed / 2000 <= 0.062


@pytest.mark.parametrize(
    "noise", [[(0.5, 1), (0.3, 9), (1.0, 400)], [(0.1, 2), (1.0, 300)], [(3.0, 4)], [(1.0, 2), (0.0, 9)]]
)
def test_the_p_value_is_005_where_the_interval_ends_at_no_difference(noise: list[tuple[float, float]]) -> None:
    half = statistics.half_width(noise)
    assert statistics.p_value(-half, noise) == pytest.approx(0.05)
    assert statistics.p_value(1.01 * half, noise) < 0.05 < statistics.p_value(0.99 * half, noise)
    assert min(degrees for _, degrees in noise) <= statistics.degrees_of(noise) <= max(d for _, d in noise)


@pytest.mark.parametrize("of_seeds", [0.1, 1.0])
def test_a_small_p_value_is_as_rare_as_it_says(of_seeds: float) -> None:
    """As Holm needs it for many comparisons. What few values add a little to does not become their t alone."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(4000):
        noise = [(of_seeds * rng.chisquare(2) / 2, 2.0), (1.0, 400.0)]
        found.append(statistics.p_value(rng.normal(0, np.sqrt(of_seeds + 1)), noise))
    assert np.mean(np.array(found) < 0.005) <= 0.008
    assert statistics.p_value(5.0, [(0.1, 2), (1.0, 400)]) < 0.002


@pytest.mark.parametrize(("degrees", "errors"), [(10**6, 2.8016), (30, 2.8966), (4, 3.7174)])
def test_the_smallest_difference_that_is_seen_is_found_in_four_of_five_experiments(degrees: int, errors: float) -> None:
    smallest = statistics.smallest_seen([(4.0, degrees)])
    assert smallest == pytest.approx(2.0 * errors, rel=1e-3)
    rng = np.random.default_rng(5)
    difference = rng.normal(smallest, 2.0, size=4000)
    variance = 4.0 * rng.chisquare(degrees, size=4000) / degrees
    found = [
        abs(each) > statistics.half_width([(noise, degrees)]) for each, noise in zip(difference, variance, strict=True)
    ]
    assert np.mean(found) == pytest.approx(0.8, abs=0.025)


def test_holm() -> None:
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7, 1.0]) == [1.0, 1.0, 1.0]
    assert statistics.holm([]) == []


def test_holm_rejects_what_its_stepwise_definition_rejects() -> None:
    rng = np.random.default_rng(6)
    for _ in range(200):
        p = (rng.random(6) ** 4).tolist()
        rejected = set()
        for rank, place in enumerate(np.argsort(p)):
            if p[place] > 0.05 / (6 - rank):
                break
            rejected.add(int(place))
        assert {place for place, value in enumerate(statistics.holm(p)) if value <= 0.05} == rejected
