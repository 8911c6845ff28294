"""Any batch in bounded memory, with the gradient of the whole batch: GradCache (arXiv 2101.06983).

First the embeddings without a graph, micro-batch by micro-batch; the loss and its gradient on all of them; then each
micro-batch again, with its graph, against its slice of that gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from embedwright.packing import PackedTexts


def backward(
    embed: Callable[[PackedTexts], Tensor],
    micro_batches: Sequence[PackedTexts],
    loss_of: Callable[[Tensor], Tensor],
    seed: int,
) -> float:
    """Adds the gradient of `loss_of(embeddings of all micro-batches in order)` to the parameters; returns the loss.

    Dropout is seeded per micro-batch, so that the second pass repeats the masks of the first.
    """

    def run(index: int) -> Tensor:
        torch.manual_seed(seed + index)
        return embed(micro_batches[index])

    if len(micro_batches) == 1:
        loss = loss_of(run(0))
        loss.backward()
        return loss.item()
    with torch.no_grad():
        parts = [run(i) for i in range(len(micro_batches))]
    cached_NE = torch.cat(parts).requires_grad_()
    loss = loss_of(cached_NE)
    loss.backward()
    assert cached_NE.grad is not None
    for i, gradient in enumerate(cached_NE.grad.split([len(p) for p in parts])):
        run(i).backward(gradient)
    return loss.item()
