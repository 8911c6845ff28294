"""Layers are chosen as ten lines on transformers' own states choose them, and are cut without another change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stock_layers import TEXTS, stock_states
from transformers import AutoModel

from embedwright.compress.depth import choose, cut_layers, distances, layers_step
from embedwright.compress.states import Texts
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder

READ = Texts("four texts", lambda: TEXTS)


def cosines(states: Sequence[Sequence[torch.Tensor]], start: int, end: int) -> torch.Tensor:
    """Of all tokens of all texts: how alike the states in front of two layers are. Runs no line of ours."""
    a, b = (torch.cat([text[at] for text in states]).double() for at in (start, end))
    lengths = (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)  # the embedding of a pad token is zero
    return ((a * b).sum(1) / lengths).clamp(-1, 1)


def switch_off(model: Embedder, number: int) -> None:
    """Makes a layer the identity: its two blocks add nothing to the residual stream."""
    layer: Any = model.network.backbone.layers[number]
    for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
        torch.nn.init.zeros_(part.weight)


def test_distances_are_those_of_the_papers(tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    model = tiny_embedder("mean")
    model.save(tmp_path / "model")
    states = [stock_states(tmp_path / "model", text) for text in TEXTS]
    for span in (1, 2):
        angles = [float((torch.acos(cosines(states, at, at + span)) / math.pi).mean()) for at in range(3 - span + 1)]
        np.testing.assert_allclose(distances(model, TEXTS, span, "angular"), angles, rtol=1e-4)
    influence = [float((1 - cosines(states, at, at + 1)).mean()) for at in range(3)]
    np.testing.assert_allclose(distances(model, TEXTS, 1, "influence"), influence, rtol=1e-4)
    for keep in (1, 2):
        angular = [float(torch.acos(cosines(states, at, at + 3 - keep)).mean()) for at in range(keep + 1)]
        first = int(np.argmin(angular))
        assert choose(model, TEXTS, keep, "angular").removed == [*range(first, first + 3 - keep)]
        best = min(combinations(range(3), 3 - keep), key=lambda layers: sum(influence[layer] for layer in layers))
        found = choose(model, TEXTS, keep, "influence")
        assert found.removed == [*best] and found.distance == pytest.approx(max(influence[n] for n in best), rel=1e-4)


@pytest.mark.parametrize(("family", "by"), [("llama", "angular"), ("gemma3", "influence")])
def test_a_layer_that_does_nothing_goes_and_nothing_changes(
    tiny_embedder: Callable[..., Embedder], family: str, by: Any, tmp_path: Path
) -> None:
    """The middle layer of three does nothing, is found, and its removal changes no vector."""
    model = tiny_embedder("mean", family)
    switch_off(model, 1)
    before = model.encode(TEXTS)
    model.save(tmp_path / "model")
    layers_step(2, by, READ).make(str(tmp_path / "model"), tmp_path / "pruned")
    pruned = Embedder.load(tmp_path / "pruned")
    (did,) = pruned.network.config.history
    assert did == {
        "step": "layers",
        "of": "model",
        "kept": "2 of 3",
        "removed": "2",
        "by": by,
        "distance": pytest.approx(0, abs=1e-6),
        "texts": "four texts",
    }
    np.testing.assert_allclose(pruned.encode(TEXTS), before, atol=1e-5)


@pytest.mark.parametrize(("family", "removed"), [("gemma3", 0)])
def test_the_config_loses_what_it_said_of_the_layer(
    tiny_embedder: Callable[..., Embedder], family: str, removed: int, tmp_path: Path
) -> None:
    """A layer's kind (windows, rotary positions) stays with the layer, in memory, on disk, and in stock transformers.

    The reference is the whole model in which that layer does nothing.
    """
    model = tiny_embedder("mean", family)
    whole = tiny_embedder("mean", family)
    switch_off(whole, removed)
    cut_layers(model.network, [removed])
    np.testing.assert_allclose(model.encode(TEXTS), whole.encode(TEXTS), atol=1e-5)
    model.save(tmp_path / "cut")
    np.testing.assert_allclose(Embedder.load(tmp_path / "cut").encode(TEXTS), whole.encode(TEXTS), atol=1e-5)
    stock = AutoModel.from_pretrained(tmp_path / "cut", trust_remote_code=False)
    assert stock.config.num_hidden_layers == len(stock.layers) == 2
    assert [layer.self_attn.layer_idx for layer in model.network.backbone.layers] == [0, 1]


@pytest.mark.parametrize("pooling", ["latent", "last"])
def test_a_pooling_block_stays_as_it_is(tiny_embedder: Callable[..., Embedder], pooling: str, tmp_path: Path) -> None:
    model = tiny_embedder(pooling, "qwen3")
    switch_off(model, 2)
    before = model.encode(TEXTS)
    model.save(tmp_path / "model", "bfloat16")
    stored = Embedder.load(tmp_path / "model")
    layers_step(2, "angular", READ).make(str(tmp_path / "model"), tmp_path / "pruned")
    pruned = Embedder.load(tmp_path / "pruned")
    assert pruned.network.backbone.dtype == torch.bfloat16 and pruned.network.config.history[0]["removed"] == "3"
    for (name, weight), (_, kept) in zip(
        stored.network.head.named_parameters(), pruned.network.head.named_parameters(), strict=True
    ):
        assert torch.equal(weight, kept), name
    np.testing.assert_allclose(Embedder.load(tmp_path / "pruned", dtype="float32").encode(TEXTS), before, atol=0.05)


def test_none_and_all_layers_are_refused(tiny_embedder: Callable[..., Embedder]) -> None:
    for keep in (0, 3, 9):
        with pytest.raises(InputError, match=f"--layers {keep}: the model has 3 layers; keep at least 1 and"):
            choose(tiny_embedder("mean"), TEXTS, keep, "angular")


def test_a_misspelt_measure_is_not_taken_for_the_other(tiny_embedder: Callable[..., Embedder]) -> None:
    other: Any = "Angular"
    for ask in (lambda: layers_step(2, other, READ), lambda: choose(tiny_embedder("mean"), TEXTS, 2, other)):
        with pytest.raises(InputError, match="by='Angular' is none of angular, influence"):
            ask()
