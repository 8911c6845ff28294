"""Draws a task's items, and computes the score of every candidate on the same draws.

Shapes: `S` training seeds of one candidate, `P` parts of a task, `B` draws, `N` items, `R` runs of k-means (1 in other
tasks).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedwright.errors import InputError
from embedwright.evaluation.compare import statistics
from embedwright.evaluation.compare.statistics import Floats
from embedwright.evaluation.results import Items, Result

FEW_DRAWS = 2_000  # give the width of one score's interval to about 2 %
NEAR = 5e-4  # a score may differ so much from its items', which are rounded


@dataclass(frozen=True, slots=True)
class Drawn:
    """The scores of one candidate in one task: for each training seed, and their mean on each draw of the items.

    A task's score is a sum of parts that are drawn apart: `drawn_PB`, with `items_P` items. Without items, `items_P` is
    empty and each draw repeats the score. `runs` has the scores of what was repeated, runs of k-means, as means over
    the training seeds and as parts of the task's score.
    """

    score_S: Floats
    drawn_PB: Floats
    items_P: tuple[int, ...]
    runs: tuple[Floats, ...] = ()

    @property
    def items(self) -> int:
        return sum(self.items_P)

    @property
    def drawn_B(self) -> Floats:
        drawn_B: Floats = self.drawn_PB.sum(axis=0)
        return drawn_B


def random(seed: int, *names: str) -> np.random.Generator:
    """Returns the generator for what `names` say. Others names give other draws."""
    return np.random.default_rng([seed, zlib.crc32("\0".join(names).encode())])


def same_order(reference: Result, result: Result) -> Result:
    """Returns `result` with its items in the order of `reference`.

    Items with ids are matched by id, others by position. Raises InputError if these are two metrics, other data, other
    items, or other labels, and for a score that is no number.
    """
    if reference.metric != result.metric:
        raise InputError(f"has two metrics, {reference.metric} and {result.metric}")
    if not math.isfinite(reference.value) or not math.isfinite(result.value):
        raise InputError("has a score that is no number")
    if reference.data and result.data and reference.data != result.data:
        alone = sorted(set(reference.data.split(", ")) ^ set(result.data.split(", ")))
        more = " and others" if len(alone) > 4 else ""
        raise InputError(f"is of other data: only one side has {', '.join(alone[:4])}{more}")
    if not reference.items or not result.items:
        return result
    if _shapes(reference) != _shapes(result):
        raise InputError("has other items: their number, their kind or their splits differ")
    items = dict(result.items)
    for part in _shares(result):
        ours, theirs = _of_part(reference, part), _of_part(result, part)
        if "id" in ours:
            ids, their_ids = ours["id"].astype(str), theirs["id"].astype(str)
            place, other = np.argsort(ids, kind="stable"), np.argsort(their_ids, kind="stable")
            if not np.array_equal(ids[place], their_ids[other]):
                odd = np.setxor1d(ids, their_ids)
                which = f"{len(odd)} are in one alone, such as {str(odd[0])!r}" if len(odd) else "some are repeated"
                raise InputError(f"has other items: {which}")
            order = np.empty_like(place)
            order[place] = other
            items |= {part + name: array[..., order] for name, array in theirs.items()}
        elif not np.array_equal(ours["gold"], theirs["gold"]):
            raise InputError("has other items: their labels differ")
    return replace(result, items=items)


def draw(rng: np.random.Generator, candidates: Sequence[Sequence[Result]], draws: int) -> list[Drawn]:
    """Returns what each candidate scores on the same draws. `candidates` are the results of their seeds.

    The items must be in one order. If the first candidate lacks items, nobody's are drawn.
    """
    usable = [all(map(agrees, results)) for results in candidates]
    drawing = [place for place, its in enumerate(usable) if its and usable[0]]
    drawn = [np.full((1, draws), np.mean([result.value for result in results])) for results in candidates]
    runs: list[dict[str, list[Floats]]] = [{} for _ in candidates]
    shares = _shares(candidates[0][0]) if drawing else {}
    counts = [_count(_of_part(candidates[0][0], part)) for part in shares]
    for place in drawing:
        drawn[place] = np.zeros((len(shares), draws))
    for number, ((part, share), count) in enumerate(zip(shares.items(), counts, strict=True)):
        at = 0
        for counts_BN in statistics.resamples(rng, count, draws):
            block = slice(at, at := at + len(counts_BN))
            for place in drawing:
                drawn[place][number, block] = _scores(candidates[place], part, counts_BN).mean(axis=0) * share
        repeated = re.sub(r"(?<=/)\d+/$", "", part)  # the older MTEB tasks have a part for each of their sets
        for place in drawing:
            scores_R = _scores(candidates[place], part, np.ones((1, count)))[:, 0] * share
            runs[place].setdefault(repeated, []).append(scores_R)
    return [
        Drawn(
            np.array([result.value for result in results]),
            drawn[place],
            tuple(counts) if place in drawing else (),
            tuple(np.concatenate(each) * len(each) for each in runs[place].values()),
        )
        for place, results in enumerate(candidates)
    ]


def _scores(results: Sequence[Result], part: str, counts_BN: Floats) -> Floats:
    """Returns the score in each draw of each run of k-means (R, B), as mean over the training seeds."""
    mean_RB: Floats = np.mean([scores(result.metric, _of_part(result, part), counts_BN) for result in results], axis=0)
    return mean_RB


def half_interval(suite: str, seeds: Sequence[Result]) -> float | None:
    """Returns half the width of a score's 95 % interval, or None for a score without items or with some not finite.

    It covers what other items would have given, by a bootstrap, and what other runs of k-means and other training seeds
    would. The computation is that of `embedwright compare`, for one score instead of a difference.
    """
    try:
        ordered = [same_order(seeds[0], row) for row in seeds]
    except InputError:  # the seeds have other items
        return None
    (drawn,) = draw(random(0, suite, seeds[0].task), [ordered], FEW_DRAWS)
    if min(drawn.items_P, default=0) < 2:
        return None
    if not all(np.isfinite(values).all() for values in (drawn.score_S, drawn.drawn_B, *drawn.runs)):
        return None
    few = [statistics.of_mean(values) for values in (drawn.score_S, *drawn.runs) if len(values) > 1]
    return statistics.half_width([*few, *statistics.of_draws(drawn.drawn_PB, drawn.items_P)])


def agrees(result: Result) -> bool:
    """Returns whether a result has items, and its score is the score of these items."""
    found = 0.0
    for part, share in _shares(result).items():
        arrays = _of_part(result, part)
        found += share * float(scores(result.metric, arrays, np.ones((1, _count(arrays)))).mean())
    return bool(result.items) and abs(found - result.value) < NEAR


def scores(metric: str, arrays: Items, counts_BN: Floats) -> Floats:
    """Returns a task's main score in each draw (R, B) from the arrays of one part of it (see results.py).

    The arrays say which score it is. Pearson's and Spearman's correlation have the same, and are told apart by name.
    """
    if "score" in arrays:
        return statistics.mean(counts_BN, arrays["score"])[None]
    gold_N = arrays["gold"]
    if "cluster" in arrays:
        drawn_RBN = (counts_BN * times_N for times_N in arrays["times"]) if "times" in arrays else repeat(counts_BN)
        runs = zip(arrays["cluster"], drawn_RBN, strict=False)
        return np.stack([statistics.v_measure(drawn_BN, cluster_N, gold_N) for cluster_N, drawn_BN in runs])
    of_labels = np.issubdtype(gold_N.dtype, np.integer)
    correlation = statistics.pearson if "pearson" in metric else statistics.spearman
    of_cosines = statistics.average_precision if of_labels else correlation
    return of_cosines(counts_BN, arrays["cosine"], gold_N)[None]


def _shares(result: Result) -> dict[str, float]:
    """Returns what the array names of each part begin with, and the part's share of the score.

    A local task has one part, "". An MTEB task has `<split>/<subset>/`, all with the same share, and inside a subset
    maybe several.
    """
    parts = dict.fromkeys(name[: name.rfind("/") + 1] for name in result.items)
    subsets = ["/".join(part.split("/")[:2]) for part in parts]
    return {part: 1 / len(set(subsets)) / subsets.count(subset) for part, subset in zip(parts, subsets, strict=True)}


def _of_part(result: Result, part: str) -> dict[str, NDArray[Any]]:
    return {name[len(part) :]: array for name, array in result.items.items() if name[: name.rfind("/") + 1] == part}


def _count(arrays: Items) -> int:
    return len(arrays["score" if "score" in arrays else "gold"])


def _shapes(result: Result) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in result.items.items()}
