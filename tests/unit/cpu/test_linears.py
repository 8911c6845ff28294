"""oneDNN products against torch's own, in float64: outputs to 1e-5 and gradients to 1e-4, relative."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn
from transformers import Gemma3TextConfig, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from embedwright.cpu import onednn
from embedwright.cpu.accelerate import accelerate_unproven
from embedwright.cpu.linears import OneDnnLinear
from embedwright.cpu.onednn import available, gated_available
from embedwright.model.embedder import Embedder


@pytest.fixture
def needs_onednn() -> None:
    if not available():
        pytest.skip("oneDNN's linear is not there on this machine")


def made(bias: bool) -> OneDnnLinear:
    layer = nn.Linear(24, 40, bias=bias)
    accelerate_unproven(layer)
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
    monkeypatch.setattr(onednn, "has_product", lambda dtype: dtype != torch.float32)
    layer, x = made(True), torch.randn(5, 24)
    stock = nn.Linear(24, 40)
    stock.load_state_dict(layer.state_dict())
    if case == "bf16":
        layer, stock, x = layer.bfloat16(), stock.bfloat16(), x.bfloat16()
    x = x[:0] if case == "empty" else x
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        got, expected = layer(x), stock(x)
    assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_where_the_processor_has_no_products_of_16_bits_they_are_in_float32_and_rounded_once(
    dtype: torch.dtype, autocast: bool, multiplied_in: list[torch.dtype]
) -> None:
    layer, x = made(True), torch.randn(3, 7, 24)
    if not autocast:
        layer, x = layer.to(dtype), x.to(dtype)
    x.requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = layer(x)
    exact = [t.detach().to(dtype).double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    right, upstream, half_unit = F.linear(*exact), torch.randn_like(out), torch.finfo(dtype).eps / 2
    assert out.dtype == upstream.dtype == dtype
    assert ((out - right).abs() <= half_unit * right.abs() + 1e-5).all()  # one rounding, and float32's sum
    out.backward(upstream)
    right.backward(upstream.double())
    for got, expected in zip((x, layer.weight, layer.bias), exact, strict=True):
        assert got.grad is not None and got.grad.dtype == got.dtype and expected.grad is not None
        assert ((got.grad - expected.grad).abs() <= half_unit * expected.grad.abs() + 1e-5).all()
    assert multiplied_in == 3 * [torch.float32]  # output, gradient of the input, gradient of the weight


def test_a_gradient_of_a_gradient_is_refused_and_not_left_out(needs_onednn: None) -> None:
    layer, x = made(False), torch.randn(5, 24, requires_grad=True)
    [gradient] = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_weights_keep_no_input(needs_onednn: None, dtype: torch.dtype, multiplied_in: list[torch.dtype]) -> None:
    """What LoRA rests on: a frozen layer stores its weight for backward, which is there anyway, and nothing else."""
    layer = made(False).to(dtype)
    layer.weight.requires_grad = False
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(50, 24, dtype=dtype, requires_grad=True))
    assert [t.data_ptr() for t in kept] == [layer.weight.data_ptr()] and multiplied_in == [torch.float32]


def test_only_plain_linears_change_and_nothing_is_stored(needs_onednn: None) -> None:
    class Own(nn.Linear):
        pass

    network = nn.Sequential(nn.Linear(3, 4), Own(4, 5), nn.LayerNorm(5))
    before = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    accelerate_unproven(network)
    assert [type(m) for m in network] == [OneDnnLinear, Own, nn.LayerNorm]
    assert {name: tensor.data_ptr() for name, tensor in network.state_dict().items()} == before


def test_a_machine_without_it_stays_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "available", lambda: False)
    layer = nn.Linear(3, 4)
    accelerate_unproven(layer)
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


# ---- gated blocks

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
BLOCKS = {
    "llama": (LlamaMLP, LlamaConfig(**SIZES)),
    "mistral": (MistralMLP, MistralConfig(**SIZES)),
    "qwen2": (Qwen2MLP, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3MLP, Qwen3Config(**SIZES)),
    "gemma": (GemmaMLP, GemmaConfig(**SIZES)),
    "gemma3": (Gemma3MLP, Gemma3TextConfig(**SIZES)),
}


@pytest.fixture
def needs_gated() -> None:
    if not gated_available():
        pytest.skip("oneDNN's fused products are not there on this machine")


def block(family: str) -> tuple[nn.Module, nn.Module]:
    """A stock block in bfloat16 for inference, and its copy with the faster products."""
    made, config = BLOCKS[family]
    torch.manual_seed(0)
    stock = made(config)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.2)
    stock = stock.bfloat16().eval()
    fast = copy.deepcopy(stock)
    accelerate_unproven(fast)
    return stock, fast


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("shape", [(48,), (1, 48), (1, 33, 48), (300, 48)])
def test_a_gated_block_rounds_less_than_the_stock_one(needs_gated: None, family: str, shape: tuple[int, ...]) -> None:
    stock, fast = block(family)
    x = torch.randn(*shape).bfloat16()
    exact = copy.deepcopy(stock).double()(x.double())
    with torch.inference_mode():
        errors = [((part(x).double() - exact).norm() / exact.norm()).item() for part in (stock, fast)]
    assert errors[1] < 0.01
    if x.numel() > 1000:  # over many values it is no matter of luck
        assert errors[1] < errors[0]


CASES = ["gradients", "training", "autocast", "float32", "bias", "lora", "empty", "activation"]


@pytest.mark.parametrize("case", CASES)
def test_a_gated_block_is_the_stock_one_otherwise(
    needs_gated: None, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("oneDNN's fused products were asked")

    monkeypatch.setattr(onednn, "gated", refuse)
    stock, fast = block("llama")
    x = torch.randn(0 if case == "empty" else 5, 48).bfloat16()
    if case == "training":
        fast.train()
    if case == "float32":
        stock, fast, x = stock.float(), fast.float(), x.float()
    if case == "bias":
        for part in (stock, fast):
            part.up_proj.bias = nn.Parameter(torch.ones(96).bfloat16())
    if case == "lora":
        for part in (stock, fast):
            torch.manual_seed(1)
            part.up_proj = Linear(part.up_proj, "default", config=LoraConfig(r=2, init_lora_weights=False), r=2)
    if case == "activation":
        for part in (stock, fast):
            part.act_fn = nn.ReLU()
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", enabled=case == "autocast"):
        torch.testing.assert_close(fast(x), stock(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("listened", ["gate_proj", "up_proj", "act_fn", "down_proj"])
def test_a_hook_in_a_gated_block_is_called_and_keeps_what_it_was_handed(listened: str, dtype: torch.dtype) -> None:
    stock, fast = (part.to(dtype) for part in block("llama"))
    handed: list[Any] = []
    for part in (stock, fast):
        part.get_submodule(listened).register_forward_hook(lambda *call: handed.append(call[2]))
    x = torch.randn(1, 600, 48).to(dtype)  # more rows than a slice
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), stock(x))
    torch.testing.assert_close(*handed)


@pytest.mark.parametrize("mode", ["inference", "gradients", "training"])
def test_a_gated_block_takes_float32_rows_in_slices_for_inference_alone(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, fast = (part.float() for part in block("llama"))
    fast.train(mode == "training")  # slices would draw other dropout masks than the whole
    rows: list[int] = []
    down, product = fast.get_submodule("down_proj"), OneDnnLinear.forward

    def counted(self: OneDnnLinear, x: torch.Tensor) -> torch.Tensor:
        rows.extend([x.shape[-2]] if self is down else [])
        return product(self, x)

    monkeypatch.setattr(OneDnnLinear, "forward", counted)
    x = torch.randn(1, 1100, 48)
    with torch.set_grad_enabled(mode == "gradients"):
        torch.testing.assert_close(fast(x), stock(x))
    assert rows == ([512, 512, 76] if mode == "inference" and available() else [1100])


def test_a_gated_block_saves_what_the_stock_one_does(needs_gated: None) -> None:
    stock, fast = block("llama")
    assert type(fast).__name__ == "LlamaMLP" and type(fast) is not LlamaMLP
    assert fast.state_dict().keys() == stock.state_dict().keys()
    before = type(fast)
    accelerate_unproven(fast)  # again: nothing more
    assert type(fast) is before
