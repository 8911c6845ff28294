"""A tiny model and its ONNX export, which takes seconds to trace: leave both as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from embedwright.export.onnx import export_onnx
from embedwright.model.embedder import Embedder

MAX_TOKENS = 40


@pytest.fixture(scope="session")
def latent(tiny_embedder: Callable[..., Embedder]) -> Embedder:
    return tiny_embedder("latent", "llama", bos=True, layers=1, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="session")
def exported(latent: Embedder, tmp_path_factory: pytest.TempPathFactory, onnx_packages: None) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "exported"
    (folder.parent / "said").write_text(export_onnx(latent, folder))
    return folder
