"""LoRA on, at work, off: every family against the plain model, and every way in which adapters silently do nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as lora_layer
from torch import Tensor

from embedwright.model.adapters import lora as adapter
from embedwright.model.adapters.lora import has_lora, idle_adapters
from embedwright.model.embedder import Embedder
from embedwright.model.verify import probe
from embedwright.model.verify.probe import ProbeError, check, lora_faults

TEXTS = ["how do tides work?", "the moon", "a dog that does not mind, and a longer text behind it"]
Make = Callable[..., Embedder]


def with_adapters(model: Embedder, std: float = 0.2) -> Embedder:
    """Adapters as training might leave them."""
    torch.manual_seed(0)
    model.add_lora(rank=4, alpha=8)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def layers(model: Embedder) -> list[Any]:
    return [module for module in model.network.modules() if isinstance(module, LoraLayer)]


def weights(model: Embedder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


# ---- added


def test_adapters_and_pooling_block_train_and_nothing_else(family: str, tiny_embedder: Make) -> None:
    model = tiny_embedder("latent", family)
    network, before = model.network, model.encode(TEXTS)
    linear = [f"backbone.{n}" for n, m in network.backbone.named_modules() if isinstance(m, torch.nn.Linear)]
    head = {f"head.{name}" for name, _ in network.head.named_parameters()}
    assert not has_lora(network.backbone)
    assert model.add_lora(rank=4, alpha=8) is model and has_lora(network.backbone)
    trainable = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trainable == head | {f"{name}.lora_{m}.default.weight" for name in linear for m in "AB"}
    np.testing.assert_array_equal(model.encode(TEXTS), before)

    assert set(idle_adapters(network)) == {name for name in trainable if "lora_B" in name}
    texts = model.tokenize(TEXTS)
    (model.embed(texts) * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == trainable
    torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1).step()
    assert idle_adapters(network) == []
    assert np.abs(model.encode(TEXTS) - before).max() > 1e-3
    torch.nn.init.zeros_(network.get_submodule(linear[0]).lora_B.default.weight)
    assert idle_adapters(network) == [f"{linear[0]}.lora_B.default.weight"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_trains_is_float32(dtype: str, tiny_embedder: Make, tmp_path: Path) -> None:
    tiny_embedder("latent").save(tmp_path / "saved")
    model = Embedder.load(tmp_path / "saved", dtype=dtype)
    model.network.requires_grad_(False)  # as a trained model comes back
    with_adapters(model, std=0.01)
    for name, parameter in model.network.named_parameters():
        trains = "lora_" in name or name.startswith("head.")
        assert parameter.requires_grad == trains
        assert parameter.dtype == (torch.float32 if trains else getattr(torch, dtype))
    assert np.isfinite(model.encode(TEXTS)).all()


def test_rank_alpha_and_dropout_are_those_asked_for(tiny_embedder: Make) -> None:
    for layer in layers(tiny_embedder("mean").add_lora(3, 12, 0.25)):
        assert layer.lora_A.default.weight.shape[0] == 3 and layer.scaling["default"] == 4
        assert layer.lora_dropout.default.p == 0.25


def test_adapters_that_make_no_sense_are_refused(tiny_embedder: Make) -> None:
    model = tiny_embedder("latent")
    for sizes in ({"rank": 0}, {"rank": -1}, {"alpha": 0}):
        with pytest.raises(ValueError, match="both must be positive"):
            model.add_lora(**sizes)
    assert not has_lora(model.network.backbone)
    model.add_lora(2)
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        model.add_lora(2)
    assert len(layers(model)[0].r) == 1
    with pytest.raises(ValueError, match="folded"):
        tiny_embedder("latent").fold().add_lora()


# ---- merged


def test_merged_is_unmerged_and_a_plain_model_again(family: str, tiny_embedder: Make) -> None:
    plain, model = tiny_embedder("latent", family), with_adapters(tiny_embedder("latent", family))
    adapted = model.encode(TEXTS)
    assert np.abs(adapted - plain.encode(TEXTS)).max() > 0.05
    assert model.merge() is model
    np.testing.assert_allclose(model.encode(TEXTS), adapted, atol=1e-5)
    assert not has_lora(model.network.backbone) and not hasattr(model.network.backbone, "peft_config")
    assert list(model.network.state_dict()) == list(plain.network.state_dict())
    assert [type(m) for m in model.network.modules()] == [type(m) for m in plain.network.modules()]
    with_adapters(model).merge()  # and can be tuned anew
    assert np.abs(model.encode(TEXTS) - adapted).max() > 0.05


def test_merging_a_model_in_training_leaves_dropout_out(tiny_embedder: Make) -> None:
    model = tiny_embedder("latent").add_lora(4, 8, dropout=0.5)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted = model.encode(TEXTS)
    np.testing.assert_array_equal(model.encode(TEXTS), adapted)  # nor does a model that only encodes drop anything
    model.network.train()
    model.merge()
    assert model.network.training  # as it was
    np.testing.assert_allclose(model.encode(TEXTS), adapted, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums_are_made_in_float32_and_rounded_once(dtype: str, tiny_embedder: Make) -> None:
    model = with_adapters(tiny_embedder("mean", "qwen2", dtype=dtype), std=0.01)  # it has biases
    bias = model.network.backbone.layers[0].self_attn.q_proj.bias.clone()
    exact = {}
    for name, module in model.network.backbone.named_modules():
        if isinstance(module, LoraLayer):
            added = 2.0 * module.lora_B.default.weight.double() @ module.lora_A.default.weight.double()
            exact[name] = module.get_base_layer().weight.double() + added
    model.merge()
    step = torch.finfo(getattr(torch, dtype)).eps / 2
    assert len(exact) == 3 * 7
    for name, expected in exact.items():
        merged = model.network.backbone.get_submodule(name).weight
        assert merged.dtype == getattr(torch, dtype)
        torch.testing.assert_close(merged.double(), expected, rtol=1.01 * step, atol=1e-7)
    q_proj = model.network.backbone.layers[0].self_attn.q_proj
    assert torch.equal(q_proj.bias, bias) and q_proj.bias.dtype == merged.dtype


def test_rounding_that_takes_most_of_an_adapter_is_reported(
    tiny_embedder: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with_adapters(tiny_embedder("mean"), std=1e-4).merge()
    with_adapters(tiny_embedder("mean", dtype="bfloat16"), std=0.05).merge()
    assert not caplog.messages
    with_adapters(tiny_embedder("mean", dtype="bfloat16"), std=1e-4).merge()
    [message] = caplog.messages
    assert "rounding to torch.bfloat16 takes" in message
    assert 80 < float(message.split("takes ")[1].split("%")[0]) <= 101


def test_there_is_nothing_to_merge_twice(tiny_embedder: Make) -> None:
    model = tiny_embedder("mean")
    with pytest.raises(ValueError, match="no LoRA adapters to merge"):
        model.merge()
    merged = with_adapters(model).merge().encode(TEXTS)
    with pytest.raises(ValueError, match="merged already stays as it is"):
        model.merge()
    np.testing.assert_array_equal(model.encode(TEXTS), merged)


def test_an_adapter_that_is_not_finite_changes_nothing(tiny_embedder: Make) -> None:
    model = with_adapters(tiny_embedder("mean"))
    torch.nn.init.constant_(model.network.backbone.layers[1].mlp.up_proj.lora_B.default.weight, float("nan"))
    before = weights(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.lora_B\.default\.weight is not finite"):
        model.merge()
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)


def test_a_merge_that_adds_something_else_is_refused(tiny_embedder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's sum made wrong on purpose, by too little for the vectors in 16 bits to show it."""
    right = lora_layer.Linear.get_delta_weight
    monkeypatch.setattr(lora_layer.Linear, "get_delta_weight", lambda self, name: 2 * right(self, name))
    for dtype in ("float32", "bfloat16"):
        model = with_adapters(tiny_embedder("mean", dtype=dtype), std=1e-2)
        with pytest.raises(RuntimeError, match=r"what layers\.0\..* computes by .* this model is lost, load it again"):
            model.merge()


