"""A model measured in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from embedwright.compress.measure import PASSES, count, measured
from embedwright.model.embedder import Embedder
from embedwright.model.quantized import INT4, INT8, Scheme, quantize_layers


def test_a_process_says_what_a_model_takes(tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    tiny_embedder("latent").save(tmp_path / "model")
    found = measured(str(tmp_path / "model"), ["How do tides work?"] * 20)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as stored:
        shapes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
    numbers = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        numbers += size
    assert found["parameters"] == numbers
    assert len(found["seconds"]) == PASSES and min(found["seconds"]) > 0
    assert 50e6 < found["peak_memory"] < 4e9  # torch alone takes more than that, and a tiny model little beside it


@pytest.mark.parametrize("scheme", [INT8, INT4])
def test_quantised_weights_are_as_many(tiny_decoder: Callable[..., Path], scheme: Scheme) -> None:
    model = Embedder.from_decoder(tiny_decoder("llama", intermediate_size=64), pooling="mean")
    before = count(model)
    quantize_layers(model.network, scheme)
    assert count(model) == before


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho some noise >&2\necho InputError: no such model >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    with pytest.raises(RuntimeError, match=r"that measured m failed: InputError: no such model$"):
        measured("m", ["x"])
