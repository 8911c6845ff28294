"""BM25, the lexical ranking: a baseline of evaluation and a teacher of mining. It needs no vectors.

Words are runs of two or more letters, digits or underscores, in lower case, without bm25s's 33 English stop words and
without stemming. Scores are those of bm25s as Lucene defines them, with k1 = 1.5 and b = 0.75. Text that is not
separated by spaces, such as Chinese, has no such words: BM25 is of little use there.

`Q` queries, `N` texts of an index, `K` the best of one query.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from embedwright.errors import InputError, MissingPackageError

try:
    import bm25s
except ImportError:
    raise MissingPackageError("BM25 needs the package bm25s: pip install bm25s") from None

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG


def index(texts: Iterable[str]) -> bm25s.BM25:
    """Indexes texts by their words. Raises InputError if none of them has a word."""
    words = _words(list(texts))
    if not any(words):
        raise InputError("BM25 finds no word in these texts")
    made = bm25s.BM25()
    made.index(words, create_empty_token=False, show_progress=False)
    return made


def scores(index: bm25s.BM25, query: str) -> NDArray[np.float32]:
    """Returns the score (N,) of each indexed text for a query: 0 where they share no word."""
    known = [word for word in _words([query])[0] if word in index.vocab_dict]
    if not known:
        return np.zeros(index.scores["num_docs"], np.float32)
    scores_N: NDArray[np.float32] = index.get_scores(known)
    return scores_N


def best(scores_N: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Returns the rows of the `k` largest scores, the largest first. Equal scores come in the order of the rows."""
    k = min(k, len(scores_N))
    floor = np.partition(scores_N, -k)[-k]
    above = np.flatnonzero(scores_N > floor)
    rows = np.concatenate([above, np.flatnonzero(scores_N == floor)[: k - len(above)]])
    return rows[np.argsort(-scores_N[rows], kind="stable")]


def top(index: bm25s.BM25, queries: Sequence[str], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Finds the `k` best texts of each query, as `search.top_k` does: scores (Q, K), descending, and rows (Q, K).

    Texts that share no word with the query score 0 and come last. `k` is cut to the size of the index.
    """
    if k < 1:
        raise InputError(f"k must be at least 1, not {k}")
    k = min(k, index.scores["num_docs"])
    scores_QK, rows_QK = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for q, query in enumerate(queries):
        scores_N = scores(index, query)
        rows_QK[q] = best(scores_N, k)
        scores_QK[q] = scores_N[rows_QK[q]]
    return scores_QK, rows_QK


def _words(texts: list[str]) -> list[list[str]]:
    words: list[list[str]] = bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
    return words
