"""Products through oneDNN, and what happens on a machine that has none. Gradients: `test_linears.py`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from embedwright.cpu import onednn
from embedwright.cpu.onednn import available, gated_available, has_product, is_faster, linear


@pytest.fixture
def forgotten() -> Iterator[None]:
    for probe in (available, gated_available):
        probe.cache_clear()
    yield
    for probe in (available, gated_available):
        probe.cache_clear()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_the_product_is_right(rows: int, bias: bool) -> None:
    if not available():
        pytest.skip("oneDNN's linear is not there on this machine")
    x, weight, added = torch.randn(rows, 24), torch.randn(40, 24), torch.randn(40)
    exact = x.double() @ weight.double().t() + (added if bias else 0)
    torch.testing.assert_close(linear(x, weight, added if bias else None).double(), exact, rtol=0, atol=1e-5)


def test_a_type_is_converted_only_where_the_processor_cannot_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not available():
        pytest.skip("oneDNN's linear is not there on this machine")
    halves = (torch.bfloat16, torch.float16)
    for has in ((), halves[:1], halves):
        monkeypatch.setattr(onednn, "has_product", lambda dtype, has=has: dtype in has)
        assert [is_faster(x) for x in halves] == [x not in has for x in halves]
        assert is_faster(torch.float32) and not is_faster(torch.float64)
    monkeypatch.setattr(onednn, "available", lambda: False)
    assert not is_faster(torch.bfloat16) and not is_faster(torch.float32)


@pytest.mark.parametrize(
    ("dtype", "op", "instructions"),
    [
        (torch.bfloat16, "_is_mkldnn_bf16_supported", ("avx512_bf16", "amx_bf16", "avx_ne_convert")),
        (torch.float16, "_is_mkldnn_fp16_supported", ("avx512_fp16", "amx_fp16", "avx_ne_convert")),
    ],
)
def test_a_processor_has_a_product_if_torch_and_its_instructions_say_so(
    dtype: torch.dtype, op: str, instructions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = has_product.__wrapped__
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, op, lambda supported=supported: supported, raising=False)
        for name in instructions:
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True}, raising=False)
            assert asked(dtype) == supported
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bw": True}, raising=False)
        assert not asked(dtype)
        monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
        assert asked(dtype) == supported
    assert not asked(torch.float32)
    monkeypatch.setattr(torch.ops.mkldnn, op, None)  # a torch without its private op
    assert not asked(dtype)


@pytest.mark.parametrize("fault", ["lacking", "other numbers", "other machine"])
def test_where_it_is_not_usable_that_is_said_once(
    fault: str, forgotten: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lacking(*_: Any) -> Any:
        raise AttributeError("no such op")

    if fault == "other machine":
        monkeypatch.setattr(onednn.platform, "machine", lambda: "arm64")
    else:
        monkeypatch.setattr(onednn, "linear", lacking if fault == "lacking" else lambda x, w, _: 1.01 * x @ w.t())
    with caplog.at_level(logging.WARNING):
        assert not available() and not available()
    assert len(caplog.records) == (0 if fault == "other machine" else 1)


@pytest.mark.parametrize("fault", ["lacking", "swish", "gelu"])
def test_fused_products_that_are_not_usable_leave_the_plain_ones(
    fault: str, forgotten: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not gated_available():
        pytest.skip("oneDNN's fused products are not there on this machine")
    gated_available.cache_clear()

    def lacking(*_: Any) -> Any:
        raise AttributeError("no such op")

    real = onednn.gated
    monkeypatch.setattr(
        onednn, "gated", lacking if fault == "lacking" else lambda *a: real(*a) * (1 + 0.1 * (fault in a))
    )
    with caplog.at_level(logging.WARNING):
        assert not gated_available() and not gated_available()
    assert len(caplog.records) == 1 and available()


def test_a_product_of_int8_that_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not onednn.int8_matmul_available():
        pytest.skip("this processor does not multiply int8 by itself")
    x, y = (torch.randint(-127, 128, (n, 4099), dtype=torch.int8) for n in (3, 50))
    assert torch.equal(onednn.int8_matmul(x, y), (x.double() @ y.double().t()).int())
    onednn.int8_matmul_available.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", lambda x, y: torch.zeros(len(x), y.shape[1], dtype=torch.int32))
    with caplog.at_level(logging.WARNING):
        assert not onednn.int8_matmul_available() and not onednn.int8_matmul_available()
    assert len(caplog.records) == 1 and available()
    onednn.int8_matmul_available.cache_clear()


GROWTH = """
import sys
sys.argv = ["embedwright"]  # whose caches are bounded
import embedwright, torch
from embedwright.cpu import onednn

def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024

onednn.available()
weight = torch.randn(192, 64)
with torch.inference_mode():
    product = lambda n: onednn.linear(torch.randn(n, 64), weight, None) if onednn.available() else None
    product(1)
    before = held()
    for n in range(2, 602):
        product(n)
        torch.nn.functional.linear(torch.randn(n, 64).bfloat16(), weight.bfloat16())
print(held() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_products_of_ever_new_shapes_take_no_more_memory() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    done = subprocess.run([sys.executable, "-c", GROWTH], env=kept, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150, done.stdout  # megabytes; unbounded it is more than 400
