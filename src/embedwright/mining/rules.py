"""Decides which ranked documents of a query may be its negatives: the rules of NV-Retriever, and what never may.

All masks are made for many queries at once. `Q` queries, `K` candidates of one query, best first.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedwright.errors import InputError

_SHORT = 32  # a longer list of one query is compared by itself

Rule = Literal["naive", "shift", "abs", "margin", "perc"]
Positives = Literal["lowest", "each"]  # which of several positives sets the threshold
Ensemble = Literal["cross-sample", "intra-sample", "intra-sample-duplicates"]  # how several teachers work together
T = TypeVar("T")

BEST_MARGIN: dict[Rule, float | None] = {"naive": None, "shift": 10, "abs": 0.7, "margin": 0.05, "perc": 0.95}
"""The best setting of each rule in NV-Retriever's ablation: what `margin=None` stands for."""

BM25, RANDOM = NAMED = ("bm25", "random")  # teachers by name, NV-Retriever's baselines

SAMPLE_FROM = 10  # NV-Retriever draws from the top 10, and finds that more hurts


class Exclusions(NamedTuple):
    """What may not be a negative of one query: rows of documents, and `text_mark`s of texts."""

    positive_rows: Collection[int]
    positive_keys: Collection[int]  # with the key of the query itself
    negative_rows: Collection[int]  # rows of the negatives that the query already has
    negative_keys: Collection[int]


class Eligible(NamedTuple):
    """Masks (Q, K) over the candidates: which may be negatives, and for the others the first reason against them."""

    eligible: NDArray[np.bool_]
    same_document: NDArray[np.bool_]
    same_text: NDArray[np.bool_]
    by_rule: NDArray[np.bool_]
    duplicates: NDArray[np.bool_]

    def removed(self) -> dict[str, NDArray[np.bool_]]:
        """Returns the masks of the removed candidates, by reason."""
        return {reason: mask for reason, mask in self._asdict().items() if reason != "eligible"}


def eligible(
    rows_QK: NDArray[np.int64],
    keys_QK: NDArray[np.int64],
    scores_QK: NDArray[np.float32],
    lowest_Q: NDArray[np.float32],
    excluded: Sequence[Exclusions],
    rule: Rule,
    margin: float | None,
) -> Eligible:
    """Tells which ranked candidates may be negatives by the rule.

    For each query it takes the rows, text keys and scores of the candidates, the score of the positive that sets the
    threshold, and the exclusions. `margin` has been checked by `check_settings`.
    """
    positive_rows, positive_keys, negative_rows, negative_keys = zip(*excluded, strict=True) if excluded else ((),) * 4
    same_document = _among(rows_QK, positive_rows)
    same_text = ~same_document & _among(keys_QK, positive_keys)
    others = ~same_document & ~same_text
    rank_QK = others.cumsum(axis=1) - 1
    by_rule = others & ~_allowed(
        rule, margin, lowest_Q.astype(np.float64)[:, None], rank_QK, scores_QK.astype(np.float64)
    )
    passed = others & ~by_rule
    again = _repeated(np.where(passed, keys_QK, -1))  # no text has the key -1
    duplicates = passed & (again | _among(rows_QK, negative_rows) | _among(keys_QK, negative_keys))
    return Eligible(passed & ~duplicates, same_document, same_text, by_rule, duplicates)


def sample_order(scores: NDArray[np.float64], seed: int, example_id: str, teacher: int) -> NDArray[np.int64]:
    """Draws an order by softmax over `scores` without replacement (the Gumbel trick gives exactly that)."""
    random = np.random.default_rng([seed, zlib.crc32(example_id.encode()), teacher])
    return np.argsort(-(scores + random.gumbel(size=len(scores))), kind="stable")


def teacher_of(example_id: str, teachers: int, seed: int) -> int:
    """Draws the number of the teacher of an example (`cross-sample`), the same in every run."""
    # the word in front keeps this apart from the draw of negatives, which is seeded by the same two
    return int(np.random.default_rng([*b"teacher", seed, zlib.crc32(example_id.encode())]).integers(teachers))


def in_turn(ranked: Sequence[Iterable[T]]) -> Iterator[T]:
    """Gives the best of each list, then the second best of each, and so on. No item may be None."""
    if len(ranked) == 1:
        yield from ranked[0]
        return
    for rank in zip_longest(*ranked):
        yield from (item for item in rank if item is not None)


