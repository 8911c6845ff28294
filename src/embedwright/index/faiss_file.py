"""Writes a faiss index of an encoded corpus, for other programs."""

from __future__ import annotations

from pathlib import Path

from embedwright import threads
from embedwright.files import whole_file
from embedwright.vectors.store import open_vectors

_ROWS = 4096  # added to the index at once


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
