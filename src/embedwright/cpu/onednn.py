"""oneDNN's matrix product on CPUs: torch's float32 default, MKL, runs slow code on AMD.

oneDNN takes the plain weight at 92 % and more of the speed of a reordered one from 256 rows on
(`benchmarks/linears.py`), so nothing is prepared.
"""

from __future__ import annotations

import logging
import platform
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

SWISH, GELU_TANH = ACTIVATIONS = ("swish", ""), ("gelu", "tanh")  # as torch names oneDNN's


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input (..., I), weight (O, I), bias (O,) or None -> (..., O), float32 on a CPU. Only where `available()`."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


def gated(input: Tensor, gate: Tensor, up: Tensor, activation: str, variant: str) -> Tensor:
    """activation(input gate^T) * (input up^T), rounded once each and not per step; bfloat16 on a CPU.

    input (..., I), gate and up (O, I) -> (..., O). `activation` and `variant` are one of `ACTIVATIONS`. Only where
    `gated_available()`.
    """
    gate_O = torch.ops.mkldnn._linear_pointwise(input, gate, None, activation, [], variant)
    product: Tensor = torch.ops.mkldnn._linear_pointwise.binary(input, gate_O, up, None, "mul")
    return product


def whole(left: Tensor, right: Tensor) -> Tensor:
    """int32 (M, N): left (M, I) times right (N, I), of int8, in whole numbers. Only where `whole_available()`."""
    return torch._int_mm(left, right.t())


@cache
def whole_available() -> bool:
    """Whether this processor multiplies int8 by itself, four times as fast as float32, and `whole` is right on it; a
    message once where it is there and wrong."""
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if not (available() and any(found.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))):
        return False
    x, y = (torch.tensor([-127, 127, 3], dtype=torch.int8, device="cpu").repeat(n, 99) for n in (5, 6))
    try:
        found_MN = whole(x, y)
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.warning("oneDNN's product of int8 is not usable (%s): float32", error)
        return False
    right = bool((found_MN == 99 * (2 * 127**2 + 9)).all())
    if not right:
        logger.warning("oneDNN's product of int8 gives other numbers here: float32")
    return right


@cache
def gated_available() -> bool:
    """Whether `gated` is there and right on this machine; a message once where it is there and wrong."""
    if not available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    random = torch.Generator().manual_seed(0)
    x, gate, up = (torch.randn(n, 8, generator=random, device="cpu", dtype=torch.float32).bfloat16() for n in (5, 6, 6))
    gate_O, up_O = x.float() @ gate.float().t(), x.float() @ up.float().t()
    exact = {"swish": F.silu(gate_O) * up_O, "gelu": F.gelu(gate_O, approximate="tanh") * up_O}
    try:
        found = {name: gated(x, gate, up, name, variant).float() for name, variant in ACTIVATIONS}
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.warning("oneDNN's fused products are not usable (%s): stock ones", error)
        return False
    right = all(torch.allclose(found[name], exact[name], rtol=0.02, atol=0.02) for name in exact)
    if not right:
        logger.warning("oneDNN's fused products give other numbers here: stock ones")
    return right


@cache
def available() -> bool:
    """Whether oneDNN's linear is there, does what it should, and is likely to win; a message once where it is not.

    It is a private op of torch: a version that lacks or changes it falls back to the stock product.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    random = torch.Generator().manual_seed(0)
    # said in full: the first model may be made without memory, or under another default type
    x, weight, bias = (
        torch.randn(*shape, generator=random, device="cpu", dtype=torch.float32) for shape in ((5, 7), (3, 7), (3,))
    )
    try:
        right = torch.allclose(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-5)
        right = right and torch.allclose(linear(x, weight.t().contiguous().t(), None), x @ weight.t(), atol=1e-5)
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.warning("oneDNN's linear is not usable (%s): stock products, slower on AMD", error)
        return False
    if not right:
        logger.warning("oneDNN's linear gives other numbers here: stock products, slower on AMD")
    return right
