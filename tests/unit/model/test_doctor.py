from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from embedwright.model import attention, doctor
from embedwright.model.embedder import Embedder
from embedwright.model.probe import ProbeError


@pytest.fixture
def folder(tmp_path: Path, tiny_embedder: Callable[..., Embedder]) -> Callable[..., Path]:
    """`folder("latent", **from_decoder's)`: a tiny saved model."""

    def make(pooling: str, **options: Any) -> Path:
        tiny_embedder(pooling, **options).save(tmp_path / "model")
        return tmp_path / "model"

    return make


def bad(findings: list[doctor.Finding]) -> list[str]:
    return [finding.name for finding in findings if not finding.ok]


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("word", ["bidirectional", "causal"])
@pytest.mark.parametrize("pooling", ["latent", "mean", "last"])
def test_a_healthy_model_passes(folder: Callable[..., Path], pooling: str, word: str, bos: bool) -> None:
    findings = doctor.examine(str(folder(pooling, attention=word, bos=bos)))
    assert bad(findings) == []
    assert findings[0].name == f"attention is {word}"
    assert len({finding.name for finding in findings}) == len(findings) == 6


@pytest.mark.parametrize("pooling", ["latent", "mean"])
def test_another_eos_than_the_tokenizers_is_found(folder: Callable[..., Path], pooling: str) -> None:
    path = folder(pooling)
    file = path / ("embedwright.json" if pooling == "mean" else "config.json")
    edit(file, lambda content: content["contract"].update(eos_id=7))
    assert bad(doctor.examine(str(path))) == ["EOS ends every text"]


def test_an_eos_that_the_model_does_not_know_is_refused(folder: Callable[..., Path]) -> None:
    path = folder("latent")
    edit(path / "config.json", lambda content: content["contract"].update(eos_id=9999))
    with pytest.raises(IndexError):
        doctor.examine(str(path))


def lie(monkeypatch: pytest.MonkeyPatch, really_causal: bool) -> None:
    """Attention that does not do what the config says, as after a change in a library."""
    allowed = attention.allowed

    def other(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
        return allowed(length, really_causal, window, device)

    monkeypatch.setattr(attention, "allowed", other)


@pytest.mark.parametrize("word", ["bidirectional", "causal"])
def test_attention_that_is_not_as_its_config_says_is_refused_and_found(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    path = folder("latent", attention=word)
    model = Embedder.load(path)
    lie(monkeypatch, really_causal=word == "bidirectional")
    with pytest.raises(ProbeError, match=r"attention is (not )?causal"):
        doctor.examine(str(path))
    monkeypatch.setattr(Embedder, "load", lambda _: model)  # loaded when all was well
    assert bad(doctor.examine(str(path))) == [f"attention is {word}"]


def test_a_query_template_that_is_pooled_is_found(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Embedder.load(folder("latent"))
    tokenize = model.tokenize

    def pooled_whole(texts: list[str], task: str | None = None) -> Any:
        packed = tokenize(texts, task=task)
        packed.pool_mask_T[:] = True
        return packed

    monkeypatch.setattr(model, "tokenize", pooled_whole)
    monkeypatch.setattr(Embedder, "load", lambda _: model)
    assert bad(doctor.examine("any")) == ["instruction is left out of pooling"]


def test_weights_that_do_not_fit_are_refused(folder: Callable[..., Path]) -> None:
    path = folder("latent")
    edit(path / "config.json", lambda content: content["backbone"].update(num_hidden_layers=4))
    with pytest.raises(ValueError, match="weights do not fit the config"):
        doctor.examine(str(path))


def test_the_environment_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.setattr(doctor, "version", lambda name: absent() if name == "peft" else "1.0")
    found = doctor.environment()
    assert found["torch"] == "1.0" and found["peft"] == "not installed"
    assert found["threads"].startswith("OMP_PROC_BIND=true")
    assert found["cores / torch threads"].endswith(f"/ {torch.get_num_threads()}")


def absent() -> str:
    raise doctor.PackageNotFoundError("peft")
