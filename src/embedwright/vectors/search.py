"""Exact inner-product search: the corpus passes once, in order, block by block.

Each block is multiplied coarsely first, in int8 where the processor has it, else in float32. That only nominates: each
document which may be among a query's best, by a bound on what the coarse product is off, is then scored in float64. So
the result is that of brute force. A GPU nominates by tiles too, in float32, and scores in float64 itself.

`Q` queries, `C` documents of the corpus, `E` embedding, `N` documents of a block, `F` pairs of a query and a document,
`K` the best of one query, `W` these and what is merged into them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedwright.cpu import kernels, onednn
from embedwright.errors import InputError
from embedwright.vectors import int8
from embedwright.vectors.int8 import TINY, Int8Nominator, slack
from embedwright.vectors.shards import Vectors, as_tensor, as_vectors

_QUERIES = 512  # queries and documents of one product: 4 MB, which a processor's last cache holds
_DOCUMENTS = 2048
_GPU_QUERIES = 2048  # the same on a GPU: 0.5 GB
_GPU_DOCUMENTS = 65_536
_WASTED = 0.2  # share of a block's pairs: where int8 nominates more, float32, which nominates few, is faster
_ROWS = 256  # rows of pairs scored at once without kernels: they stay in a core's own cache
_GPU_ROWS, _GPU_NUMBERS = 2**14, 2**24  # at most so many pairs, and numbers of each side: 0.1 GB in float64
_TF32 = 2.0**-8  # what a product of a GPU is off at most, relative to the lengths, where the host has allowed TF32
_NO_ROW = 2**32 - 1


class Nominator(Protocol):
    """Gives for parts of the queries the number of the first and bool (q, N): whose score may be `floor_Q` or more."""

    def nominate(self, document_NE: Tensor, floor_Q: Tensor) -> Iterator[tuple[int, Tensor]]: ...


def top_k(
    queries_QE: NDArray[Any], corpus: NDArray[Any] | Vectors, k: int, device: torch.device | str | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Finds the `k` largest inner products of each query, exactly.

    A score is the inner product of the float32 vectors, summed in float64 and rounded to float32. Equal scores come in
    the order of the corpus, also where the cut falls between them. `k` is cut to the size of the corpus.

    `corpus` (C, E) may be larger than memory, and is read once, whatever the number of queries. Beside it and the
    result, this holds a block of it (2048 documents), 4 MB for products, and 5 E + 8 k bytes per query.

    `device` multiplies and scores; default: a GPU where torch has one, else the CPU. What a GPU holds: `gpu_bytes`. It
    may add the float64 products in another order than the CPU.

    Returns:
        Scores float32 (Q, k), descending, and their rows int64 (Q, k).

    Raises:
        ValueError: the widths differ, `k` < 1, or a vector is not finite; the message names its row.
    """
    queries_QE = np.ascontiguousarray(queries_QE, dtype=np.float32)
    vectors = as_vectors(corpus)
    if queries_QE.ndim != 2 or queries_QE.shape[1] != vectors.shape[1]:
        raise InputError(f"queries {queries_QE.shape} and corpus {vectors.shape} must be (Q, E) and (C, E)")
    if k < 1:
        raise InputError(f"k must be at least 1, not {k}")
    k = min(k, len(vectors))
    key_QK = np.full((len(queries_QE), k), _NONE)
    if not key_QK.size:
        return _scores(key_QK), key_QK
    query_QE = as_tensor(queries_QE).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check(query_QE, "query", 0)
    on_cpu = _on_cpu(query_QE)
    nominator: Nominator = _Float32Nominator(query_QE)
    for first, documents_NE in vectors.tiles(_DOCUMENTS if on_cpu else _GPU_DOCUMENTS):
        document_NE = as_tensor(documents_NE).to(query_QE.device)
        _check(document_NE, "document", first)
        if first == 0 and on_cpu and int8.available(vectors.shape[1]):
            nominator = Int8Nominator(query_QE, document_NE.mean(0), _QUERIES)
        floor_Q = _scores(key_QK[:, -1]) if first else _first_floor(query_QE, document_NE, k)
        nominated = 0
        for start, may_QN in nominator.nominate(document_NE, as_tensor(floor_Q).to(query_QE.device)):
            marked_F = np.flatnonzero(may_QN.numpy()) if on_cpu else may_QN.flatten().nonzero()[:, 0].cpu().numpy()
            query_F, column_F = divmod(marked_F, len(documents_NE))
            found_F = _exact(query_QE[start:], document_NE, query_F, column_F)
            own = slice(start, start + len(may_QN))
            key_QK[own] = _merged(key_QK[own], _keys(found_F, column_F + first), query_F)
            nominated += len(query_F)
        if nominated > _WASTED * len(queries_QE) * len(documents_NE):
            nominator = _Float32Nominator(query_QE)
        del document_NE  # before a GPU gets the next ones
    return _scores(key_QK), key_QK & _NO_ROW


