"""What comes next is made while the model computes: texts tokenised in a thread, and batches in a GPU's queue, which
stands still while Python prepares one if it has no other to go on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedwright import threads
from embedwright.text import TokenizedText


def queued(
    run: Callable[[list[int]], Tensor], made: Sequence[list[int]]
) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """(batch, run(batch) in host memory) in the order given, each handed over when the next is in the GPU's queue."""
    before: tuple[list[int], Tensor, torch.cuda.Event] | None = None
    for batch in made:
        found_NE = run(batch)
        vectors_NE = found_NE.to("cpu", non_blocking=True)  # torch pins what it makes for such a copy
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(found_NE.device))  # the model's GPU need not be the current one
        if before is not None:
            yield _waited_for(*before)
        before = batch, vectors_NE, copied
    if before is not None:
        yield _waited_for(*before)


def _waited_for(
    batch: list[int], vectors_NE: Tensor, copied: torch.cuda.Event
) -> tuple[list[int], NDArray[np.float32]]:
    copied.synchronize()
    return batch, vectors_NE.numpy()


def ahead(
    make: Callable[[int], list[TokenizedText]], starts: Sequence[int]
) -> Iterator[tuple[int, list[TokenizedText]]]:
    """(start, make(start)) in turn, the next one made in a thread meanwhile: tokenizers lets go of the interpreter."""
    if len(starts) < 2:
        yield from ((start, make(start)) for start in starts)
        return
    with ThreadPoolExecutor(1, initializer=threads.free) as pool:
        waiting = pool.submit(make, starts[0])
        for start, following in zip(starts, [*starts[1:], None], strict=True):
            chunk = waiting.result()
            if following is not None:
                waiting = pool.submit(make, following)
            yield start, chunk
