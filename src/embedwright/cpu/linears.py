"""Products of stock models through `onednn`, gated blocks in fewer steps: a change of class on the loaded model.

No weight is copied or reordered, so that there is nothing to undo when it is saved, and peft, autocast and every
checkpoint see the `nn.Linear` that they know.
"""

from __future__ import annotations

from collections.abc import Container
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from embedwright.cpu import onednn


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
    @once_differentiable
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


# transformers' blocks that are down(activation(gate(x)) * up(x)), and their activations as oneDNN has them.
_GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma3MLP")
_ACTIVATIONS = {"SiLU": onednn.SWISH, "SiLUActivation": onednn.SWISH, "GELUTanh": onednn.GELU_TANH}

_GATED_ROWS = 512  # at a time in float32: what lies between the products stays in the caches


@cache
def _gated(stock: Any) -> Any:
    """A stock block's class for inference on a CPU. In bfloat16 activation and product are part of the matrix products,
    which spares two rounds through memory and two roundings; in float32 rows go in slices, and what lies between the
    products is written over. All else is as it was.
    """

    def written_over(self: Any, rows_SD: Tensor) -> Tensor:
        gate_SI = self.gate_proj(rows_SD)
        silu = _ACTIVATIONS.get(type(self.act_fn).__name__) == ("swish", "")
        gate_SI = F.silu(gate_SI, inplace=True) if silu else self.act_fn(gate_SI)
        return cast(Tensor, self.down_proj(gate_SI.mul_(self.up_proj(rows_SD))))

    def forward(self: Any, x: Tensor) -> Tensor:
        parts = self.gate_proj, self.up_proj
        # never in training: dropout must be the same with a gradient and without (GradCache)
        plain = (
            x.device.type == "cpu"
            and x.numel() > 0
            and not self.training
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and all(part.weight.dtype == x.dtype and type(part) is OneDnnLinear for part in parts)
            and not listened_to(*parts, self.act_fn, self.down_proj)
        )
        if plain and x.dtype == torch.float32:
            made = [written_over(self, rows_SD) for rows_SD in x.reshape(-1, x.shape[-1]).split(_GATED_ROWS)]
            return (made[0] if len(made) == 1 else torch.cat(made)).view(x.shape)
        activation = _ACTIVATIONS.get(type(self.act_fn).__name__)
        fused = plain and x.dtype == torch.bfloat16 and onednn.gated_available()
        if not fused or activation is None or any(part.bias is not None for part in parts):
            return cast(Tensor, stock.forward(self, x))
        gate, up = (part.weight for part in parts)
        return cast(Tensor, self.down_proj(onednn.gated(x, gate, up, *activation)))

    return faster(_gated, stock, forward)


def listened_to(*modules: nn.Module) -> bool:
    """Whether there are hooks on these. What a hook hears of must be called, and what it is handed not written over."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def faster(make: Any, stock: Any, forward: Any) -> Any:
    """A class like `stock` with another forward, which `make(stock)` gives: how another process finds it, to which a
    model is sent (sentence-transformers' pools)."""

    def reduced(self: nn.Module, protocol: Any) -> Any:
        return _instance, (make, stock), self.__dict__

    return type(stock.__name__, (stock,), {"forward": forward, "faster": True, "__reduce_ex__": reduced})


def change(module: nn.Module, names: Container[str], make: Any) -> None:
    """Give a module whose class has one of these names the class that `make` makes of it, in place; once."""
    kind: Any = type(module)
    if kind.__name__ in names and not hasattr(module, "faster"):
        module.__class__ = make(kind)


def _instance(make: Any, stock: Any) -> nn.Module:
    kind = make(stock)
    empty: nn.Module = kind.__new__(kind)
    return empty


def speed_up(network: nn.Module) -> None:
    """Give the network's plain `nn.Linear` and gated blocks faster products, in place, where this machine has them."""
    if not onednn.available():
        return
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear
        change(module, _GATED, _gated)