def gpu_bytes(queries: int, width: int) -> int:
    """Returns about how many bytes `top_k` holds on a GPU: vectors, products with their bounds, pairs in float64."""
    pairs = 32 * min(width * _GPU_ROWS, _GPU_NUMBERS)
    return 4 * width * (queries + _GPU_DOCUMENTS) + 9 * _GPU_QUERIES * _GPU_DOCUMENTS + pairs


def pair_scores(
    queries_QE: NDArray[np.float32], vectors: Vectors, query_F: NDArray[np.int64], row_F: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Returns float32 (F,): the score of each named pair of a query and a document, as `top_k` scores them.

    Documents are read in their order, block by block; beside the result, one block is held.
    """
    order_F = np.argsort(row_F, kind="stable")
    query_F, row_F = query_F[order_F], row_F[order_F]
    query_QE = as_tensor(np.ascontiguousarray(queries_QE))
    scores_F = np.empty(len(row_F), np.float32)
    for first, documents_NE in vectors.tiles_with(row_F):
        start, end = np.searchsorted(row_F, (first, first + len(documents_NE)))
        scores_F[order_F[start:end]] = _exact(
            query_QE, as_tensor(documents_NE), query_F[start:end], row_F[start:end] - first
        )
    return scores_F


class _Float32Nominator:
    """Nominates by float32 products."""

    def __init__(self, query_QE: Tensor) -> None:
        self.query_QE = query_QE
        self.at_once = _QUERIES if _on_cpu(query_QE) else _GPU_QUERIES
        self.off_Q = (slack(query_QE.shape[1]) + (0 if _on_cpu(query_QE) else _TF32)) * query_QE.norm(dim=1)

    def nominate(self, document_NE: Tensor, floor_Q: Tensor) -> Iterator[tuple[int, Tensor]]:
        length_N = document_NE.norm(dim=1)
        for start in range(0, len(floor_Q), self.at_once):
            own = slice(start, start + self.at_once)
            most_QN = _product(self.query_QE[own], document_NE).add_(torch.outer(self.off_Q[own], length_N)).add_(TINY)
            yield start, ~(most_QN < floor_Q[own, None])  # what is not a number may be anything


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _product(query_QE: Tensor, document_NE: Tensor) -> Tensor:
    """Multiplies in float32; a GPU in TF32 where the host has allowed that.

    On a CPU, torch's products are bfloat16 where the host has allowed that; numpy's never are.
    """
    if not _on_cpu(query_QE):
        return query_QE @ document_NE.T
    backend: Any = torch.backends.mkldnn
    if onednn.available() and backend.matmul.fp32_precision in ("none", "ieee"):
        return onednn.linear(query_QE, document_NE, None)
    return as_tensor(query_QE.numpy() @ document_NE.numpy().T)


def _first_floor(query_QE: Tensor, document_NE: Tensor, k: int) -> NDArray[np.float32]:
    """Returns a lower bound of each query's k-th best score: the worst of k likely documents of the first block."""
    floor_Q = np.full(len(query_QE), -np.inf, np.float32)
    if k > len(document_NE):
        return floor_Q
    at_once = _QUERIES if _on_cpu(query_QE) else _GPU_QUERIES
    for start in range(0, len(floor_Q), at_once):
        own_QE = query_QE[start : start + at_once]
        likely_QK = _product(own_QE, document_NE).topk(k, sorted=False).indices.cpu().numpy()
        scores_F = _exact(own_QE, document_NE, np.arange(len(own_QE)).repeat(k), likely_QK.ravel())
        floor_Q[start : start + at_once] = scores_F.reshape(-1, k).min(1)
    return floor_Q


def _exact(
    query_QE: Tensor, document_NE: Tensor, query_F: NDArray[np.int64], document_F: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Scores pairs, float32 (F,): inner products of float32 vectors, summed in float64."""
    if (on_cpu := _on_cpu(query_QE)) and kernels.available():
        return kernels.dots(query_QE, document_NE, as_tensor(query_F), as_tensor(document_F)).numpy()
    scores_F = np.empty(len(query_F), np.float32)
    size = _ROWS if on_cpu else min(_GPU_ROWS, _GPU_NUMBERS // query_QE.shape[1])
    for start in range(0, len(query_F), size):
        own = slice(start, start + size)
        # not a matrix product: a row's sum must not depend on its neighbours, or copies would score differently
        if on_cpu:
            query_FE = query_QE.numpy()[query_F[own]].astype(np.float64)
            scores_F[own] = (document_NE.numpy()[document_F[own]] * query_FE).sum(1)
        else:  # always as many rows: a GPU's order of summation depends on it
            query, document = (
                as_tensor(np.resize(some[own], size)).to(query_QE.device) for some in (query_F, document_F)
            )
            found_F = (query_QE[query].double() * document_NE[document].double()).sum(1).float()
            scores_F[own] = found_F[: len(query_F) - start].cpu().numpy()
    return scores_F


def _merged(key_QK: NDArray[np.int64], key_F: NDArray[np.int64], query_F: NDArray[np.int64]) -> NDArray[np.int64]:
    """Merges new keys, in the order of their queries, into the best so far. Returns the k best of each, in order."""
    queries, k = key_QK.shape
    count_Q = np.bincount(query_F, minlength=queries)
    key_QW = np.full((queries, k + int(count_Q.max())), _NONE)
    key_QW[:, :k] = key_QK
    key_QW[query_F, k + np.arange(len(query_F)) - (count_Q.cumsum() - count_Q)[query_F]] = key_F
    key_QW.sort(axis=1)
    return key_QW[:, :k]


def _keys(scores: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Joins score and row into one integer, whose order is by descending score, then by row."""
    bits = (scores + np.float32(0)).view(np.int32).astype(np.int64)  # in the order of the floats; -0.0 becomes 0.0
    keys: NDArray[np.int64] = (np.where(bits < 0, bits & 0x7FFFFFFF, -bits) << 32) + rows
    return keys


def _scores(keys: NDArray[np.int64]) -> NDArray[np.float32]:
    """Takes the scores out of keys."""
    bits = -(keys >> 32)
    return np.where(bits < 0, -bits | -(2**31), bits).astype(np.int32).view(np.float32)


_NONE = _keys(np.array([-np.inf], np.float32), np.array([_NO_ROW]))[0]  # stands where there is no document


def _check(vectors_NE: Tensor, what: str, first: int) -> None:
    """Raises InputError for a vector that is not finite. The first vector has the number `first`."""
    length_N = vectors_NE.norm(dim=1)
    if not torch.isfinite(length_N.sum()) and not (finite_N := length_N.isfinite()).all():
        row = int(finite_N.logical_not().nonzero()[0])
        raise InputError(f"{what} {first + row}: its vector is not finite, or its square overflows float32")
