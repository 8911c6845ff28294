"""The lean LoRA product against peft's own layer: outputs to 1e-5, gradients to 1e-4, relative; and what it keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from embedwright.cpu import lean_lora as lora
from embedwright.cpu import onednn
from embedwright.cpu.accelerate import accelerate_unproven
from embedwright.cpu.lean_lora import LeanLinear
from embedwright.model.adapters.lora import inject_lora
from embedwright.model.embedder import Embedder

IN, OUT, RANK = 24, 40, 4
TEXTS = ["tides", "a longer text, which says nothing of note", "the moon"]


class Pair(nn.Module):
    """Two layers that read the same input, as q and k do."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, OUT, bias=bias), nn.Linear(IN, OUT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x) * self.second(x)
        return out


def made(bias: bool = False, mixed: bool = False, **options: Any) -> Any:
    """A pair with adapters that add about as much as the weights do."""
    torch.manual_seed(0)
    pair = Pair(bias)
    accelerate_unproven(pair)
    if mixed:
        pair.bfloat16()
    config = LoraConfig(**{"r": RANK, "lora_alpha": 3 * RANK, "target_modules": ["first", "second"], **options})
    inject_lora(pair, config, mixed=mixed)
    for name, parameter in pair.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return pair


def layers(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, Linear)]


@contextmanager
def stock(network: nn.Module) -> Iterator[None]:
    """peft's own forward instead of ours."""
    changed = layers(network)
    for layer in changed:
        layer.__class__ = Linear
    try:
        yield
    finally:
        for layer in changed:
            layer.__class__ = LeanLinear


def gradients(network: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of the input (where it has one) and of all that trains."""
    network.zero_grad(set_to_none=True)
    x.grad = None
    out = network(x)
    (out * upstream).sum().backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return out.detach(), found | ({} if x.grad is None else {"x": x.grad})


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative, of the one that differs most."""
    assert a.keys() == b.keys() and a
    return max(float((a[n].double() - b[n].double()).norm() / b[n].double().norm()) for n in a)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each lean product."""
    calls: list[int] = []
    forward = lora._LoraProduct.forward
    monkeypatch.setattr(lora._LoraProduct, "forward", staticmethod(lambda *a: calls.append(1) or forward(*a)))
    return calls


# ---- the product


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(IN,), (7, IN), (1, 9, IN), (2, 3, 5, IN)])
@pytest.mark.parametrize("below", [True, False])
def test_outputs_and_gradients_are_those_of_peft(
    shape: tuple[int, ...], bias: bool, below: bool, runs: list[int]
) -> None:
    pair, x, upstream = made(bias), torch.randn(*shape, requires_grad=below), torch.randn(*shape[:-1], OUT)
    out, found = gradients(pair, x, upstream)
    assert len(runs) == 2
    with stock(pair):
        right, expected = gradients(pair, x, upstream)
    assert len(runs) == 2 and ("x" in found) == below
    torch.testing.assert_close(out, right, rtol=0, atol=1e-5)
    assert difference(found, expected) < 1e-5
    assert all(expected[f"{n}.lora_{m}.default.weight"].norm() > 0.1 for n in ("first", "second") for m in "AB")


def test_without_onednn_too(monkeypatch: pytest.MonkeyPatch, runs: list[int]) -> None:
    monkeypatch.setattr(onednn, "available", lambda: False)
    pair, x, upstream = made(True), torch.randn(7, IN, requires_grad=True), torch.randn(7, OUT)
    assert type(pair.first.base_layer) is nn.Linear
    out, found = gradients(pair, x, upstream)
    with stock(pair):
        right, expected = gradients(pair, x, upstream)
    assert len(runs) == 2 and difference(found, expected) < 1e-5
    torch.testing.assert_close(out, right, rtol=0, atol=1e-5)


def test_what_is_not_contiguous() -> None:
    layer, x = made().first, torch.randn(IN, 7, requires_grad=True)
    layer(x.t()).sum().backward()  # a gradient that is one number, expanded
    found = {"x": x.grad, "a": layer.lora_A.default.weight.grad, "b": layer.lora_B.default.weight.grad}
    layer.zero_grad(set_to_none=True)
    x.grad = None
    with stock(layer):
        layer(x.t()).sum().backward()
    expected = {"x": x.grad, "a": layer.lora_A.default.weight.grad, "b": layer.lora_B.default.weight.grad}
    assert difference(found, expected) < 1e-5


def test_in_bf16_it_is_as_close_to_the_truth_as_peft(runs: list[int]) -> None:
    near_as_peft(runs)


def test_where_the_processor_has_no_bfloat16_all_products_are_in_float32(
    runs: list[int], multiplied_in: list[torch.dtype]
) -> None:
    x, upstream = torch.randn(7, IN, dtype=torch.bfloat16, requires_grad=True), torch.randn(7, OUT)
    pair = made(mixed=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, found = gradients(pair, x, upstream)
    # of each of the two layers: two of the output, then the gradients through B, of A, of B and of the input
    assert multiplied_in == 12 * [torch.float32]
    for parameter in pair.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)  # as autocast casts the adapters
    with torch.autocast("cpu", torch.bfloat16):
        same, again = gradients(pair, x, upstream)
    assert torch.equal(out, same) and difference(again, found) == 0
    runs.clear()
    near_as_peft(runs)


def near_as_peft(runs: list[int]) -> None:
    """In bf16, outputs and gradients of the lean product are as near to those in float64 as peft's are."""
    pair = made(mixed=True)
    x, upstream = torch.randn(200, IN, dtype=torch.bfloat16, requires_grad=True), torch.randn(200, OUT)

    def mixed() -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            out, found = gradients(pair, x, upstream)
        assert out.dtype == torch.bfloat16
        assert all(g.dtype == (torch.bfloat16 if n == "x" else torch.float32) for n, g in found.items())
        return out, found | {"out": out}

    _, found = mixed()
    assert len(runs) == 2
    with stock(pair):
        _, peft = mixed()
        exact_pair, exact_x = copy.deepcopy(pair).double(), x.detach().double().requires_grad_()
        out, exact = gradients(exact_pair, exact_x, upstream.double())
    exact["out"] = out
    assert len(runs) == 2
    for name, truth in exact.items():
        ours, theirs = (difference({name: side[name]}, {name: truth}) for side in (found, peft))
        assert 0 < ours < 1.2 * theirs < 0.05


def test_every_family_gives_the_vectors_and_gradients_of_peft(
    tiny_embedder: Callable[..., Embedder], family: str, runs: list[int]
) -> None:
    model = tiny_embedder("latent", family).add_lora(RANK, 2 * RANK)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    changed = layers(model.network)
    assert len(changed) > 10 and {type(layer) for layer in changed} == {LeanLinear}
    upstream = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.network.zero_grad(set_to_none=True)
        embedded = model.embed(model.tokenize(TEXTS))
        (embedded * upstream).sum().backward()
        return embedded.detach(), {n: p.grad for n, p in model.network.named_parameters() if p.grad is not None}

    vectors, found = step()
    assert len(runs) == len(changed)
    with stock(model.network):
        right, expected = step()
    assert len(runs) == len(changed)
    torch.testing.assert_close(vectors, right, rtol=0, atol=1e-5)
    assert difference(found, expected) < 1e-4


# ---- what is kept


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_the_input_is_kept_once_and_a_narrow_product(dropout: float) -> None:
    pair = made(lora_dropout=dropout).train()
    own = {p.data_ptr() for p in pair.parameters()}
    kept: dict[int, torch.Size] = {}
    x = torch.randn(50, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.shape}) or t, lambda t: t):
        outputs = [pair.first(x), pair.second(x)]
    assert sorted(shape for at, shape in kept.items() if at not in own) == [(50, RANK), (50, RANK), (50, IN)]
    assert kept[x.data_ptr()] == (50, IN) and len(outputs) == 2