def test_vectors_that_move_are_refused(tiny_embedder: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Something else than the linear layers changes while they are merged."""
    fold_in = adapter._fold_in

    def and_the_norm(backbone: Any) -> float:
        backbone.norm.weight.data[::2] *= 1.01
        return fold_in(backbone)

    model = with_adapters(tiny_embedder("mean"))
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "_fold_in", and_the_norm)
        with pytest.raises(RuntimeError, match=r"merging moved vectors by .*e-03, .* this model is lost"):
            model.merge()
    for attempt in (model.merge, lambda: model.save(tmp_path / "saved"), lambda: check(model.network)):
        with pytest.raises((ValueError, ProbeError), match="merged into the weights already"):
            attempt()
    assert not any(tmp_path.iterdir())


def test_a_merged_model_is_probed(tiny_embedder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, probed = with_adapters(tiny_embedder("mean")), []
    monkeypatch.setattr(probe, "check", lambda network: probed.append(has_lora(network)))
    model.merge()
    assert probed == [False]


# ---- at work


def switched_off(model: Embedder) -> None:
    layers(model)[4].enable_adapters(False)


def merged_by_hand(model: Embedder) -> None:
    layers(model)[4].merge()


def another_chosen(model: Embedder) -> None:
    layers(model)[4].update_layer("other", r=2, lora_alpha=2, config=model.network.backbone.peft_config["default"])
    layers(model)[4].set_adapter("other")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (switched_off, "switched off"),
        (merged_by_hand, "merged into the weights already, and still there"),
        (another_chosen, r"not chosen \(default\)"),
    ],
)
def test_adapters_that_are_not_at_work_are_named(
    fault: Callable[[Embedder], None], reason: str, tiny_embedder: Make, tmp_path: Path
) -> None:
    model = with_adapters(tiny_embedder("latent"))
    assert lora_faults(model.network.backbone) == []
    fault(model)
    [line] = lora_faults(model.network.backbone)
    named = [n for n, m in model.network.backbone.named_modules() if isinstance(m, LoraLayer)][4]
    assert line.startswith(f"the LoRA adapter of {named} is ")
    with pytest.raises(ProbeError, match=reason):
        check(model.network)
    with pytest.raises(ProbeError, match=reason):
        model.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"cannot merge: .* {reason}"):
        model.merge()
    assert not any(tmp_path.iterdir())


def test_adapters_that_change_nothing_are_named_when_merged(
    tiny_embedder: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_adapters(tiny_embedder("mean"))
    for layer in layers(model)[:2]:
        torch.nn.init.zeros_(layer.lora_B.default.weight)
    with caplog.at_level(logging.WARNING):
        model.merge()
    [message] = caplog.messages
    assert message.startswith(
        "2 of 21 LoRA adapters are zero and change nothing, e.g. layers.0.self_attn.q_proj.lora_B"
    )
