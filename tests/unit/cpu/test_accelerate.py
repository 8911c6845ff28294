"""The seam: what is changed, what stays as somebody made it, and what `stock` gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from embedwright.cpu import attention, kernels, onednn
from embedwright.cpu.accelerate import accelerate, accelerate_unproven, accelerated, restore, stock
from embedwright.model.backbone import text_hidden
from embedwright.model.embedder import Embedder

Patch = pytest.MonkeyPatch
SIZES = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 96}
TEXTS = ["tides", "a longer text, which says nothing of note", "and one more"]


@pytest.fixture(autouse=True)
def needs_both() -> None:
    if not (kernels.available() and onednn.available()):
        pytest.skip("this machine has no fast path")


@pytest.fixture
def folder(tiny_decoder: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda family: tiny_decoder(family, **SIZES)


def vectors_of_training(model: Embedder) -> np.ndarray[Any, Any]:
    """What the stock blocks give: with a gradient none of ours but the products runs."""
    return model.embed(model.tokenize(TEXTS)).detach().numpy()


# ---- what somebody changed


def _twice(patch: Patch, owner: Any, name: str) -> None:
    right = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: 2 * right(*args, **kwargs))


def _rotated_further(patch: Patch, module: Any) -> None:
    right = module.apply_rotary_pos_emb
    patch.setattr(module, "apply_rotary_pos_emb", lambda q, k, c, s, *rest: right(2 * q, k, c, s, *rest))


def _half_turned(patch: Patch, module: Any) -> None:
    right = module.rotate_half
    patch.setattr(module, "rotate_half", lambda x: -right(x))


def _another_block(patch: Patch, module: Any, name: str, attribute: str) -> None:
    """Somebody's own class of the same name in the namespace that models are made from."""
    right = getattr(module, name)

    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = 2 * right.forward(self, x)
        return out

    patch.setattr(module, name, type(name, (right,), {"forward": forward, "__module__": module.__name__}))


def _swapped(patch: Patch, module: Any, name: str) -> None:
    """transformers' own attention block, with something else before it."""
    right = getattr(module, name).forward
    patch.setattr(
        getattr(module, name), "forward", lambda self, hidden_states, **rest: right(self, 2 * hidden_states, **rest)
    )


CHANGES: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "gated block": ("llama", lambda p: _twice(p, modeling_llama.LlamaMLP, "forward")),
    "norm": ("llama", lambda p: _twice(p, modeling_llama.LlamaRMSNorm, "forward")),
    "norm of queries": ("qwen3", lambda p: _twice(p, modeling_qwen3.Qwen3RMSNorm, "forward")),
    "helper of a norm": ("gemma3", lambda p: _twice(p, modeling_gemma3.Gemma3RMSNorm, "_norm")),
    "rotary function": ("llama", lambda p: _rotated_further(p, modeling_llama)),
    "half of the rotary function": ("llama", lambda p: _half_turned(p, modeling_llama)),
    "attention block": ("llama", lambda p: _swapped(p, modeling_llama, "LlamaAttention")),
    "activation": ("llama", lambda p: _twice(p, torch.nn.functional, "silu")),
    "linear layer": ("llama", lambda p: _twice(p, nn.Linear, "forward")),
    "class of the same name": ("llama", lambda p: _another_block(p, modeling_llama, "LlamaMLP", "mlp")),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", CHANGES)
def test_what_somebody_changed_counts_in_inference_as_in_training(
    what: str, when: str, folder: Callable[[str], Path], monkeypatch: Patch
) -> None:
    if (what, when) == ("class of the same name", "after"):
        pytest.skip("a model that is made stays of its class")
    family, patch = CHANGES[what]
    unpatched = Embedder.from_decoder(folder(family), pooling="mean")
    plain = unpatched.encode(TEXTS)
    if when == "before":
        patch(monkeypatch)
        model = Embedder.from_decoder(folder(family), pooling="mean")
        assert model.network.cpu_fault is None  # it is no fault, and the rest is as fast as ever
    else:
        model = unpatched
        patch(monkeypatch)
    found = model.encode(TEXTS)
    assert np.abs(found - plain).max() > 1e-3
    np.testing.assert_allclose(found, vectors_of_training(model), atol=1e-5)
    with stock(model.network) as twin:
        np.testing.assert_allclose(found, Embedder(twin, model.tokenizer).encode(TEXTS), atol=1e-5)