# ---- dropout


def dropping(p: float) -> Any:
    """A layer without weights below, whose adapter is the identity: its output is its dropped-out input."""
    layer = made(r=IN, lora_alpha=IN, lora_dropout=p).train().first
    nn.init.zeros_(layer.base_layer.weight)
    layer.lora_A.default.weight.data = torch.eye(IN)
    layer.lora_B.default.weight.data = torch.eye(OUT, IN)
    return layer


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_with_its_probability_and_scales_the_rest(p: float) -> None:
    layer, x = dropping(p), torch.rand(1001, IN) + 1
    dropped = layer(x)[:, :IN]
    zero = dropped == 0
    torch.testing.assert_close(dropped[~zero], x[~zero] / (1 - p), rtol=1e-3, atol=0)
    deviation = (p * (1 - p) / zero.numel()) ** 0.5
    assert abs(float(zero.double().mean()) - p) < 4 * deviation
    assert (zero.double().mean(0) - p).abs().max() < 5 * deviation * IN**0.5  # in every column
    neighbours = (zero[:, 1:] & zero[:, :-1]).double().mean()  # and one does not tell of the next
    assert abs(float(neighbours) - p * p) < 5 * deviation
    layer.eval()
    torch.testing.assert_close(layer(x)[:, :IN], x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(IN,), (7, IN), (1, 33, IN)])
def test_gradients_under_dropout_are_those_of_the_same_mask(shape: tuple[int, ...]) -> None:
    class Mask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * factor

    bare = dropping(0.4)
    torch.manual_seed(5)
    factor = bare(torch.ones(shape)).detach()[..., :IN]
    assert 0.1 < float((factor == 0).double().mean()) < 0.7
    layer, x, upstream = made(lora_dropout=0.4).train().first, torch.randn(shape, requires_grad=True), torch.randn(OUT)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    out, found = gradients(layer, x, upstream)
    layer.lora_dropout["default"] = Mask()
    right, expected = gradients(layer, x, upstream)
    torch.testing.assert_close(out, right, rtol=1e-3, atol=1e-5)
    assert difference(found, expected) < 1e-4
    assert not torch.equal(state, torch.get_rng_state())


