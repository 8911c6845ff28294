"""Any batch in bounded memory, with the gradient of the whole batch: GradCache (arXiv 2101.06983).

First the embeddings without a graph, micro-batch by micro-batch; the loss and its gradient on all of them; then each
micro-batch again, with its graph, against its slice of that gradient. One of them needs no second time: the last to be
embedded keeps its graph, and is the first to give it up.
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

    Dropout is seeded per micro-batch, so that the second pass repeats the masks of the first. Of several `processes`,
    each with as many micro-batches as the others, gradients are averaged on the way (`syncing(last)`), so they are
    sent times their number.
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
