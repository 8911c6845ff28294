"""A processor that cannot multiply bfloat16, whatever this one can."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from embedwright.cpu import onednn


@pytest.fixture
def multiplied_in(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The types of the factors of each product that oneDNN is asked for. `is_faster` sees such a processor."""
    if not onednn.available():  # tries `linear`, once in a process
        pytest.skip("oneDNN's linear is not there on this machine")
    types: list[torch.dtype] = []
    linear = onednn.linear

    def recorded(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert input.dtype == weight.dtype
        types.append(input.dtype)
        return linear(input, weight, bias)

    monkeypatch.setattr(onednn, "has_product", lambda _: False)
    monkeypatch.setattr(onednn, "linear", recorded)
    return types
