"""While something traces or transforms, and where somebody changed a block, the stock code runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from embedwright.cpu import kernels, onednn
from embedwright.cpu.accelerate import accelerate_unproven, accelerated, stock
from embedwright.cpu.guards import is_unpatched, stock_functions, usable
from embedwright.model.embedder import Embedder

SIZES = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(autouse=True)
def needs_both() -> None:
    if not (kernels.available() and onednn.available()):
        pytest.skip("this machine has no fast path")


@pytest.fixture(scope="module")
def model(tiny_decoder: Callable[..., Path]) -> Embedder:
    made = Embedder.from_decoder(tiny_decoder("llama", **SIZES), pooling="mean")
    assert accelerated(made.network)
    return made


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of the fast path runs is an error: C code would read addresses of nothing."""

    def ran(*_: Any, **__: Any) -> Any:
        raise AssertionError("the fast path ran")

    monkeypatch.setattr(kernels, "_run", ran)
    monkeypatch.setattr(onednn, "linear", ran)
    monkeypatch.setattr(onednn, "gated", ran)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["real", "fake"])
def test_under_fake_tensors(weights: str, model: Embedder, no_kernel: None) -> None:
    packed = model.tokenize(["tides", "a longer text"])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        network = model.network
        if weights == "fake":
            fake = {name: mode.from_tensor(tensor) for name, tensor in network.state_dict().items()}
            out = torch.func.functional_call(
                network.backbone,
                {name.removeprefix("backbone."): tensor for name, tensor in fake.items()},
                kwargs={"input_ids": packed.ids_T[None], "position_ids": packed.position_T[None], "packed": packed},
            ).last_hidden_state
        else:
            out = network.hidden(packed)[None]
    assert out.shape == (1, len(packed.ids_T), 64)


@torch.no_grad()
def test_an_export_of_the_stock_twin(model: Embedder, no_kernel: None) -> None:
    ids = model.tokenize(["a longer text, to be exported"]).ids_T[None]
    with stock(model.network) as twin:
        twin.eval()
        program = torch.export.export(twin.backbone, (), {"input_ids": ids, "use_cache": False}, strict=False)
        expected = twin.backbone(input_ids=ids, use_cache=False).last_hidden_state
    found = program.module()(input_ids=ids, use_cache=False)
    torch.testing.assert_close(found["last_hidden_state"], expected, rtol=1e-5, atol=1e-5)


def test_an_export_of_the_fast_model(model: Embedder, no_kernel: None) -> None:
    packed = model.tokenize(["tides", "a longer text"])

    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model.network

        def forward(self, ids_T: Tensor, position_T: Tensor) -> Tensor:
            out = self.network.backbone(
                input_ids=ids_T[None], position_ids=position_T[None], packed=packed, use_cache=False
            )
            hidden: Tensor = out.last_hidden_state
            return hidden

    with torch.no_grad():
        program = torch.export.export(Vectors(), (packed.ids_T, packed.position_T), strict=False)
        found = program.module()(packed.ids_T, packed.position_T)
        with stock(model.network) as twin:
            torch.testing.assert_close(found[0], twin.hidden(packed), rtol=1e-5, atol=1e-5)


def fast(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    made: dict[str, Callable[[], nn.Module]] = {
        "norm": lambda: LlamaRMSNorm(64),
        "linear": lambda: nn.Linear(64, 64),
        "gated": lambda: LlamaMLP(modeling_llama.LlamaConfig(hidden_size=64, intermediate_size=96)),
    }
    module = made[kind]().eval()
    accelerate_unproven(module)
    assert accelerated(module)
    return module, torch.randn(5, 64)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["norm", "linear", "gated"])
@pytest.mark.parametrize("how", ["vmap", "jit", "make_fx", "compile", "flops"])
def test_what_is_traced_or_transformed_is_right_for_another_input(kind: str, how: str) -> None:
    module, x = fast(kind)
    other = torch.randn(5, 64)
    expected = type(module).__mro__[1].forward(module, other)  # type: ignore[attr-defined]
    if how == "vmap":
        found = torch.vmap(module)(other)
    elif how == "jit":
        found = torch.jit.trace(module, x, check_trace=False)(other)
    elif how == "make_fx":
        found = make_fx(module)(x)(other)
    elif how == "compile":
        found = torch.compile(module, backend="eager", fullgraph=True)(other)
    else:
        with FlopCounterMode(display=False) as counter:
            found = module(other)
        assert (counter.get_total_flops() > 0) == (kind != "norm")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["norm", "gated"])
def test_a_forward_gradient_is_not_lost(kind: str) -> None:
    module, x = fast(kind)
    with forward_ad.dual_level():
        out = module(forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(out).tangent
    assert tangent is not None and tangent.abs().max() > 0


def test_a_tensor_of_another_class_is_not_usable() -> None:
    class Own(Tensor):
        pass

    x = torch.randn(2, 3)
    assert usable(x, nn.Parameter(x)) and not usable(x, x.as_subclass(Own)) and not usable(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not usable(x)


def test_a_function_is_known_by_its_own_file() -> None:
    known = stock_functions((LlamaMLP, "forward"), (modeling_llama, "rotate_half"))
    assert known is not None and is_unpatched(known)

    class LlamaMlpOfAUser(nn.Module):
        forward = LlamaMLP.forward

    assert stock_functions((LlamaMlpOfAUser, "forward")) is None
    assert stock_functions((modeling_llama, "no_such_function")) is None


def test_a_patch_that_wraps_is_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    import functools

    right = LlamaMLP.forward
    known = stock_functions((LlamaMLP, "forward"))
    assert known is not None
    monkeypatch.setattr(LlamaMLP, "forward", functools.wraps(right)(lambda self, x: 2 * right(self, x)))
    assert stock_functions((LlamaMLP, "forward")) is None and not is_unpatched(known)
