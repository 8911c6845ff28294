"""Vectors as blocks: arrays in memory, or shards, which are Arrow files, mapped into memory while they are read.

`C` texts, `N` texts of a tile, `E` embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedwright.errors import InputError
from embedwright.files import whole_file

_TILE = 4096  # rows read at once where some of them are wanted


@dataclass(frozen=True, slots=True)
class Coded:
    """Vectors in a small form: int8, by which `scale_C` is multiplied, or signs, eight of them in a uint8."""

    code_CB: NDArray[Any]
    scale_C: NDArray[np.float32] | None
    width: int

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        """Returns these rows as float32; a sign is 1 or -1."""
        code_NB = self.code_CB[rows]
        if self.scale_C is None:
            return np.unpackbits(code_NB, axis=1, count=self.width).astype(np.float32) * 2 - 1
        vectors_NE: NDArray[np.float32] = code_NB.astype(np.float32) * self.scale_C[rows, None]
        return vectors_NE


Whole = NDArray[Any] | Path | Coded


class SomeOfShard(NamedTuple):
    """Some rows of a shard or an array."""

    block: Whole
    rows: NDArray[np.int64]


class Vectors:
    """Float32 (C, E), as blocks: arrays, paths of shards, which may hold them in float16, or coded ones."""

    def __init__(self, blocks: Sequence[Whole | SomeOfShard], rows: Sequence[int], width: int) -> None:
        """`rows` of each block."""
        self.blocks, self.rows = blocks, rows
        self.shape = sum(rows), width

    def __len__(self) -> int:
        return self.shape[0]

    def __add__(self, other: Vectors) -> Vectors:
        """Returns the rows of both, those of `other` after the own ones."""
        return Vectors([*self.blocks, *other.blocks], [*self.rows, *other.rows], self.shape[1])

    def of_rows(self, rows_F: NDArray[np.int64]) -> Vectors:
        """Returns these rows, which ascend, of vectors whose blocks are whole. Nothing is read."""
        ends = np.cumsum(self.rows)
        parts = np.split(rows_F, np.searchsorted(rows_F, ends[:-1]))
        blocks = [
            SomeOfShard(block, part - start) if len(part) < rows else block
            for block, part, start, rows in zip(self.blocks, parts, ends - self.rows, self.rows, strict=True)
            if not isinstance(block, SomeOfShard)
        ]
        return Vectors(blocks, list(map(len, parts)), self.shape[1])

    def take(self, rows_F: NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns float32 (F, E): these rows, which ascend. Of blocks on disk nothing else is read."""
        ends = np.cumsum(self.rows)
        parts = np.split(rows_F, np.searchsorted(rows_F, ends[:-1]))
        found = [
            _rows(block, part - end + rows)
            for block, part, end, rows in zip(self.blocks, parts, ends, self.rows, strict=True)
        ]
        return np.concatenate(found).astype(np.float32, copy=False)

    def tiles(self, size: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Gives all rows in order, up to `size` at a time, with the number of the first. Small blocks are joined."""
        parts: list[NDArray[np.float32]] = []
        for row, part in self._parts(size):
            if parts and (held := sum(map(len, parts))) + len(part) > size:
                yield row - held, np.concatenate(parts) if len(parts) > 1 else parts[0]
                parts = []
            parts.append(part)
        if parts:
            yield len(self) - sum(map(len, parts)), np.concatenate(parts) if len(parts) > 1 else parts[0]

    def tiles_with(self, rows_F: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """As `tiles`, but gives only tiles with one of `rows_F`, which ascend; nothing else is read."""
        yield from self._parts(_TILE, rows_F)

    def _parts(self, size: int, rows_F: NDArray[np.int64] | None = None) -> Iterator[tuple[int, NDArray[np.float32]]]:
        start = 0
        for block, rows in zip(self.blocks, self.rows, strict=True):
            for first in range(0, rows, size):
                end = min(first + size, rows)
                if rows_F is None or np.diff(np.searchsorted(rows_F, (start + first, start + end))):
                    yield start + first, np.ascontiguousarray(_rows(block, slice(first, end)), dtype=np.float32)
            start += rows


def _rows(block: Whole | SomeOfShard, rows: slice | NDArray[np.int64]) -> NDArray[Any]:
    if isinstance(block, SomeOfShard):
        return _rows(block.block, block.rows[rows])
    found: NDArray[Any] = (vectors_of(read_shard(block)) if isinstance(block, Path) else block)[rows]
    return found


def as_vectors(vectors: NDArray[Any] | Vectors) -> Vectors:
    """Wraps an array or memory map (C, E) as vectors of one block; returns Vectors as they are."""
    if isinstance(vectors, Vectors):
        return vectors
    array_CE = np.asanyarray(vectors)
    if array_CE.ndim != 2:
        raise InputError(f"vectors {array_CE.shape} must be (C, E)")
    return Vectors([array_CE], [len(array_CE)], array_CE.shape[1])


def as_tensor(array: NDArray[Any]) -> Tensor:
    """Returns a view, never to be written to; torch warns of arrays, such as memory maps, that must not be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def read_shard(path: Path) -> pa.RecordBatch:
    """Returns the rows of a shard: a view of the file."""
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def vectors_of(shard: pa.RecordBatch) -> NDArray[Any]:
    """Returns the vectors (N, E) of a shard: a view of the file."""
    flat: NDArray[Any] = shard["vector"].flatten().to_numpy()
    return flat.reshape(shard.num_rows, -1)


def write_shard(
    path: Path, vectors_NE: NDArray[Any], columns: Mapping[str, Sequence[Any]], metadata: dict[bytes, bytes]
) -> None:
    """Writes vectors and columns of texts or of whole numbers, whole or not at all."""
    vector = pa.FixedSizeListArray.from_arrays(pa.array(vectors_NE.ravel()), vectors_NE.shape[1])
    beside = {
        name: pa.array(values, pa.int64() if isinstance(values[0], int) else pa.large_string())
        for name, values in columns.items()
    }
    batch = pa.RecordBatch.from_pydict({**beside, "vector": vector}).replace_schema_metadata(metadata)
    with whole_file(path) as temp, pa.ipc.new_file(str(temp), batch.schema) as writer:
        writer.write_batch(batch)
