"""Runs linear layers of stock models through `onednn`, and gated blocks in fewer steps, by a change of class.

No weight is copied or reordered. So saving has nothing to undo, and peft, autocast and checkpoints see a plain
`nn.Linear`.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import activations

from embedwright.cpu import int8, onednn
from embedwright.cpu.guards import Original, has_hooks, is_inference, is_unpatched, on_cpu, stock_functions, subclass

_LINEAR = stock_functions((nn.Linear, "forward"))


class OneDnnLinear(nn.Linear):
    """`nn.Linear` whose products on a CPU run in oneDNN, forward and backward, in float32, where that `is_faster`.

    Nothing else changes: the output has the type of the stock layer's, under autocast too.
    """

    stock_class: ClassVar[Any] = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        weight, autocast = self.weight, torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else input.dtype
        fits = on_cpu(input, weight) and (autocast or input.dtype == weight.dtype)
        if not (fits and stays_plain(self) and onednn.is_faster(dtype)):
            return super().forward(input)
        function: Any = _Product  # torch leaves `apply` untyped
        factors = (None if x is None else x.to(dtype) for x in (input, weight, self.bias))
        product: Tensor = function.apply(*factors)
        return product


def stays_plain(linear: nn.Module) -> bool:
    """Returns whether this linear layer runs torch's own, unpatched code."""
    return type(linear) in (nn.Linear, OneDnnLinear) and _LINEAR is not None and is_unpatched(_LINEAR)


class _Product(torch.autograd.Function):
    """Computes input (..., I) W^T + bias -> (..., O), weight (O, I), bias (O,) or None, in float32.

    All have one type. The result is rounded to it, and what backward needs is kept in it.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_input, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)
        return onednn.linear(input.float(), weight.float(), None if bias is None else bias.float()).to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        wide, dtype = gradient.float().contiguous(), gradient.dtype
        rows_TO = wide.reshape(-1, wide.shape[-1])
        of_input = of_weight = of_bias = None
        if weight is not None:
            of_input = onednn.linear(wide, weight.float().t(), None).to(dtype)
        if input is not None:
            input_TI = input.float().reshape(len(rows_TO), -1)
            of_weight = onednn.linear(rows_TO.t().contiguous(), input_TI.t(), None).to(dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows_TO.sum(0).to(dtype)
        return of_input, of_weight, of_bias


_GATED_ROWS = 512  # at a time in float32: intermediate results stay in the processor's caches


@cache
def gated(stock: Any) -> Any:
    """Makes the class of a block down(activation(gate(x)) * up(x)), for inference on a CPU. None for a patched block.

    In bfloat16, activation and product are part of the matrix products: that saves two passes through memory and two
    roundings. In float32, rows go in slices, and intermediate results are overwritten.
    """
    known = stock_functions((stock, "forward"))
    if known is None:
        return None

    def written_over(self: Any, rows_SD: Tensor) -> Tensor:
        gate_SI = self.gate_proj(rows_SD)
        silu = _activation(self.act_fn) == onednn.SWISH
        gate_SI = F.silu(gate_SI, inplace=True) if silu else self.act_fn(gate_SI)
        return cast(Tensor, self.down_proj(gate_SI.mul_(self.up_proj(rows_SD))))

    def forward(self: Any, x: Tensor) -> Tensor:
        if _fits_int8(self) and is_inference(self, known, x):
            gelu = _activation(self.act_fn) == onednn.GELU_TANH
            mixed = int8.gated(int8.quantized_input(x, self.gate_proj, x.dtype), self.gate_proj, self.up_proj, gelu)
            return cast(Tensor, self.down_proj(int8.quantized_input(mixed, self.down_proj, x.dtype)))
        parts = self.gate_proj, self.up_proj
        plain = (
            all(type(part) is OneDnnLinear and stays_plain(part) for part in parts)
            and is_inference(self, known, x, *(part.weight for part in parts))
            and not has_hooks(*parts, self.act_fn, self.down_proj)
        )
        activation = _activation(self.act_fn) if plain else None
        if activation is not None and x.dtype == torch.float32:
            made = [written_over(self, rows_SD) for rows_SD in x.reshape(-1, x.shape[-1]).split(_GATED_ROWS)]
            return (made[0] if len(made) == 1 else torch.cat(made)).view(x.shape)
        if activation is None or not onednn.gated_available() or any(part.bias is not None for part in parts):
            return cast(Tensor, stock.forward(self, x))
        gate, up = (part.weight for part in parts)
        return cast(Tensor, self.down_proj(onednn.gated(x, gate, up, *activation)))

    return subclass(gated, stock, forward, known)


def _fits_int8(self: Any) -> bool:
    """Returns whether a gated block can run in int8."""
    parts = self.gate_proj, self.up_proj, self.down_proj
    return (
        int8.can_run_int8(*parts)
        and self.gate_proj.bias is None is self.up_proj.bias
        and not has_hooks(*parts, self.act_fn)
        and _activation(self.act_fn) is not None
    )


# the activations of transformers and torch that oneDNN has, by class
_ACTIVATIONS: dict[Any, tuple[tuple[Original, ...], tuple[str, str]]] = {
    owner: (known, name)
    for owner, name in (
        (nn.SiLU, onednn.SWISH),
        (getattr(activations, "SiLUActivation", None), onednn.SWISH),
        (getattr(activations, "GELUTanh", None), onednn.GELU_TANH),
    )
    if owner is not None and (known := stock_functions((owner, "forward"))) is not None
}


def _activation(module: Any) -> tuple[str, str] | None:
    """Returns oneDNN's name of an activation, None if oneDNN lacks it or somebody patched it."""
    known, name = _ACTIVATIONS.get(type(module), ((), None))
    if name is None or "forward" in vars(module) or not is_unpatched(known):
        return None
    if name == onednn.GELU_TANH:
        act = getattr(module, "act", None)
        if not isinstance(act, partial) or act.func is not F.gelu or act.keywords != {"approximate": "tanh"}:
            return None
    return name if not getattr(module, "inplace", False) else None