def test_an_instance_that_somebody_changed_stays(folder: Callable[[str], Path], monkeypatch: Patch) -> None:
    model = Embedder.from_decoder(folder("llama"), pooling="mean")
    restore(model.network)
    layers = model.network.backbone.layers
    right = layers[0].mlp.forward
    layers[0].mlp.forward = lambda x: 2 * right(x)

    class Mine(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layers[1].mlp.up_proj.__class__ = Mine
    layers[2].self_attn.q_proj.__class__ = Mine
    accelerate(model.network)
    assert model.network.cpu_fault is None
    kinds = dict(model.network.named_modules())
    assert type(kinds["backbone.layers.0.mlp"]) is modeling_llama.LlamaMLP
    assert type(kinds["backbone.layers.1.mlp.up_proj"]) is Mine
    np.testing.assert_allclose(model.encode(TEXTS), vectors_of_training(model), atol=1e-5)


def test_a_hook_on_all_modules_hears_of_every_product(folder: Callable[[str], Path]) -> None:
    model = Embedder.from_decoder(folder("llama"), pooling="mean", dtype="bfloat16")
    heard: set[int] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.add(id(module)))
    try:
        model.encode(TEXTS)
    finally:
        handle.remove()
    assert {id(m) for m in model.network.backbone.modules() if isinstance(m, nn.Linear)} <= heard


# ---- stock


def classes(network: nn.Module) -> list[Any]:
    return [type(module) for module in network.modules()]


def test_the_twin_has_the_same_weights_and_nothing_of_ours(folder: Callable[[str], Path]) -> None:
    model = Embedder.from_decoder(folder("llama"), pooling="mean")
    before, implementation = classes(model.network), model.network.backbone.config._attn_implementation
    assert implementation == attention.FAST
    with stock(model.network) as twin:
        for name, parameter in model.network.named_parameters():
            assert twin.get_parameter(name) is parameter
        plain = AutoModel.from_pretrained(folder("llama"))
        assert classes(twin.backbone) == classes(plain)
        assert twin.backbone.config._attn_implementation == "sdpa"
        twin.train()
        twin.backbone.config.is_causal = True
    assert classes(model.network) == before and not model.network.training
    assert model.network.backbone.config._attn_implementation == implementation
    assert model.network.backbone.config.is_causal is False


def test_hooks_of_the_twin_are_its_own(folder: Callable[[str], Path]) -> None:
    model = Embedder.from_decoder(folder("llama"), pooling="mean")
    heard: list[str] = []
    model.network.backbone.norm.register_forward_hook(lambda *_: heard.append("user"))
    with stock(model.network) as twin:
        twin.backbone.norm.register_forward_hook(lambda *_: heard.append("twin"))
        twin.hidden(model.tokenize(["tides"]))
    assert heard == ["user", "twin"]
    model.encode(["tides"])
    assert heard == ["user", "twin", "user"]


def test_references_may_run_while_others_encode(folder: Callable[[str], Path]) -> None:
    model = Embedder.from_decoder(folder("llama"), pooling="mean")
    expected, done = model.encode(TEXTS), Event()

    def encode() -> bool:
        same = True
        while not done.is_set():
            same = same and np.array_equal(model.encode(TEXTS), expected)
        return same

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(encode) for _ in range(3)]
        for implementation in ("sdpa", "eager") * 5:
            packed = model.tokenize([TEXTS[1]])
            with stock(model.network) as twin:
                twin.attend_by(implementation)
                hidden = text_hidden(twin.backbone, packed.ids_T)
            torch.testing.assert_close(hidden, model.network.hidden(packed), rtol=1e-5, atol=1e-5)
        done.set()
        assert all(future.result() for future in running)


def test_with_adapters_the_twin_runs_pefts_own(folder: Callable[[str], Path]) -> None:
    from peft.tuners.lora import Linear

    model = Embedder.from_decoder(folder("llama"), pooling="mean").add_lora(rank=2, alpha=4)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    with stock(model.network) as twin:
        layers = [module for module in twin.modules() if isinstance(module, Linear)]
        assert layers and {type(layer) for layer in layers} == {Linear}
        found = Embedder(twin, model.tokenizer).encode(TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-5)


def test_a_tests_backend_and_other_doors_are_stock(folder: Callable[[str], Path], tmp_path: Path) -> None:
    made = Embedder.from_decoder(folder("llama"), pooling="latent", latents=6, heads=2, multiple=1)
    assert accelerated(made.network)
    made.save(tmp_path / "model")
    assert accelerated(AutoModel.from_pretrained(tmp_path / "model")) == []
    for backend in ("sdpa", "eager"):
        other = Embedder.load(tmp_path / "model", backend=backend)  # type: ignore[arg-type]
        assert accelerated(other.network) == []
        np.testing.assert_allclose(other.encode(TEXTS), made.encode(TEXTS), atol=1e-5)


def test_changed_twice_is_changed_once_and_undone(folder: Callable[[str], Path]) -> None:
    model = Embedder.from_decoder(folder("llama"), pooling="mean")
    before = classes(model.network)
    accelerate(model.network)
    accelerate_unproven(model.network)
    assert classes(model.network) == before
    assert classes(copy.deepcopy(model.network)) == before
    restore(model.network)
    assert accelerated(model.network) == [] and model.network.backbone.config._attn_implementation != attention.FAST
