"""Exact inner-product search in tiles: the corpus passes once, in order, and no more than a tile of scores is held.

Tiles are multiplied coarsely: in int8 where the processor has it, which is four times as fast, else in float32; by
faiss where there are no kernels, as it ranks faster than stock torch. So a tile only nominates: what may be among a
query's best, by a bound of what either vector lost, is scored in float64. The result is that of brute force, whatever
the tiles were.

`Q` queries, `C` documents of the corpus, `E` embedding, `N` documents of a tile, `F` pairs of a query and a document,
`K` the best of one query, `W` these and what is taken into them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from embedwright import threads
from embedwright.cpu import kernels, onednn
from embedwright.errors import InputError
from embedwright.vectors.store import Vectors, as_tensor, as_vectors

_QUERIES = 512  # queries and documents of a tile of products: 4 MB, which a processor's last cache holds
_DOCUMENTS = 2048
_FAISS_DOCUMENTS = 16_384  # of a tile that faiss searches
_SPARE = 16  # documents that it finds beyond the best, so that none that is as good is left out
_VAIN = 0.2  # of the pairs of a tile: to score more of them for nothing takes longer than float32, which spares that
_WIDEST = 2**17  # numbers of a vector, for the product of two in int8 to stay within int32
_ROWS = 256  # worked on at a time, so that what is made of them stays in a core's own cache
_NO_ROW = 2**32 - 1
# More than a length loses where the squares of tiny numbers vanish; and its square more than a product does.
_TINY = 2.0**-50


def top_k(
    queries_QE: NDArray[Any], corpus: NDArray[Any] | Vectors, k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `k` largest inner products of each query, exactly: scores float32 (Q, k) descending, and their rows int64.

    A score is the inner product of the float32 vectors, summed in float64 and rounded to float32. Equal scores come in
    the order of the corpus, also where the cut falls between them. `k` is cut to the size of the corpus.

    `corpus` (C, E) may be larger than memory: beside it and the result, this holds a tile of it (2048 documents), 4 MB
    for products, and 9 E + 12 k bytes per query. Without the kernels the tile has 16,384 documents, and what was found
    is read a second time.

    Raises ValueError where the widths differ, `k` < 1, or a vector is not finite, with its row.
    """
    queries_QE = np.ascontiguousarray(queries_QE, dtype=np.float32)
    vectors = as_vectors(corpus)
    if queries_QE.ndim != 2 or queries_QE.shape[1] != vectors.shape[1]:
        raise InputError(f"queries {queries_QE.shape} and corpus {vectors.shape} must be (Q, E) and (C, E)")
    if k < 1:
        raise InputError(f"k must be at least 1, not {k}")
    k = min(k, len(vectors))
    if not len(queries_QE) or not k:
        return np.empty((len(queries_QE), k), np.float32), np.empty((len(queries_QE), k), np.int64)
    _check(as_tensor(queries_QE).norm(dim=1), "query", 0)
    with _settled():
        if kernels.available():
            return _searched(queries_QE, vectors, k)
        scores_QK, rows_QK, sure_Q = _by_faiss(queries_QE, vectors, k)
        if not sure_Q.all():
            scores_QK[~sure_Q], rows_QK[~sure_Q] = _searched(queries_QE[~sure_Q], vectors, k)
    return scores_QK, rows_QK


def _by_faiss(
    queries_QE: NDArray[np.float32], vectors: Vectors, k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
    """What `top_k` returns, and of each query whether it is sure: what faiss left out, by its float32 scores, is worse
    than the last of the best by more than those are off. Where many score alike, it is not."""
    faiss = threads.load_faiss()
    kept, longest = k + _SPARE, 0.0
    near_QW = np.empty((len(queries_QE), 0), np.float32)
    rows_QW = np.empty(near_QW.shape, np.int64)
    for first, documents_NE in vectors.tiles(_FAISS_DOCUMENTS):
        length_N = as_tensor(documents_NE).norm(dim=1)
        _check(length_N, "document", first)
        longest = max(longest, float(length_N.max()))
        most = min(kept, len(documents_NE))
        found_QW, own_QW = faiss.knn(queries_QE, documents_NE, most, metric=faiss.METRIC_INNER_PRODUCT)
        near_QW = np.concatenate((near_QW, found_QW), axis=1)
        rows_QW = np.concatenate((rows_QW, own_QW + first), axis=1)
        if near_QW.shape[1] > kept:
            best_QW = np.argpartition(-near_QW, kept - 1, axis=1)[:, :kept]
            near_QW = np.take_along_axis(near_QW, best_QW, axis=1)
            rows_QW = np.take_along_axis(rows_QW, best_QW, axis=1)
    query_F = np.arange(len(queries_QE)).repeat(rows_QW.shape[1])
    exact_QW = pair_scores(queries_QE, vectors, query_F, rows_QW.ravel()).reshape(rows_QW.shape)
    exact_QW, rows_QW = _ordered(exact_QW, rows_QW)
    off_Q = _slack(queries_QE.shape[1]) * np.linalg.norm(queries_QE, axis=1) * longest + _TINY
    sure_Q = exact_QW[:, k - 1] > near_QW.min(1) + off_Q
    return exact_QW[:, :k].copy(), rows_QW[:, :k].copy(), sure_Q | (len(vectors) <= kept)


def _slack(width: int) -> float:
    """Of two lengths' product: what a sum of so many products in float32, in whatever order, and the rounding of
    lengths, bounds and scores are off at most. 1 % is for the lengths themselves."""
    return float(1.01 * 2.0**-24 * (width + 64))


def _searched(
    queries_QE: NDArray[np.float32], vectors: Vectors, k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """What `top_k` returns, by tiles of our own products."""
    query_QE = as_tensor(queries_QE)
    in_whole = kernels.available() and onednn.whole_available() and vectors.shape[1] <= _WIDEST
    best: list[_Best] = []
    pause = left = 0  # tiles in float32 where int8 tells too little apart; then it is tried again, ever more rarely
    for first, documents_NE in vectors.tiles(_DOCUMENTS):
        document_NE = as_tensor(documents_NE)
        if first == 0:
            _check(document_NE.norm(dim=1), "document", 0)  # before one of them spoils the mean
            mean_E = document_NE.mean(0)
            best = [_Best(some_QE, k, mean_E if in_whole else None) for some_QE in query_QE.split(_QUERIES)]
        tile = _whole(document_NE, mean_E) if in_whole and not left else _plain(document_NE)
        _check(tile.length_N, "document", first)
        vain = sum(some.add(document_NE, tile, first) for some in best)
        if left:
            left -= 1
        elif vain > _VAIN * len(query_QE) * len(document_NE):
            pause = left = 2 * pause + 1
    ordered = [_ordered(some.scores_QK.numpy(), some.rows_QK.numpy()) for some in best]
    return np.concatenate([scores for scores, _ in ordered]), np.concatenate([rows for _, rows in ordered])


def pair_scores(
    queries_QE: NDArray[np.float32], vectors: Vectors, query_F: NDArray[np.int64], row_F: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Float32 (F,): the inner product of each query and document named, summed in float64, as `top_k` scores them.

    Documents are read in their order, block by block; beside the result, one block is held.
    """
    order_F = np.argsort(row_F, kind="stable")
    rows_F = row_F[order_F]
    queries_F = torch.from_numpy(query_F[order_F])
    query_QE = as_tensor(np.ascontiguousarray(queries_QE)).double()
    scores_F = np.empty(len(row_F), np.float32)
    with _settled():
        for first, documents_NE in vectors.tiles_with(rows_F):
            start, end = np.searchsorted(rows_F, (first, first + len(documents_NE)))
            own_F = torch.from_numpy(rows_F[start:end] - first)
            scores_F[order_F[start:end]] = _exact(query_QE, as_tensor(documents_NE), queries_F[start:end], own_F)
    return scores_F


@contextmanager
def _settled() -> Iterator[None]:
    """On the CPU and in true float32, whatever this process has told torch: `set_float32_matmul_precision("medium")`
    lets processors with AMX multiply in bfloat16, which loses more than the bounds know of."""
    backend: Any = torch.backends.mkldnn
    products = backend.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        with torch.device("cpu"):
            yield
    finally:
        products.fp32_precision = before


class _Multiplied(NamedTuple):
    """Vectors less a mean as they are multiplied: each is about `scale` times its own of these, and off by a vector
    that is no longer than `lost`."""

    vectors_NE: Tensor  # int8 or float32
    scale_N: Tensor
    moved_N: Tensor  # lengths less the mean
    lost_N: Tensor
    length_N: Tensor


def _whole(vectors_NE: Tensor, mean_E: Tensor) -> _Multiplied:
    """In int8. The mean, once it is taken away, moves all scores of a query alike; and where all texts of a model point
    in nearly one direction, what is left, and so what rounding loses, is small."""
    whole_NE, scale_N, length_N, moved_N, lost_N = kernels.quantised(vectors_NE, mean_E)
    return _Multiplied(whole_NE, scale_N, moved_N.add_(_TINY), lost_N.add_(_TINY), length_N)


def _plain(vectors_NE: Tensor) -> _Multiplied:
    """In float32, as they are."""
    length_N = vectors_NE.norm(dim=1)
    lost_N = torch.full_like(length_N, _TINY)
    return _Multiplied(vectors_NE, torch.ones_like(length_N), length_N + _TINY, lost_N, length_N)


class _Best:
    """The k best of some queries among the documents so far: a heap, or in order where there are no kernels."""

    def __init__(self, query_QE: Tensor, k: int, mean_E: Tensor | None) -> None:
        """`mean_E`: what is taken from documents in int8, None where all are float32."""
        self.exact_QE = query_QE.double()
        zero_E = query_QE.new_zeros(query_QE.shape[1])
        sides = [(_plain(query_QE), zero_E)] + ([] if mean_E is None else [(_whole(query_QE, zero_E), mean_E)])
        self.sides = {side.vectors_NE.dtype: (side.vectors_NE, self._bounds(side, mean)) for side, mean in sides}
        self.scores_QK = query_QE.new_full((len(query_QE), k), -math.inf)  # float32, whatever torch's default
        self.rows_QK = torch.full(self.scores_QK.shape, _NO_ROW)

    def _bounds(self, query: _Multiplied, mean_E: Tensor) -> tuple[Tensor, ...]:
        """What makes a product of two vectors the most that their score can be, as `kernels.rank` reads it.

        With q = a + d and x = m + b + e, where a and b are what is multiplied, q x is a b + q m, and |d| |b + e| + |a|
        |e| by Cauchy-Schwarz; beside it what float32 loses of |q| |x - m|. 1 % is for the lengths themselves."""
        slack = _slack(len(mean_E))
        off_Q = 1.01 * query.lost_N + slack * query.moved_N
        shift_Q = (self.exact_QE @ mean_E.double()).float() + slack * query.moved_N * mean_E.norm()
        return query.scale_N, off_Q, 1.01 * (query.moved_N + query.lost_N), shift_Q

    def add(self, document_NE: Tensor, tile: _Multiplied, first: int) -> int:
        """Take what is of the best from a tile, whose first document is row `first` of the corpus. How many were scored
        for nothing, where the kernels do it."""
        vectors_QE, bounds = self.sides[tile.vectors_NE.dtype]
        product_QN = _product(vectors_QE, tile.vectors_NE)
        if kernels.available():
            columns = (tile.scale_N, tile.moved_N, tile.lost_N)
            best = (self.scores_QK, self.rows_QK)
            return kernels.rank(product_QN, columns, bounds, self.exact_QE, document_NE, first, *best)
        _, off_Q, _, _ = bounds
        self._rank(product_QN + torch.outer(off_Q, tile.moved_N), document_NE, first)
        return 0

    def _rank(self, most_QN: Tensor, document_NE: Tensor, first: int) -> None:
        """Take what is of the best from a tile of the most that scores can be."""
        queries, k = self.scores_QK.shape
        floor_Q = self.scores_QK[:, -1]
        if first == 0:  # any k documents have the k-th best at least
            likely_F = most_QN.topk(min(k, len(document_NE))).indices.flatten()
            query_F = torch.arange(queries).repeat_interleave(len(likely_F) // queries)
            if len(likely_F) == queries * k:
                floor_Q = _exact(self.exact_QE, document_NE, query_F, likely_F).view(queries, k).amin(1)
        hit_F = torch.from_numpy(np.flatnonzero(~(most_QN < floor_Q[:, None]).numpy()))
        query_F, column_F = hit_F // len(document_NE), hit_F % len(document_NE)
        count_Q = torch.bincount(query_F, minlength=queries)
        place_F = k + torch.arange(len(hit_F)) - (count_Q.cumsum(0) - count_Q)[query_F]
        scores_QW = self.scores_QK.new_full((queries, k + int(count_Q.max())), -math.inf)
        rows_QW = torch.full(scores_QW.shape, _NO_ROW)
        scores_QW[:, :k], rows_QW[:, :k] = self.scores_QK, self.rows_QK
        scores_QW[query_F, place_F] = _exact(self.exact_QE, document_NE, query_F, column_F)
        rows_QW[query_F, place_F] = column_F + first
        scores_QK, rows_QK = _ordered(scores_QW.numpy(), rows_QW.numpy())
        self.scores_QK, self.rows_QK = torch.from_numpy(scores_QK[:, :k]), torch.from_numpy(rows_QK[:, :k])


def _ordered(
    scores_QW: NDArray[np.float32], rows_QW: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores and rows of each query by descending score, equal ones by row."""
    # A float's bits, as a whole number, are in its order: one sort by score, then row. The sum makes -0.0 a 0.0.
    bits_QW = (scores_QW + np.float32(0)).view(np.int32).astype(np.int64)
    bits_QW = np.where(bits_QW < 0, -(bits_QW & 0x7FFFFFFF), bits_QW)
    key_QW = np.sort((-bits_QW << 32) + rows_QW, axis=1)
    bits_QW = -(key_QW >> 32)
    scores_QW = np.where(bits_QW < 0, -bits_QW | -(2**31), bits_QW).astype(np.int32).view(np.float32)
    return scores_QW, key_QW & 0xFFFFFFFF


def _product(queries_QE: Tensor, documents_NE: Tensor) -> Tensor:
    """(Q, N): int32 of int8, float32 of float32."""
    if queries_QE.dtype == torch.int8:
        return onednn.whole(queries_QE, documents_NE)
    if onednn.available():
        return onednn.linear(queries_QE, documents_NE, None)
    return F.linear(queries_QE, documents_NE)


def _exact(query_QE: Tensor, document_NE: Tensor, query_F: Tensor, document_F: Tensor) -> Tensor:
    """Float32 (F,): the inner products of pairs, of queries in float64, summed in float64."""
    if kernels.available():
        return kernels.dots(query_QE, document_NE, query_F, document_F)
    scores_F = document_NE.new_empty(len(query_F))
    for some_F, queries, documents in zip(*(x.split(_ROWS) for x in (scores_F, query_F, document_F)), strict=True):
        # not a matrix product: a row's sum must not depend on its neighbours, or copies would score differently
        exact = document_NE.index_select(0, documents).double().mul_(query_QE.index_select(0, queries))
        some_F.copy_(exact.sum(1))
    return scores_F


def _check(length_N: Tensor, what: str, first: int) -> None:
    """Raise ValueError for a length that is not finite; the first has the number `first`."""
    if not torch.isfinite(length_N.sum()) and not (finite_N := length_N.isfinite()).all():
        row = int(finite_N.logical_not().nonzero()[0])
        raise InputError(f"{what} {first + row}: its vector is not finite, or its square overflows float32")
