"""Compares the results of models with a baseline: differences with 95 % intervals, task by task and in the mean.

The uncertainty comes from a paired bootstrap over the items that each score was computed from (`bootstrap.py`). Where a
candidate has several training seeds, these count too. In a mean over many tasks, so do the tasks inside their types:
the interval is then about other tasks of these types, else about these very tasks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from embedwright.errors import InputError
from embedwright.evaluation.compare import statistics
from embedwright.evaluation.compare.bootstrap import Drawn, draw, random, same_order
from embedwright.evaluation.compare.statistics import Floats
from embedwright.evaluation.results import Result, Results

DRAWS = 10_000
SEED = 1
METHOD = (
    "Scores are in points (x100). The standard error of a difference adds up what its sources (`over`) contribute: the "
    "items, by a paired bootstrap; training seeds where there are several, in pairs where both sides have the same "
    "ones, while a single training run counts as noisy as those of the others; runs of k-means; in a mean over many "
    "tasks, the tasks inside their types. Tasks in `without` have no items, and what these do by chance is left out. A "
    "mean has no interval if such tasks have more than a fifth of its weight and there are no seeds. In the interval "
    "(95 %), each source has Student's t for its degrees of freedom. The t-distribution with it gives the "
    "two-sided p-value, the larger p-value of both one-sided tests, and the smallest difference that would have been "
    "seen (80 % power). `p_holm` and `p_equivalent` are `p` and `p_within`, corrected for all comparisons of the "
    "table (Holm). A claim needs one of them below 0.05."
)
PAIRED, ONE, APART = "pairs of seeds", "one training run against several", "other seeds, or a model that has none"
MEAN, HIGHER, LOWER, NONE_SHOWN = "mean", "higher", "lower", "none shown"
ENOUGH_TASKS = 5  # tasks beside the first of each type, from which the spread over tasks is known well enough
SILENT = 0.2  # the largest share of a mean that tasks without items may have, if it is to have an interval
TINY = 1e-9  # of a point: below it, a standard error or a difference is rounding

Key = tuple[str, str]  # suite and task


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is compared: a name, and for each training seed its results, one a suite. A seed may be unknown (None)."""

    name: str
    seeds: Mapping[int | None, Sequence[Results]]


