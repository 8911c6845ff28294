"""Writes a faiss index of an index's vectors, for other programs."""

from __future__ import annotations

from pathlib import Path

from embedwright import threads
from embedwright.files import whole_file
from embedwright.index.index import Index

_ROWS = 4096  # added to the index at once


def write_faiss(folder: Path) -> Path:
    """Writes `index.faiss`, a flat inner-product index of all vectors in `folder`, for other programs that read faiss.

    Its row i is chunk i of the shards, where chunks of deleted documents do not count; without chunking, a document is
    a chunk. `search` does not need it. Raises ValueError if encoding has not finished.
    """
    faiss = threads.load_faiss()
    index = Index.open(folder)
    vectors = index.vectors.of_rows(index.live_rows())
    flat = faiss.IndexFlatIP(vectors.shape[1])
    for _, tile_NE in vectors.tiles(_ROWS):
        flat.add(tile_NE)
    path = folder / "index.faiss"
    with whole_file(path) as temp:
        faiss.write_index(flat, str(temp))
    return path
