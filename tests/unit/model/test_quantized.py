"""Linear layers in few bits, against a plain computation, and what becomes of a network that has them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.model.quantized import (
    INT4,
    INT8,
    QuantizedLinear,
    Scheme,
    compute_in_float32,
    has_quantized_layers,
    quantize_layers,
    quantized,
    rotated,
)

EIGHT, FOUR = Scheme(bits=8), Scheme(bits=4)  # without a rotation
TEXTS = ["tides", "a longer text, which says nothing of note", "and one more"]


def by_hand(weight: Tensor) -> Tensor:
    """Each row is rounded to multiples of its largest size over 127, number by number."""
    rounded = weight.clone()
    for row in rounded.numpy():
        scale = np.float32(np.abs(row).max() / np.float32(127))
        row[:] = np.round(row / scale) * scale if scale else 0
    return rounded


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_8_bits_holds_the_nearest_codes(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 20, bias=bias)
    with torch.no_grad():
        linear.weight[3], linear.weight[4, :32] = 0, 0
        linear.weight[5, 7] = 9.0  # the codes of its row are few
    layer, expected = quantized(linear, EIGHT), by_hand(linear.weight.detach())
    torch.testing.assert_close(layer.dequantized(torch.float32), expected, rtol=1e-6, atol=1e-7)
    assert layer.codes.dtype == torch.int8 and layer.codes.shape == (20, 48) and layer.scales.shape == (20, 1)
    check_layer(layer, linear, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_4_bits_holds_the_nearest_codes(bias: bool) -> None:
    """Of all products of a step and a code from -8 to 7, those of its own steps; read by hand from codes and steps."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias)
    with torch.no_grad():
        linear.weight[3], linear.weight[4, :32] = 0, 0
    layer = quantized(linear, FOUR)
    assert layer.codes.dtype == torch.uint8 and layer.codes.shape == (40, 48) and layer.steps is not None
    codes = np.concatenate([layer.codes.numpy() % 16, layer.codes.numpy() // 16], axis=1).astype(np.int8) - 8
    steps = layer.scales * layer.steps.repeat_interleave(32, 1)
    expected = torch.from_numpy(codes) * steps
    torch.testing.assert_close(layer.dequantized(torch.float32), expected, rtol=1e-6, atol=1e-7)
    nearest = (torch.arange(-8, 8)[:, None, None] * steps - linear.weight).abs().amin(0)
    torch.testing.assert_close((expected - linear.weight).abs(), nearest, rtol=0, atol=1e-7)
    check_layer(layer, linear, expected)


@pytest.mark.parametrize(
    ("inputs", "rotation", "block"), [(48, 64, 16), (64, 64, 64), (48, 1, 1), (192, 32, 32), (31, 8, 1)]
)
def test_a_rotation_changes_no_product_and_spreads_outliers(inputs: int, rotation: int, block: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, 20), torch.randn(7, inputs)
    with torch.no_grad():
        linear.weight[:, 3] *= 100
    layer = quantized(linear, Scheme(bits=8, rotation=rotation))
    assert layer.rotation == block
    matrix = torch.ones(1, 1)
    while len(matrix) < block:  # Sylvester's
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    whole = torch.block_diag(*[matrix / block**0.5] * (inputs // block))
    torch.testing.assert_close(rotated(x, block), x @ whole)
    torch.testing.assert_close(rotated(rotated(x, block), block), x)
    torch.testing.assert_close(layer.dequantized(torch.float32), (layer.codes * layer.scales) @ whole)
    if block > 1:
        off, plain = ((one(x) - linear(x)).norm() for one in (layer, quantized(linear, EIGHT)))
        assert off < plain
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=0.05 * float(linear(x).detach().abs().max()))


def check_layer(layer: QuantizedLinear, linear: nn.Linear, expected: Tensor) -> None:
    assert (layer.in_features, layer.out_features) == (linear.in_features, linear.out_features)
    x = torch.randn(2, 3, linear.in_features)
    torch.testing.assert_close(layer(x), F.linear(x, expected, linear.bias), rtol=1e-5, atol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    names = {"codes", "scales", *(["steps"] if layer.bits == 4 else []), *([] if linear.bias is None else ["bias"])}
    assert not list(layer.parameters()) and set(layer.state_dict()) == names


def test_the_weight_does_not_depend_on_settings_of_torch() -> None:
    layer = quantized(nn.Linear(64, 32), INT8)
    expected = layer.dequantized(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.dequantized(torch.float32), expected)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(layer.dequantized(torch.float32), expected)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_a_cast_of_the_network_leaves_the_weights(cast: str) -> None:
    layer = quantized(nn.Linear(64, 32), FOUR)
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    after = getattr(nn.Sequential(layer), cast)()[0].state_dict()
    assert all(after[name].dtype == x.dtype and torch.equal(after[name], x) for name, x in before.items())
    assert layer.to("meta", torch.bfloat16).scales.is_meta


def test_the_search_of_steps_lowers_the_error() -> None:
    """Against an exact scale for each group, by which its largest weight is the largest code: no search, no steps."""
    torch.manual_seed(0)
    linear = nn.Linear(1024, 64)
    weight = nn.init.normal_(linear.weight.detach())
    groups = weight.view(64, -1, 32)
    plain = groups.abs().amax(-1, keepdim=True) / 7
    before = ((groups / plain).round() * plain - groups).square().sum()
    after = (quantized(linear, FOUR).dequantized(torch.float32) - weight).square().sum()
    assert after < 0.8 * before


def test_a_large_layer_is_multiplied_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = nn.Linear(64, 40), torch.randn(3, 64)
    layer = quantized(linear, FOUR)
    whole = layer(x)
    monkeypatch.setattr("embedwright.model.quantized._SLICE", 64 * 7)  # seven rows at a time
    torch.testing.assert_close(layer(x), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(quantized(linear, FOUR).codes, layer.codes)


@pytest.mark.parametrize("fault", ["odd", "nan"])
def test_what_cannot_be_quantised_is_refused_by_name(fault: str, tiny_embedder: Callable[..., Embedder]) -> None:
    network = tiny_embedder("mean", "llama").network
    up: nn.Linear = network.backbone.layers[1].mlp.up_proj
    with torch.no_grad():
        up.weight[0, 0] = float("nan") if fault == "nan" else 1.0
    if fault == "odd":
        network.backbone.layers[1].mlp.up_proj = nn.Linear(31, 48)
    with pytest.raises(InputError, match=r"layers\.(1\.mlp\.up_proj|0\.mlp\.down_proj)"):
        quantize_layers(network, INT4 if fault == "odd" else INT8)


def test_a_network_keeps_embeddings_norms_and_head(tiny_embedder: Callable[..., Embedder], family: str) -> None:
    model = tiny_embedder("latent", family)
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    linear = {n for n, m in model.network.backbone.named_modules() if isinstance(m, nn.Linear)}
    assert linear and not has_quantized_layers(model.network)
    plain = model.encode(TEXTS)
    quantize_layers(model.network)
    assert has_quantized_layers(model.network)
    layers = {n: m for n, m in model.network.backbone.named_modules() if isinstance(m, QuantizedLinear)}
    assert layers.keys() == linear
    left = dict(model.network.named_parameters())
    assert before.keys() - left.keys() == {
        f"backbone.{n}.{leaf}" for n in linear for leaf in ("weight", "bias") if f"backbone.{n}.{leaf}" in before
    }
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in left.items())
    moved = 1 - (plain * model.encode(TEXTS)).sum(1)
    assert 0 < moved.max() < 0.01  # another model, and a near one


def test_a_wide_network_computes_in_float32_from_a_table_in_16_bits(
    tiny_embedder: Callable[..., Embedder], family: str
) -> None:
    model = tiny_embedder("mean", family, dtype="bfloat16")
    quantize_layers(model.network)
    compute_in_float32(model.network)
    table = model.network.backbone.get_input_embeddings()
    types = {p.dtype for p in model.network.backbone.parameters() if p is not table.weight}
    assert table.weight.dtype == torch.bfloat16 and types == {torch.float32}
    seen: set[torch.dtype] = set()
    for layer in model.network.backbone.layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.add(args[0].dtype), with_kwargs=True)
    model.encode(TEXTS)
    assert seen == {torch.float32}
