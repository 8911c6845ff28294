"""Exact search over an encoded corpus, and a faiss index of it for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedwright import threads
from embedwright.encoders.protocol import as_encoder, encode_finite
from embedwright.errors import InputError
from embedwright.files import whole_file
from embedwright.vectors.search import top_k
from embedwright.vectors.shards import read_shard
from embedwright.vectors.store import Manifest, check_model, open_vectors, shard_path

_ROWS = 4096  # added to the index at once


class Hit(NamedTuple):
    """A document found. Its score is the inner product with the query, a cosine for vectors of unit length."""

    id: str
    score: float
    text: str


def build_index(folder: Path) -> Path:
    """Writes `index.faiss`, a flat inner-product index of all vectors in `folder`, for other programs that read faiss.

    Its row i is document i of the shards. `search` does not need it. Raises ValueError if encoding has not finished.
    """
    faiss = threads.load_faiss()
    vectors = open_vectors(folder)
    index = faiss.IndexFlatIP(vectors.shape[1])
    for _, tile_NE in vectors.tiles(_ROWS):
        index.add(tile_NE)
    path = folder / "index.faiss"
    with whole_file(path) as temp:
        faiss.write_index(index, str(temp))
    return path


def search(
    folder: Path, model: Any, queries: Sequence[str], *, k: int = 10, task: str | None = None
) -> list[list[Hit]]:
    """Finds the `k` best documents of each query, best first; fewer where the corpus has fewer. The search is exact.

    `task` is the instruction for the queries. `model` must be the one that encoded the corpus. To tell, all its weights
    are read: pass queries together rather than one by one. Raises FileNotFoundError if nothing is encoded, and
    ValueError for another model (naming what differs) or where encoding has not finished.
    """
    vectors, encoder = open_vectors(folder), as_encoder(model)
    if "text" not in read_shard(shard_path(folder, 0)).schema.names:
        raise InputError(f"{folder} holds vectors without documents: take a folder that `encode` or `index` wrote")
    check_model(folder, encoder)
    if not queries:
        return []
    scores_QK, rows_QK = top_k(encode_finite(encoder, queries, task), vectors, k)
    documents = _documents_at(folder, np.unique(rows_QK))
    return [
        [Hit(documents[row][0], score, documents[row][1]) for score, row in zip(scores, rows, strict=True)]
        for scores, rows in zip(scores_QK.tolist(), rows_QK.tolist(), strict=True)
    ]


def _documents_at(folder: Path, rows: NDArray[np.int64]) -> dict[int, tuple[str, str]]:
    """Returns row -> (id, text), from the shards that hold these rows."""
    found: dict[int, tuple[str, str]] = {}
    size = Manifest.read(folder).shard_rows
    for shard in np.unique(rows // size).tolist():
        here = rows[rows // size == shard]
        columns = (read_shard(shard_path(folder, shard))[name].take(here - shard * size) for name in ("id", "text"))
        documents = zip(*(column.to_pylist() for column in columns), strict=True)
        found.update(zip(here.tolist(), documents, strict=True))
    return found
