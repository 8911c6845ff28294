"""The bootstrap of evaluation metrics, and the conclusions that it allows.

One draw of the bootstrap takes as many items as there are, with replacement. It is kept as counts: how often each item
was taken. The metrics here are computed from counts, many draws at once, and equal those of scipy and sklearn on the
items that were taken. The `[eval]` extra is imported where it is used.

Shapes: `B` draws, `N` items, `G` groups of items.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Noise = tuple[float, float]  # the variance of a difference that comes from one source, and its degrees of freedom

CHUNK = 2_000_000  # counts that are held at once
LEVEL = 0.05  # the error rate of intervals (95 %), of claims after Holm, and of each one-sided test
POWER = 0.8


def resamples(rng: np.random.Generator, items: int, draws: int) -> Iterator[Floats]:
    """Yields the counts of all draws in blocks (B, N). The same generator state gives the same draws."""
    step = max(1, CHUNK // items)
    for first in range(0, draws, step):
        block = min(step, draws - first)
        taken_BN = rng.integers(0, items, size=(block, items)) + np.arange(block)[:, None] * items
        yield np.bincount(taken_BN.ravel(), minlength=block * items).reshape(block, items).astype(np.float64)


# ---------------------------------------------------------------------------------------------------- metrics


def mean(counts_BN: Floats, score_N: NDArray[np.floating]) -> Floats:
    """Returns the mean score of the items of each draw."""
    drawn_B: Floats = counts_BN @ score_N.astype(np.float64) / counts_BN.sum(axis=1)
    return drawn_B


def spearman(counts_BN: Floats, left_N: NDArray[np.floating], right_N: NDArray[np.floating]) -> Floats:
    """Returns Spearman's correlation in each draw, with mean ranks for ties; 0 where all of one side are equal."""
    return _correlation(counts_BN, _centred_ranks(counts_BN, left_N), _centred_ranks(counts_BN, right_N))


def pearson(counts_BN: Floats, left_N: NDArray[np.floating], right_N: NDArray[np.floating]) -> Floats:
    """Returns Pearson's correlation in each draw; 0 where all of one side are equal."""
    return _correlation(counts_BN, _centred(counts_BN, left_N), _centred(counts_BN, right_N))


def _correlation(counts_BN: Floats, left: tuple[Floats, Floats], right: tuple[Floats, Floats]) -> Floats:
    (left_BN, left_B), (right_BN, right_B) = left, right
    together_B = np.einsum("bn,bn,bn->b", counts_BN, left_BN, right_BN)
    scale_B = np.sqrt(left_B * right_B)
    drawn_B: Floats = np.divide(together_B, scale_B, out=np.zeros_like(scale_B), where=scale_B > 0)
    return drawn_B


def _centred(counts_BN: Floats, value_N: NDArray[np.floating]) -> tuple[Floats, Floats]:
    """Returns each item's value less the mean, and the sum of the squares of each draw."""
    centred_BN = value_N.astype(np.float64) - mean(counts_BN, value_N)[:, None]
    centred_BN[np.abs(centred_BN) < 1e-12 * np.abs(value_N).max()] = 0  # rounding: in a draw of equal values, all is
    return centred_BN, np.einsum("bn,bn,bn->b", counts_BN, centred_BN, centred_BN)


def _centred_ranks(counts_BN: Floats, value_N: NDArray[np.floating]) -> tuple[Floats, Floats]:
    """Returns each item's rank less the mean rank, and the sum of the squared ranks of each draw."""
    group_N = np.unique(value_N, return_inverse=True)[1]
    count_BG = _in_groups(counts_BN, group_N)
    rank_BG = np.cumsum(count_BG, axis=1) - (count_BG - 1) / 2 - (counts_BN.sum(axis=1, keepdims=True) + 1) / 2
    return rank_BG[:, group_N], np.einsum("bg,bg,bg->b", count_BG, rank_BG, rank_BG)


def average_precision(
    counts_BN: Floats, score_N: NDArray[np.floating], gold_N: NDArray[np.integer | np.floating]
) -> Floats:
    """Returns sklearn's average precision in each draw, for `gold` of 0 and 1; 0 in a draw without a positive."""
    group_N = np.unique(-score_N, return_inverse=True)[1]  # the highest score first
    true_BG = _in_groups(counts_BN * gold_N, group_N)
    above_BG = np.cumsum(_in_groups(counts_BN, group_N), axis=1)
    precision_BG = np.cumsum(true_BG, axis=1) / np.maximum(above_BG, 1)
    drawn_B: Floats = np.einsum("bg,bg->b", true_BG, precision_BG) / np.maximum(true_BG.sum(axis=1), 1)
    return drawn_B


def v_measure(counts_BN: Floats, cluster_N: NDArray[np.integer], gold_N: NDArray[np.integer]) -> Floats:
    """Returns the v-measure in each draw: the items that are taken keep their cluster."""
    from scipy.special import entr

    (cluster_G, gold_G), pair_N = np.unique(np.stack([cluster_N, gold_N]), axis=1, return_inverse=True)
    pair_BG = _in_groups(counts_BN, pair_N.ravel())
    pair_BG /= pair_BG.sum(axis=1, keepdims=True)
    sides = (np.unique(side_G, return_inverse=True)[1] for side_G in (cluster_G, gold_G))
    cluster_B, gold_B = (entr(_in_groups(pair_BG, side_G)).sum(axis=1) for side_G in sides)
    scale_B = cluster_B + gold_B
    # twice the mutual information over both entropies; with one cluster and one class, all is in order
    information_B = scale_B - entr(pair_BG).sum(axis=1)
    drawn_B: Floats = np.divide(2 * information_B, scale_B, out=np.ones_like(scale_B), where=scale_B > 0)
    return drawn_B


