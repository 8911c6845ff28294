"""GradCache (arXiv 2101.06983): the exact gradient of a batch of any size, in bounded memory.

All micro-batches but the first are embedded without a graph; the first is embedded last and keeps its graph. The loss
and its gradient are computed on all embeddings. Then each micro-batch backpropagates its slice of that gradient: the
first at once, each of the others after a second forward, with its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from embedwright.packing import PackedTexts


def backward(
    embed: Callable[[PackedTexts], Tensor],
    micro_batches: Sequence[PackedTexts],
    loss_of: Callable[[Tensor], Tensor],
    seed: int,
    *,
    processes: int = 1,
    syncing: Callable[[bool], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> float:
    """Adds the gradient of `loss_of(embeddings of all micro-batches in order)` to the parameters; returns the loss.

    Dropout is seeded per micro-batch, so the second pass repeats the first's masks. All `processes` have equally many
    micro-batches. `syncing(last)` surrounds each pass and averages gradients over the processes: the gradient is
    multiplied by their number, so that the average is the sum.
    """

    def run(index: int) -> Tensor:
        torch.manual_seed(seed + index)
        return embed(micro_batches[index])

    last = len(micro_batches) - 1
    with torch.no_grad(), syncing(False):
        others = [run(i) for i in range(1, last + 1)]
    with syncing(last == 0):
        first = run(0)
    cached_NE = torch.cat([first.detach(), *others]).requires_grad_()
    loss = loss_of(cached_NE)
    loss.backward()
    assert cached_NE.grad is not None
    gradients = (cached_NE.grad * processes).split([len(part) for part in (first, *others)])
    for i, gradient in enumerate(gradients):
        with syncing(i == last):
            (run(i) if i else first).backward(gradient)
    return loss.item()
