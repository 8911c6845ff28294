"""An index as a LanceDB table on disk, for more: approximate search of large corpora, full text and hybrid search.

The table has a row for each chunk: `row` (its number in the index), `id`, `title`, `text` (of the chunk), `start`,
`end`, the metadata columns, and `vector`. It names our embedding function, so LanceDB itself encodes texts with the
model that made the index; `import embedwright.index.lancedb` registers the function.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import PrivateAttr

from embedwright.encoders.open import open_encoder
from embedwright.encoders.protocol import Encoder, as_encoder, encode_finite, encode_queries
from embedwright.errors import InputError, MissingPackageError, NotFoundError
from embedwright.files import write_json
from embedwright.fingerprint import differences, fingerprint_of
from embedwright.index.build import recall
from embedwright.index.codes import Shortened, cut
from embedwright.index.index import Hit, Index
from embedwright.index.where import Where, conditions

try:
    import lancedb
    from lancedb.embeddings import EmbeddingFunction, EmbeddingFunctionConfig, get_registry, register
    from lancedb.index import FTS, HnswSq
    from lancedb.query import MatchQuery
except ImportError as error:
    raise MissingPackageError("needs lancedb: pip install 'embedwright[lancedb]'") from error

By = Literal["exact", "ann", "hybrid"]

_TABLE, _STATE = "chunks", "embedwright.json"
_BATCH = 2048  # rows written at once
_ANN_FROM = 10_000  # rows; fewer are searched exactly in milliseconds
_REFINE = 4  # times as many candidates are scored again exactly
_OWN = {"row": pa.int64(), "id": pa.large_string(), "title": pa.large_string(), "text": pa.large_string()}
_OWN |= {"start": pa.int64(), "end": pa.int64()}


@register("embedwright")
class EmbedwrightFunction(EmbeddingFunction):
    """LanceDB's embedding function of the model that made a table.

    It opens the model `name` when it is first needed, in the length and number type of `fingerprint`, and raises
    ValueError for another one. Queries get the instruction `task`, or for None the model's own. `dim` is the length of
    shortened vectors.
    """

    name: str
    fingerprint: dict[str, str]
    width: int
    task: str | None = None
    dim: int | None = None
    max_retries: int = 0  # a refused model stays refused
    _encoder: Encoder | None = PrivateAttr(default=None)

    def ndims(self) -> int:
        return self.width

    def compute_query_embeddings(self, query: str | Sequence[str], *_: Any, **__: Any) -> list[NDArray[np.float32]]:
        found = encode_queries(self.encoder(), self.sanitize_input(query), self.task)
        return list(cut(found, self.dim) if self.dim else found)

    def compute_source_embeddings(self, texts: Any, *_: Any, **__: Any) -> list[NDArray[np.float32]]:
        found = encode_finite(self.encoder(), self.sanitize_input(texts))
        return list(cut(found, self.dim) if self.dim else found)

    def encoder(self) -> Encoder:
        if self._encoder is None:
            then = self.fingerprint
            length = then.get("contract.max_tokens", then.get("settings.max_seq_length", ""))
            stored = then.get("dtype", "").split(", ")  # adapters are in float32, whatever the type of their base
            kind = next((kind for kind in ("int8", "bfloat16", "float16", "float32") if kind in stored), None)
            dtype = None if "uint8" in stored else kind  # weights in 4 bits open as they are
            opened = as_encoder(
                open_encoder(self.name, dtype=dtype, max_tokens=int(length) if length.isdecimal() else None)
            )
            now = fingerprint_of(Shortened(opened, self.dim) if self.dim else opened) or {}
            if now != self.fingerprint:
                other = differences(self.fingerprint, now)
                raise InputError(f"{self.name} is another model than the one that made this table ({other})")
            self._encoder = opened
        return self._encoder


class Written(NamedTuple):
    """A table in `folder`. `recall` of its approximate search is that of the ten nearest; None: it has none."""

    folder: Path
    rows: int
    recall: float | None


def to_lancedb(index: Index, task: str | None = None) -> Written:
    """Writes the chunks of an index as the table `chunks` in its folder `lancedb`, in place of an older one.

    Rows are streamed, so that memory holds one batch of vectors. The text is indexed for full-text search. From 10,000
    rows on, the vectors are indexed for approximate search. `task` is the instruction of queries that LanceDB encodes.
    """
    schema = _schema(index, task)
    database = lancedb.connect(str(_folder(index)))
    rows = index.live_rows()
    batches = pa.RecordBatchReader.from_batches(schema, _batches(index, rows, schema))
    (_folder(index) / _STATE).unlink(missing_ok=True)
    table = database.create_table(_TABLE, batches, mode="overwrite")
    table.create_index("text", config=FTS())
    found = None
    if len(rows) >= _ANN_FROM:
        table.create_index("vector", config=HnswSq(distance_type="dot"))
        found = recall(index, partial(_nearest, table))
    write_json(_folder(index) / _STATE, _state(index))
    return Written(_folder(index), table.count_rows(), found)


def search_lancedb(
    index: Index,
    model: Any,
    queries: Sequence[str],
    k: int = 10,
    task: str | None = None,
    where: Where | None = None,
    *,
    by: By = "ann",
) -> list[list[Hit]]:
    """Finds the `k` best documents of each query in the table of an index, as `Index.search` does.

    `by`: `ann` takes the vectors' approximate index, where there is one; `exact` does not; `hybrid` joins the ranks by
    vectors with those by full text, and its scores are LanceDB's of the joined ranks.

    Raises FileNotFoundError if there is no table, ValueError if the index has changed since, and as `Index.search`.
    """
    encoder = index.check(model, queries=True)
    folder = _folder(index)
    if not (folder / _STATE).is_file():
        raise NotFoundError(f"{folder} holds no table: run `embedwright index` with --lancedb")
    if json.loads((folder / _STATE).read_text(encoding="utf-8")) != _state(index):
        raise InputError(f"{folder} is of an older state of the index: run `embedwright index` with --lancedb again")
    if not queries:
        return []
    if by == "hybrid" and not all(query.strip() for query in queries):
        raise InputError("an empty query has no word to be found by: leave out --by hybrid")
    table = lancedb.connect(str(folder)).open_table(_TABLE)
    condition = sql(where, index) if where else None
    return [
        _documents(index, table, vector_E, query, k, condition, by)
        for vector_E, query in zip(index.encoded(encoder, queries, task), queries, strict=True)
    ]


def sql(where: Where, index: Index) -> str:
    """Writes conditions on metadata as a filter of LanceDB."""
    return " AND ".join(
        (f"`{column}` IN ({', '.join(map(_literal, values))})" if values else "false")
        if how == "in"
        else f"`{column}` {how} {_literal(values[0])}"
        for column, how, values in conditions(where, index.types)
    )


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, float) and math.isinf(value):
        return f"CAST('{value}' AS DOUBLE)"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _documents(
    index: Index, table: Any, vector_E: NDArray[np.float32], query: str, k: int, condition: str | None, by: By
) -> list[Hit]:
    """Finds documents by their best chunks. Where these are of too few documents, more chunks are asked for."""
    depth = k
    while True:
        rows, scores = _chunks(table, vector_E, query, depth, condition, by)
        best: dict[str, Hit] = {}
        for hit, score in zip(index.chunks_at(rows), scores, strict=True):
            best.setdefault(hit.id, hit._replace(score=score))
        if len(best) >= k or len(rows) < depth:
            return list(best.values())[:k]
        depth *= 4


def _chunks(
    table: Any, vector_E: NDArray[np.float32], query: str, depth: int, condition: str | None, by: By
) -> tuple[NDArray[np.int64], list[float]]:
    """Returns row and score of the best chunks, best first."""
    hybrid = by == "hybrid"
    asked = table.search(vector_E)
    if hybrid:  # by a MatchQuery, since the quotes of a plain text would ask for an index of phrases
        asked = table.search(query_type="hybrid").vector(vector_E).text(MatchQuery(query, "text"))
    asked = asked.distance_type("dot")
    asked = asked.bypass_vector_index() if by == "exact" else asked.refine_factor(_REFINE)
    if condition:
        asked = asked.where(condition, prefilter=True)
    if not hybrid:  # whose two searches warn of columns that are not selected
        asked = asked.select(["row", "_distance"])
    found = asked.limit(depth).to_arrow()
    scores = found["_relevance_score"].to_pylist() if hybrid else [1 - far for far in found["_distance"].to_pylist()]
    return found["row"].to_numpy(), scores


def _schema(index: Index, task: str | None) -> pa.Schema:
    for name in index.types:
        if name in _OWN or name == "vector":
            raise InputError(f"metadata column {name!r} has the name of a column of the table: rename it")
        if "." in name or "`" in name:
            raise InputError(
                f"metadata column {name!r}: LanceDB filters by no name with a full stop or a backtick: rename it"
            )
    if index.manifest.model is None or not index.layout.model:
        raise InputError(f"{index.folder}: the model that made it has no fingerprint or name: make the index anew")
    kinds = {"text": pa.large_string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    fields = [*_OWN.items(), *((name, kinds[kind]) for name, kind in index.types.items())]
    width = index.manifest.dimension
    local = Path(index.layout.model).expanduser()
    function = EmbedwrightFunction.create(
        name=str(local.absolute()) if local.exists() else index.layout.model,
        fingerprint=dict(index.manifest.model),
        width=width,
        task=task,
        dim=index.layout.dim,
    )
    config = EmbeddingFunctionConfig(vector_column="vector", source_column="text", function=function)
    known = get_registry().get_table_metadata([config])
    return pa.schema([*fields, ("vector", pa.list_(pa.float32(), width))], metadata=known)


def _batches(index: Index, rows: NDArray[np.int64], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yields chunks with their vectors, which are read from the shards as they are asked for."""
    live = index.vectors if len(rows) == len(index.vectors) else index.vectors.of_rows(rows)
    for first, tile_NE in live.tiles(_BATCH):
        own = rows[first : first + len(tile_NE)]
        hits = index.chunks_at(own)
        columns: dict[str, Any] = {
            "row": own,
            "id": [hit.id for hit in hits],
            "title": [hit.title for hit in hits],
            "text": [hit.text[hit.start : hit.end] for hit in hits],
            "start": [hit.start for hit in hits],
            "end": [hit.end for hit in hits],
            **{name: [hit.metadata[name] for hit in hits] for name in index.types},
        }
        arrays = [pa.array(column, schema.field(name).type) for name, column in columns.items()]
        vector = pa.FixedSizeListArray.from_arrays(pa.array(tile_NE.ravel()), tile_NE.shape[1])
        yield pa.RecordBatch.from_arrays([*arrays, vector], schema=schema)


def _nearest(table: Any, vectors_QE: NDArray[np.float32], k: int) -> list[NDArray[np.int64]]:
    """Returns the rows that the approximate search finds for each query."""
    return [_chunks(table, vector_E, "", k, None, "ann")[0] for vector_E in vectors_QE]


def _folder(index: Index) -> Path:
    return index.folder / "lancedb"


def _state(index: Index) -> dict[str, Any]:
    """Returns what tells one state of an index from another."""
    return {
        "layout": json.loads(index.layout.model_dump_json()),
        "model": index.manifest.model,
        "rows": len(index.vectors),
    }
