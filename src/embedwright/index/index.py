"""`Index`: an encoded corpus, opened for search. The search is exact, and one hit stands for one document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedwright.data.tables.documents import DocumentTable
from embedwright.encoders.protocol import Encoder, as_encoder, encode_finite
from embedwright.errors import InputError
from embedwright.vectors.corpus import open_encoded
from embedwright.vectors.search import top_k
from embedwright.vectors.shards import Vectors
from embedwright.vectors.store import Manifest, check_model, open_vectors

Where = Mapping[str, Any] | Sequence[str]


class Hit(NamedTuple):
    """A document found.

    `text` is the whole document, without its title. `start` and `end` are the characters of its best chunk, and `score`
    is that chunk's inner product with the query: a cosine for vectors of unit length.
    """

    id: str
    score: float
    text: str
    title: str
    start: int
    end: int
    metadata: dict[str, Any]


class Index:
    """An index on disk, opened for search. Make one with `Index.open`.

    `manifest` says how it was made, `vectors` has one row for each chunk.
    """

    def __init__(self, folder: Path, manifest: Manifest, vectors: Vectors, table: DocumentTable) -> None:
        self.folder, self.manifest, self.vectors, self._table = folder, manifest, vectors, table
        self._checked: tuple[Any, Encoder] | None = None

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Opens a folder that the commands `index` or `encode` have filled.

        Raises FileNotFoundError if nothing is encoded there, and ValueError where encoding has not finished.
        """
        folder = Path(folder)
        return cls(folder, Manifest.read(folder), open_vectors(folder), open_encoded(folder))

    def facts(self) -> dict[str, Any]:
        """Returns what the index holds: counts, the model's fingerprint, dimension, precision, metadata columns."""
        return {
            "documents": len(self._table),
            "chunks": len(self.vectors),
            "model": self.manifest.model,
            "dimension": self.manifest.dimension,
            "precision": self.manifest.precision,
            "metadata": dict[str, str](),
        }

    def check(self, model: Any) -> Encoder:
        """Returns `model` as an encoder. Raises ValueError, naming what differs, unless it made this index.

        All its weights are read the first time. A model that is trained further needs a newly opened index.
        """
        if self._checked is None or self._checked[0] is not model:
            encoder = as_encoder(model)
            check_model(self.folder, encoder)
            self._checked = model, encoder
        return self._checked[1]

    def search(
        self, model: Any, queries: Sequence[str], k: int = 10, task: str | None = None, where: Where | None = None
    ) -> list[list[Hit]]:
        """Finds the `k` best documents of each query, best first; fewer where fewer match.

        `task` is the instruction of the queries; None means the model's default one. `where` filters by metadata.
        Raises ValueError for another model than the one that made the index, naming what differs.
        """
        encoder = self.check(model)
        if isinstance(queries, str):
            raise InputError("queries is one text: give a list of texts")
        if not queries:
            return []
        return self.search_vectors(encode_finite(encoder, queries, task or ""), k, where)

    def search_vectors(
        self, queries_QE: NDArray[np.float32], k: int = 10, where: Where | None = None
    ) -> list[list[Hit]]:
        """Does the same for queries that this index's model has encoded."""
        if where:
            raise InputError(f"{self.folder} has no metadata to filter by")
        scores_QK, rows_QK = top_k(queries_QE, self.vectors, k)
        documents = {row: self._table[row] for row in np.unique(rows_QK).tolist()}
        return [
            [_hit(*documents[row], score) for score, row in zip(scores, rows, strict=True)]
            for scores, rows in zip(scores_QK.tolist(), rows_QK.tolist(), strict=True)
        ]


def _hit(id: str, text: str, score: float) -> Hit:
    return Hit(id, score, text, "", 0, len(text), {})
