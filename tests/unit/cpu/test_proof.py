"""A fault seeded into each piece of the fast path: the load finds it and the model stays stock, the doctor finds it.

The reference runs no line of ours, so that no fault of ours is in both sides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from embedwright.cpu import attention as blocks
from embedwright.cpu import kernels, linears, onednn, proof
from embedwright.cpu.accelerate import accelerate, accelerated, fault, stock
from embedwright.model import attention
from embedwright.model.embedder import Embedder
from embedwright.model.pooling import WEIGHTLESS, Kind
from embedwright.model.verify import doctor
from embedwright.model.verify.probe import ProbeError

Patch = pytest.MonkeyPatch
SIZES = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 96}  # what the kernels take, and more than 32 columns
TEXTS = ["tides", "a longer text, which says nothing of note", "and one more"]


@pytest.fixture(autouse=True)
def needs_both() -> None:
    if not (kernels.available() and onednn.available()):
        pytest.skip("this machine has no fast path")


@pytest.fixture(scope="module")
def made(tiny_decoder: Callable[..., Path]) -> Callable[..., Embedder]:
    """`made(family, dtype, pooling)`: made once; a test that leaves it stock is undone by the next `accelerate`."""

    @cache
    def make(family: str, dtype: str = "float32", pooling: str = "mean") -> Embedder:
        folder = tiny_decoder(family, **SIZES)
        sizes = {"latents": 6, "heads": 2, "multiple": 1}
        model = Embedder.from_decoder(folder, pooling=pooling, dtype=dtype, **sizes)
        torch.manual_seed(1)
        for parameter in model.network.head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


# ---- the faults


def after(patch: Patch, owner: Any, name: str, spoil: Callable[[Tensor], Any]) -> None:
    """What a function gives is spoilt in place."""
    right = getattr(owner, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = right(*args, **kwargs)
        with torch.no_grad():
            spoil(out)
        return out

    patch.setattr(owner, name, wrong)


def _norm(patch: Patch) -> None:
    after(patch, kernels, "norm", lambda out: out[..., 32:].mul_(0.25))


def _norm_of_the_last_row(patch: Patch) -> None:
    after(patch, kernels, "norm", lambda out: out.view(-1, out.shape[-1])[-1].mul_(1.2))


def _rotary(patch: Patch) -> None:
    right = kernels.rotate
    patch.setattr(kernels, "rotate", lambda q, k, cosine, sine: right(q, k, cosine, -sine))


def _block_scale(patch: Patch) -> None:
    """The block hands its attention another scale than its own."""
    right = blocks.packed_attention
    patch.setattr(blocks, "packed_attention", lambda *a, scaling=1.0, **k: right(*a, scaling=scaling * 1.5, **k))


def _attention(patch: Patch) -> None:
    after(patch, kernels, "attention", lambda out: out[..., -1].mul_(2))


def _attention_leaks(patch: Patch) -> None:
    right = kernels.attention
    patch.setattr(kernels, "attention", lambda q, k, v, ends, *rest: right(q, k, v, ends[[0, -1]], *rest))


def _attention_scale(patch: Patch) -> None:
    right = kernels.attention
    patch.setattr(kernels, "attention", lambda q, k, v, ends, scale, window: right(q, k, v, ends, 2 * scale, window))


def _attention_mask(patch: Patch) -> None:
    right = kernels.attention
    patch.setattr(kernels, "attention", lambda *args: right(*args[:5], (-1, 0)))


def _linear(patch: Patch) -> None:
    after(patch, onednn, "linear", lambda out: out[..., 32:].mul_(0.9))


def _gated_float32(patch: Patch) -> None:
    wrong = SimpleNamespace(silu=lambda x, inplace: x.mul_(torch.sigmoid(1.1 * x)), linear=F.linear, gelu=F.gelu)
    patch.setattr(linears, "F", wrong)


def _gated_bfloat16(patch: Patch) -> None:
    after(patch, onednn, "gated", lambda out: out[..., 32:].mul_(0.5))


def _backward(function: Any, which: int) -> Callable[[Patch], None]:
    def seed(patch: Patch) -> None:
        right = function.backward

        def wrong(ctx: Any, gradient: Tensor) -> Any:
            return tuple(x * 1.5 if i == which and x is not None else x for i, x in enumerate(right(ctx, gradient)))

        patch.setattr(function, "backward", staticmethod(wrong))

    return seed


def _packed_scale(patch: Patch) -> None:
    right = attention.attend
    patch.setattr(attention, "attend", lambda q, *rest: right(q * 2, *rest))


def _packed_window(patch: Patch) -> None:
    allowed = attention.build_mask
    patch.setattr(attention, "build_mask", lambda rows, keys, _, *rest: allowed(rows, keys, True, *rest))
    patch.setattr(attention, "flash_window", lambda causal, window: (-1, 0))


BOTH, FULL, BF16 = ("float32", "bfloat16"), ("float32",), ("bfloat16",)
NORMS = ("llama", "qwen3", "gemma3", "mistral", "qwen2", "gemma", "phi3")
BLOCKS = NORMS[:-1]  # whose attention and gated blocks are known
SILU = tuple(family for family in BLOCKS if not family.startswith("gemma"))
ALL = (*NORMS, "cohere2")
# fault -> how it is seeded, in which types it shows, in which families
FAST: dict[str, tuple[Callable[[Patch], None], tuple[str, ...], tuple[str, ...]]] = {
    "norm": (_norm, BOTH, NORMS),
    "norm, last row": (_norm_of_the_last_row, BOTH, NORMS),
    "rotary": (_rotary, BOTH, BLOCKS),
    "attention block": (_block_scale, BOTH, BLOCKS),
    "attention": (_attention, BOTH, ALL),
    "attention leaks": (_attention_leaks, BOTH, ALL),
    "attention's scale": (_attention_scale, BOTH, ALL),
    "attention's mask": (_attention_mask, BOTH, ALL),
    "linear": (_linear, FULL, ALL),
    "gated": (_gated_float32, FULL, SILU),
    "gated, fused": (_gated_bfloat16, BF16, BLOCKS),
    "linear's gradient of the input": (_backward(linears._Product, 0), FULL, ALL),
    "linear's gradient of the weight": (_backward(linears._Product, 1), FULL, ALL),
    "linear's gradient of the bias": (_backward(linears._Product, 2), FULL, ("qwen2",)),
}
# of packed attention in torch's own steps: nothing is left to fall back to
PACKED: dict[str, tuple[Callable[[Patch], None], tuple[str, ...]]] = {
    "packed attention's scale": (_packed_scale, BOTH),
    "packed attention's mask": (_packed_window, BOTH),
    "packed attention's gradient of q": (_backward(attention._Recomputed, 0), BF16),
    "packed attention's gradient of v": (_backward(attention._Recomputed, 2), BF16),
}
CASES = [(name, f, d) for name, (_, dtypes, families) in FAST.items() for d in dtypes for f in families]
SHORT = {"llama", "gemma3"}


def cases(short: bool) -> list[tuple[str, str, str]]:
    return [case for case in CASES if (case[1] in SHORT or FAST[case[0]][2] == ("qwen2",)) == short]


def found_by_load_and_doctor(name: str, model: Embedder, patch: Patch, caplog: pytest.LogCaptureFixture) -> None:
    network = model.network
    accelerate(network)
    assert network.cpu_fault is None and fault(network) is None and accelerated(network)
    FAST[name][0](patch)
    found = doctor._fast(model, None)  # a fault that comes after the load
    assert found is not None and not found[0] and "transformers' own" in found[1]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        accelerate(network)
    assert network.cpu_fault is not None and accelerated(network) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"] and network.cpu_fault in caplog.text
    found = doctor._fast(model, None)
    assert found is not None and not found[0] and found[1] == f"off: {network.cpu_fault}"


@pytest.mark.parametrize(("name", "family", "dtype"), cases(short=True))
def test_a_fault_is_found(
    name: str, family: str, dtype: str, made: Any, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    if name == "gated, fused" and not onednn.gated_available():
        pytest.skip("oneDNN's fused products are not there on this machine")
    found_by_load_and_doctor(name, made(family, dtype), monkeypatch, caplog)


@pytest.mark.long
@pytest.mark.parametrize(("name", "family", "dtype"), cases(short=False))
def test_a_fault_is_found_in_every_family(
    name: str, family: str, dtype: str, made: Any, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    if name == "gated, fused" and not onednn.gated_available():
        pytest.skip("oneDNN's fused products are not there on this machine")
    found_by_load_and_doctor(name, made(family, dtype), monkeypatch, caplog)


@pytest.mark.parametrize(("name", "dtype"), [(name, d) for name, (_, dtypes) in PACKED.items() for d in dtypes])
def test_packed_attention_itself_is_held_to_the_stock_mask(
    name: str, dtype: str, made: Any, monkeypatch: Patch
) -> None:
    model = made("llama", dtype)
    accelerate(model.network)
    PACKED[name][0](monkeypatch)
    with pytest.raises(ProbeError, match="packed attention is not the stock model's"):
        accelerate(model.network)


@pytest.mark.parametrize("pooling", [kind for kind in get_args(Kind) if kind not in WEIGHTLESS])
def test_the_pooling_block_is_proven_too(pooling: str, made: Any, monkeypatch: Patch) -> None:
    model = made("llama", "float32", pooling)
    accelerate(model.network)
    assert any(name.startswith("head.") for name in accelerated(model.network))
    own = {parameter.data_ptr() for parameter in model.network.head.parameters()}
    right = onednn.linear

    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return right(x, weight, bias) * (1.01 if weight.data_ptr() in own else 1)

    monkeypatch.setattr(onednn, "linear", wrong)
    found = doctor._fast(model, None)
    assert found is not None and not found[0] and found[1].startswith("head.")
    accelerate(model.network)
    assert (model.network.cpu_fault or "").startswith("head.")


def test_a_kernel_that_fails_is_a_fault_and_not_an_error(made: Any, monkeypatch: Patch) -> None:
    model = made("llama")

    def fails(*_: Any) -> Any:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(kernels, "norm", fails)
    accelerate(model.network)
    assert "could not create a primitive" in (model.network.cpu_fault or "")
    model.encode(TEXTS)


def test_a_model_with_a_fault_gives_the_stock_vectors_and_the_doctor_says_so(
    tiny_decoder: Callable[..., Path], tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    """The whole way: load, encode, save, doctor, with the fault that no example of the kernels shows."""
    healthy = Embedder.from_decoder(tiny_decoder("llama", **SIZES), pooling="latent", latents=6, heads=2, multiple=1)
    expected = healthy.encode(TEXTS)
    healthy.save(tmp_path / "model")
    _norm(monkeypatch)
    assert np.abs(healthy.encode(TEXTS) - expected).max() > 1e-2
    with caplog.at_level(logging.WARNING):
        model = Embedder.load(tmp_path / "model")
    assert "fast path on this CPU is off" in caplog.text
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)
    bad = {finding.name: finding.detail for finding in doctor.examine(model, tmp_path / "model") if not finding.ok}
    assert list(bad) == ["fast path = stock blocks"] and "units in the last place" in str(bad)


def test_the_reference_runs_no_line_of_ours(family: str, made: Any, monkeypatch: Patch) -> None:
    model = made(family)
    accelerate(model.network)
    expected = model.encode(TEXTS)

    def ours(*_: Any, **__: Any) -> Any:
        raise AssertionError("a line of ours ran")

    with stock(model.network) as twin:
        for owner, name in (
            (kernels, "_run"),
            (onednn, "linear"),
            (onednn, "gated"),
            (attention, "attend"),
            (linears.OneDnnLinear, "forward"),
            (linears._Product, "apply"),
        ):
            monkeypatch.setattr(owner, name, ours)
        homes = {type(module).__module__.split(".")[0] for module in twin.backbone.modules()}
        assert homes == {"torch", "transformers"}
        found = Embedder(twin, model.tokenizer).encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(AssertionError, match="a line of ours"):
        model.encode(TEXTS)


def test_every_attention_block_and_every_changed_module_is_proven(family: str, made: Any) -> None:
    model = made(family, "float32", "latent")
    accelerate(model.network)
    with stock(model.network) as twin:
        proven = proof.recorded(twin, accelerated(model.network))
    names = [block.name for block in proven]
    assert sum(block.attends for block in proven) == model.network.backbone.config.num_hidden_layers
    for name in accelerated(model.network):
        assert any(name == one or name.startswith(f"{one}.") for one in names), name


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_deep_real_model_raises_no_alarm(smollm2_folder: Path, dtype: str) -> None:
    model = Embedder.from_decoder(smollm2_folder, pooling="mean", dtype=dtype)
    assert model.network.cpu_fault is None
    assert fault(model.network, (1, 40, 300)) is None


@pytest.mark.parametrize("dtype", BOTH)
def test_adapters_in_float32_on_weights_in_16_bits_raise_no_alarm(
    dtype: str, tiny_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    Embedder.from_decoder(tiny_decoder("llama", **SIZES), pooling="mean", dtype=dtype).save(tmp_path / "base")
    model = Embedder.load(tmp_path / "base").add_lora(rank=2, alpha=4)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save(tmp_path / "adapter")
    loaded = Embedder.load(tmp_path / "adapter")
    assert loaded.network.cpu_fault is None and fault(loaded.network) is None


def test_a_gradient_whose_parts_cancel_is_no_fault(tiny_embedder: Callable[..., Embedder]) -> None:
    """Tokens that are nearly alike: the gradients of adapters on keys cancel, and rounding is what stays of them."""
    model = tiny_embedder("mean", dtype="bfloat16").add_lora(2)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.network.backbone.embed_tokens.weight += 1.0
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-2, generator=random)
    assert fault(model.network) is None
