"""Exact inner-product search in tiles: the corpus passes once, in order, and no more than a tile of scores is held.

Tiles are multiplied in float32, whose rounding depends on their shape. So a tile only nominates: whatever lies within
the rounding error of a query's k-th best stays, and the few that are left are scored again in float64. The result is
that of brute force, whatever the tiles were.

`Q` queries, `C` documents of the corpus, `E` embedding, `N` documents of a tile, `B` blocks of a tile, `L` documents of
a block, `W` candidates of one query, padded.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from embedwright import onednn

_QUERIES = 512  # queries and documents of a tile of scores: 8 MB, which a processor's last cache holds
_DOCUMENTS = 4096
_BLOCK = 16  # documents passed over or looked at together, by the best of them
_SPARE = 64  # candidates of a query beyond 2 k before they are cut: cuts cost more than a few more candidates


def top_k(queries_QE: NDArray[Any], corpus_CE: NDArray[Any], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `k` largest inner products of each query, exactly: scores float32 (Q, k) descending, and their rows int64.

    A score is the inner product of the float32 vectors, summed in float64 and rounded to float32. Equal scores come in
    the order of the corpus, also where the cut falls between them. `k` is cut to the size of the corpus.

    `corpus_CE` may be a memory map larger than memory: beside it and the result, this holds one tile of it where it is
    not float32 already, 40 MB for scores, and 12 (2 k + 64) bytes per query; a corpus of copies costs more, up to
    another 12 x 4096 bytes for each of 512 queries.

    Raises ValueError where the widths differ, `k` < 1, or a vector is not finite, with its row.
    """
    queries_QE = np.ascontiguousarray(queries_QE, dtype=np.float32)
    corpus_CE = np.asanyarray(corpus_CE)
    if queries_QE.ndim != 2 or corpus_CE.ndim != 2 or queries_QE.shape[1] != corpus_CE.shape[1]:
        raise ValueError(f"queries {queries_QE.shape} and corpus {corpus_CE.shape} must be (Q, E) and (C, E)")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    k = min(k, len(corpus_CE))
    scores_QK, rows_QK = np.empty((len(queries_QE), k), np.float32), np.empty((len(queries_QE), k), np.int64)
    if not len(queries_QE) or not k:
        return scores_QK, rows_QK
    _longest(queries_QE, "query", 0)
    starts = range(0, len(queries_QE), _QUERIES)
    best = [_Best(queries_QE[start : start + _QUERIES], corpus_CE, k) for start in starts]
    product = onednn.linear if onednn.available() else F.linear
    longest = 0.0
    for first in range(0, len(corpus_CE), _DOCUMENTS):
        documents_NE = _float32(corpus_CE[first : first + _DOCUMENTS])
        longest = max(longest, _longest(documents_NE, "document", first))
        tile_NE = _tensor(documents_NE)
        for some in best:
            some.add(product(tile_NE, some.tile_QE, None), first, longest)
    for start, some in zip(starts, best, strict=True):
        some.settle()
        scores_QK[start : start + _QUERIES], rows_QK[start : start + _QUERIES] = some.scores_QW, some.rows_QW
    return scores_QK, rows_QK


