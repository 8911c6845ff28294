"""oneDNN's matrix product on CPUs: torch's float32 default, MKL, runs its slow code on AMD (2.3x lost there).

oneDNN takes the plain weight at 95 % and more of the speed of a reordered one from 256 rows on, so nothing is prepared.
"""

from __future__ import annotations

import logging
import platform
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input (..., I), weight (O, I), bias (O,) or None -> (..., O), float32 on a CPU. Only where `available()`."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


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
