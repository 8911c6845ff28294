"""Packed rows against plain loops over the texts, and the rules of batching on many random lengths."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from embedwright.packing import batches, pack
from embedwright.text import TokenizedText


def made_up_texts(lengths: list[int], seed: int = 0) -> list[TokenizedText]:
    random = np.random.default_rng(seed)
    return [TokenizedText(random.integers(0, 1000, n), random.random(n) < 0.5) for n in lengths]


@pytest.mark.parametrize("lengths", [[3], [2, 2, 5, 2], [1, 7, 7, 7, 4], [300, 1, 1]])
def test_a_packed_row_holds_each_text_in_order(lengths: list[int]) -> None:
    texts = made_up_texts(lengths)
    packed = pack(texts)

    assert len(packed) == len(lengths) and packed.longest == max(lengths)
    assert packed.lengths_N.tolist() == lengths
    assert packed.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packed.position_T.tolist() == [p for n in lengths for p in range(n)]
    for i, text in enumerate(texts):
        row = slice(int(packed.cu_seqlens[i]), int(packed.cu_seqlens[i + 1]))
        assert packed.ids_T[row].tolist() == text.ids.tolist()
        assert packed.pool_mask_T[row].tolist() == text.pool.tolist()


def test_dtypes_are_those_that_kernels_ask_for() -> None:
    packed = pack(made_up_texts([3, 4]))
    dtypes = [t.dtype for t in (packed.ids_T, packed.position_T, packed.cu_seqlens, packed.pool_mask_T)]
    assert dtypes == [torch.int64, torch.int64, torch.int32, torch.bool]


def test_runs_are_neighbours_of_equal_length() -> None:
    assert pack(made_up_texts([5, 5, 2, 5, 2, 2])).runs == ((2, 5), (1, 2), (1, 5), (2, 2))


def test_no_texts_make_an_empty_row() -> None:
    packed = pack([])
    assert len(packed) == 0 and packed.longest == 0 and packed.runs == ()
    assert packed.ids_T.shape == packed.pool_mask_T.shape == (0,) and packed.cu_seqlens.tolist() == [0]


def test_moved_rows_keep_what_they_hold() -> None:
    packed = pack(made_up_texts([5, 5, 2]))
    moved = packed.to("meta")
    assert {t.device.type for t in (moved.ids_T, moved.position_T, moved.cu_seqlens, moved.pool_mask_T)} == {"meta"}
    assert (moved.runs, moved.longest, len(moved)) == (packed.runs, packed.longest, 3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch_tokens", [1, 40, 100, 10_000])
def test_batches_hold_every_text_once_within_the_bound(seed: int, batch_tokens: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 60, 200).tolist()
    made = list(batches(lengths, batch_tokens))

    assert sorted(i for batch in made for i in batch) == list(range(200))
    for batch in made:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= batch_tokens
    # full: the first text of a batch had no room in the one before
    for before, after in pairwise(made):
        assert sum(lengths[i] for i in before) + lengths[after[0]] > batch_tokens
    in_order = [lengths[i] for batch in made for i in batch]
    assert in_order == sorted(lengths, reverse=True)


def test_equal_lengths_keep_their_order() -> None:
    assert list(batches([4, 4, 4, 4, 4], 8)) == [[0, 1], [2, 3], [4]]


def test_a_longer_text_is_a_batch_of_its_own() -> None:
    assert list(batches([3, 50, 4], 10)) == [[1], [2, 0]]
    assert list(batches([], 10)) == []
