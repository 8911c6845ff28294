"""Quantised layers in int8, against the same numbers in float64, and faults planted in each piece."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedwright.cpu import int8, kernels
from embedwright.cpu.accelerate import accelerate, accelerate_unproven, accelerated, fault, stock
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.model.quantized import QuantizedLinear, Scheme, has_quantized_layers, quantized, rotated
from embedwright.model.verify.doctor import examine

Patch = pytest.MonkeyPatch
SIZES = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 96}
TEXTS = ["tides", "a longer text, which says nothing of note", "and one more"]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "phi3")


@pytest.fixture(autouse=True)
def needs_int8() -> None:
    if not kernels.int8_available():
        pytest.skip(f"products of int8: {kernels.int8_fault()}")


@pytest.fixture(scope="module")
def saved(tiny_decoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved(family)`: a folder of an embedder that the kernels take."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("int8") / family
            Embedder.from_decoder(tiny_decoder(family, **SIZES), pooling="mean").save(made[family])
        return made[family]

    return make


# ---- rows


def hadamard(size: int) -> Tensor:
    """Sylvester's, scaled to length 1."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotation", [1, 16, 32, 64])
def test_rows_become_whole_numbers(rotation: int, dtype: torch.dtype) -> None:
    x = (torch.randn(37, 192, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    x[5], x[6, 7] = 0, 1e4
    exact = (x.double().view(37, -1, rotation) @ hadamard(rotation)).view(37, 192)
    rows = kernels.quantize_rows(x, rotation)
    scale = exact.abs().amax(1) / 127
    torch.testing.assert_close(rows.scale_T.double(), scale, rtol=1e-6, atol=0)
    held = rows.codes_TD.double() * scale[:, None]
    assert ((held - exact).abs() <= 0.50001 * scale[:, None]).all()
    assert rows.codes_TD.int().abs().amax(1).eq(127).sum() == 36 and not rows.codes_TD[5].any()
    assert torch.equal(rows.total_T.long(), rows.codes_TD.long().sum(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_gives_nothing_finite(bad: float) -> None:
    x = torch.ones(3, 32)
    x[1, 7] = bad
    layer = quantized(nn.Linear(32, 16), Scheme(bits=8))
    accelerate_unproven(layer)
    with torch.inference_mode():
        found = layer.eval()(x)
    assert found.isfinite().all(1).tolist() == [True, False, True]


# ---- products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [16, 48, 64, 112, 192])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 16), (7, 80), (401, 64), (1030, 192)])
def test_a_product_is_exact(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=random)
    codes = torch.randint(-127, 128, (outputs, inputs), generator=random, dtype=torch.int8)
    scales, bias = torch.rand(outputs, generator=random), torch.randn(outputs, generator=random)
    made = kernels.quantize_rows(x, 1)
    exact = (made.codes_TD.double() * made.scale_T[:, None]) @ (codes.double() * scales[:, None]).t() + bias
    found = kernels.int8_product(made, codes, scales, bias, dtype)
    assert found.dtype == dtype
    near = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=near, atol=1e-5 * float(exact.abs().max()))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(found, kernels.int8_product(made, codes, scales, bias, dtype))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("outputs", [16, 48, 96])
def test_a_gated_product_is_rounded_once(outputs: int, gelu: bool) -> None:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (2, outputs, 80), generator=random, dtype=torch.int8)
    scales = torch.rand(2, outputs, generator=random) / 8  # gates from -200 to 200
    made = kernels.quantize_rows(torch.randn(390, 80, generator=random), 1)
    x = made.codes_TD.double() * made.scale_T[:, None]
    gate, up = (x @ (one * scale[:, None]).double().t() for one, scale in zip(codes, scales, strict=True))
    exact = (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
    assert gate.min() < -100 and gate.max() > 100
    found = kernels.int8_gated(made, (codes[0], scales[0]), (codes[1], scales[1]), gelu)
    torch.testing.assert_close(found.double(), exact, rtol=1.1 * 2.0**-8, atol=1e-6)


@pytest.mark.parametrize("case", ["gradients", "training", "autocast", "float16", "width", "empty", "scales", "double"])
def test_all_else_is_the_dequantised_weight(case: str, monkeypatch: Patch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("int8 was asked")

    monkeypatch.setattr(kernels, "int8_product", refuse)
    layer = quantized(nn.Linear(24 if case == "width" else 32, 16), Scheme(bits=8)).eval()
    if case in ("scales", "double"):  # as a file or `load_state_dict(..., assign=True)` may have them
        layer.scales = layer.scales.to(torch.bfloat16 if case == "scales" else torch.float64)
    plain = QuantizedLinear(layer.codes, layer.scales, None, layer.bias)
    accelerate_unproven(layer)
    assert type(layer) is int8.Int8Linear
    x = torch.randn(0 if case == "empty" else 5, layer.in_features)
    x = x.half() if case == "float16" else x
    layer.train(case == "training")
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", enabled=case == "autocast"):
        assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("bias", [False, True])
def test_4_bits_multiply_in_whole_numbers_a_few_rows_at_a_time(bias: bool, monkeypatch: Patch) -> None:
    """The product is that of the dequantised weights with the inputs that were rounded."""
    torch.manual_seed(0)
    monkeypatch.setattr("embedwright.model.quantized._SLICE", 64 * 32)  # 32 rows
    layer = quantized(nn.Linear(64, 112, bias=bias), Scheme(bits=4)).eval()
    x = torch.randn(7, 64)
    rows = kernels.quantize_rows(x, 1)
    expected = layer(rows.codes_TD * rows.scale_T[:, None])
    accelerate_unproven(layer)
    with torch.inference_mode(), int8.watched() as seen:
        found = layer(x)
    assert list(seen) == [layer]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---- whole models


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_int8_is_near_its_dequantised_self(family: str, saved: Callable[..., Path]) -> None:
    model = Embedder.load(saved(family), dtype="int8")
    assert model.network.cpu_fault is None and fault(model.network) is None
    fast = [module for module in model.network.modules() if type(module) is int8.Int8Linear]
    assert fast and len(fast) == sum(isinstance(m, QuantizedLinear) for m in model.network.modules())
    with int8.watched() as seen:
        found = model.encode(TEXTS)
    assert seen.keys() == set(fast)  # each of them has multiplied in int8
    with stock(model.network) as twin:
        near = Embedder(twin, model.tokenizer).encode(TEXTS)
    exact = Embedder.load(saved(family)).encode(TEXTS)
    apart, moved = (1 - (found * other).sum(1).min() for other in (near, exact))
    assert 0 < apart < 0.02 and 0 < moved < 0.02


def test_vectors_do_not_depend_on_the_batch(saved: Callable[..., Path]) -> None:
    model = Embedder.load(saved("llama"), dtype="int8")
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    np.testing.assert_array_equal(model.encode(TEXTS), alone)


def test_the_doctor_finds_it_well(saved: Callable[..., Path]) -> None:
    bad = [finding for finding in examine(Embedder.load(saved("qwen3"), dtype="int8")) if not finding.ok]
    assert bad == []


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_a_cast_leaves_a_model_in_int8_near(cast: str, saved: Callable[..., Path]) -> None:
    model = Embedder.load(saved("llama"), dtype="int8")
    before = model.encode(TEXTS)
    getattr(model.network, cast)()
    assert 1 - (model.encode(TEXTS) * before).sum(1).min() < 0.001


def test_another_device_is_warned_of(
    saved: Callable[..., Path], monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Embedder, "device", torch.device("cuda"))  # as the model believes
    for dtype, warns in ((None, False), ("int8", True)):
        with caplog.at_level(logging.WARNING):
            Embedder.load(saved("llama"), dtype=dtype, device="cpu")
        assert ("dequantised" in caplog.text) == warns


def test_adapters_are_merged_first(saved: Callable[..., Path], tmp_path: Path) -> None:
    model = Embedder.load(saved("llama")).add_lora(rank=2, alpha=4)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save(tmp_path / "adapter")
    found = Embedder.load(tmp_path / "adapter", dtype="int8")
    model.merge().save(tmp_path / "merged")
    assert has_quantized_layers(found.network)
    np.testing.assert_array_equal(found.encode(TEXTS), Embedder.load(tmp_path / "merged", dtype="int8").encode(TEXTS))


def test_what_a_model_in_int8_cannot_do_is_said(saved: Callable[..., Path]) -> None:
    model = Embedder.load(saved("llama"), dtype="int8")
    with pytest.raises(InputError, match="dtype"):
        model.add_lora(rank=2)


def test_what_is_saved_is_in_int8_too(saved: Callable[..., Path], tmp_path: Path) -> None:
    model = Embedder.load(saved("llama"), dtype="int8")
    model.save(tmp_path / "model")
    model.to_sentence_transformer().save(str(tmp_path / "st"))
    for folder in ("model", "st"):
        np.testing.assert_array_equal(Embedder.load(tmp_path / folder).encode(TEXTS), model.encode(TEXTS))


def test_its_vectors_are_those_of_another_model(saved: Callable[..., Path]) -> None:
    plain, few = (Embedder.load(saved("llama"), dtype=dtype).fingerprint() for dtype in (None, "int8"))
    assert plain != few and "int8" in few["dtype"]
    assert few == Embedder.load(saved("llama"), dtype="int8").fingerprint()


def test_a_record_that_does_not_hold_stops_int8_too(saved: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    from embedwright.model.verify.probe import ProbeError

    folder = shutil.copytree(saved("llama"), tmp_path / "edited")
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProbeError, match="does not give the vectors"):
        Embedder.load(folder, dtype="int8")


# ---- faults


def _of_product(spoil: Callable[..., None]) -> Callable[[Patch], None]:
    """Spoils the arguments of a product: rows, weight, scales of outputs."""

    def plant(patch: Patch) -> None:
        for name in ("int8_product", "int8_gated"):
            right = getattr(kernels, name)

            def wrong(rows: kernels.QuantizedRows, first: Any, second: Any, *rest: Any, right: Any = right) -> Tensor:
                rows = kernels.QuantizedRows(*(x.clone() for x in rows))
                if isinstance(first, tuple):  # gate and up: the fault is in up
                    second = tuple(x.clone() for x in second)
                    spoil(rows, *second)
                else:
                    first, second = first.clone(), second.clone()
                    spoil(rows, first, second)
                return right(rows, first, second, *rest)

            patch.setattr(kernels, name, wrong)

    return plant


def _dropped_output(rows: Any, weight: Tensor, scales: Tensor) -> None:
    weight[-1] = 0


def _dropped_input(rows: Any, weight: Tensor, scales: Tensor) -> None:
    weight[:, 17] = 0


def _scale_of_an_output(rows: Any, weight: Tensor, scales: Tensor) -> None:
    scales.view(-1)[3] *= 1.05


def _scale_of_a_row(rows: Any, weight: Tensor, scales: Tensor) -> None:
    rows.scale_T[-1] *= 1.02


def _zero_point(rows: Any, weight: Tensor, scales: Tensor) -> None:
    """As if the weights stood 127 above zero, and not 128."""
    rows.total_T.mul_(127 / 128)


def _rounded_down(patch: Patch) -> None:
    """Numbers lose their fraction in place of being rounded."""
    right = kernels.quantize_rows

    def wrong(x: Tensor, rotation: int) -> Any:
        rows = right(x, rotation)
        codes = (rotated(x.float(), rotation) / rows.scale_T[:, None]).trunc().to(torch.int8)
        return kernels.QuantizedRows(codes, rows.scale_T, codes.sum(1, dtype=torch.int32))

    patch.setattr(kernels, "quantize_rows", wrong)


def _not_rotated(patch: Patch) -> None:
    right = kernels.quantize_rows
    patch.setattr(kernels, "quantize_rows", lambda x, _: right(x, 1))


def _gates(patch: Patch) -> None:
    right = kernels.int8_gated
    patch.setattr(kernels, "int8_gated", lambda rows, gate, up, gelu: right(rows, up, gate, gelu))


def _activation(patch: Patch) -> None:
    right = kernels.int8_gated
    patch.setattr(kernels, "int8_gated", lambda rows, gate, up, gelu: right(rows, gate, up, not gelu))


FAULTS: dict[str, Callable[[Patch], None]] = {
    "an output is dropped": _of_product(_dropped_output),
    "an input is dropped": _of_product(_dropped_input),
    "scale of an output": _of_product(_scale_of_an_output),
    "scale of a row": _of_product(_scale_of_a_row),
    "zero point": _of_product(_zero_point),
    "rounded down": _rounded_down,
    "not rotated": _not_rotated,
    "gate and up": _gates,
    "activation": _activation,
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.long)])
def test_a_fault_is_found(
    name: str, family: str, saved: Callable[..., Path], monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Embedder.load(saved(family), dtype="int8")
    expected = model.encode(TEXTS)
    assert accelerated(model.network)
    FAULTS[name](monkeypatch)
    with caplog.at_level(logging.WARNING):
        accelerate(model.network)
    assert model.network.cpu_fault is not None and model.network.cpu_fault in caplog.text
    assert accelerated(model.network) == []
    stays = model.encode(TEXTS)  # dequantised, by transformers' own code
    assert 1 - (stays * expected).sum(1).min() < 0.02


@pytest.mark.parametrize("layer", ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_a_fault_in_any_one_layer_is_found(layer: str, saved: Callable[..., Path], monkeypatch: Patch) -> None:
    """One scale in one layer, 5 % off."""
    model = Embedder.load(saved("llama"), dtype="int8")
    block = model.network.backbone.layers[1]
    own = getattr(block.mlp if hasattr(block.mlp, layer) else block.self_attn, layer).scales
    bad = own.clone()
    bad[int(own.argmax())] *= 1.05
    swap = lambda x: bad if isinstance(x, Tensor) and x.data_ptr() == own.data_ptr() else x  # noqa: E731
    for name in ("int8_product", "int8_gated"):
        right = getattr(kernels, name)

        def wrong(rows: Any, *rest: Any, right: Any = right) -> Tensor:
            return right(rows, *(tuple(map(swap, x)) if isinstance(x, tuple) else swap(x) for x in rest))

        monkeypatch.setattr(kernels, name, wrong)
    assert fault(model.network) is not None


def test_without_the_instructions_weights_are_dequantised(
    saved: Callable[..., Path], monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, real = Embedder.load(saved("llama"), dtype="int8").encode(TEXTS), kernels.library.load()

    class Without:
        def __getattr__(self, name: str) -> Any:
            if name == "product":
                raise AttributeError(name)
            return getattr(real, name)

    monkeypatch.setattr(kernels.library, "load", Without)
    kernels.int8_available.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            model = Embedder.load(saved("llama"), dtype="int8")
    finally:
        kernels.int8_available.cache_clear()
    assert caplog.text.count("VNNI") == 1 and model.network.cpu_fault is None
    assert not any(type(module) is int8.Int8Linear for module in model.network.modules())
    assert 1 - (model.encode(TEXTS) * expected).sum(1).min() < 0.02