@dataclass(frozen=True, slots=True)
class Difference:
    """One candidate against the baseline in one task, or in a mean over tasks. Scores are in points.

    `over` says what the interval covers. If it is empty there is no interval, and nothing is claimed. `without` names
    the tasks whose items are not kept: what these items do by chance is not covered. `error` is the standard
    error. `smallest` is the smallest true difference that is found in four cases of five.
    """

    candidate: str
    suite: str
    task: str
    kind: str
    metric: str
    baseline: float
    score: float
    difference: float
    over: str = ""
    without: tuple[str, ...] = ()
    error: float | None = None
    low: float | None = None
    high: float | None = None
    smallest: float | None = None
    p: float | None = None
    p_holm: float | None = None
    p_within: float | None = None
    p_equivalent: float | None = None
    claim: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All differences from the baseline; what was left out, and why; `equivalent`, the bound of the one-sided tests."""

    baseline: str
    rows: tuple[Difference, ...]
    left_out: tuple[str, ...]
    equivalent: float | None
    draws: int
    seed: int
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"method": METHOD}, indent=2, ensure_ascii=False, allow_nan=False)


def compare(
    candidates: Sequence[Candidate], *, equivalent: float | None = None, draws: int = DRAWS, seed: int = SEED
) -> Comparison:
    """Compares each candidate with the first one, the baseline.

    Args:
        candidates: The baseline, and at least one other.
        equivalent: Difference in points within which two candidates count as equal. Without it, equality is not tested.
        draws: Draws of the bootstrap.
        seed: Decides the draws. The same results, draws and seed give the same comparison.

    Returns:
        For each candidate, one row for each task that both have, then the means of each suite.

    Raises:
        InputError: A candidate has nothing that can be compared with the baseline, there is only one, or `equivalent`
            is not a finite number above 0.
    """
    rows, left_out = differences(candidates, equivalent, draws, seed)
    return Comparison(candidates[0].name, claimed(rows, equivalent), left_out, equivalent, draws, seed)


def differences(
    candidates: Sequence[Candidate], equivalent: float | None, draws: int = DRAWS, seed: int = SEED
) -> tuple[list[Difference], tuple[str, ...]]:
    """Returns the rows of `compare` before their p-values are corrected, and what was left out.

    The rows of several calls can be claimed together.
    """
    if len(candidates) < 2:
        raise InputError("a comparison needs a baseline and at least one other")
    if equivalent is not None and not 0 < equivalent < math.inf:
        raise InputError(f"equivalent: {equivalent:g} points is no bound: give a finite number above 0")
    baseline, *others = candidates
    ours, odd = _by_task(baseline)
    left_out = [f"{baseline.name}: {reason}" for reason in odd.values()]
    sides: dict[Key, dict[int, list[Result]]] = {key: {} for key in ours}  # of each task: who can be compared in it
    for number, other in enumerate(others):
        theirs, reasons = _comparable(ours, odd, baseline.name, other)
        if not theirs:
            raise InputError(
                f"{other.name} has nothing to compare with {baseline.name}: {'; '.join([*odd.values(), *reasons])}"
            )
        left_out += [f"{other.name}: {reason}" for reason in reasons]
        for key, results in theirs.items():
            sides[key][number] = results
    pairs: list[list[_Pair]] = [[] for _ in others]
    for key, found in sides.items():
        drawn = draw(random(seed, *key), [ours[key], *found.values()], draws)
        for number, side in zip(found, drawn[1:], strict=True):
            pairs[number].append(_Pair(key[0], ours[key][0], drawn[0], side))
            if side.items:
                continue
            name, task = others[number].name, "/".join(key)
            both = {baseline.name: ours[key], name: found[number]}
            lacking = [each for each, results in both.items() if not all(result.items for result in results)]
            if not lacking:
                left_out.append(f"{name}: {task} has no interval: its items give another score")
            elif any(result.items for results in both.values() for result in results):
                left_out.append(f"{name}: the items of {task} are in no interval: {' and '.join(lacking)} lacks some")
    rows: list[Difference] = []
    for other, own in zip(others, pairs, strict=True):
        rows += _rows(other.name, own, _how(baseline, other), equivalent)
    return rows, tuple(left_out)


def _by_task(candidate: Candidate) -> tuple[dict[Key, list[Result]], dict[Key, str]]:
    """Returns the results of each task, one a seed, by rising seed; and why other tasks are no part of them."""
    found: dict[Key, list[Result]] = {}
    for _, suites in sorted(candidate.seeds.items(), key=lambda item: item[0] or 0):
        for results in suites:
            for row in results.rows:
                found.setdefault((results.suite, row.task), []).append(row)
    whole: dict[Key, list[Result]] = {}
    odd: dict[Key, str] = {}
    for key, rows in found.items():
        try:
            if len(rows) != len(candidate.seeds):
                raise InputError(f"is of {len(rows)} seeds, not of {len(candidate.seeds)}")
            whole[key] = [same_order(rows[0], row) for row in rows]
        except InputError as error:
            odd[key] = f"{'/'.join(key)} {error}"
    return whole, odd


def _comparable(
    ours: Mapping[Key, Sequence[Result]], odd: Mapping[Key, str], baseline: str, other: Candidate
) -> tuple[dict[Key, list[Result]], list[str]]:
    """Returns those results of `other` that can be compared with ours, items in our order; and why others cannot."""
    theirs, odd_too = _by_task(other)
    common: dict[Key, list[Result]] = {}
    reasons = [*odd_too.values()]
    for key in dict.fromkeys([*ours, *theirs]):
        if key in odd or key in odd_too:
            continue
        try:
            if key not in ours or key not in theirs:
                raise InputError(f"is of {baseline if key in ours else other.name} alone")
            common[key] = [same_order(ours[key][0], result) for result in theirs[key]]
        except InputError as error:
            reasons.append(f"{'/'.join(key)} {error}")
    return common, reasons


# ---------------------------------------------------------------------------------------------------- differences


@dataclass(frozen=True, slots=True)
class _Pair:
    """Both sides of one task."""

    suite: str
    result: Result
    base: Drawn
    other: Drawn

    @property
    def items_P(self) -> tuple[int, ...]:
        """The items of each part; none if one side has none, or if one item alone shows no noise."""
        counts = min(self.base.items_P, self.other.items_P)
        return () if 1 in counts else counts

    @property
    def difference(self) -> float:
        return float(self.other.score_S.mean() - self.base.score_S.mean())


def _how(baseline: Candidate, other: Candidate) -> str:
    """Says how the seeds of two candidates are compared."""
    fewer, more = sorted((baseline.seeds, other.seeds), key=len)
    if len(fewer) == 1 < len(more) and None not in fewer:
        return ONE
    return PAIRED if len(fewer) > 1 and fewer.keys() == more.keys() else APART


def _rows(name: str, pairs: Sequence[_Pair], how: str, equivalent: float | None) -> list[Difference]:
    """Returns the row of each task, then for each suite the means of its types, over its types, and over its tasks.

    Each mean is there once: none of one task, and none over types of one task each.
    """

    def row(task: str, kind: str, metric: str, types: Sequence[Sequence[_Pair]], shares: Sequence[float]) -> Difference:
        bare = Difference(name, types[0][0].suite, task, kind, metric, 0, 0, 0)
        return _difference(bare, types, shares, how, equivalent)

    rows = [row(pair.result.task, pair.result.kind, pair.result.metric, [[pair]], [1.0]) for pair in pairs]
    for suite in dict.fromkeys(pair.suite for pair in pairs):
        types: dict[str, list[_Pair]] = {}
        for pair in pairs:
            if pair.suite == suite:
                types.setdefault(pair.result.kind, []).append(pair)
        total = sum(map(len, types.values()))
        if len(types) > 1:
            rows += [row(MEAN, kind, f"{len(own)} tasks", [own], [1.0]) for kind, own in types.items() if len(own) > 1]
        if 1 < len(types) < total:  # with one task a type it would be the mean over tasks, told and corrected for twice
            rows.append(row(MEAN, "types", f"{len(types)} types", [*types.values()], [1 / len(types)] * len(types)))
        if total > 1:
            shares = [len(own) / total for own in types.values()]
            rows.append(row(MEAN, "tasks", f"{total} tasks", [*types.values()], shares))
    return rows


def _difference(
    bare: Difference,
    types: Sequence[Sequence[_Pair]],
    shares: Sequence[float],
    how: str,
    equivalent: float | None,
) -> Difference:
    """Fills in the mean over `types`, weighted by `shares`, of the mean over their tasks, with its interval."""
    pairs = [(pair, share / len(tasks)) for tasks, share in zip(types, shares, strict=True) for pair in tasks]
    base_S = np.sum([share * pair.base.score_S for pair, share in pairs], axis=0)
    other_S = np.sum([share * pair.other.score_S for pair, share in pairs], axis=0)
    noise = _of_seeds(100 * base_S, 100 * other_S, how)
    drawn = [(pair, 100 * share) for pair, share in pairs if pair.items_P]
    for pair, share in drawn:
        runs = [share * (theirs_R - ours_R) for ours_R, theirs_R in zip(pair.base.runs, pair.other.runs, strict=True)]
        noise += [statistics.of_mean(values) for values in runs if len(values) > 1]
    groups = [share * np.array([pair.difference for pair in tasks]) for tasks, share in zip(types, shares, strict=True)]
    drawn_tasks = sum(len(tasks) - 1 for tasks in types) >= ENOUGH_TASKS
    if drawn_tasks:
        noise.append(statistics.of_groups(100 * values for values in groups))
    if drawn:
        parts = [share * (pair.other.drawn_PB - pair.base.drawn_PB) for pair, share in drawn]
        noise += statistics.of_draws(np.concatenate(parts), [n for pair, _ in drawn for n in pair.items_P])
    # the same results in another order of items differ by rounding alone
    noise = [(variance if variance > TINY**2 else 0.0, degrees) for variance, degrees in noise]
    difference, error = 100 * float(other_S.mean() - base_S.mean()), statistics.error_of(noise)
    difference = difference if abs(difference) > TINY else 0.0
    row = replace(bare, baseline=100 * float(base_S.mean()), score=100 * float(other_S.mean()), difference=difference)
    silent = {
        pair.result.task: share / len(tasks)
        for tasks, share in zip(types, shares, strict=True)
        for pair in tasks
        if not pair.items_P and not (drawn_tasks and len(tasks) > 1)
    }
    # where nothing shows the noise of much of a mean, its interval would be too narrow
    seeds = max(len(base_S), len(other_S)) > 1
    known = seeds or sum(silent.values()) <= SILENT
    if not known or (error == 0 and difference != 0):
        return row
    half = statistics.half_width(noise)
    return replace(
        row,
        over=", ".join(name for name, there in (("tasks", drawn_tasks), ("seeds", seeds), ("items", drawn)) if there),
        without=tuple(silent),
        error=error,
        low=difference - half,
        high=difference + half,
        smallest=statistics.smallest_seen(noise),
        p=statistics.p_value(difference, noise),
        p_within=None if equivalent is None else statistics.p_equivalent(difference, noise, equivalent),
    )


def _of_seeds(base_S: Floats, other_S: Floats, how: str) -> list[statistics.Noise]:
    """Returns the noise of the training seeds in the difference of two means over seeds."""
    if how == ONE:
        return [statistics.of_one_more(max(base_S, other_S, key=len))]
    sides = [other_S - base_S] if how == PAIRED else [other_S, base_S]
    return [statistics.of_mean(values) for values in sides if len(values) > 1]


def claimed(rows: Sequence[Difference], equivalent: float | None) -> tuple[Difference, ...]:
    """Corrects the p-values of all rows for their number, and says what they allow to claim."""
    corrected = iter(statistics.holm([row.p for row in rows if row.p is not None]))
    equal = iter(statistics.holm([row.p_within for row in rows if row.p_within is not None]))
    claimed = []
    for row in rows:
        if row.p is not None:
            p_holm, p_equivalent = next(corrected), next(equal, None)
            claims = [HIGHER if row.difference > 0 else LOWER] if p_holm < statistics.LEVEL else []
            if p_equivalent is not None and p_equivalent < statistics.LEVEL:
                claims.append(f"within {equivalent:g}")
            row = replace(row, p_holm=p_holm, p_equivalent=p_equivalent, claim=", ".join(claims) or NONE_SHOWN)
        claimed.append(row)
    return tuple(claimed)
