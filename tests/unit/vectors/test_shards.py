from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedwright.vectors.shards import Vectors, as_vectors, read_shard, vectors_of, write_shard


def test_a_shard_is_read_as_it_was_written(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_shard(tmp_path / "a.arrow", array, {"id": ["1", "2"], "text": ["a", "\u00e4"]}, {b"key": b"value"})
    shard = read_shard(tmp_path / "a.arrow")
    assert (shard.schema.names, shard["text"].to_pylist()) == (["id", "text", "vector"], ["a", "\u00e4"])
    assert np.array_equal(vectors_of(shard), array) and shard.schema.metadata == {b"key": b"value"}


def test_tiles_join_small_blocks_and_part_large_ones() -> None:
    array = np.arange(40, dtype=np.float64).reshape(20, 2)
    found = Vectors(np.split(array, [1, 3, 4, 16]), [1, 2, 1, 12, 4], 2)
    assert [(first, len(tile)) for first, tile in found.tiles(5)] == [(0, 4), (4, 5), (9, 5), (14, 2), (16, 4)]
    assert np.array_equal(np.concatenate([tile for _, tile in found.tiles(5)]), array)
    assert all(tile.dtype == np.float32 for _, tile in found.tiles(5))
    wanted = [(first, len(tile)) for first, tile in found.tiles_with(np.array([1, 2, 17]))]
    assert wanted == [(1, 2), (16, 4)]
    assert list(found.tiles_with(np.array([], np.int64))) == [] and list(Vectors([], [], 0).tiles(5)) == []
    both = found + as_vectors(array[:3])
    assert both.shape == (23, 2) and np.array_equal(np.concatenate([t for _, t in both.tiles(9)])[20:], array[:3])


def test_what_are_no_vectors() -> None:
    with pytest.raises(ValueError, match=r"must be \(C, E\)"):
        as_vectors(np.zeros(3))
