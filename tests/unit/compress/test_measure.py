"""A model measured in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from embedwright.compress.measure import PASSES, count, measured
from embedwright.encoders.open import open_model
from embedwright.model.embedder import Embedder
from embedwright.model.quantized import INT4, INT8, quantize_layers


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
    for scheme in (INT8, INT4):  # quantised weights are as many
        model = open_model(str(tmp_path / "model"))
        quantize_layers(model.network, scheme)
        assert count(model) == numbers
    assert len(found["seconds"]) == PASSES and min(found["seconds"]) > 0
    assert 50e6 < found["peak_memory"] < 4e9  # torch alone takes more than that, and a tiny model little beside it


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho some noise >&2\necho InputError: no such model >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    with pytest.raises(RuntimeError, match=r"that measured m failed: InputError: no such model$"):
        measured("m", ["x"])
