"""4-bit weights: in the layers that they belong in, computed as they decode, trainable, and never merged or saved."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from embedwright.cpu.lean_lora import LeanLinear
from embedwright.model.adapters import fourbit
from embedwright.model.embedder import Embedder

TEXTS = ["how do tides work?", "the moon", "a dog that does not mind, and a longer text behind it"]
Make = Callable[..., Embedder]


@pytest.fixture
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes", reason="package bitsandbytes is missing (the extra [qlora])")


@pytest.fixture
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


@pytest.mark.usefixtures("no_bitsandbytes")
def test_without_the_package_it_says_so(tiny_embedder: Make) -> None:
    assert "bitsandbytes is missing" in str(fourbit.missing())
    with pytest.raises(ImportError, match=r"bitsandbytes is missing .*embedwright\[qlora\]"):
        tiny_embedder("latent", four_bit=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_linear_layers_of_the_backbone_and_none_of_the_head(
    bnb: Any, family: str, dtype: str, tiny_embedder: Make
) -> None:
    assert fourbit.missing() is None
    model = tiny_embedder("latent", family, four_bit=True, dtype=dtype)
    backbone, head = model.network.backbone, model.network.head
    assert fourbit.in_four_bits(backbone) and not fourbit.in_four_bits(tiny_embedder("latent", family).network.backbone)
    assert linears(backbone).keys() == linears(tiny_embedder("latent", family).network.backbone).keys()
    for layer in linears(backbone).values():
        state: Any = layer.weight.quant_state
        assert type(layer) is bnb.nn.Linear4bit and layer.weight.dtype == torch.uint8
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, getattr(torch, dtype))
    assert linears(head) and not any(isinstance(layer, bnb.nn.Linear4bit) for layer in linears(head).values())
    others = [p for p in backbone.parameters() if p.dtype != torch.uint8]
    assert others and all(p.dtype == getattr(torch, dtype) for p in others)


def decoded(bnb: Any, model: Embedder, plain: Embedder) -> None:
    """Give `plain` the weights that `model` stands for."""
    for name, layer in linears(model.network.backbone).items():
        packed = layer.weight
        weight = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
        linears(plain.network.backbone)[name].weight.data = weight.float()


def gradients(model: Embedder) -> dict[str, Tensor]:
    model.network.train()
    (
        model.embed(model.tokenize(TEXTS)) * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    ).sum().backward()
    return {name: p.grad for name, p in model.network.named_parameters() if p.grad is not None}


def test_vectors_and_gradients_are_those_of_the_decoded_weights(bnb: Any, family: str, tiny_embedder: Make) -> None:
    model, plain = tiny_embedder("latent", family, four_bit=True), tiny_embedder("latent", family)
    as_read = plain.encode(TEXTS)
    decoded(bnb, model, plain)
    layers = len(linears(plain.network.backbone))
    np.testing.assert_allclose(model.encode(TEXTS), plain.encode(TEXTS), atol=1e-5)
    assert np.abs(model.encode(TEXTS) - as_read).max() > 1e-3
    for each in (model, plain):
        torch.manual_seed(0)
        each.add_lora(rank=4, alpha=8)
        for name, parameter in each.network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    # behind a forward without a gradient, which is what packs the weights anew where bitsandbytes is left to it
    np.testing.assert_allclose(model.encode(TEXTS), plain.encode(TEXTS), atol=1e-5)
    ours, theirs = gradients(model), gradients(plain)
    assert ours.keys() == theirs.keys() and sum("lora_" in name for name in ours) == 2 * layers
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def test_adapters_are_pefts_own_in_float32_and_the_rest_is_frozen(bnb: Any, tiny_embedder: Make) -> None:
    model = tiny_embedder("latent", four_bit=True, dtype="bfloat16").add_lora(rank=4, alpha=8)
    layers = [part for part in model.network.modules() if isinstance(part, LoraLayer)]
    assert len(layers) == 3 * 7 and not any(isinstance(layer, LeanLinear) for layer in layers)
    assert all(type(layer.get_base_layer()) is bnb.nn.Linear4bit for layer in layers)
    for name, parameter in model.network.named_parameters():
        trains = "lora_" in name or name.startswith("head.")
        assert parameter.requires_grad == trains, name
        assert parameter.dtype == torch.float32 or not trains, name


def test_it_is_neither_merged_nor_saved(bnb: Any, tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder("latent", four_bit=True)
    with pytest.raises(ValueError, match="cannot save: the weights of this model are in 4 bits"):
        model.save(tmp_path / "plain")
    model.add_lora(rank=4, alpha=8)
    before = model.encode(TEXTS)
    with pytest.raises(ValueError, match="cannot merge: the weights of this model are in 4 bits"):
        model.merge()
    with pytest.raises(ValueError, match="cannot save: the weights of this model are in 4 bits"):
        model.save(tmp_path / "adapters")
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(model.encode(TEXTS), before)
