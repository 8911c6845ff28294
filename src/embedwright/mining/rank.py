"""Ranks documents for queries: by the vectors of a model, by BM25, or by chance.

`mine` calls a teacher through one function, which takes queries in tiles and gives ranked candidates tile by tile. A
model encodes a tile at a time and searches for all of them at once, so that vectors on disk are read once. Besides
models, there are two teachers by name, the baselines of NV-Retriever (arXiv 2407.15831): `bm25` and `random`.

`Q` queries, `K` candidates of one query, `F` pairs of a query and a passage, `E` embedding.
"""

from __future__ import annotations

import logging
import zlib
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedwright.data.schema import Example, Passage
from embedwright.data.tables.documents import DocumentTable
from embedwright.encoders.protocol import Encoder, encode_finite, task_for
from embedwright.encoders.sharded import itself
from embedwright.mining.pool import Pool
from embedwright.mining.rules import RANDOM
from embedwright.vectors.search import pair_scores, top_k
from embedwright.vectors.shards import Vectors
from embedwright.vectors.store import Manifest, open_vectors, other_model

logger = logging.getLogger(__name__)

Advance = Callable[[int], None]  # called with the number of further texts that a teacher has read


class MiningQuery(NamedTuple):
    """An example to fill, without the negatives that are answers, and all answers to its question."""

    example: Example
    answers: tuple[Passage, ...]
    removed: int  # how many of its negatives were removed
    instruction: str | None


class Candidates(NamedTuple):
    """What a teacher ranks for some queries, the best first."""

    rows_QK: NDArray[np.int64]  # rows of the pool
    scores_QK: NDArray[np.float32]
    listed_QK: NDArray[np.bool_]  # False after the end of a shorter list
    own: list[NDArray[np.float32]]  # for each query, the scores of its positives, then of its given negatives


Tile = Sequence[MiningQuery]
Teacher = Callable[[Sequence[Tile]], Iterator[Candidates]]


Encode = Callable[[Encoder, Callable[[], Iterable[str]], int], Vectors]  # as `encode_texts`


def teacher_of_pool(
    teacher: Encoder | str,
    pool: Pool,
    everything: Callable[[], Iterable[Example]],
    depth: int,
    seed: int,
    encode: Encode,
    advance: Advance,
) -> Teacher:
    """Returns the function that ranks the best `depth` documents of the pool for queries.

    Args:
        teacher: a model, `bm25` or `random`. BM25 indexes the pool here. A model encodes the documents once it has
            encoded the first queries: what it cannot read of these is known before the long work.
        everything: gives all examples, whose passages BM25 counts words of.
        seed: of `random`.
        encode: encodes texts, and keeps the vectors where that is asked for.
    """
    if isinstance(teacher, str):
        if teacher == RANDOM:
            return lambda tiles: (_by_chance(tile, pool, depth, seed, advance) for tile in tiles)
        from embedwright.vectors import bm25

        lacking = pool.lacking_in(everything())
        index = bm25.index(chain(pool.texts(), lacking))
        advance(len(pool))
        others = {text: row for row, text in enumerate(lacking, start=len(pool))}
        return lambda tiles: (_by_words(tile, pool, index, others, depth, advance) for tile in tiles)
    documents = cache(partial(_encoded_documents, teacher, pool, encode, advance))
    return lambda tiles: _by_vectors(tiles, pool, teacher, documents, depth, encode, advance)


def _encoded_documents(encoder: Encoder, pool: Pool, encode: Encode, advance: Advance) -> Vectors:
    """Returns the vectors of all documents: stored ones, if this model made them; else it encodes them."""
    table = pool.corpus if isinstance(pool.corpus, DocumentTable) else None
    if table and table.encoded:
        manifest = Manifest.read(table.encoded)
        other = other_model(table.encoded, encoder, lambda texts: encode_finite(encoder, texts, manifest.task))
        if other is None and manifest.task is None:
            advance(len(pool))
            return open_vectors(table.encoded).of_rows(np.array(pool.place, np.int64))  # those with text
        logger.warning("%s: its vectors are not this teacher's (%s): encoded again", table.encoded, other or "a task")
    return encode(encoder, pool.texts, len(pool))


