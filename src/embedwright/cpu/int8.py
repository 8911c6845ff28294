"""Runs quantised linear layers as int8 products on CPUs, for inference: their inputs are rounded to int8, row by row.

A product of int8 with sums in int32 is exact, so all that differs from the dequantised weights is the rounding of the
inputs, by half a step of its row's scale at most. `proof` holds every layer to that.

T tokens, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from embedwright.cpu import kernels
from embedwright.cpu.guards import is_inference
from embedwright.model.quantized import QuantizedLinear, slices

_WIDEST = 2**16  # inputs of a layer, for sums to stay within int32


@dataclass(frozen=True)
class QuantizedInput:
    """A tensor `exact`, rotated and rounded to int8 (`rows`), for layers that share it. They give `dtype`."""

    rows: kernels.QuantizedRows
    exact: Tensor
    dtype: torch.dtype


Seen = dict[nn.Module, tuple[QuantizedInput, Tensor | None]]  # by layer: what it multiplied, and what it gave by itself
_SEEN: ContextVar[Seen | None] = ContextVar("seen", default=None)


class Int8Linear(QuantizedLinear):
    """A `QuantizedLinear` that multiplies in int8 where it can."""

    stock_class: ClassVar[Any] = QuantizedLinear

    def forward(self, input: Tensor | QuantizedInput) -> Tensor:
        if not isinstance(input, QuantizedInput):
            if not is_inference(self, (), input) or not can_run_int8(self):
                return super().forward(input)
            input = quantized_input(input, self, input.dtype)
        out_TO = _joined(
            kernels.int8_product(
                input.rows, weight, scales, None if self.bias is None else self.bias[part].float(), input.dtype
            )
            for part, (weight, scales) in _parts(self)
        )
        _note(input, out_TO, self)
        return out_TO.view(*input.exact.shape[:-1], -1)


def can_run_int8(*layers: nn.Module) -> bool:
    """Returns whether these layers can run in int8: their sizes fit, their scales are float32 on the CPU.

    Those that are named together share their input, and are rotated alike.
    """
    return all(
        isinstance(layer, Int8Linear)
        and layer.in_features % 16 == layer.out_features % 16 == 0
        and layer.rotation in (1, 16, 32, 64)
        and layer.in_features <= _WIDEST
        and layer.scales.dtype == torch.float32  # the kernel reads an address: another type would be other bytes
        and layer.scales.is_cpu
        for layer in layers
    )


def quantized_input(x: Tensor, layer: Int8Linear, dtype: torch.dtype) -> QuantizedInput:
    """Rounds a tensor (..., D) for this layer, and others with the same rotation, to give `dtype`."""
    return QuantizedInput(kernels.quantize_rows(x.reshape(-1, x.shape[-1]).contiguous(), layer.rotation), x, dtype)


def gated(input: QuantizedInput, gate: Int8Linear, up: Int8Linear, gelu: bool) -> Tensor:
    """Computes activation(gate(input)) * up(input) -> (..., O) bfloat16. The layers have no bias."""
    pairs = zip(_parts(gate), _parts(up), strict=True)
    out_TO = _joined(kernels.int8_gated(input.rows, one, other, gelu) for (_, one), (_, other) in pairs)
    _note(input, None, gate, up)
    return out_TO.view(*input.exact.shape[:-1], -1)


def _parts(layer: Int8Linear) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """Yields rows of a layer with their int8 weight and scales: all at once, or a few where 4 bits are unpacked."""
    parts = [slice(None)] if layer.bits == 8 else slices(layer.shape)
    return ((part, (layer.int8_weight(part), layer.scales[part])) for part in parts)


def _joined(made: Iterable[Tensor]) -> Tensor:
    parts = list(made)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@contextmanager
def watched() -> Iterator[Seen]:
    """Yields a dict that fills with what each layer multiplies within the block, in this thread."""
    seen: Seen = {}
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def _note(input: QuantizedInput, output: Tensor | None, *layers: nn.Module) -> None:
    if (seen := _SEEN.get()) is not None:
        kept = None if output is None else output.clone()  # rotary positions overwrite it
        seen.update(dict.fromkeys(layers, (input, kept)))