class _Best:
    """The candidates of some queries among the documents so far: all that can be of the `k` best, and a few more."""

    def __init__(self, queries_QE: NDArray[np.float32], corpus_CE: NDArray[Any], k: int) -> None:
        self.queries_QE, self.corpus_CE, self.k = queries_QE, corpus_CE, k
        self.tile_QE = _tensor(queries_QE)
        self.length_Q = self.tile_QE.norm(dim=1)
        self.slack_Q = torch.zeros(len(queries_QE))
        self.floor_Q = torch.full((len(queries_QE),), -math.inf)  # what scores less cannot be of the k best
        self.scores_QW = torch.empty(len(queries_QE), 0)
        self.rows_QW = torch.empty(len(queries_QE), 0, dtype=torch.int64)

    def add(self, scores_NQ: Tensor, first: int, longest: float) -> None:
        """Take what may be among the best from a tile of scores, whose first document is row `first` of the corpus.

        `longest` is the length of the longest vector so far: the sum of E products, in whatever order, is off by at
        most E units in the last place of |q| |c|; one more for rounding the float64 sum, and 1 % for the lengths.
        """
        width = self.queries_QE.shape[1]
        self.slack_Q = 2 * 1.01 * (width + 1) * 2.0**-24 * longest * self.length_Q  # both of a pair may be off
        if short := -len(scores_NQ) % _BLOCK:
            scores_NQ = F.pad(scores_NQ, (0, 0, 0, short), value=-math.inf)
        scores_BLQ = scores_NQ.unflatten(0, (-1, _BLOCK))
        best_BQ = scores_BLQ.amax(1)
        if first == 0 and len(best_BQ) >= self.k:  # k blocks have k documents at least as good as the k-th best block
            self.floor_Q = best_BQ.topk(self.k, dim=0).values[-1] - self.slack_Q
        query_H, block_H = (best_BQ >= self.floor_Q).t().nonzero().unbind(1)
        scores_HL = scores_BLQ[block_H, :, query_H]
        hit, offset = (scores_HL >= self.floor_Q[query_H, None]).nonzero().unbind(1)
        self._append(query_H[hit], scores_HL[hit, offset], first + block_H[hit] * _BLOCK + offset)
        if self.scores_QW.shape[1] > 2 * self.k + _SPARE:
            self._cut()
        if self.scores_QW.shape[1] > 2 * self.k + _SPARE:  # so many that rounding cannot tell apart: copies
            self.settle()

    def _append(self, query: Tensor, scores: Tensor, rows: Tensor) -> None:
        """Join found documents, in order of their queries, to the candidates: one more column for each of a query."""
        count_Q = torch.bincount(query, minlength=len(self.queries_QE))
        column = torch.arange(len(query)) - (count_Q.cumsum(0) - count_Q)[query]
        new_scores = torch.full((len(count_Q), int(count_Q.max())), -math.inf)
        new_rows = torch.full(new_scores.shape, -1)
        new_scores[query, column] = scores
        new_rows[query, column] = rows
        self.scores_QW = torch.cat((self.scores_QW, new_scores), 1)
        self.rows_QW = torch.cat((self.rows_QW, new_rows), 1)

    def _cut(self) -> None:
        """Raise the floor to where the k-th best stands now, and drop what lies below it."""
        scores_QW, order_QW = self.scores_QW.sort(dim=1, descending=True)
        self.floor_Q = scores_QW[:, self.k - 1] - self.slack_Q
        width = int((scores_QW >= self.floor_Q[:, None]).sum(1).max())
        self.scores_QW = scores_QW[:, :width]
        self.rows_QW = self.rows_QW.gather(1, order_QW[:, :width])

    def settle(self) -> None:
        """Score the candidates in float64, and keep the k best of each query in their final order."""
        self._cut()
        scores_QK, rows_QK = (torch.empty(len(self.queries_QE), self.k, dtype=t) for t in (torch.float32, torch.int64))
        near_QW = (self.scores_QW >= self.floor_Q[:, None]).numpy()
        for q, query_E in enumerate(self.queries_QE.astype(np.float64)):
            rows = np.sort(self.rows_QW[q].numpy()[near_QW[q]])
            documents = _float32(self.corpus_CE[rows]).astype(np.float64)
            scores = np.vecdot(documents, query_E).astype(np.float32)  # a row's sum does not depend on its neighbours
            order = np.argsort(-scores, kind="stable")[: self.k]
            scores_QK[q], rows_QK[q] = torch.from_numpy(scores[order]), torch.from_numpy(rows[order])
        self.scores_QW, self.rows_QW = scores_QK, rows_QK


def _longest(vectors_NE: NDArray[np.float32], what: str, first: int) -> float:
    """The length of the longest vector. Raises ValueError for one that is not finite; row 0 has the number `first`."""
    length_N = _tensor(vectors_NE).norm(dim=1)
    longest = float(length_N.max())
    if not math.isfinite(longest):
        row = int(length_N.isfinite().logical_not().nonzero()[0])
        raise ValueError(f"{what} {first + row}: its vector is not finite, or its square overflows float32")
    return longest


def _float32(vectors_NE: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(vectors_NE, dtype=np.float32)


def _tensor(vectors_NE: NDArray[np.float32]) -> Tensor:
    """A view, never written to; torch warns of arrays, such as memory maps, that must not be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(vectors_NE)
