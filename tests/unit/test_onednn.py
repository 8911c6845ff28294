"""Products through oneDNN, and what happens on a machine that has none. Gradients: `model/test_linears.py`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from embedwright import onednn
from embedwright.onednn import available, linear


@pytest.fixture
def forgotten() -> Iterator[None]:
    available.cache_clear()
    yield
    available.cache_clear()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_the_product_is_right(rows: int, bias: bool) -> None:
    if not available():
        pytest.skip("oneDNN's linear is not there on this machine")
    x, weight, added = torch.randn(rows, 24), torch.randn(40, 24), torch.randn(40)
    exact = x.double() @ weight.double().t() + (added if bias else 0)
    torch.testing.assert_close(linear(x, weight, added if bias else None).double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fault", ["lacking", "other numbers", "other machine"])
def test_where_it_is_not_usable_that_is_said_once(
    fault: str, forgotten: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lacking(*_: Any) -> Any:
        raise AttributeError("no such op")

    if fault == "other machine":
        monkeypatch.setattr(onednn.platform, "machine", lambda: "arm64")
    else:
        monkeypatch.setattr(onednn, "linear", lacking if fault == "lacking" else lambda x, w, _: 1.01 * x @ w.t())
    with caplog.at_level(logging.WARNING):
        assert not available() and not available()
    assert len(caplog.records) == (0 if fault == "other machine" else 1)
