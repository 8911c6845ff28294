"""Channels are scored as ten lines on transformers' own model score them; the lowest go, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stock_layers import TEXTS, stock
from transformers import AutoModel

from embedwright.compress.depth import cut_layers
from embedwright.compress.states import Texts
from embedwright.compress.width import channels, choose, cut_channels, gated_blocks, scores, width_step
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder

READ = Texts("four texts", lambda: TEXTS)


def stock_scores(folder: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The scores by magnitude and by Wanda, of each layer. Runs no line of ours."""
    (model, tokenizer), squares = stock(folder), {}
    for number, layer in enumerate(model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, n=number: squares.__setitem__(n, squares.get(n, 0) + args[0][0].double().pow(2).sum(0))
        )
    with torch.no_grad():
        for text in TEXTS:
            model(**tokenizer(text, return_tensors="pt"))
    magnitude, wanda = [], []
    for number, layer in enumerate(model.layers):
        down = layer.mlp.down_proj.weight.detach().abs().double()  # (hidden, channels)
        if hasattr(layer.mlp, "gate_up_proj"):
            gate, up = layer.mlp.gate_up_proj.weight.detach().abs().double().chunk(2)
        else:
            gate, up = (part.weight.detach().abs().double() for part in (layer.mlp.gate_proj, layer.mlp.up_proj))
        magnitude.append(gate.sum(1) + up.sum(1) + down.sum(0))
        wanda.append((down * squares[number].sqrt()).sum(0))
    return magnitude, wanda


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_scores_and_the_channels_that_go(tiny_embedder: Callable[..., Embedder], family: str, tmp_path: Path) -> None:
    model = tiny_embedder("mean", family)
    model.save(tmp_path / "model")
    for by, expected in zip(("magnitude", "wanda"), stock_scores(tmp_path / "model"), strict=True):
        found = scores(model, TEXTS, by)  # type: ignore[arg-type]
        kept = choose(model, TEXTS, 0.7, by)  # type: ignore[arg-type]
        for ours, own, kept_K in zip(found, expected, kept, strict=True):
            torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-6)
            gone = set(range(48)) - set(kept_K.tolist())
            assert gone == set(np.argsort(own.numpy())[:16].tolist())  # the least of all, by brute force
            assert kept_K.tolist() == sorted(kept_K.tolist())


def test_what_is_left_of_a_family_computes_what_the_whole_does_without_the_rest(
    tiny_embedder: Callable[..., Embedder], family: str, tmp_path: Path
) -> None:
    """Layer and channels that are cut are as ones that do nothing, after saving too. The folder is a stock one."""
    model, whole = tiny_embedder("mean", family), tiny_embedder("mean", family)
    layer: Any = whole.network.backbone.layers[1]
    for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
        torch.nn.init.zeros_(part.weight)
    kept = [torch.arange(number, 48)[:32] for number in (0, 5, 16)]  # other channels in each layer
    for block, kept_K in zip(gated_blocks(whole.network), kept, strict=True):
        for channel in set(range(48)) - set(kept_K.tolist()):
            block.down.weight.data[:, channel] = 0
    cut_layers(model.network, [1])
    cut_channels(model, kept[::2])
    model.save(tmp_path / "cut")
    np.testing.assert_allclose(Embedder.load(tmp_path / "cut").encode(TEXTS), whole.encode(TEXTS), atol=1e-5)
    opened = AutoModel.from_pretrained(tmp_path / "cut", trust_remote_code=False)
    assert opened.config.intermediate_size == 32 and opened.layers[0].mlp.down_proj.weight.shape == (32, 32)


@pytest.mark.parametrize(("by", "pooling"), [("wanda", "mean"), ("magnitude", "latent")])
def test_channels_that_do_nothing_go_and_nothing_changes(
    tiny_embedder: Callable[..., Embedder], by: Any, pooling: str, tmp_path: Path
) -> None:
    model = tiny_embedder(pooling, "qwen2")
    idle = torch.arange(1, 48, 3)  # 16 of 48
    for block in gated_blocks(model.network):
        block.down.weight.data[:, idle] = 0
        for part in block.up:
            part.weight.data[idle] = 0
    before = model.encode(TEXTS)
    model.save(tmp_path / "model")
    width_step(2 / 3, by, READ).make(str(tmp_path / "model"), tmp_path / "pruned")
    pruned = Embedder.load(tmp_path / "pruned")
    np.testing.assert_allclose(pruned.encode(TEXTS), before, atol=1e-5)
    texts = {"texts": "four texts"} if by == "wanda" else {}
    told = {"step": "width", "of": "model", "kept": "32 of 48 channels a layer", "by": by, **texts}
    assert pruned.network.config.history == [told]


def test_a_layout_that_is_not_what_it_seems_is_found(tiny_embedder: Callable[..., Embedder]) -> None:
    """A block that mixes its channels: removing some that are zero changes vectors, and the model is given up."""
    model = tiny_embedder("mean", "llama")
    mlp: Any = model.network.backbone.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj((mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).roll(1, -1))
    with pytest.raises(RuntimeError, match="moved vectors"):
        cut_channels(model, [torch.arange(0, 32)] * 3)


def test_shares_and_models_that_cannot_be_pruned_are_refused(tiny_embedder: Callable[..., Embedder]) -> None:
    assert channels(1536, 0.75) == 1152 and channels(48, 0.5) == 32
    for size, share in ((48, 0.1), (1536, 0.99), (48, -1.0), (48, 1.0), (48, float("nan"))):
        with pytest.raises(InputError, match=r"--width"):
            channels(size, share)
    model, other = tiny_embedder("mean"), "Magnitude"
    for ask in (lambda: width_step(0.5, other, READ), lambda: choose(model, TEXTS, 0.5, other)):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="by='Magnitude' is none of magnitude, wanda"):
            ask()
    backbone: Any = model.network.backbone
    backbone.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(InputError, match=r"layer 2 of this 'llama' model has no gated block of linear layers"):
        gated_blocks(model.network)
