"""oneDNN products against torch's own, in float64: outputs to 1e-5 and gradients to 1e-4, relative."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from embedwright import onednn
from embedwright.model.embedder import Embedder
from embedwright.model.linears import OneDnnLinear, speed_up
from embedwright.onednn import available


@pytest.fixture
def needs_onednn() -> None:
    if not available():
        pytest.skip("oneDNN's linear is not there on this machine")


def made(bias: bool) -> OneDnnLinear:
    layer = nn.Linear(24, 40, bias=bias)
    speed_up(layer)
    assert isinstance(layer, OneDnnLinear)
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24,), (7, 24), (1, 9, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("trains", [(True, True), (True, False), (False, True)])
def test_outputs_and_gradients_are_right(
    needs_onednn: None, shape: tuple[int, ...], bias: bool, trains: tuple[bool, bool]
) -> None:
    layer, x = made(bias), torch.randn(*shape, requires_grad=trains[0])
    for parameter in layer.parameters():
        parameter.requires_grad = trains[1]
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, layer.weight)]
    exact_bias = layer.bias.detach().double().requires_grad_(trains[1]) if bias else None
    out, right = layer(x), F.linear(exact[0], exact[1], exact_bias)
    torch.testing.assert_close(out.double(), right, rtol=0, atol=1e-5)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    right.backward(upstream.double())
    pairs = [(x, exact[0]), (layer.weight, exact[1]), *([(layer.bias, exact_bias)] if bias else [])]
    for got, expected in pairs:
        assert (got.grad is None) == (expected.grad is None)
        if got.grad is not None:
            error = (got.grad.double() - expected.grad).norm() / expected.grad.norm()
            assert error < 1e-6


def test_a_gradient_that_is_not_contiguous(needs_onednn: None) -> None:
    layer, x = made(False), torch.randn(6, 24, requires_grad=True)
    layer(x).t().contiguous().t().sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(6, -1), rtol=0, atol=1e-5)
    x.grad = None
    layer(x)[::2].sum().backward()
    assert x.grad is not None and not x.grad[1].any() and x.grad[0].any()


def test_an_input_that_is_not_contiguous(needs_onednn: None) -> None:
    layer, x = made(True), torch.randn(24, 7)
    torch.testing.assert_close(layer(x.t()), F.linear(x.t(), layer.weight, layer.bias), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["bf16", "autocast", "empty"])
def test_all_else_is_stock(needs_onednn: None, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("oneDNN was asked")

    monkeypatch.setattr(onednn, "linear", refuse)
    layer, x = made(True), torch.randn(5, 24)
    stock = nn.Linear(24, 40)
    stock.load_state_dict(layer.state_dict())
    if case == "bf16":
        layer, stock, x = layer.bfloat16(), stock.bfloat16(), x.bfloat16()
    x = x[:0] if case == "empty" else x
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        got, expected = layer(x), stock(x)
    assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_frozen_weights_keep_no_input(needs_onednn: None) -> None:
    """What LoRA rests on: a frozen layer stores its weight for backward, which is there anyway, and nothing else."""
    layer = made(False)
    layer.weight.requires_grad = False
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(50, 24, requires_grad=True))
    assert [t.shape for t in kept] == [layer.weight.shape]


def test_only_plain_linears_change_and_nothing_is_stored(needs_onednn: None) -> None:
    class Own(nn.Linear):
        pass

    network = nn.Sequential(nn.Linear(3, 4), Own(4, 5), nn.LayerNorm(5))
    before = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    speed_up(network)
    assert [type(m) for m in network] == [OneDnnLinear, Own, nn.LayerNorm]
    assert {name: tensor.data_ptr() for name, tensor in network.state_dict().items()} == before


def test_a_machine_without_it_stays_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "available", lambda: False)
    layer = nn.Linear(3, 4)
    speed_up(layer)
    assert type(layer) is nn.Linear


def test_every_model_has_them_and_gives_the_stock_vectors(
    needs_onednn: None, tiny_embedder: Callable[..., Embedder], family: str, tmp_path: Path
) -> None:
    model = tiny_embedder("latent", family)
    swapped = [m for m in model.network.modules() if isinstance(m, nn.Linear)]
    assert swapped and {type(m) for m in swapped} == {OneDnnLinear}
    texts = ["tides", "a longer text, which says nothing of note"]
    fast = model.encode(texts)
    for module in swapped:
        module.__class__ = nn.Linear
    torch.testing.assert_close(torch.tensor(fast), torch.tensor(model.encode(texts)), rtol=0, atol=1e-5)
