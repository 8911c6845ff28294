"""`Index`: an encoded corpus, opened for search. The search is exact, and one hit stands for one document.

`Q` queries, `C` chunks, `N` documents, `E` embedding, `F` chunks that are searched, `K` the best of one query.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedwright.encoders.protocol import Encoder, as_encoder, encode_finite, encode_queries
from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
from embedwright.encoders.sharded import itself
from embedwright.errors import InputError, as_input_error
from embedwright.fingerprint import aligned_with, space_of
from embedwright.index import documents as docs
from embedwright.index.codes import Shortened, cut, nominated_top_k, read_codes
from embedwright.index.layout import Layout, Part
from embedwright.index.where import Where, matching, warn_of_absent
from embedwright.model.embedder import Embedder
from embedwright.vectors.corpus import open_encoded
from embedwright.vectors.search import top_k
from embedwright.vectors.shards import Vectors, read_shard, vectors_of
from embedwright.vectors.store import Manifest, open_vectors, other_model

logger = logging.getLogger(__name__)

_CHUNKS = 4  # searched for each document that is wanted, at first


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
    """An index on disk, opened for search. Make one with `Index.open`; open it again after a change.

    `manifest` says how its vectors were made, `layout` its settings. `vectors` has a row for each chunk, and so has
    `chunks`: `document` (the row in `documents`), `start`, `end`. `live_N` is false for deleted documents.
    """

    def __init__(self, folder: Path, layout: Layout | None) -> None:
        self.folder, self.layout = folder, layout or Layout(parts=(Part(folder="."),))
        if not self.layout.parts:
            raise InputError(f"{folder} is unfinished: run the same `index` command again")
        folders = [folder / part.folder for part in self.layout.parts]
        self.manifest = Manifest.read(folders[0])
        self.types = self.layout.metadata
        opened = [_open_part(*both, plain=layout is None) for both in zip(folders, self.layout.parts, strict=True)]
        self.vectors = Vectors([], [], self.manifest.dimension)
        self.codes = read_codes(folders, self.manifest.dimension) if self.layout.codes else None
        self.documents = docs.open_table([file for part in opened for file in part.documents], self.types)
        chunks, first = [], 0
        for part in opened:
            self.vectors += part.vectors
            own = part.chunks
            chunks.append(own.set_column(0, "document", pc.add(own["document"], first)))
            first += len(part.live_N)
        self.chunks = pa.concat_tables(chunks)
        self.sizes = [len(part.live_N) for part in opened]
        self.live_N = np.concatenate([part.live_N for part in opened])
        self._document_C = self.chunks["document"].to_numpy()
        self._checked: tuple[Any, Encoder, bool] | None = None  # the bool: an aligned student, for queries alone

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Opens a folder that the commands `index` or `encode` have filled.

        Raises FileNotFoundError if nothing is encoded there, and ValueError where encoding has not finished.
        """
        folder = Path(folder)
        with as_input_error(folder, "cannot be opened as an index"):
            while True:
                layout = Layout.read(folder)
                try:
                    return cls(folder, layout)
                except (InputError, OSError):
                    if Layout.read(folder) == layout:
                        raise  # else a change has come in between, and removed what this state names

    def facts(self) -> dict[str, Any]:
        """Returns what the index holds: counts, the model's name and fingerprint, dimension, precision, metadata."""
        return {
            "documents": int(self.live_N.sum()),
            "chunks": int(self.live_N[self._document_C].sum()),
            "model": self.layout.model,
            "fingerprint": self.manifest.model,
            "dimension": self.manifest.dimension,
            "precision": self.layout.codes or self.manifest.precision,
            "metadata": dict(self.types),
        }

    def live_rows(self) -> NDArray[np.int64]:
        """Returns the rows of all chunks whose documents are not deleted."""
        return np.flatnonzero(self.live_N[self._document_C])

    def document(self, id: str) -> docs.Document | None:
        """Returns a document by its id; None if there is none, or it is deleted."""
        rows = np.flatnonzero(pc.equal(self.documents["id"], id).to_numpy() & self.live_N)
        return docs.take(self.documents, rows.tolist())[0] if len(rows) else None

    def difference(self, encoder: Encoder) -> str | None:
        """Returns what tells `encoder` from the model that made the index; None if it is that model."""
        reader = Shortened(encoder, self.layout.dim) if self.layout.dim else encoder
        task = self.manifest.task
        folder = self.folder / self.layout.parts[0].folder
        return other_model(folder, reader, lambda texts: encode_finite(reader, texts, task))

    def check(self, model: Any, *, queries: bool = False) -> Encoder:
        """Returns `model` as an encoder. Raises ValueError, naming what differs, unless it made this index.

        For `queries` a student that is aligned with that model will do, which a warning says once. All its weights are
        read the first time. A model that is trained further needs a newly opened index.
        """
        known, encoder, aligned = self._checked or (None, None, False)
        if encoder is not None and known is model and (queries or not aligned):
            return encoder
        encoder, aligned = as_encoder(model), False
        if other := self.difference(encoder):
            then, now = (name or "one without a name" for name in (self.layout.model, name_of(encoder)))
            aligned = aligned_with(encoder) == space_of(self.manifest.model or {})
            if not aligned:
                as_then = ", opened with the same --max-tokens and --dtype," if then == now else ","
                raise InputError(
                    f"{self.folder} was encoded by another model, {then}, than {now} ({other}): take the one that made "
                    f"it{as_then} or a new or empty folder"
                )
            if not queries:
                raise InputError(
                    f"{self.folder} was encoded by {then}. Its aligned student {now} may search there, and not add to "
                    "it: documents are the teacher's"
                )
            logger.warning("%s reads the queries: a student that is aligned with %s, which made the index", now, then)
        self._checked = model, encoder, aligned
        return encoder

    def search(
        self,
        model: Any,
        queries: Sequence[str],
        k: int = 10,
        task: str | None = None,
        where: Where | None = None,
        *,
        each_chunk: bool = False,
    ) -> list[list[Hit]]:
        """Finds the `k` best documents of each query, best first; fewer where fewer match.

        Args:
            model: the model that made the index, or a student that is aligned with it.
            queries: a list of texts.
            k: number of hits of a query.
            task: the instruction of the queries; empty for none. None: the model's own, with a warning if it has none.
            where: conditions on the metadata, as `["lang=en", "year>=2020"]`, in parts, or as `{"lang": "en"}`
                (`index.where`). Documents are filtered first, and the search is exact over what is left.
            each_chunk: each chunk is a hit. Default: one hit for a document, with its best chunk.

        Raises ValueError for another model than the one that made the index, naming what differs, and for a condition
        that cannot be read.
        """
        encoder = self.check(model, queries=True)
        if isinstance(queries, str):
            raise InputError("queries is one text: give a list of texts")
        if not queries:
            return []
        found = self.search_vectors(self.encoded(encoder, queries, task), k, where, each_chunk=each_chunk)
        if where and not any(found):
            warn_of_absent(self.documents, self.types, where)
        return found

    def encoded(self, encoder: Encoder, queries: Sequence[str], task: str | None) -> NDArray[np.float32]:
        """Encodes queries (Q, E). Where neither caller nor model has an instruction, it warns: the model then reads
        queries as documents.
        """
        try:
            vectors_QE = encode_queries(encoder, queries, task)
        except InputError as error:
            if task is not None:
                raise
            vectors_QE = encode_queries(encoder, queries, "")
            logger.warning("%s", error)
        return cut(vectors_QE, self.layout.dim) if self.layout.dim else vectors_QE

    def search_vectors(
        self,
        queries_QE: NDArray[np.float32],
        k: int = 10,
        where: Where | None = None,
        *,
        each_chunk: bool = False,
        most_bytes: int | None = None,
    ) -> list[list[Hit]]:
        """Does the same for queries that this index's model has encoded, and logs nothing.

        Raises ValueError, before a text is read, if the hits' documents have more than `most_bytes` together.
        """
        if self.layout.dim and queries_QE.shape[1] != self.layout.dim:
            queries_QE = cut(queries_QE, self.layout.dim)
        wanted_N = self.live_N & matching(self.documents, self.types, where) if where else self.live_N
        row_F = np.flatnonzero(wanted_N[self._document_C])
        document_F = np.arange(len(row_F)) if each_chunk else self._document_C[row_F]
        best = _best(queries_QE, partial(self.top_k, row_F=row_F), document_F, k)
        if most_bytes is not None:
            size = sum(int(self._bytes_N[self._document_C[row_F[row]]]) for hits in best for _, row in hits)
            if size > most_bytes:
                raise InputError(f"the hits hold {size:,} bytes of text, more than {most_bytes:,}: ask for fewer")
        row_H = np.unique([row_F[row] for found in best for _, row in found]).astype(np.int64)
        found = dict(zip(row_H.tolist(), self.chunks_at(row_H), strict=True))
        return [[found[row_F[row]]._replace(score=score) for score, row in hits] for hits in best]

    def top_k(
        self, queries_QE: NDArray[np.float32], k: int, row_F: NDArray[np.int64], exact: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Finds scores and places in `row_F` of each query's best chunks among these rows, which ascend.

        The codes nominate where the index has some, unless `exact`.
        """
        vectors, codes = (
            all if all is None or len(row_F) == len(all) else all.of_rows(row_F) for all in (self.vectors, self.codes)
        )
        assert vectors is not None
        if codes is None or self.layout.codes is None or exact:
            return top_k(queries_QE, vectors, k)
        return nominated_top_k(queries_QE, codes, vectors, k, self.layout.codes)

    @cached_property
    def _bytes_N(self) -> NDArray[np.int64]:
        lengths: NDArray[np.int64] = pc.binary_length(self.documents["text"]).to_numpy()
        return lengths

    def chunks_at(self, row_H: NDArray[np.int64]) -> list[Hit]:
        """Returns chunks as hits without a score."""
        chunks = self.chunks.take(pa.array(row_H)).to_pydict()
        rows = np.unique(chunks["document"]).astype(np.int64).tolist()
        document_of = dict(zip(rows, docs.take(self.documents, rows), strict=True))
        hits = []
        for row, start, end in zip(chunks["document"], chunks["start"], chunks["end"], strict=True):
            id, title, text, metadata = document_of[row]
            hits.append(Hit(id, 0.0, text, title, start, end, metadata))
        return hits


class _OpenPart(NamedTuple):
    vectors: Vectors
    documents: list[Path]
    chunks: pa.Table
    live_N: NDArray[np.bool_]


def _open_part(folder: Path, part: Part, plain: bool) -> _OpenPart:
    """Opens a part. A plain one is a folder of `encode`, whose shards hold the documents."""
    found = open_vectors(folder)
    shards = [block for block in found.blocks if isinstance(block, Path)]
    # open files outlive a change of the index
    vectors = Vectors([vectors_of(read_shard(shard)) for shard in shards], found.rows, found.shape[1])
    if plain:
        open_encoded(folder)  # raises for vectors without documents
        table = docs.open_table(shards, {})
        length = pc.utf8_length(table["text"])
        columns = {"document": np.arange(len(table)), "start": np.zeros(len(table), np.int64), "end": length}
        return _OpenPart(vectors, shards, pa.table(columns), np.ones(len(table), np.bool_))
    file = folder / "documents.arrow"
    live_N = np.ones(len(docs.open_table([file], {})), np.bool_)
    live_N[list(part.deleted)] = False
    batches = [read_shard(shard).select(["document", "start", "end"]) for shard in shards]
    chunks = pa.Table.from_batches([batch.replace_schema_metadata(None) for batch in batches])
    return _OpenPart(vectors, [file], chunks, live_N)


def name_of(encoder: Encoder) -> str:
    """Returns the name that a model was opened by, for messages; its class where it has none."""
    inner: Any = itself(encoder)
    if isinstance(inner, Embedder):
        return str(inner.network.config.name_or_path)
    if isinstance(inner, SentenceTransformerEncoder):
        network = getattr(inner.model[0], "auto_model", None)
        return str(getattr(getattr(network, "config", None), "name_or_path", "")) or type(inner.model).__name__
    return type(inner).__name__


def _best(
    queries_QE: NDArray[np.float32],
    find: Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]],
    document_F: NDArray[np.int64],
    k: int,
) -> list[list[tuple[float, int]]]:
    """Finds score and row of the best chunk of the `k` best documents of each query.

    The best chunks hold the best documents in order. Where they hold too few, more chunks are searched.
    """
    several = bool((document_F[1:] == document_F[:-1]).any())  # the chunks of a document are neighbours
    found: list[list[tuple[float, int]]] = [[] for _ in queries_QE]
    open_Q, depth = np.arange(len(queries_QE)), k * _CHUNKS if several else k
    while len(open_Q):
        scores_QK, rows_QK = find(queries_QE[open_Q], depth)
        for q, scores, rows in zip(open_Q.tolist(), scores_QK.tolist(), rows_QK, strict=True):
            first = np.unique(document_F[rows], return_index=True)[1]
            found[q] = [(scores[place], int(rows[place])) for place in sorted(first.tolist())[:k]]
        open_Q = np.array([q for q in open_Q if len(found[q]) < k and depth < len(document_F)], np.int64)
        depth *= _CHUNKS
    return found
