"""An embedder is told from a decoder. The outline of each format: tests/unit/training/run/test_start.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from embedwright.model.embedder import Embedder
from embedwright.model.formats.detect import check_decoder, check_embedder, content_fingerprint


@pytest.fixture
def folders(tmp_path: Path, tiny_embedder: Callable[..., Embedder]) -> tuple[Path, Path]:
    """An embedder, and an adapter on it."""
    tiny_embedder("mean").save(tmp_path / "base")
    model = Embedder.load(tmp_path / "base").add_lora(2)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.1)
    model.save(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_fingerprint_follows_the_content(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    found = {content_fingerprint(str(base)), content_fingerprint(str(adapter))}
    assert len(found) == 2
    moved = Path(shutil.copytree(base, tmp_path / "elsewhere"))
    (moved / "README.md").write_text("a card\n")
    assert content_fingerprint(str(moved)) in found  # neither its place nor what nobody reads
    edit(base / "embedwright.json", note="x")
    found |= {content_fingerprint(str(base)), content_fingerprint(str(adapter))}  # an adapter's base is a part of it
    assert len(found) == 4
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert content_fingerprint(str(adapter)) not in found


def test_an_embedder_is_told_from_a_decoder(folders: tuple[Path, Path], tiny_decoder: Callable[..., Path]) -> None:
    decoder = str(tiny_decoder("llama"))
    check_decoder(decoder)
    with pytest.raises(ValueError, match="is no embedder"):
        check_embedder(decoder)
    for folder in map(str, folders):
        check_embedder(folder)
        with pytest.raises(ValueError, match=r"write model: \{from: "):
            check_decoder(folder)
