"""Matrix products on CPUs through oneDNN: torch's float32 default, MKL, runs its slow code on AMD (2.3x lost there).

A change of class on the loaded stock model and nothing else: no weight is copied or reordered, so that there is
nothing to undo when it is saved, and peft, autocast and every checkpoint see the `nn.Linear` that they know. oneDNN
takes the plain weight at 95 % and more of the speed of a reordered one from 256 tokens on (`benchmarks/linears.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedwright import onednn


class OneDnnLinear(nn.Linear):
    """`nn.Linear` whose float32 products on a CPU run in oneDNN, forward and backward; all else is as it was."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        plain = input.dtype == weight.dtype == torch.float32 and input.device.type == "cpu"
        if not plain or torch.is_autocast_enabled("cpu") or input.numel() == 0:
            return F.linear(input, weight, self.bias)
        function: Any = _Product  # torch leaves `apply` untyped
        product: Tensor = function.apply(input, weight, self.bias)
        return product


class _Product(torch.autograd.Function):
    """input (..., I), weight (O, I), bias (O,) or None -> (..., O). Keeps only what the gradients asked for need."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_input, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)
        return onednn.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        rows_TO = gradient.reshape(-1, gradient.shape[-1])
        return (
            None if weight is None else onednn.linear(gradient.contiguous(), weight.t(), None),
            None
            if input is None
            else onednn.linear(rows_TO.t().contiguous(), input.reshape(len(rows_TO), -1).t(), None),
            rows_TO.sum(0) if ctx.needs_input_grad[2] else None,
        )


def speed_up(network: nn.Module) -> None:
    """Give every plain `nn.Linear` of the network the faster products, in place, where this machine has them."""
    if not onednn.available():
        return
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear
