"""The map of an index: a sample of its documents as points, with what a page shows of each.

`N` documents of the sample, `C` chunks, `F` chunks of the sample, `E` embedding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedwright.index.index import Index
from embedwright.vectors.plane import SEED, in_plane

POINTS = 3_000  # t-SNE of so many takes some ten seconds on two cores
_TITLE = 80  # characters of the text that stand for a title where there is none


def map_of(index: Index) -> dict[str, Any]:
    """Lays out a sample of an index's documents, each where the mean of its chunks' vectors points.

    Returns columns with one value a document: `ids`, `titles`, `x` and `y` between 0 and 1, and `metadata` by column.
    `of` counts the documents that the sample was drawn from, with `seed`. Raises InputError if there is nothing to tell
    apart: fewer than two documents, or equal vectors.
    """
    live_N = np.flatnonzero(index.live_N)
    row_N = np.sort(np.random.default_rng(SEED).permutation(live_N)[:POINTS])
    layout_N2, method = in_plane(_vectors_at(index, row_N), f"documents of {index.folder.name}")
    shown = index.documents.select(["id", "title", *index.types]).take(pa.array(row_N)).to_pydict()
    texts = index.documents["text"]
    titles = [
        title or " ".join(texts[row].as_py()[: 2 * _TITLE].split())[:_TITLE]
        for title, row in zip(shown["title"], row_N.tolist(), strict=True)
    ]
    x_N, y_N = layout_N2.round(4).T.tolist()
    metadata = {name: shown[name] for name in index.types}
    said = {"of": len(live_N), "seed": SEED, "method": method}
    return {**said, "ids": shown["id"], "titles": titles, "x": x_N, "y": y_N, "metadata": metadata}


def _vectors_at(index: Index, row_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """Returns the direction of the mean of each document's chunks. Nothing else is read."""
    place_D = np.full(len(index.live_N), -1)
    place_D[row_N] = np.arange(len(row_N))
    place_C = place_D[index.chunks["document"].to_numpy()]
    chunk_F = np.flatnonzero(place_C >= 0)
    mean_NE = np.zeros((len(row_N), index.vectors.shape[1]), np.float32)
    for first, tile_CE in index.vectors.tiles_with(chunk_F):
        own_F = chunk_F[np.searchsorted(chunk_F, first) : np.searchsorted(chunk_F, first + len(tile_CE))]
        np.add.at(mean_NE, place_C[own_F], tile_CE[own_F - first])
    length_N1 = np.linalg.norm(mean_NE, axis=1, keepdims=True)
    mean_NE /= np.maximum(length_N1, np.finfo(np.float32).tiny)
    return mean_NE
