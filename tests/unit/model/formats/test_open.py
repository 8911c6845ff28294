"""What `Embedder.load` refuses to open. What it opens: the test of each format, and `interop/test_save.py`."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from embedwright.model.embedder import Embedder


def test_what_is_no_embedder_says_so(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Embedder.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Embedder.load(tmp_path)
    with pytest.raises(ValueError, match=r"is not an embedder that we know: use Embedder\.from_decoder"):
        Embedder.load(tiny_decoder("llama"))


@pytest.mark.parametrize(("pooling", "name"), [("latent", "head.latents"), ("mean", "layers.1.mlp.up_proj.weight")])
def test_a_lost_weight_is_an_error(
    pooling: Any, name: str, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    tiny_embedder(pooling).save(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        Embedder.load(tmp_path / "saved")


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux lists what a process maps")
def test_int8_lets_go_of_the_file_that_it_was_made_from(tmp_path: Path, tiny_embedder: Callable[..., Embedder]) -> None:
    tiny_embedder("latent").save(tmp_path / "model")
    mapped = lambda: str(tmp_path / "model") in Path("/proc/self/maps").read_text()  # noqa: E731
    low = Embedder.load(tmp_path / "model", dtype="int8", device="cpu")
    gc.collect()
    assert not mapped() and low.encode(["text"]).shape == (1, 32)
    whole = Embedder.load(tmp_path / "model", device="cpu")
    assert mapped() and whole.encode(["text"]).shape == (1, 32)
