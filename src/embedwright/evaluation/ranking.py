"""Retrieval and reranking: what is ranked for each query, by a model's vectors or by BM25.

Q queries, C documents, P chunks, K hits of a query, E embedding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedwright import threads
from embedwright.data.files.beir import read_beir
from embedwright.data.files.folders import is_data
from embedwright.data.files.rows import text_lines
from embedwright.data.schema import DataError, id_of
from embedwright.encoders.chunks import chunked
from embedwright.encoders.protocol import Encoder, encode_finite, task_for
from embedwright.evaluation import metrics
from embedwright.evaluation.metrics import READOUTS, SEED, Embeddings, Qrels, Run, Scored
from embedwright.evaluation.tasks import SuiteTask, digest, read_columns, rows_of, split_of

DEPTH = 1000  # hits of a query that are ranked, as in mteb; with equal scores, hits after the first 100 may matter
CANDIDATES = 100  # that BM25 finds for a query, if the task does not say how many
_CENTRED_DEPTH = 100  # hits that are ranked for a read-out
_BLOCK = 64  # queries whose scores of all chunks are in memory at once

logger = logging.getLogger(__name__)


class Vectors(NamedTuple):
    """Unit vectors of the queries and of what is ranked for them: documents by id, or the `counts` chunks of each."""

    query_QE: Embeddings
    doc_CE: Embeddings
    ids: list[str]
    counts: list[int] | None = None


class Search(NamedTuple):
    """Queries and documents by id, judgements, and the documents to rank for each query: None for all of them."""

    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: Qrels
    candidates: dict[str, list[str]] | None


def score(encoder: Encoder | None, task: SuiteTask) -> Scored:
    """Scores retrieval or reranking by the encoder's vectors, or by BM25 if there is no encoder.

    Retrieval by vectors has two read-outs beside its metrics (`_readouts`), which cannot be its main score.
    """
    search = _read(task)
    vectors = None if encoder is None else _encoded(encoder, search, task)
    found = _metrics(search, _by_words(search) if vectors is None else _by_vectors(search, vectors), task)
    if vectors is not None and task.kind == "retrieval":
        found = replace(found, values=found.values | _readouts(search, vectors, task))
    judged = {query: search.qrels[query] for query in search.queries}
    lists = {query: sorted(docs) for query, docs in (search.candidates or {}).items()}
    data = digest(search.queries, search.corpus, judged, lists, [task.ignore_identical_ids])
    return replace(found, data=data)


def _metrics(search: Search, run: Run, task: SuiteTask) -> Scored:
    if task.ignore_identical_ids:
        run = {query: {doc: score for doc, score in hits.items() if doc != query} for query, hits in run.items()}
    return metrics.ranking(run, search.qrels)


def _readouts(search: Search, vectors: Vectors, task: SuiteTask) -> dict[str, float]:
    """Says how much the documents' vectors have in common, and what retrieval is without it.

    `mean_cosine` is the mean over all pairs of two documents (or chunks). For `nDCG@10_centred`, the documents' mean
    vector is subtracted from queries and documents, and each is scaled to length 1 again. Overwrites the documents'
    vectors, so that a large corpus is in memory once. Fewer than two documents have no read-outs.
    """
    query_QE, doc_CE = vectors.query_QE, vectors.doc_CE
    if (count := len(doc_CE)) < 2:
        return {}
    sum_E = doc_CE.sum(axis=0, dtype=np.float64)
    with_itself = np.einsum("ce,ce->", doc_CE, doc_CE, dtype=np.float64)
    mean_cosine = float(sum_E @ sum_E - with_itself) / (count * (count - 1))
    mean_E = (sum_E / count).astype(np.float32)
    doc_CE -= mean_E
    doc_CE /= np.maximum(np.linalg.norm(doc_CE, axis=1, keepdims=True), 1e-12)
    run = _by_vectors(search, vectors._replace(query_QE=_unit(query_QE - mean_E)), depth=_CENTRED_DEPTH)
    return dict(zip(READOUTS, (mean_cosine, _metrics(search, run, task).values["nDCG@10"]), strict=True))


# ---------------------------------------------------------------------------------------------------- what is ranked


def _read(task: SuiteTask) -> Search:
    if not task.path.is_dir():
        return _from_rows(task.path, task.limit)
    beir = read_beir(task.path, split_of(task.path))
    queries = dict(islice(((id_, text) for id_, text in beir.queries.items() if id_ in beir.qrels), task.limit))
    corpus = beir.corpus
    if task.corpus_limit:
        corpus = _fewer(corpus, set(chain.from_iterable(beir.qrels[query] for query in queries)), task.corpus_limit)
    own = sum(corpus.get(query) == text for query, text in queries.items())
    if own and not task.ignore_identical_ids:
        logger.warning(
            "%s: %d queries are documents too, under their own ids, and find themselves first; mteb leaves these out "
            "for ArguAna, Quora and some others, and so does ignore_identical_ids: true in a suite file",
            *(task.path, own),
        )
    search = Search(queries, corpus, beir.qrels, None)
    if task.candidates is None:
        return search
    if task.candidates == "bm25":
        found = {query: list(hits) for query, hits in _bm25(search, task.depth or CANDIDATES).items()}
    else:
        found = _candidates(Path(task.candidates), beir.queries, corpus)
    lists = {query: found.get(query, [])[: task.depth] for query in queries}
    missing = sum(not some for some in lists.values())
    if missing == len(lists):
        raise DataError(f"{task.candidates}: no candidate for any query")
    if missing:
        logger.warning("%s: %d of %d queries have no candidate and score 0", task.candidates, missing, len(lists))
    return search._replace(candidates=lists)


def _fewer(corpus: Mapping[str, str], judged: set[str], limit: int) -> dict[str, str]:
    """Takes the judged documents and, up to `limit` in all, others drawn by a fixed seed. They keep their order."""
    others = [doc for doc in corpus if doc not in judged]
    drawn = np.random.default_rng(SEED).permutation(len(others))[: max(limit - len(judged), 0)]
    kept = judged | {others[place] for place in drawn.tolist()}
    return {doc: text for doc, text in corpus.items() if doc in kept}


def _from_rows(path: Path, limit: int | None) -> Search:
    """Reads rows of a query with its own positives and negatives. A query that lacks either is left out, as in mteb."""
    queries: dict[str, str] = {}
    corpus: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    columns = read_columns(path, "reranking", limit)
    for number, (query, positive, negative) in enumerate(zip(*columns, strict=True), start=1):
        if not positive or not negative:
            continue
        # mteb's ids: of equal scores trec_eval ranks the later id first, so a tie is never in a positive's favour
        own = {f"apositive_{number}_{i:05}": text for i, text in enumerate(positive)}
        own |= {f"negative_{number}_{i:05}": text for i, text in enumerate(negative)}
        queries[str(number)] = query
        corpus |= own
        qrels[str(number)] = {doc: int(doc.startswith("a")) for doc in own}
    if not queries:
        raise DataError(f"{path}: no query with a positive and a negative")
    if (left_out := len(columns[0]) - len(queries)) > 0:
        logger.warning("%s: %d queries without a positive or a negative are left out, as in mteb", path, left_out)
    return Search(queries, corpus, qrels, {query: list(docs) for query, docs in qrels.items()})


def _candidates(file: Path, queries: Mapping[str, str], corpus: Mapping[str, str]) -> dict[str, list[str]]:
    """Reads the documents that a retriever found for each query, best first.

    `file` is a TREC run, or rows of mteb's `{"query-id", "corpus-ids"}`. DataError names file and line.
    """
    scored: dict[str, dict[str, float]] = {}
    for where, query, doc, score in _listed(file):
        if query not in queries:
            raise DataError(f"{where}: query {query[:60]!r} is not among the queries")
        if doc not in corpus:
            raise DataError(f"{where}: document {doc[:60]!r} is not in the corpus")
        if doc in scored.setdefault(query, {}):
            raise DataError(f"{where}: document {doc[:60]!r} twice for query {query[:60]!r}")
        scored[query][doc] = score
    return {query: sorted(docs, key=lambda doc: -docs[doc]) for query, docs in scored.items()}


def _listed(file: Path) -> Iterator[tuple[str, str, str, float]]:
    """Yields (file:line, query id, document id, score) of each candidate. The score of a list is the place in it."""
    if is_data(file):
        for number, (query, docs) in enumerate(rows_of(file, "test", _row), start=1):
            yield from ((f"{file}:{number}", query, doc, float(-place)) for place, doc in enumerate(docs))
        return
    for number, raw, _ in text_lines(file):
        fields = raw.decode("utf-8", errors="replace").split()
        if not fields:
            continue
        try:
            query, _, doc, _, score, _ = fields
            value = float(score)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            wanted = "query id, Q0, document id, rank, score and the name of the run"
            raise DataError(f"{file}:{number}: expected {wanted}, separated by spaces, as in a TREC run")
        yield f"{file}:{number}", query, doc, value


def _row(row: dict[str, Any], _: str) -> tuple[str, list[str]]:
    if not isinstance(docs := row.get("corpus-ids"), list):
        raise DataError("corpus-ids: expected a list of document ids, beside query-id")
    return id_of(row.get("query-id"), "query-id"), [id_of(doc, "corpus-ids") for doc in docs]


# ---------------------------------------------------------------------------------------------------- how it is ranked


def _by_words(search: Search) -> Run:
    """Ranks by BM25 over the words of the corpus. In a whole corpus, documents that share no word are not hits."""
    if search.candidates is None:
        return _bm25(search, DEPTH)
    from embedwright.vectors import bm25

    index, row_of = bm25.index(search.corpus.values()), {doc: row for row, doc in enumerate(search.corpus)}
    run = {}
    for query, docs in search.candidates.items():
        score_C = bm25.scores(index, search.queries[query])
        run[query] = {doc: float(score_C[row_of[doc]]) for doc in docs}
    return run


def _bm25(search: Search, depth: int) -> dict[str, dict[str, float]]:
    """Finds the best documents of each query, best first. Those that share no word with it are none."""
    from embedwright.vectors import bm25

    score_QK, row_QK = bm25.top(bm25.index(search.corpus.values()), list(search.queries.values()), depth)
    return _named(search, np.where(score_QK > 0, score_QK, -np.inf), row_QK)


def _encoded(encoder: Encoder, search: Search, task: SuiteTask) -> Vectors:
    """Encodes the queries and what is ranked for them. Of a corpus with candidates, only these are encoded."""
    query_QE = _unit(encode_once(encoder, list(search.queries.values()), task_for(encoder, task.instruction)))
    if search.candidates is not None:
        named = set(chain.from_iterable(search.candidates.values()))
        ids = [doc for doc in search.corpus if doc in named]
        return Vectors(query_QE, _unit(encode_once(encoder, [search.corpus[doc] for doc in ids])), ids)
    ids, texts = list(search.corpus), list(search.corpus.values())
    if not task.chunk_tokens:
        return Vectors(query_QE, _unit(encode_once(encoder, texts)), ids)
    parts = chunked(encoder, texts, task.chunk_tokens)
    chunk_PE = _unit(encode_once(encoder, list(chain.from_iterable(parts))))
    return Vectors(query_QE, chunk_PE, ids, [len(own) for own in parts])


def _by_vectors(search: Search, vectors: Vectors, depth: int = DEPTH) -> Run:
    if search.candidates is not None:
        return _of_candidates(search.candidates, vectors)
    query_QE, doc_CE, ids, counts = vectors
    if counts is not None:
        return _named(search, *_best_of_chunks(query_QE, doc_CE, counts))
    faiss = threads.load_faiss()
    return _named(search, *faiss.knn(query_QE, doc_CE, min(depth, len(ids)), metric=faiss.METRIC_INNER_PRODUCT))


def _of_candidates(candidates: Mapping[str, Sequence[str]], vectors: Vectors) -> Run:
    row_of = {doc: row for row, doc in enumerate(vectors.ids)}
    run = {}
    for query_E, (query, own) in zip(vectors.query_QE, candidates.items(), strict=True):
        # einsum, not a matrix product: equal documents then have equal scores wherever they stand
        score_K = np.einsum("ke,e->k", vectors.doc_CE[[row_of[doc] for doc in own]], query_E)
        run[query] = dict(zip(own, score_K.tolist(), strict=True))
    return run


def _best_of_chunks(
    query_QE: Embeddings, chunk_PE: Embeddings, counts: Sequence[int]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns score and row (Q, K) of the best documents. A document's score is the largest of its chunks' (MaxP)."""
    starts = np.cumsum([0, *counts[:-1]])
    scores, rows = [], []
    for first in range(0, len(query_QE), _BLOCK):
        score_QC = np.maximum.reduceat(query_QE[first : first + _BLOCK] @ chunk_PE.T, starts, axis=1)
        row_QK = np.argsort(-score_QC, axis=1, kind="stable")[:, :DEPTH]
        rows.append(row_QK)
        scores.append(np.take_along_axis(score_QC, row_QK, axis=1))
    return np.concatenate(scores), np.concatenate(rows)


def _named(search: Search, score_QK: NDArray[Any], row_QK: NDArray[Any]) -> dict[str, dict[str, float]]:
    ids = list(search.corpus)
    return {
        query: {ids[row]: score for score, row in zip(scores, rows, strict=True) if score > -math.inf}
        for query, scores, rows in zip(search.queries, score_QK.tolist(), row_QK.tolist(), strict=True)
    }


def _unit(vectors_NE: Embeddings) -> Embeddings:
    norm_N1 = np.linalg.norm(vectors_NE, axis=1, keepdims=True)
    unit_NE: Embeddings = np.ascontiguousarray(vectors_NE / np.maximum(norm_N1, 1e-12), dtype=np.float32)
    return unit_NE


def encode_once(encoder: Encoder, texts: Sequence[str], task: str | None = None) -> Embeddings:
    """Encodes texts to float32 (N, E), each distinct text once."""
    place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    vectors_NE = encode_finite(encoder, list(place), task)
    return vectors_NE if len(place) == len(texts) else vectors_NE[[place[text] for text in texts]]
