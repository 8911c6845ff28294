"""Replaces the class of peft's LoRA layers by one that keeps less memory for backward.

peft's forward makes several sums as wide as the output. Under dropout it keeps a copy of the input and a mask of the
same size for every layer. Here one function keeps the input, which layers with the same input share, its narrow product
with A, and the seed of the dropout mask.

T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from embedwright.cpu import onednn
from embedwright.cpu.guards import has_hooks, is_eager, on_cpu
from embedwright.cpu.linears import OneDnnLinear

_STEPS = 2**16  # a probability of dropout is a multiple of 1/_STEPS


def make_lean(root: nn.Module) -> None:
    """Gives every plain `peft.tuners.lora.Linear` below `root` the lean forward, in place. Names and weights stay."""
    for module in root.modules():
        if type(module) is Linear:
            module.__class__ = LeanLinear


class LeanLinear(Linear):
    """peft's layer with one autograd function for the plain case: one active adapter on a frozen `nn.Linear`.

    Its output has the type of input and base: float32, or the 16 bits of autocast, which casts the float32 adapters.
    It computes in that type, or in float32 where that `onednn.is_faster`. Every other case goes to peft's own forward.
    """

    stock_class: ClassVar[Any] = Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self._plain(x):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        [name] = self.active_adapters
        base, dropout, scale = self.base_layer, self.lora_dropout[name], float(self.scaling[name])
        steps = _drop_steps(dropout)
        onednn_runs = type(base) is OneDnnLinear and on_cpu(x) and onednn.is_faster(x.dtype)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        function: Any = _LoraProduct  # torch leaves `apply` untyped
        output = function.apply(x, base.weight, base.bias, a, b, scale, steps, onednn_runs)
        return output

    def _plain(self, x: Tensor) -> bool:
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return False
        name, base, device = names[0], self.base_layer, x.device.type
        a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        autocast = torch.is_autocast_enabled(device)
        computed_in = torch.get_autocast_dtype(device) if autocast else a.weight.dtype
        return (
            is_eager(x, *base.parameters(), *a.parameters(), *b.parameters())
            and name not in self.lora_variant
            and not self.lora_bias[name]
            and type(base) in (nn.Linear, OneDnnLinear)
            and not any(parameter.requires_grad for parameter in base.parameters())
            and type(dropout) in (nn.Dropout, nn.Identity)
            and (not _drop_steps(dropout) or (device == "cpu" and _drop_steps(dropout) < _STEPS))
            and x.dtype == base.weight.dtype == computed_in
            and a.weight.dtype == b.weight.dtype
            and x.numel() > 0
            and not has_hooks(base, a, b, dropout)
        )


class _LoraProduct(torch.autograd.Function):
    """Computes x W^T + bias + scale * dropout(x) A^T B^T, with gradients of x, A and B.

    x (..., I), W (O, I), bias (O,) or None, A (R, I), B (O, R). A and B are rounded to the type of x, which output and
    gradient of x have. If `onednn_runs`, all is computed in float32, else in that type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        steps: int,
        onednn_runs: bool,
    ) -> Tensor:
        # from the default generator: a replayed forward (GradCache, checkpointing) restores its state
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if steps else 0
        ctx.scale, ctx.steps, ctx.seed = scale * _STEPS / (_STEPS - steps), steps, seed
        ctx.onednn_runs = onednn_runs
        product, computes = _how(onednn_runs, x.dtype)
        factor, a_RI, b_OR = x.to(computes), *_rounded(x.dtype, computes, a, b)
        output: Tensor = product(factor, weight.to(computes), None if bias is None else bias.to(computes))
        x_TI = factor.reshape(-1, x.shape[-1])
        narrow_TR = product(x_TI * _kept(x_TI, steps, seed) if steps else x_TI, a_RI, None)
        output.view(-1, output.shape[-1]).addmm_(narrow_TR, b_OR.t(), alpha=ctx.scale)
        ctx.save_for_backward(x, weight, a, b, narrow_TR)
        return output.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, a, b, narrow_TR = ctx.saved_tensors
        scale, (product, computes) = ctx.scale, _how(ctx.onednn_runs, x.dtype)
        a_RI, b_OR = _rounded(x.dtype, computes, a, b)
        x_TI = x.to(computes).reshape(-1, x.shape[-1])
        kept_TI = _kept(x_TI, ctx.steps, ctx.seed) if ctx.steps else None
        gradient_TO = gradient.to(computes).reshape(-1, gradient.shape[-1]).contiguous()
        back_TR = product(gradient_TO, b_OR.t(), None)
        grad_a = product(back_TR.t().contiguous(), (x_TI if kept_TI is None else x_TI * kept_TI).t(), None)
        grad_b = product(narrow_TR.t().contiguous(), gradient_TO.t(), None).t()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(gradient_TO, weight.to(computes).t(), None)
            if kept_TI is None:
                grad_x.addmm_(back_TR, a_RI, alpha=scale)
            else:
                grad_x.add_(product(back_TR, a_RI.t(), None).mul_(kept_TI), alpha=scale)
            grad_x = grad_x.to(x.dtype).view(x.shape)
        # scaled after the cast, in the adapters' own float32
        return grad_x, None, None, grad_a.to(a.dtype) * scale, grad_b.to(b.dtype) * scale, None, None, None


def _how(onednn_runs: bool, dtype: torch.dtype) -> tuple[Callable[..., Any], torch.dtype]:
    """Returns the function that multiplies, and the type of its factors."""
    return (onednn.linear, torch.float32) if onednn_runs else (F.linear, dtype)


def _rounded(dtype: torch.dtype, computes: torch.dtype, *adapters: Tensor) -> Iterator[Tensor]:
    """Rounds adapters to `dtype`, in the type `computes`."""
    return (adapter.to(dtype).to(computes) for adapter in adapters)


def _drop_steps(dropout: nn.Module) -> int:
    """Returns the current dropout probability of a module, in steps of 1/_STEPS."""
    return round(dropout.p * _STEPS) if isinstance(dropout, nn.Dropout) and dropout.training else 0


def _kept(x_TI: Tensor, steps: int, seed: int) -> Tensor:
    """Draws a bool mask of x's shape on a CPU: False with probability steps/_STEPS. The seed decides the mask.

    torch draws one element at a time, which takes longer than the products. Here 64 bits give four elements.
    """
    words = np.random.Generator(np.random.SFC64(seed)).integers(2**64, size=-(-x_TI.numel() // 4), dtype=np.uint64)
    bits = torch.from_numpy(words.view(np.int16)[: x_TI.numel()]).view(x_TI.shape)
    return bits >= steps - _STEPS // 2
