"""What mining counted, and a histogram of the scores."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STEPS = 100  # bins of the histogram from 0 to the power of ten above the largest score
KINDS = ("positives", "removed_by_rule", "negatives")


@dataclass(slots=True)
class Histogram:
    """Counts, for each kind and each i, the scores in [i step, (i + 1) step).

    The first scores set `step`: 0.01 where they are cosines.
    """

    step: float = 0.0
    counts: dict[str, Counter[int]] = field(default_factory=lambda: {kind: Counter() for kind in KINDS})

    def add(self, kind: str, scores: NDArray[np.floating[Any]]) -> None:
        """Counts scores, of any shape."""
        if not scores.size:
            return
        if not self.step:
            largest = 0.99 * float(np.abs(scores).max()) or 1.0  # a cosine may be a little above 1
            self.step = 10.0 ** math.ceil(math.log10(largest)) / _STEPS
        bins, counts = np.unique(np.floor(scores.astype(np.float64) / self.step).astype(np.int64), return_counts=True)
        self.counts[kind].update(dict(zip(bins.tolist(), counts.tolist(), strict=True)))

    def to_json(self) -> dict[str, Any]:
        """Returns `start` and `step` of the bins, and for each kind the counts in them."""
        bins = [i for counts in self.counts.values() for i in counts]
        first, last = (min(bins), max(bins)) if bins else (0, -1)
        counts = {kind: [each[i] for i in range(first, last + 1)] for kind, each in self.counts.items()}
        return {"start": first * self.step, "step": self.step, **counts}


@dataclass(frozen=True, slots=True)
class MiningReport:
    """Counts what mining looked at, what it removed and why, and what it took.

    A removed candidate counts under the first reason that holds. So `candidates` minus the four counts after it, up to
    `removed_duplicates`, are the eligible ones. Those are looked at one by one until a query has enough:
    `removed_near_duplicate` were passed over, `negatives` were taken. `removed_given` counts negatives that the
    examples came with and that repeat an answer or the query. `queries_short` queries got fewer negatives than asked
    for. Where several teachers rank for every query, the candidates of each teacher count. `without_positive` counts
    scored pairs below the threshold, which are kept as they are.
    """

    rule: str
    margin: float | None
    teachers: int
    ensemble: str | None
    seconds: float
    queries: int
    documents: int
    candidates: int = 0
    removed_same_document: int = 0
    removed_same_text: int = 0
    removed_by_rule: int = 0
    removed_duplicates: int = 0
    removed_near_duplicate: int = 0
    removed_given: int = 0
    negatives: int = 0
    queries_short: int = 0
    without_positive: int = 0
    scores: dict[str, Any] = field(default_factory=dict)  # a Histogram's JSON

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain values, ready for `json.dumps`."""
        return asdict(self)

    def counts(self) -> dict[str, Any]:
        """Returns the report without the histogram of the scores."""
        return {key: value for key, value in self.to_json().items() if key != "scores"}
