"""Exact inner-product search in tiles: the corpus passes once, in order, and no more than a tile of scores is held.

Tiles are multiplied coarsely: in bfloat16 where the processor has it, which is twice as fast, else in float32. So a
tile only nominates: whatever lies within the error of a query's k-th best stays, and the few that are left are scored
again in float64. The result is that of brute force, whatever the tiles were.

`Q` queries, `C` documents of the corpus, `E` embedding, `N` documents of a tile, `F` found candidates of all queries,
`W` candidates of one query, padded.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from embedwright import kernels, onednn
from embedwright.data.vectors import Vectors, as_tensor, as_vectors

_QUERIES = 512  # queries and documents of a tile of scores: 8 MB in float32, which a processor's last cache holds
_DOCUMENTS = 4096
_BLOCK = 8  # documents of the first tile whose best stands for them
_SPARE = 256  # candidates of a query beyond 2 k before they are cut: cuts cost more than a few more candidates
_ROWS = 256  # worked on at a time, so that what is made of them stays in a core's own cache
_TINY = (
    2.0**-50
)  # more than a length loses where the squares of tiny numbers vanish, and its square than a product does


def top_k(
    queries_QE: NDArray[Any], corpus: NDArray[Any] | Vectors, k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `k` largest inner products of each query, exactly: scores float32 (Q, k) descending, and their rows int64.

    A score is the inner product of the float32 vectors, summed in float64 and rounded to float32. Equal scores come in
    the order of the corpus, also where the cut falls between them. `k` is cut to the size of the corpus.

    `corpus` (C, E) may be larger than memory: beside it and the result, this holds a tile of it (4096 documents), 40 MB
    for scores, and 12 (2 k + 256) bytes per query; a corpus of near-copies costs more, up to
    another 12 x 4096 bytes for each of 512 queries.

    Raises ValueError where the widths differ, `k` < 1, or a vector is not finite, with its row.
    """
    queries_QE = np.ascontiguousarray(queries_QE, dtype=np.float32)
    vectors = as_vectors(corpus)
    if queries_QE.ndim != 2 or queries_QE.shape[1] != vectors.shape[1]:
        raise ValueError(f"queries {queries_QE.shape} and corpus {vectors.shape} must be (Q, E) and (C, E)")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    k = min(k, len(vectors))
    if not len(queries_QE) or not k:
        return np.empty((len(queries_QE), k), np.float32), np.empty((len(queries_QE), k), np.int64)
    _longest(as_tensor(queries_QE), "query", 0)
    dtype = torch.bfloat16 if _fast_bfloat16() else torch.float32
    starts = range(0, len(queries_QE), _QUERIES)
    best = [_Best(queries_QE[start : start + _QUERIES], vectors, k, dtype) for start in starts]
    corpus_side = _Rounded(dtype)
    for first, documents_NE in vectors.tiles(_DOCUMENTS):
        tile_NE = corpus_side.tile(as_tensor(documents_NE), first)
        for some in best:
            some.add(_product(some.tile_QE, tile_NE), first, corpus_side)
    settled = [some.settle() for some in best]
    return np.concatenate([scores for scores, _ in settled]), np.concatenate([rows for _, rows in settled])


