"""Calls oneDNN's matrix products on CPUs, because torch's float32 default, MKL, runs slow code on AMD.

From 256 rows on, oneDNN multiplies a plain weight at 92 % or more of the speed of a reordered one
(`benchmarks/peaks.py`), so no weight is reordered.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from embedwright.cpu.guards import FLOATS

logger = logging.getLogger(__name__)

# torch's test of a type, and the instructions that multiply it: oneDNN takes bfloat16 with any AVX-512, but converts it
_INSTRUCTIONS = {
    torch.bfloat16: ("_is_mkldnn_bf16_supported", ("avx512_bf16", "amx_bf16", "avx_ne_convert")),
    torch.float16: ("_is_mkldnn_fp16_supported", ("avx512_fp16", "amx_fp16", "avx_ne_convert")),
}
SWISH, GELU_TANH = ACTIVATIONS = ("swish", ""), ("gelu", "tanh")  # torch's names for oneDNN's


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiplies input (..., I) by weight (O, I), adds bias (O,) or None -> (..., O). Float32 on a CPU; needs
    `available()`. `is_faster` tells when to call it."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


def gated(input: Tensor, gate: Tensor, up: Tensor, activation: str, variant: str) -> Tensor:
    """Computes activation(input gate^T) * (input up^T) in bfloat16 on a CPU. Each factor is rounded only once.

    input (..., I), gate and up (O, I) -> (..., O). `activation` and `variant` are one of `ACTIVATIONS`. It needs
    `gated_available()`.
    """
    gate_O = torch.ops.mkldnn._linear_pointwise(input, gate, None, activation, [], variant)
    product: Tensor = torch.ops.mkldnn._linear_pointwise.binary(input, gate_O, up, None, "mul")
    return product


def int8_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiplies left (M, I) by right (N, I), both int8 -> (M, N) int32, exactly. Needs `int8_matmul_available()`."""
    return torch._int_mm(left, right.t())


@cache
def available() -> bool:
    """Returns whether oneDNN's linear exists, is right, and is likely to be faster. Logs a warning once if it is wrong.

    It is a private op of torch. If a version lacks or changes it, the stock product is used.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    x, weight, bias = _random((5, 7), (3, 7), (3,))

    def right() -> bool:
        exact = x @ weight.t()
        whole = torch.allclose(linear(x, weight, bias), exact + bias, atol=1e-5)
        return whole and torch.allclose(linear(x, weight.t().contiguous().t(), None), exact, atol=1e-5)

    return _holds(right, "linear", "stock products, slower on AMD")


def is_faster(dtype: torch.dtype) -> bool:
    """Returns whether `linear` is to multiply factors of `dtype`, as float32, in place of torch's own product.

    Few processors multiply float16, and most laptops not even bfloat16. torch's own products then take 4 to 40 times as
    long as those in float32. Converting both factors first gives the same numbers up to the order of sums: each product
    is exact, sums are in float32, and the caller rounds them once.
    """
    return available() and dtype in FLOATS and not has_product(dtype)


@cache
def has_product(dtype: torch.dtype) -> bool:
    """Returns whether torch's own product of this type of 16 bits is one of oneDNN that this processor has instructions
    for. False for float32, which torch leaves to MKL."""
    op, instructions = _INSTRUCTIONS.get(dtype, ("", ()))
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    supported = getattr(torch.ops.mkldnn, op, None) if op else None
    return supported is not None and bool(supported()) and any(found.get(name, not found) for name in instructions)


@cache
def gated_available() -> bool:
    """Returns whether `gated` exists here and gives torch's numbers. Logs a warning once if it gives others."""
    if not available() or not has_product(torch.bfloat16):
        return False
    x, gate, up = (tensor.bfloat16() for tensor in _random((5, 8), (6, 8), (6, 8)))
    gate_O, up_O = x.float() @ gate.float().t(), x.float() @ up.float().t()
    exact = {SWISH: F.silu(gate_O) * up_O, GELU_TANH: F.gelu(gate_O, approximate="tanh") * up_O}

    def right() -> bool:
        found = {how: gated(x, gate, up, *how).float() for how in ACTIVATIONS}
        return all(torch.allclose(found[how], exact[how], rtol=0.02, atol=0.02) for how in ACTIVATIONS)

    return _holds(right, "gated product", "stock ones")


@cache
def int8_matmul_available() -> bool:
    """Returns whether this processor has int8 products, four times as fast as float32, and `int8_matmul` is right. Logs
    a warning once if it is wrong."""
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if not (available() and any(found.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))):
        return False
    x, y = (torch.tensor([-127, 127, 3], dtype=torch.int8, device="cpu").repeat(n, 99) for n in (5, 6))
    return _holds(lambda: bool((int8_matmul(x, y) == 99 * (2 * 127**2 + 9)).all()), "product of int8", "float32")


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    # explicit device and dtype: the first model may be made on `meta` or under another default type
    random = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=random, device="cpu", dtype=torch.float32) for shape in shapes]


def _holds(right: Callable[[], bool], what: str, instead: str) -> bool:
    """Returns whether an example is right. Logs a warning if it is not, or if torch's private op fails."""
    try:
        fault = None if right() else "gives other numbers here"
    except (AttributeError, RuntimeError, TypeError) as error:
        fault = f"is not usable ({error})"
    if fault is not None:
        logger.warning("oneDNN's %s %s: %s", what, fault, instead)
    return fault is None
