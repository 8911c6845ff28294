"""An embedder is told from a decoder. The outline of each format: tests/unit/training/run/test_start.py."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from embedwright.model.embedder import Embedder
from embedwright.model.formats.detect import (
    check_decoder,
    check_embedder,
    content_fingerprint,
    detect,
    warn_of_embedder,
)


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
    with pytest.raises(ValueError, match="is not an embedder"):
        check_embedder(decoder)
    for folder in map(str, folders):
        check_embedder(folder)
        with pytest.raises(ValueError, match=r"write model: \{from: "):
            check_decoder(folder)


def test_an_export_for_llama_cpp_is_told_from_a_decoder(
    tiny_embedder: Callable[..., Embedder], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Read as a bare decoder it would come back with another contract, mask rule and pooling."""
    pytest.importorskip("gguf")
    from embedwright.export.gguf import export_gguf

    file = tmp_path / "model.gguf"
    export_gguf(tiny_embedder("mean"), file)
    for refuses in (check_decoder, check_embedder, detect):
        with pytest.raises(ValueError, match=r"model\.gguf is an export of an embedder .* give the folder that it was"):
            refuses(str(file))
    with caplog.at_level(logging.WARNING):
        warn_of_embedder(str(file))  # of `from_decoder`, where it may be meant
    assert "is an embedder: its text contract and pooling are left out; the folder that it was made from" in caplog.text
