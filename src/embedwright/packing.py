"""Texts of any length as one row of tokens with boundaries. No padding exists after this point.

T packed tokens, N texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedwright.text import TokenizedText


@dataclass(frozen=True)
class PackedTexts:
    """N texts in one row of T tokens.

    `ids_T` and `position_T` are int64, `pool_mask_T` is bool. `cu_seqlens` int32 (N+1,) holds the boundaries: text i is
    tokens cu_seqlens[i] to cu_seqlens[i+1].
    """

    ids_T: Tensor
    position_T: Tensor
    cu_seqlens: Tensor
    pool_mask_T: Tensor
    longest: int
    # (texts, length) for each run of neighbours of equal length, which attention computes as one batch. Python
    # numbers, since reading them from the tensor would make a GPU wait in every layer.
    runs: tuple[tuple[int, int], ...]
    # A list makes packed attention record its calls, one a layer, for the proof of the masks.
    calls: list[Any] | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def lengths_N(self) -> Tensor:
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    def to(self, device: torch.device | str) -> PackedTexts:
        return replace(
            self,
            ids_T=moved(self.ids_T, device),
            position_T=moved(self.position_T, device),
            cu_seqlens=moved(self.cu_seqlens, device),
            pool_mask_T=moved(self.pool_mask_T, device),
        )


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copies to a GPU from pinned memory. From other memory the copy would wait for the GPU's whole queue."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pack(texts: Sequence[TokenizedText]) -> PackedTexts:
    """Packs texts into one row, one after the other, in the order given."""
    lengths = [len(t.ids) for t in texts]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    total = int(cu_seqlens[-1])
    starts_T = np.repeat(cu_seqlens[:-1], lengths)
    empty: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    return PackedTexts(
        ids_T=torch.from_numpy(np.concatenate([t.ids for t in texts] or empty)),
        position_T=torch.from_numpy(np.arange(total) - starts_T),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        pool_mask_T=torch.from_numpy(np.concatenate([t.pool for t in texts] or empty).astype(bool)),
        longest=max(lengths, default=0),
        runs=tuple((len(list(group)), length) for length, group in groupby(lengths)),
    )


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yields batches of text indices, at most `batch_tokens` tokens each. A longer text is a batch of its own.

    The longest texts come first, so that attention finds runs of equal length and the first batch needs most memory.
    """
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and tokens + lengths[i] > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch
