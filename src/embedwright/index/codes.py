"""Small forms of vectors, int8 or one bit a number, which nominate documents before the vectors themselves score them.

A part has them in `codes.arrow`: `code` (a fixed-size list of int8, or of uint8 with eight signs each) and, for int8,
`scale`, by which a code is multiplied. They are read into memory; of the vectors only the nominated ones are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedwright.encoders.protocol import Encoder, encode_finite
from embedwright.errors import InputError
from embedwright.files import whole_file
from embedwright.fingerprint import Facts, fingerprint_of
from embedwright.model.encode import shortened
from embedwright.vectors.search import pair_scores, top_k
from embedwright.vectors.shards import Coded, Vectors, as_vectors
from embedwright.vectors.store import Manifest, open_vectors

Kind = Literal["int8", "binary"]

# How many times as many are nominated as are wanted. MiniLM on 3,833 chunks of SQuAD finds all of the best 10 of 200
# questions from 2 on with int8 and from 20 on with binary, where 10 find 0.9995 and 4 find 0.988.
_NOMINATED = {"int8": 4, "binary": 20}
_FILE, _OWNER = "codes.arrow", b"embedwright.manifest"
_ROWS = 4096


class Shortened:
    """An encoder whose vectors keep their first `dim` numbers and have unit length again."""

    def __init__(self, encoder: Encoder, dim: int) -> None:
        self.encoder, self.dim = encoder, dim

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        return cut(encode_finite(self.encoder, texts, task), self.dim)

    def fingerprint(self) -> Facts | None:
        known = fingerprint_of(self.encoder)
        return known and known | {"option.dim": str(self.dim)}


def cut(vectors_NE: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """Keeps the first `dim` numbers of vectors, at unit length. Raises InputError if they have fewer."""
    if vectors_NE.shape[1] < dim:
        raise InputError(f"--dim {dim}: the model's vectors have {vectors_NE.shape[1]} numbers")
    return shortened(vectors_NE, dim)


def write_codes(folder: Path, kind: Kind) -> None:
    """Writes the codes of a folder's vectors, unless they are there."""
    owner = Manifest.read(folder).digest() + kind.encode()
    path, vectors = folder / _FILE, open_vectors(folder)
    if path.is_file() and (_opened(path).schema.metadata or {}).get(_OWNER) == owner:
        return
    width = vectors.shape[1] if kind == "int8" else -(-vectors.shape[1] // 8)
    inner = pa.int8() if kind == "int8" else pa.uint8()
    columns = {"code": pa.list_(inner, width), **({"scale": pa.float32()} if kind == "int8" else {})}
    schema = pa.schema(columns, metadata={_OWNER: owner})
    with whole_file(path) as temp, pa.ipc.new_file(str(temp), schema) as writer:
        for _, tile_NE in vectors.tiles(_ROWS):
            code_NB, *scale = _coded(tile_NE, kind)
            flat = pa.FixedSizeListArray.from_arrays(pa.array(code_NB.ravel()), width)
            writer.write_batch(pa.RecordBatch.from_arrays([flat, *map(pa.array, scale)], schema=schema))


def read_codes(folders: Sequence[Path], width: int) -> Vectors:
    """Reads the codes of parts into memory, as vectors of `width` numbers."""
    blocks, rows = list[Coded](), list[int]()
    for folder in folders:
        table = _opened(folder / _FILE).read_all()
        code_NB = np.concatenate([chunk.flatten().to_numpy() for chunk in table["code"].chunks]).reshape(len(table), -1)
        blocks.append(Coded(code_NB, table["scale"].to_numpy() if "scale" in table.column_names else None, width))
        rows.append(len(table))
    return Vectors(blocks, rows, width)


def nominated_top_k(
    queries_QE: NDArray[np.float32], codes: Vectors, vectors: Vectors, k: int, kind: Kind
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Does what `top_k` does, for the documents that the codes nominate: their scores are exact."""
    rows_QW = top_k(queries_QE, codes, k * _NOMINATED[kind])[1]
    row_U, place_QW = np.unique(rows_QW, return_inverse=True)
    query_F = np.arange(len(queries_QE)).repeat(rows_QW.shape[1])
    scores_F = pair_scores(queries_QE, as_vectors(vectors.take(row_U)), query_F, place_QW.ravel())
    scores_QW = scores_F.reshape(rows_QW.shape)
    best_QK = np.lexsort((rows_QW, -scores_QW), axis=1)[:, :k]
    return np.take_along_axis(scores_QW, best_QK, 1), np.take_along_axis(rows_QW, best_QK, 1)


def _opened(path: Path) -> Any:
    return pa.ipc.open_file(pa.memory_map(str(path)))


def _coded(vectors_NE: NDArray[np.float32], kind: Kind) -> tuple[NDArray[Any], ...]:
    if kind == "binary":
        return (np.packbits(vectors_NE > 0, axis=1),)
    scale_N = np.maximum(np.abs(vectors_NE).max(axis=1), np.finfo(np.float32).tiny) / np.float32(127)
    return np.rint(vectors_NE / scale_N[:, None]).astype(np.int8), scale_N
