"""Draws a task's items, and computes the score of every candidate on the same draws.

Shapes: `S` training seeds of one candidate, `B` draws, `N` items, `R` runs of k-means (1 in other tasks).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedwright.errors import InputError
from embedwright.evaluation import statistics
from embedwright.evaluation.results import Items, Result
from embedwright.evaluation.statistics import Floats

NEAR = 5e-4  # a score may differ so much from its items', which are rounded


@dataclass(frozen=True, slots=True)
class Drawn:
    """The scores of one candidate in one task: for each training seed, and their mean on each draw of the items.

    Without items, `items` is 0 and each draw repeats the score. `runs` has the scores of the runs of k-means, as means
    over the training seeds, for each part of a clustering task.
    """

    score_S: Floats
    drawn_B: Floats
    items: int
    runs: tuple[Floats, ...] = ()


def random(seed: int, *names: str) -> np.random.Generator:
    """Returns the generator for what `names` say. Others names give other draws."""
    return np.random.default_rng([seed, zlib.crc32("\0".join(names).encode())])


def same_order(reference: Result, result: Result) -> Result:
    """Returns `result` with its items in the order of `reference`.

    Items with ids are matched by id, others by position. Raises InputError if these are two metrics, other items, or
    other labels.
    """
    if reference.metric != result.metric:
        raise InputError(f"has two metrics, {reference.metric} and {result.metric}")
    if not reference.items or not result.items:
        return result
    if _shapes(reference) != _shapes(result):
        raise InputError("has other items: their number, their kind or their splits differ")
    items = dict(result.items)
    for part in _parts(result):
        ours, theirs = _of_part(reference, part), _of_part(result, part)
        if "id" in ours:
            place, other = np.argsort(ours["id"], kind="stable"), np.argsort(theirs["id"], kind="stable")
            if not np.array_equal(ours["id"][place], theirs["id"][other]):
                odd = np.setxor1d(ours["id"], theirs["id"])
                raise InputError(f"has other items: {len(odd)} are in one alone, such as {str(odd[0])!r}")
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
    drawn = [np.full(draws, np.mean([result.value for result in results])) for results in candidates]
    runs: list[list[Floats]] = [[] for _ in candidates]
    items, parts = 0, _parts(candidates[0][0]) if drawing else []
    for place in drawing:
        drawn[place] = np.zeros(draws)
    for part in parts:
        count = _count(_of_part(candidates[0][0], part))
        items, at = items + count, 0
        for counts_BN in statistics.resamples(rng, count, draws):
            block = slice(at, at := at + len(counts_BN))
            for place in drawing:
                drawn[place][block] += _scores(candidates[place], part, counts_BN).mean(axis=0) / len(parts)
        for place in drawing:
            runs[place].append(_scores(candidates[place], part, np.ones((1, count)))[:, 0] / len(parts))
    return [
        Drawn(np.array([result.value for result in results]), drawn[place], items * (place in drawing), (*runs[place],))
        for place, results in enumerate(candidates)
    ]


def _scores(results: Sequence[Result], part: str, counts_BN: Floats) -> Floats:
    """Returns the score in each draw of each run of k-means (R, B), as mean over the training seeds."""
    mean_RB: Floats = np.mean([scores(result.kind, _of_part(result, part), counts_BN) for result in results], axis=0)
    return mean_RB


def agrees(result: Result) -> bool:
    """Says whether a result has items, and its score is the score of these items."""
    found = []
    for part in _parts(result):
        arrays = _of_part(result, part)
        found.append(scores(result.kind, arrays, np.ones((1, _count(arrays)))).mean())
    return bool(found) and abs(float(np.mean(found)) - result.value) < NEAR


def scores(kind: str, arrays: Items, counts_BN: Floats) -> Floats:
    """Returns a task's main score in each draw (R, B) from the arrays of one part of it (see results.py)."""
    if "score" in arrays:
        return statistics.mean(counts_BN, arrays["score"])[None]
    gold_N = arrays["gold"]
    if "cluster" in arrays:
        return np.stack([statistics.v_measure(counts_BN, cluster_N, gold_N) for cluster_N in arrays["cluster"]])
    of_cosines = statistics.average_precision if kind.lower().startswith("pair") else statistics.spearman
    return of_cosines(counts_BN, arrays["cosine"], gold_N)[None]


def _parts(result: Result) -> list[str]:
    """Returns what the names of the arrays begin with: "", or `<split>/<subset>/` for each part of an MTEB task."""
    return list(dict.fromkeys(name[: name.rfind("/") + 1] for name in result.items))


def _of_part(result: Result, part: str) -> dict[str, NDArray[Any]]:
    return {name[len(part) :]: array for name, array in result.items.items() if name[: name.rfind("/") + 1] == part}


def _count(arrays: Items) -> int:
    return len(arrays["score" if "score" in arrays else "gold"])


def _shapes(result: Result) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in result.items.items()}
