"""Batches of a corpus in a GPU's queue: it stands still while Python prepares one, if it has no other to go on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def queued(
    run: Callable[[list[int]], Tensor], made: Sequence[list[int]]
) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """(batch, run(batch) in host memory) in the order given, each handed over when the next is in the GPU's queue."""
    ahead: tuple[list[int], Tensor, torch.cuda.Event] | None = None
    for batch in made:
        found_NE = run(batch)
        vectors_NE = found_NE.to("cpu", non_blocking=True)  # torch pins what it makes for such a copy
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(found_NE.device))  # the model's GPU need not be the current one
        if ahead is not None:
            yield _waited_for(*ahead)
        ahead = batch, vectors_NE, copied
    if ahead is not None:
        yield _waited_for(*ahead)


def _waited_for(
    batch: list[int], vectors_NE: Tensor, copied: torch.cuda.Event
) -> tuple[list[int], NDArray[np.float32]]:
    copied.synchronize()
    return batch, vectors_NE.numpy()
