"""Models that lie about their attention, each made on purpose: the probe has to catch them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from embedwright.model import attention
from embedwright.model.backbone import decoder_config, load_backbone
from embedwright.model.embedder import Embedder
from embedwright.model.network import EmbedwrightModel
from embedwright.model.verify.probe import ProbeError, check, probe
from embedwright.packing import PackedTexts


@pytest.fixture
def network(tiny_embedder: Callable[..., Embedder]) -> EmbedwrightModel:
    return tiny_embedder("mean").network


@pytest.fixture
def causal(tiny_decoder: Callable[..., Path]) -> Any:
    folder = str(tiny_decoder("llama"))
    return load_backbone(folder, decoder_config(folder, attention="causal"), torch.float32)


def with_claim(backbone: Any, is_causal: bool) -> Any:
    """Another config on the outside alone: the layers keep theirs."""
    backbone.config = copy.deepcopy(backbone.config)
    backbone.config.is_causal = is_causal
    return backbone


def test_honest_models_pass(family: str, tiny_embedder: Callable[..., Embedder]) -> None:
    both_ways = check(tiny_embedder("mean", family).network)
    one_way = check(tiny_embedder("last", family, attention="causal").network)
    assert both_ways.later_token > 0.01 and one_way.later_token == 0
    assert both_ways.batch_mates < 1e-5 and one_way.batch_mates < 1e-5


def test_half_precision_passes(tiny_embedder: Callable[..., Embedder]) -> None:
    assert check(tiny_embedder("mean", dtype="bfloat16").network).tolerance == 0.1


def test_weights_that_a_high_rate_has_ruined_are_not_called_causal_alone(
    tiny_embedder: Callable[..., Embedder],
) -> None:
    network = tiny_embedder("mean").network
    for layer in network.backbone.layers:
        layer.self_attn.o_proj.weight.data.mul_(1e-5)  # states say next to nothing of other tokens
    seen = probe(network)
    assert 0 < seen.later_token < seen.tolerance and not seen.wrong_masks
    with pytest.raises(ProbeError, match=r"or training has collapsed \(try a lower rate\)"):
        check(network)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_of_a_deep_model_raises_no_alarm(smollm2_folder: Path, dtype: str) -> None:
    """Thirty layers of rounding, on a token with an outsized state: 0.15 for one token in float16."""
    found = check(Embedder.from_decoder(smollm2_folder, pooling="mean", dtype=dtype).network)
    print(dtype, found)
    assert found.batch_mates < 0.05 < 0.5 < found.later_token


def test_a_causal_model_that_claims_to_be_bidirectional(network: EmbedwrightModel, causal: Any) -> None:
    network.backbone = with_claim(causal, is_causal=False)
    with pytest.raises(ProbeError, match="attention is causal"):
        check(network)


def test_a_bidirectional_model_that_claims_to_be_causal(network: EmbedwrightModel) -> None:
    with_claim(network.backbone, is_causal=True)
    with pytest.raises(ProbeError, match="attention is not causal"):
        check(network)


@pytest.mark.parametrize("implementation", [attention.PACKED, "eager"])
def test_an_override_on_the_lora_wrapper_leaves_the_model_causal(
    network: EmbedwrightModel, causal: Any, implementation: str
) -> None:
    wrapped = get_peft_model(causal, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    network.backbone = with_claim(wrapped, is_causal=False)
    if implementation != attention.PACKED:
        network.attend_by(implementation)
    with pytest.raises(ProbeError, match="attention is causal"):
        check(network)


def test_attention_that_ignores_boundaries(network: EmbedwrightModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def over_the_whole_row(q: Tensor, k: Tensor, v: Tensor, packed: PackedTexts, *rest: Any) -> Tensor:
        whole = replace(packed, runs=((1, q.shape[1]),), cu_seqlens=packed.cu_seqlens[[0, -1]])
        return attend(q, k, v, whole, *rest)

    attend = attention.attend
    monkeypatch.setattr(attention, "attend", over_the_whole_row)
    with pytest.raises(ProbeError, match="leak into each other"):
        check(network)


def test_positions_that_run_through_the_whole_row(network: EmbedwrightModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions are relative, so that these do no harm; learned ones would. The probe says which it is."""
    hidden = type(network).hidden

    def running_on(self: EmbedwrightModel, packed: PackedTexts) -> Tensor:
        return hidden(self, replace(packed, position_T=torch.arange(len(packed.ids_T))))

    monkeypatch.setattr(type(network), "hidden", running_on)
    assert check(network).batch_mates < 1e-4


def test_weights_that_are_not_finite(network: EmbedwrightModel) -> None:
    torch.nn.init.constant_(network.backbone.layers[0].mlp.up_proj.weight, float("nan"))
    with pytest.raises(ProbeError):
        check(network)


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_put_back_and_no_gradient_is_left(network: EmbedwrightModel, training: bool) -> None:
    network.train(training)
    first, again = probe(network), probe(network)
    assert first == again and network.training == network.backbone.training == training
    assert all(p.grad is None for p in network.parameters())


def test_many_threads_may_load_and_encode_at_once(tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    made = tiny_embedder("mean")
    made.save(tmp_path / "model")
    expected = made.encode(["tides", "the moon and the sun"])
    registered = dict(ALL_ATTENTION_FUNCTIONS)

    def load_and_encode(_: int) -> Any:
        return Embedder.load(tmp_path / "model").encode(["tides", "the moon and the sun"])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(load_and_encode, range(24)))
    for vectors in found:
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert dict(ALL_ATTENTION_FUNCTIONS) == registered  # and nothing goes on listening


def test_no_tensor_outlives_the_probe(network: EmbedwrightModel) -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())

    check(network)
    before = alive()
    check(network)
    assert alive() == before
