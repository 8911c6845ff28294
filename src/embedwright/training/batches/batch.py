"""One batch: its texts, who is whose negative, and what else a loss learns from. Q queries, C distinct candidates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Text = tuple[str, str]  # prefix, text
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def ids_hash(ids: Sequence[str]) -> str:
    """Hashes the ids of a step's rows: equal hashes mean equal rows in the same order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def split_token_limit(distinct: float) -> float:
    """Returns how many tokens a split by queries may encode in total, if the distinct texts have `distinct`.

    A forward and backward cost about three forwards, and GradCache adds a fourth: a split is cheaper while repeated
    texts add less than a third.
    """
    return 4 * distinct / 3


@dataclass(frozen=True)
class Masks:
    """Who is whose negative.

    `positive_Q`: the column of each query's positive. `negative_QC`: the columns that are its negatives. `own_QC`: its
    hard negatives, from its own row. `queries_QQ`: the other queries that are its negatives too.
    `distinct`: the queries (Q,) and the positives (C,) that the spread-out term compares, each text once. The last two
    are None if the loss does not ask for them.
    """

    positive_Q: Ints
    negative_QC: Bools
    own_QC: Bools
    queries_QQ: Bools | None = None
    distinct: tuple[Bools, Bools] | None = None

    def columns(self, row: int) -> list[int]:
        """Returns the columns that a query needs: its positive and its negatives, in order."""
        return sorted({int(self.positive_Q[row]), *np.flatnonzero(self.negative_QC[row]).tolist()})


@dataclass(frozen=True)
class Targets:
    """What a loss learns from besides the vectors. Each is None, or False, if the stage's loss does not use it.

    `teacher_QC`: a teacher's scores of the positive and of the own negatives, NaN elsewhere. `score_Q`: each pair's
    score for CoSENT, which orders the pairs of one `group_Q` (-1: CoSENT leaves the row out). `similarities`: a teacher
    compares each query with all candidates of the batch.
    """

    teacher_QC: NDArray[np.float32] | None = None
    group_Q: Ints | None = None
    score_Q: NDArray[np.float64] | None = None
    similarities: bool = False


@dataclass(frozen=True)
class Batch:
    """The texts of one step. `ids`: the id of each query's row."""

    queries: list[Text]
    candidates: list[Text]
    ids: list[str]
    masks: Masks
    targets: Targets = Targets()

    def ids_hash(self) -> str:
        return ids_hash(self.ids)

    def texts(self, row: int) -> list[Text]:
        """Returns the texts that a query needs: itself, its positive and its negatives."""
        return [self.queries[row], *(self.candidates[column] for column in self.masks.columns(row))]

    def separable(self) -> bool:
        """Returns whether the batch may be split without changing the loss: no query needs what another's row brought.

        A text that several rows brought, such as the name of a class, is no hindrance: each part encodes it.
        """
        masks, group_Q = self.masks, self.targets.group_Q
        if self.targets.similarities or (masks.queries_QQ is not None and masks.queries_QQ.any()):
            return False
        if masks.distinct is not None and max(part.sum() for part in masks.distinct) > 1:
            return False
        if group_Q is not None and np.bincount(group_Q + 1)[1:].max(initial=0) > 1:
            return False
        uses_C = masks.negative_QC.sum(axis=0) + np.bincount(masks.positive_Q, minlength=len(self.candidates))
        return not (masks.negative_QC & ~masks.own_QC)[:, uses_C > 1].any()

    def take(self, rows: Sequence[int]) -> Batch:
        """Returns the batch of these queries alone, with the candidates that they use."""
        masks, targets = self.masks, self.targets
        chosen = np.array(rows, dtype=np.int64)
        positive_Q = masks.positive_Q[chosen]
        columns = np.union1d(np.flatnonzero(masks.negative_QC[chosen].any(axis=0)), positive_Q)
        both = np.ix_(chosen, columns)
        return Batch(
            [self.queries[i] for i in rows],
            [self.candidates[c] for c in columns],
            [self.ids[i] for i in rows],
            Masks(
                np.searchsorted(columns, positive_Q),
                masks.negative_QC[both],
                masks.own_QC[both],
                None if masks.queries_QQ is None else masks.queries_QQ[np.ix_(chosen, chosen)],
                None if masks.distinct is None else (masks.distinct[0][chosen], masks.distinct[1][columns]),
            ),
            Targets(
                None if targets.teacher_QC is None else targets.teacher_QC[both],
                None if targets.group_Q is None else targets.group_Q[chosen],
                None if targets.score_Q is None else targets.score_Q[chosen],
                targets.similarities,
            ),
        )