def _in_groups(counts_BN: Floats, group_N: NDArray[np.integer]) -> Floats:
    """Adds up the counts of each group. `group_N` has the numbers 0, 1, ... and leaves none out."""
    order_N = np.argsort(group_N, kind="stable")
    starts_G = np.flatnonzero(np.diff(group_N[order_N], prepend=-1))
    count_BG: Floats = np.add.reduceat(counts_BN[:, order_N], starts_G, axis=1)
    return count_BG


# ---------------------------------------------------------------------------------------------------- conclusions


def of_mean(values: Floats) -> Noise:
    """Returns the noise of the mean of few values: training seeds, runs of k-means, tasks of one type.

    This is the variance of a bootstrap that takes one value less than there are, which alone is unbiased (Rao and Wu
    1988); it needs no drawing. A bootstrap's percentiles would be too narrow: those of three seeds cover at most 75 %.
    """
    return float(values.var(ddof=1)) / len(values), len(values) - 1


def of_one_more(values: Floats) -> Noise:
    """Returns the noise of the mean of `values` less one more value of their kind, whose own noise cannot be seen.

    It is that of all of them: a single training run against runs with several seeds.
    """
    variance, degrees = of_mean(values)
    return variance * (len(values) + 1), degrees


def of_draws(drawn_PB: Floats, items_P: Sequence[int]) -> list[Noise]:
    """Returns the noise of each part of a sum, drawn on items of its own (two at least), from its bootstrap.

    A bootstrap's variance lacks a factor n / (n - 1): of two items it is half of the truth. Each part keeps its degrees
    of freedom, since Welch's are too many where a part of few items makes most of the noise.
    """
    variances = drawn_PB.var(axis=1, ddof=1)
    return [(float(each) * n / (n - 1), n - 1) for each, n in zip(variances, items_P, strict=True)]


def of_groups(groups: Iterable[Floats]) -> Noise:
    """Returns the noise of a sum of means, each of one group: a bootstrap inside the groups. A single value has none.

    The degrees of freedom are those of Welch and Satterthwaite.
    """
    parts = [of_mean(values) for values in groups if len(values) > 1]
    variance, below = sum(part for part, _ in parts), sum(part**2 / degrees for part, degrees in parts)
    return variance, variance**2 / below if below > 0 else 1.0


def error_of(noise: Sequence[Noise]) -> float:
    """Returns the standard error of a difference: the root of its variances, added up."""
    return math.sqrt(sum(variance for variance, _ in noise))


def half_width(noise: Sequence[Noise]) -> float:
    """Returns half the width of an interval that misses the truth in at most 5 of 100 cases.

    Each source of noise gets Student's t for its own degrees of freedom. With one source, this is the t-test's.
    """
    from scipy.special import stdtrit

    return math.hypot(*(math.sqrt(variance) * stdtrit(degrees, 1 - LEVEL / 2) for variance, degrees in noise))


def degrees_of(noise: Sequence[Noise]) -> float:
    """Returns the degrees of freedom for which Student's t gives an interval as wide as `half_width`.

    Welch's degrees are too many where one source of few values makes most of the noise: intervals from two seeds would
    then miss the truth in up to 13 of 100 cases.
    """
    from scipy.optimize import brentq
    from scipy.special import stdtrit

    known = [degrees for variance, degrees in noise if variance > 0]
    fewest, most = min(known, default=1.0), max(known, default=1.0)
    quantile = half_width(noise) / error_of(noise) if known else math.inf

    def wider(degrees: float) -> float:
        return float(stdtrit(degrees, 1 - LEVEL / 2)) - quantile

    if wider(fewest) <= 0 or wider(most) >= 0:
        return fewest if wider(fewest) <= 0 else most
    return float(brentq(wider, fewest, most))


def smallest_seen(noise: Sequence[Noise]) -> float:
    """Returns the smallest true difference that is found four times of five: 2.8 standard errors, more with few seeds.

    This is the minimum detectable effect at 80 % power, for one comparison alone: among several, whose p-values are
    corrected, it is larger.
    """
    from scipy.special import stdtrit

    return half_width(noise) + float(stdtrit(degrees_of(noise), POWER)) * error_of(noise)


def p_value(difference: float, noise: Sequence[Noise]) -> float:
    """Returns the two-sided p-value of no difference. It is below 0.05 exactly if the interval leaves out 0."""
    return min(1.0, 2 * _above(abs(difference), noise))


def p_equivalent(difference: float, noise: Sequence[Noise], bound: float) -> float:
    """Returns the larger p-value of the two one-sided tests that the true difference is within -bound and bound."""
    return _above(bound - abs(difference), noise)


def _above(distance: float, noise: Sequence[Noise]) -> float:
    """Returns how likely noise alone goes beyond `distance`, on one side."""
    from scipy.special import stdtr

    error = error_of(noise)
    if error == 0:
        return 0.0 if distance > 0 else 0.5 if distance == 0 else 1.0
    return float(stdtr(degrees_of(noise), -distance / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns Holm's adjusted p-values: claims below 0.05 are all true in 95 of 100 families of comparisons."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
