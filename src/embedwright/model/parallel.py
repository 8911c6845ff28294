"""Batches of a corpus so that no device waits: side by side on a CPU's threads, in a queue on a GPU.

On a CPU a forward has hundreds of small parallel loops. Shared by the cores, each loop ends when the slowest core is
done, and beside another busy process that is most of the time. A GPU stands still while Python prepares a batch, if
it has no other to go on with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedwright import threads
from embedwright.model.memory import give_back
from embedwright.packing import batches

_LEAST = 256  # tokens of a forward: fewer rows do not fill a matrix product
_MOST = 8  # forwards at a time: they take turns at Python, and each holds its own intermediates

T = TypeVar("T")


def planned(lengths: Sequence[int], batch_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Batches to run one after the other on all threads, and batches to run side by side, as indices of texts.

    At most `batch_tokens` tokens are at work at a time, but for a text that is longer, which all threads share.
    """
    workers = torch.get_num_threads()
    total = sum(length for length in lengths if length <= batch_tokens)
    if (
        not 1 < workers <= min(_MOST, len(threads.CORES), batch_tokens // _LEAST, total // _LEAST)
        or torch.is_autocast_enabled("cpu")  # a setting of this thread alone
    ):
        return list(batches(lengths, batch_tokens)), []
    rounds = -(-total // (batch_tokens // workers * workers))
    share = -(-total // (rounds * workers))  # so that all are done at about the same time
    made = list(batches(lengths, share))
    alone = [batch for batch in made if lengths[batch[0]] > batch_tokens]
    return alone, made[len(alone) :]


def side_by_side(run: Callable[[list[int]], T], made: Sequence[list[int]]) -> Iterator[tuple[list[int], T]]:
    """(batch, run(batch)) in the order given, as many at a time as torch has threads here, each on one of its own."""
    workers = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=_on_one_thread) as pool:
            for done in zip(made, pool.map(run, made), strict=True):
                give_back()  # every batch has its own shapes: what they leave is gaps in each thread's memory
                yield done
    finally:
        torch.set_num_threads(workers)  # torch's own count is one thread's, that of its libraries is everyone's


def queued(
    run: Callable[[list[int]], Tensor], made: Sequence[list[int]]
) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """(batch, run(batch) in host memory) in the order given, each handed over when the next is in the GPU's queue."""
    ahead: tuple[list[int], Tensor, torch.cuda.Event] | None = None
    for batch in made:
        vectors_NE = run(batch).to("cpu", non_blocking=True)  # torch pins what it makes for such a copy
        copied = torch.cuda.Event()
        copied.record()
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


def _on_one_thread() -> None:
    threads.free()
    torch.set_num_threads(1)
