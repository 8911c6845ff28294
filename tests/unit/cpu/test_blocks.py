"""Norms and attention blocks in their faster form against the stock ones, and when they are the stock ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from embedwright.cpu import kernels
from embedwright.cpu.accelerate import accelerate_unproven
from embedwright.model import attention
from embedwright.model.embedder import Embedder
from embedwright.model.verify.probe import ProbeError, check

NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, Phi3RMSNorm, GemmaRMSNorm, Gemma3RMSNorm)
DIM = 32  # of a head: what the kernels take
TEXTS = ["tides", "a longer text, which says nothing of note", " ".join(["many words"] * 40)]


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    if not kernels.available():
        pytest.skip(f"kernels {kernels.described()}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run, by name."""
    names: list[str] = []
    run = kernels._run
    monkeypatch.setattr(kernels, "_run", lambda name, *members: (names.append(name), run(name, *members))[1])
    return names


@pytest.fixture
def model(tiny_decoder: Callable[..., Path], family: str) -> Embedder:
    return Embedder.from_decoder(tiny_decoder(family, head_dim=DIM), pooling="mean")


def norm(kind: Any, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A stock norm for inference, and its copy in the faster form."""
    torch.manual_seed(0)
    stock = kind(96, eps=1e-3)
    nn.init.normal_(stock.weight)
    stock = stock.to(dtype).eval()
    fast = copy.deepcopy(stock)
    accelerate_unproven(fast)
    return stock, fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: kind.__name__)
def test_a_norm_is_rounded_as_the_stock_one(kind: Any, dtype: torch.dtype, calls: list[str]) -> None:
    stock, fast = norm(kind, dtype)
    x = torch.randn(3, 50, 96).to(dtype)
    with torch.inference_mode():
        found, expected = fast(x), stock(x)
    assert calls == ["norm"] and type(fast).__name__ == kind.__name__
    assert found.dtype == dtype and found.shape == x.shape
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    else:  # but for a sum that falls on the other side of where two roundings meet
        assert (found != expected).float().mean() < 1e-3
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("case", ["gradients", "training", "autocast", "mixed", "strides", "width", "half", "empty"])
def test_a_norm_is_the_stock_one_otherwise(case: str, calls: list[str]) -> None:
    stock, fast = norm(LlamaRMSNorm, torch.float32)
    x = torch.randn(0 if case == "empty" else 5, 96)
    if case == "training":
        fast.train()
    if case == "mixed":
        x = x.bfloat16()
    if case == "half":
        stock, fast, x = stock.half(), fast.half(), x.half()
    if case == "strides":
        x = x.t().contiguous().t()
    if case == "width":
        stock.weight = fast.weight = nn.Parameter(torch.ones(90))
        x = x[:, :90].contiguous()
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", torch.bfloat16, case == "autocast"):
        assert torch.equal(fast(x), stock(x))
    assert calls == []


def test_every_family_runs_through_them_and_gives_the_stock_vectors(
    model: Embedder, family: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = model.encode(TEXTS)
    layers = model.network.backbone.config.num_hidden_layers
    assert calls.count("attention") == layers
    assert calls.count("rotary") == (0 if family in ("phi3", "cohere2") else layers)
    assert calls.count("norm") >= (0 if family == "cohere2" else 2 * layers + 1)
    monkeypatch.setattr(kernels, "available", lambda: False)
    calls.clear()
    torch.testing.assert_close(torch.tensor(fast), torch.tensor(model.encode(TEXTS)), rtol=0, atol=1e-5)
    assert calls == []


def test_in_bfloat16_no_family_is_further_from_float32_than_stock(
    model: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.network.bfloat16()
    fast = model.encode(TEXTS)
    monkeypatch.setattr(kernels, "available", lambda: False)
    stock = model.encode(TEXTS)
    model.network.float()
    exact = torch.tensor(model.encode(TEXTS))
    off_fast, off_stock = ((torch.tensor(x) - exact).norm() for x in (fast, stock))
    assert 0 < off_fast < 1.3 * off_stock


@pytest.mark.parametrize("mode", ["training with gradients", "training without", "gradients"])
def test_no_kernel_takes_part_in_training(mode: str, tiny_decoder: Callable[..., Path], calls: list[str]) -> None:
    model = Embedder.from_decoder(tiny_decoder("llama", head_dim=DIM), pooling="mean")
    model.network.train(mode.startswith("training"))
    packed = model.tokenize(TEXTS)
    calls.clear()
    with torch.set_grad_enabled(mode != "training without"):
        vectors: Tensor = model.embed(packed)
    assert calls == [] and vectors.requires_grad == (mode != "training without")


def test_the_probe_sees_the_masks_that_the_kernels_use(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    causal = model.network.backbone.config.is_causal
    right = attention.flash_window
    monkeypatch.setattr(attention, "flash_window", lambda _, window: right(not causal, window))
    with pytest.raises(ProbeError, match="causal"):
        check(model.network)


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "q_norm"])
def test_what_a_hook_was_handed_is_not_written_over(
    part: str, tiny_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Embedder.from_decoder(tiny_decoder("qwen3", head_dim=DIM), pooling="mean")
    plain = model.encode(TEXTS)
    rotated: list[Tensor] = []
    rotate = kernels.rotate
    monkeypatch.setattr(kernels, "rotate", lambda q, *others: (rotated.append(q), rotate(q, *others)))
    handed: list[tuple[Tensor, Tensor]] = []
    listened = next(module for name, module in model.network.named_modules() if name.endswith(part))
    listened.register_forward_hook(lambda *call: handed.append((call[2], call[2].clone())))
    np.testing.assert_allclose(model.encode(TEXTS), plain, atol=1e-6)
    assert handed and all(torch.equal(*pair) for pair in handed)
    assert len(rotated) == model.network.backbone.config.num_hidden_layers - 1  # in the others


def test_without_kernels_the_network_stays_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert type(norm(LlamaRMSNorm, torch.float32)[1]) is LlamaRMSNorm