def _by_vectors(
    tiles: Sequence[Tile],
    pool: Pool,
    encoder: Encoder,
    encoded_documents: Callable[[], Vectors],
    depth: int,
    encode: Encode,
    advance: Advance,
) -> Iterator[Candidates]:
    ends = np.cumsum([len(tile) for tile in tiles])
    queries_QE: NDArray[np.float32] | None = None
    for tile, end in zip(tiles, ends.tolist(), strict=True):
        if tile:
            vectors_NE = _encoded(encoder, tile)
            queries_QE = (
                np.empty((int(ends[-1]), vectors_NE.shape[1]), np.float32) if queries_QE is None else queries_QE
            )
            queries_QE[end - len(tile) : end] = vectors_NE
            advance(len(tile))
    documents = encoded_documents()
    everything = documents + encode(encoder, lambda: pool.lacking, len(pool.lacking))
    if queries_QE is None:  # none is this teacher's
        queries_QE = np.empty((0, documents.shape[1]), np.float32)
    device = getattr(itself(encoder), "device", None)  # another GPU may be another process's
    scores_QK, rows_QK = top_k(queries_QE, documents, depth, device)
    rows = [own for tile in tiles for own in _own_rows(tile, pool.row_of_text)]
    lengths = np.array([len(own) for own in rows], np.int64)
    row_F = np.fromiter(chain.from_iterable(rows), np.int64)
    own = np.split(pair_scores(queries_QE, everything, np.arange(len(rows)).repeat(lengths), row_F), lengths.cumsum())
    for tile, end in zip(tiles, ends.tolist(), strict=True):
        at = slice(end - len(tile), end)
        yield Candidates(rows_QK[at], scores_QK[at], np.ones(rows_QK[at].shape, bool), own[at])


def _by_words(
    queries: Tile, pool: Pool, index: Any, others: dict[str, int], depth: int, advance: Advance
) -> Candidates:
    """Ranks by BM25 over all texts of the pool, `others` among them. A document that shares no word with the query is
    no candidate.
    """
    from embedwright.vectors import bm25

    shape = len(queries), min(depth, len(pool))
    rows_QK, scores_QK, own = np.empty(shape, np.int64), np.empty(shape, np.float32), []
    own_rows = _own_rows(queries, ChainMap(others, pool.row_of_text))
    for q, (query, rows) in enumerate(zip(queries, own_rows, strict=True)):
        score_N = bm25.scores(index, query.example.query)
        rows_QK[q] = bm25.best(score_N[: len(pool)], depth)
        scores_QK[q] = score_N[rows_QK[q]]
        own.append(score_N[rows])
    advance(len(queries))
    return Candidates(rows_QK, scores_QK, scores_QK > 0, own)


def _by_chance(queries: Tile, pool: Pool, depth: int, seed: int, advance: Advance) -> Candidates:
    """Draws documents, each as likely as any other, none twice, seeded per example id. All scores are 0."""
    shape = len(queries), min(depth, len(pool))
    rows_QK = np.empty(shape, np.int64)
    for q, query in enumerate(queries):
        # the word in front keeps this apart from other draws of the same seed and example
        random = np.random.default_rng([*RANDOM.encode(), seed, zlib.crc32(query.example.id.encode())])
        rows_QK[q] = random.choice(len(pool), shape[1], replace=False)
    advance(len(queries))
    own = [np.zeros(len(rows), np.float32) for rows in _own_rows(queries, pool.row_of_text)]
    return Candidates(rows_QK, np.zeros(shape, np.float32), np.ones(shape, bool), own)


def _own_rows(queries: Tile, row_of_text: Mapping[str, int]) -> list[list[int]]:
    """Returns the rows of each query's positives, then of the negatives that it came with."""
    passages = ((*query.example.positives, *query.example.negatives) for query in queries)
    return [[row_of_text[p.text] for p in own] for own in passages]


def _encoded(encoder: Encoder, queries: Tile) -> NDArray[np.float32]:
    """Returns the vectors of the queries, each under its instruction; an empty one stands for the encoder's own."""
    by_instruction: dict[str | None, list[int]] = {}
    for q, query in enumerate(queries):
        by_instruction.setdefault(task_for(encoder, query.instruction), []).append(q)
    parts = [
        encode_finite(encoder, [queries[q].example.query for q in some], instruction)
        for instruction, some in by_instruction.items()
    ]
    vectors_QE: NDArray[np.float32] = np.concatenate(parts)[np.argsort(list(chain(*by_instruction.values())))]
    return vectors_QE