def test_masks_follow_the_generator_and_differ_by_layer() -> None:
    layer, x = dropping(0.5), torch.ones(50, IN)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first) and not torch.equal(second, first)


def test_checkpointing_repeats_the_masks(tiny_embedder: Callable[..., Embedder], runs: list[int]) -> None:
    model = tiny_embedder("mean").add_lora(RANK, 2 * RANK, 0.3)
    model.network.train()
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)

    def step(seed: int) -> dict[str, Tensor]:
        model.network.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        model.embed(model.tokenize(TEXTS))[:, :7].sum().backward()
        return {n: p.grad for n, p in model.network.named_parameters() if p.grad is not None}

    plain, other = step(3), step(4)
    once = len(runs) // 2
    model.network.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    again = step(3)
    assert len(runs) == 4 * once
    assert difference(again, plain) < 1e-5 < 0.1 < difference(other, plain)


# ---- all else is peft's


def _merged(pair: Any) -> None:
    pair.first.merge()


def _switched_off(pair: Any) -> None:
    pair.first.enable_adapters(False)


def _two_adapters(pair: Any) -> None:
    pair.first.update_layer("other", r=2, lora_alpha=2, config=LoraConfig(init_lora_weights=False))
    pair.first.set_adapter(["default", "other"])


def _none_chosen(pair: Any) -> None:
    pair.first.set_adapter([])


def _a_base_that_trains(pair: Any) -> None:
    pair.first.base_layer.weight.requires_grad = True


def _a_base_of_another_kind(pair: Any) -> None:
    pair.first.base_layer.__class__ = type("Own", (nn.Linear,), {})


def _another_dropout(pair: Any) -> None:
    pair.first.lora_dropout["default"] = nn.Sequential(nn.Identity())


def _a_dropout_of_everything(pair: Any) -> None:
    pair.first.lora_dropout["default"] = nn.Dropout(1.0)


def _a_hook(pair: Any) -> None:
    pair.first.base_layer.register_forward_hook(lambda _, __, out: 2 * out)


def _bf16_without_autocast(pair: Any) -> None:
    pair.first.base_layer.bfloat16()


def _float64_adapters(pair: Any) -> None:
    pair.first.lora_A.default.double(), pair.first.lora_B.default.double()


FALLBACKS = (
    _merged,
    _switched_off,
    _two_adapters,
    _none_chosen,
    _a_base_that_trains,
    _a_base_of_another_kind,
    _another_dropout,
    _a_dropout_of_everything,
    _a_hook,
    _bf16_without_autocast,
    _float64_adapters,
)


@pytest.mark.parametrize("unusual", FALLBACKS)
def test_what_is_unusual_is_left_to_peft(unusual: Callable[[Any], None], runs: list[int]) -> None:
    pair = made().train()
    unusual(pair)
    x = torch.randn(5, IN, dtype=pair.first.base_layer.weight.dtype)
    out = pair.first(x)
    assert not runs
    with stock(pair):
        assert torch.equal(out, pair.first(x))
    pair.second(x.float())
    assert len(runs) == 1


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_variants_are_left_to_peft(options: dict[str, Any], runs: list[int]) -> None:
    pair, x = made(bias=True, **options), torch.randn(5, IN)
    out = pair(x)
    assert not runs
    with stock(pair):
        assert torch.equal(out, pair(x))


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_autocast_on_float32_weights_and_empty_inputs_are_left_to_peft(
    has_bfloat16: bool, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "has_product", lambda dtype: has_bfloat16 and dtype != torch.float32)
    pair, x = made(), torch.randn(5, IN)
    with torch.autocast("cpu", torch.bfloat16):
        out = pair(x)
        with stock(pair):
            assert torch.equal(out, pair(x))
    assert out.dtype == torch.bfloat16 and pair(x[:0]).shape == (0, OUT)
    assert not runs
    assert pair(x).dtype == torch.float32 and len(runs) == 2


def test_arguments_are_passed_on(runs: list[int]) -> None:
    layer, x = made().eval().first, torch.randn(3, IN)
    names = ["default", "__base__", "default"]
    with torch.no_grad():
        out = layer(x, adapter_names=names)
        torch.testing.assert_close(out[1], layer.base_layer(x)[1])
    assert not runs


# ---- the module stays what it is


def test_names_weights_and_copies_are_as_they_were() -> None:
    pair = made()
    ours = list(pair.state_dict())
    with stock(pair):
        assert list(pair.state_dict()) == ours
    twin = copy.deepcopy(pair)
    twin.first.lora_B.default.weight.data.zero_()
    x = torch.randn(5, IN)
    torch.testing.assert_close(twin.first(x), pair.first.base_layer(x))
    assert not torch.allclose(pair.first(x), twin.first(x), atol=1e-3)