def check_settings(rule: Rule, margin: float | None, negatives: int, depth: int) -> float | None:
    """Returns the margin to use. Raises ValueError if the settings do not fit together."""
    if rule not in BEST_MARGIN:
        raise InputError(f"rule must be one of {', '.join(BEST_MARGIN)}, not {rule!r}")
    if negatives < 1:
        raise InputError(f"negatives must be at least 1, not {negatives}")
    if margin is None:
        margin = BEST_MARGIN[rule]
    elif rule == "naive":
        raise InputError("rule 'naive' takes no margin")
    else:
        sound, what = {
            "shift": (margin >= 0 and margin % 1 == 0, "a whole number of ranks"),
            "abs": (math.isfinite(margin), "a score"),
            "margin": (0 <= margin < math.inf, "a difference of scores, 0 or more"),
            "perc": (0 < margin < 2, "a share of the positive's score, such as 0.95"),
        }[rule]
        if not sound:
            raise InputError(f"the margin of rule {rule!r} must be {what}, not {margin}")
    if depth < (needed := negatives + int(margin or 0 if rule == "shift" else 0)):
        raise InputError(f"depth {depth} cannot hold what rule {rule!r} needs: {needed}")
    return margin


def check_teachers(teachers: Sequence[Any], rule: Rule, margin: float | None, sampled: bool) -> None:
    """Raises ValueError if a teacher by name cannot be asked what the settings ask. `margin` is as the user gave it."""
    if RANDOM in teachers:
        if len(teachers) > 1:
            raise InputError("teacher random ranks nothing that others could join: let it mine alone")
        if rule != "naive":
            raise InputError(f"teacher random has no scores for rule {rule!r}: use rule 'naive'")
        if sampled:
            raise InputError("teacher random draws already: leave sampled out")
    if BM25 in teachers and rule in ("abs", "margin") and margin is None:
        raise InputError(f"rule {rule!r} with teacher bm25 needs a margin: {BEST_MARGIN[rule]} is one for cosines")


def check_sampling(sampled: bool, sample_from: int | None, negatives: int) -> int:
    """Returns how many eligible candidates are drawn from; 0 where the best are taken.

    Raises ValueError if the settings do not fit together.
    """
    if not sampled:
        if sample_from is not None:
            raise InputError(f"sample_from {sample_from} says what to draw from, and sampled is off")
        return 0
    if sample_from is None:
        return max(SAMPLE_FROM, negatives)
    if sample_from < negatives:
        raise InputError(f"sample_from {sample_from} is too few to draw {negatives} negatives from")
    return sample_from


def _allowed(
    rule: Rule,
    margin: float | None,
    lowest_Q1: NDArray[np.float64],
    rank_QK: NDArray[np.int64],
    scores_QK: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Tells which ranked scores the rule lets pass."""
    if margin is None:  # naive
        return np.ones(scores_QK.shape, dtype=bool)
    if rule == "shift":
        return rank_QK >= margin
    if rule == "abs":
        return scores_QK <= margin
    if rule == "margin":
        return scores_QK < lowest_Q1 - margin
    return scores_QK < lowest_Q1 * np.where(lowest_Q1 >= 0, margin, 2 - margin)


def _among(values_QK: NDArray[np.int64], lists: Sequence[Collection[int]]) -> NDArray[np.bool_]:
    """Tells which values of each query are in the query's own list."""
    found = np.zeros(values_QK.shape, dtype=bool)
    short = [values if len(values) <= _SHORT else () for values in lists]
    for column in zip_longest(*short, fillvalue=-1):  # neither a row nor a key
        found |= values_QK == np.array(column)[:, None]
    for q, values in enumerate(lists):
        if len(values) > _SHORT:
            found[q] = np.isin(values_QK[q], np.fromiter(values, np.int64, len(values)))
    return found


def _repeated(keys_QK: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tells which keys repeat an earlier key of the same row."""
    order_QK = np.argsort(keys_QK, axis=1, kind="stable")
    sorted_QK = np.take_along_axis(keys_QK, order_QK, axis=1)
    again = np.zeros(keys_QK.shape, dtype=bool)
    np.put_along_axis(again, order_QK[:, 1:], sorted_QK[:, 1:] == sorted_QK[:, :-1], axis=1)
    return again
