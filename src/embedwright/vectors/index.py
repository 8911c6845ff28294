"""Exact search over an encoded corpus: inner products with every vector, none left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedwright import threads
from embedwright.encoders.protocol import as_encoder, encode_finite
from embedwright.errors import InputError, NotFoundError
from embedwright.files import whole_file
from embedwright.vectors.corpus import Manifest, check_model, read_shards, shard_path, vectors_of
from embedwright.vectors.search import top_k

__all__ = ["Hit", "build_index", "search", "top_k"]


class Hit(NamedTuple):
    """A document found: its score is the inner product with the query, a cosine for vectors of unit length."""

    id: str
    score: float
    text: str


def build_index(folder: Path) -> Path:
    """Write `index.faiss`, a flat inner-product index of all vectors in `folder`, beside its shards.

    Any program that reads faiss opens it; its row i is document i of the shards. Raises ValueError where encoding has
    not finished.
    """
    faiss = threads.load_faiss()
    index = faiss.IndexFlatIP(Manifest.read(folder).dimension)
    for shard in read_shards(folder):
        index.add(vectors_of(shard))
    path = folder / "index.faiss"
    with whole_file(path) as temp:
        faiss.write_index(index, str(temp))
    return path


def search(
    folder: Path, model: Any, queries: Sequence[str], *, k: int = 10, task: str | None = None
) -> list[list[Hit]]:
    """The `k` best documents of each query, best first; fewer where the corpus has fewer. Exact.

    `task` is the instruction for the queries. `model` must be the one that encoded the corpus. To tell, all its weights
    are read: pass queries together rather than one by one. Raises FileNotFoundError without an index, ValueError for
    another model (naming what differs) or an index of other vectors.
    """
    path = folder / "index.faiss"
    if not path.exists():
        raise NotFoundError(f"{path}: no index yet, build_index makes it")
    manifest = Manifest.read(folder)
    faiss = threads.load_faiss()
    index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    if (index.ntotal, index.d) != (manifest.count, manifest.dimension):
        raise InputError(f"{path} is not the index of this corpus: build it again")
    # A view of the index's own memory: top_k, unlike index.search, settles the order of equal scores.
    vectors_CE = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    _check_index(folder, manifest, vectors_CE)
    check_model(folder, model)
    if not queries:
        return []
    scores_QK, rows_QK = top_k(encode_finite(as_encoder(model), queries, task), vectors_CE, k)
    documents = _documents_at(folder, np.unique(rows_QK), manifest.shard_rows)
    return [
        [Hit(documents[row][0], score, documents[row][1]) for score, row in zip(scores, rows, strict=True)]
        for scores, rows in zip(scores_QK.tolist(), rows_QK.tolist(), strict=True)
    ]


def _check_index(folder: Path, manifest: Manifest, vectors_CE: NDArray[np.float32]) -> None:
    """Raises ValueError unless the first vectors of the first and the last shard are those of the index, to the bit."""
    for start in {0, (manifest.count - 1) // manifest.shard_rows * manifest.shard_rows}:
        shard = pq.ParquetFile(shard_path(folder, start // manifest.shard_rows))
        first_1E = vectors_of(pa.Table.from_batches([next(shard.iter_batches(1, columns=["vector"]))]))
        if not np.array_equal(first_1E[0], vectors_CE[start]):
            raise InputError(
                f"{folder / 'index.faiss'} is the index of other vectors than lie beside it: build it again"
            )


def _documents_at(folder: Path, rows: NDArray[np.int64], shard_rows: int) -> dict[int, tuple[str, str]]:
    """Row -> (id, text), from the shards that hold these rows."""
    found: dict[int, tuple[str, str]] = {}
    for shard in np.unique(rows // shard_rows).tolist():
        here = rows[rows // shard_rows == shard]
        table = pq.read_table(shard_path(folder, shard), columns=["id", "text"]).take(here - shard * shard_rows)
        documents = zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)
        found.update(zip(here.tolist(), documents, strict=True))
    return found