def pair_scores(
    queries_QE: NDArray[np.float32], vectors: Vectors, query_F: NDArray[np.int64], row_F: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Float32 (F,): the inner product of each query and document named, summed in float64, as `top_k` scores them.

    Documents are read in their order, block by block; beside the result, one block is held.
    """
    order_F = np.argsort(row_F, kind="stable")
    rows_F = row_F[order_F]
    queries_F = torch.from_numpy(query_F[order_F])
    query_QE = as_tensor(np.ascontiguousarray(queries_QE))
    scores = []
    for first, documents_NE in vectors.tiles_with(rows_F):
        start, end = np.searchsorted(rows_F, (first, first + len(documents_NE)))
        own_F = torch.from_numpy(rows_F[start:end] - first)
        if kernels.available():
            scores.append(kernels.dots(query_QE, as_tensor(documents_NE), queries_F[start:end], own_F))
            continue
        for rows, queries in zip(own_F.split(_ROWS), queries_F[start:end].split(_ROWS), strict=True):
            documents = as_tensor(documents_NE).index_select(0, rows).double()
            # not a matrix product: a row's sum must not depend on its neighbours, or copies would score differently
            scores.append(documents.mul_(query_QE.index_select(0, queries)).sum(1).float())
    scores_F = np.empty(len(row_F), np.float32)
    scores_F[order_F] = torch.cat(scores) if scores else ()
    return scores_F


class _Rounded:
    """The corpus as tiles to multiply, and the most that any of its vectors so far is off by.

    For bfloat16 the mean of the first tile is taken from every vector. That moves all scores of a query alike; and
    where all texts of a model point in nearly one direction, what is left, and so what rounding loses, is small.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.mean_E = torch.zeros(())
        self.longest = self.length = self.off = 0.0  # of a vector; of it less the mean; of what rounding took from that

    def tile(self, documents_NE: Tensor, first: int) -> Tensor:
        """`documents_NE`, whose first is row `first` of the corpus, in this dtype."""
        self.longest = max(self.longest, _longest(documents_NE, "document", first))
        if self.dtype == torch.float32:
            self.length = self.longest
            return documents_NE
        if first == 0:
            self.mean_E = documents_NE.mean(0)
        tile_NE = torch.empty(documents_NE.shape, dtype=self.dtype)
        for rows, rounded in zip(documents_NE.split(_ROWS), tile_NE.split(_ROWS), strict=True):
            moved = rows - self.mean_E
            rounded.copy_(moved)
            self.length = max(self.length, float(moved.norm(dim=1).max()))
            self.off = max(self.off, float(moved.sub_(rounded).norm(dim=1).max()))
        return tile_NE


class _Best:
    """The candidates of some queries among the documents so far: all that can be of the `k` best, and a few more."""

    def __init__(self, queries_QE: NDArray[np.float32], vectors: Vectors, k: int, dtype: torch.dtype) -> None:
        self.queries_QE, self.vectors, self.k = queries_QE, vectors, k
        exact_QE = as_tensor(queries_QE)
        self.tile_QE = exact_QE.to(dtype)
        self.length_Q = exact_QE.norm(dim=1)
        self.off_Q = (exact_QE - self.tile_QE).norm(dim=1)
        self.error_Q = torch.zeros(len(queries_QE))
        self.shift_Q = torch.zeros(len(queries_QE))  # by which the scores of a tile differ from the inner products
        self.least_Q = torch.full((len(queries_QE),), -math.inf)  # what the k-th best so far has at least
        self.scores_QW = torch.empty(len(queries_QE), 0)
        self.rows_QW = torch.empty(len(queries_QE), 0, dtype=torch.int64)

    def add(self, scores_QN: Tensor, first: int, corpus: _Rounded) -> None:
        """Take what may be among the best from a tile of scores, whose first document is row `first` of the corpus."""
        self._bound_error(corpus)
        if first == 0:
            self.shift_Q = (as_tensor(self.queries_QE).double() * corpus.mean_E).sum(1).float()
            whole = scores_QN[:, : scores_QN.shape[1] // _BLOCK * _BLOCK].unflatten(1, (_BLOCK, -1))
            if whole.shape[2] >= self.k:  # k blocks have k documents at least as good as the k-th best block
                self._raise(whole.amax(1).float().kthvalue(whole.shape[2] - self.k + 1, dim=1).values)
        count_Q, scores_F, column_F = _reaching(scores_QN, self._floor())
        self._append(count_Q, scores_F, column_F.add_(first))
        if self.scores_QW.shape[1] > 2 * self.k + _SPARE:
            self._cut()
        if self.scores_QW.shape[1] > 2 * self.k + _SPARE:  # so many that rounding cannot tell apart: copies
            self.settle()

    def settle(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Score the candidates in float64, and keep the k best of each query: their scores and rows, in final order."""
        self._cut()
        query_F, column_F = (self.scores_QW > -math.inf).nonzero().unbind(1)
        row_F = self.rows_QW[query_F, column_F].numpy()
        scores_F = pair_scores(self.queries_QE, self.vectors, query_F.numpy(), row_F)
        # A float's bits, as a whole number, are in its order: one sort by score, then row. The sum makes -0.0 a 0.0.
        bits_F = (scores_F + np.float32(0)).view(np.int32).astype(np.int64)
        bits_F = np.where(bits_F < 0, -(bits_F & 0x7FFFFFFF), bits_F)
        key_QW = np.full(self.rows_QW.shape, np.iinfo(np.int64).max)
        key_QW[query_F.numpy(), column_F.numpy()] = (-bits_F << 32) + row_F
        key_QK = np.sort(key_QW, axis=1)[:, : self.k]
        rows_QK, bits_QK = key_QK & 0xFFFFFFFF, -(key_QK >> 32)
        scores_QK = np.where(bits_QK < 0, -bits_QK | -(2**31), bits_QK).astype(np.int32).view(np.float32)
        self.rows_QW = torch.from_numpy(rows_QK)
        self.scores_QW = torch.from_numpy(scores_QK) - self.shift_Q[:, None]
        self.least_Q = self.scores_QW[:, -1]
        return scores_QK, rows_QK

    def _bound_error(self, corpus: _Rounded) -> None:
        """What a score of a tile may be off by, but for its own rounding: what either vector lost, by Cauchy-Schwarz;
        the sum of E products, by E units in the last place of |q| |c|, in whatever order; the rounding of a final
        score, of the shift and of their difference. 1 % is for the lengths themselves."""
        query_Q, off_Q = self.length_Q + _TINY, self.off_Q + _TINY
        length, off, unit = corpus.length + _TINY, corpus.off + _TINY, 2.0**-24
        lost_Q = off_Q * length + (query_Q + off_Q) * off
        summed_Q = unit * (self.queries_QE.shape[1] + 3) * (query_Q + off_Q) * (length + off)
        self.error_Q = 1.01 * (lost_Q + summed_Q + 3 * unit * query_Q * corpus.longest)

    def _raise(self, kth_Q: Tensor) -> None:
        """There are k documents whose score in a tile was at least `kth_Q`."""
        self.least_Q = torch.maximum(self.least_Q, _below(kth_Q, self.tile_QE.dtype) - self.error_Q)

    def _floor(self) -> Tensor:
        """What scores less in a tile cannot be of the k best."""
        return _below(self.least_Q - self.error_Q, self.tile_QE.dtype)

    def _cut(self) -> None:
        """Raise the floor to where the k-th best stands now, and drop what lies below it."""
        self._raise(self.scores_QW.kthvalue(self.scores_QW.shape[1] - self.k + 1, dim=1).values)
        count_Q, scores_F, column_F = _reaching(self.scores_QW, self._floor())
        rows_F = self.rows_QW[torch.arange(len(count_Q)).repeat_interleave(count_Q), column_F]
        self.scores_QW, self.rows_QW = self.scores_QW[:, :0], self.rows_QW[:, :0]
        self._append(count_Q, scores_F, rows_F)

    def _append(self, count_Q: Tensor, scores_F: Tensor, rows_F: Tensor) -> None:
        """Join found documents, so many of each query, to the candidates: one more column for each of a query."""
        query_F = torch.arange(len(count_Q)).repeat_interleave(count_Q)
        column_F = torch.arange(len(query_F)) - (count_Q.cumsum(0) - count_Q)[query_F]
        new_scores = torch.full((len(count_Q), int(count_Q.max())), -math.inf)
        new_rows = torch.full(new_scores.shape, -1)
        new_scores[query_F, column_F] = scores_F
        new_rows[query_F, column_F] = rows_F
        self.scores_QW = torch.cat((self.scores_QW, new_scores), 1)
        self.rows_QW = torch.cat((self.rows_QW, new_rows), 1)


def _reaching(scores_QN: Tensor, floor_Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What reaches its query's floor, query by query: how many of each (Q,), their scores (F,) and columns (F,)."""
    if kernels.available():
        return kernels.scan(scores_QN, floor_Q)
    hit_F = torch.from_numpy(np.flatnonzero((scores_QN.float() >= floor_Q[:, None]).numpy()))
    count_Q = torch.bincount(hit_F // scores_QN.shape[1], minlength=len(scores_QN))
    return count_Q, scores_QN.view(-1)[hit_F].float(), hit_F % scores_QN.shape[1]


def _product(queries_QE: Tensor, documents_NE: Tensor) -> Tensor:
    """(Q, N), summed in float32."""
    if queries_QE.dtype == torch.float32 and onednn.available():
        return onednn.linear(queries_QE, documents_NE, None)
    return F.linear(queries_QE, documents_NE)


@cache
def _fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 by itself: emulated, it would be slower than float32."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _below(scores_Q: Tensor, dtype: torch.dtype) -> Tensor:
    """Less than what rounds to `scores_Q` in `dtype`, and than what `scores_Q` rounds to."""
    return scores_Q - 1.01 * torch.finfo(dtype).eps / 2 * scores_Q.abs()


def _longest(vectors_NE: Tensor, what: str, first: int) -> float:
    """The length of the longest vector. Raises ValueError for one that is not finite; row 0 has the number `first`."""
    length_N = vectors_NE.norm(dim=1)
    longest = float(length_N.max())
    if not math.isfinite(longest):
        row = int(length_N.isfinite().logical_not().nonzero()[0])
        raise ValueError(f"{what} {first + row}: its vector is not finite, or its square overflows float32")
    return longest
