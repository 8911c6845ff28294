"""What the doctor says of healthy models, and how it says what is wrong; what it catches: test_doctor_faults.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from embedwright.model.embedder import Embedder
from embedwright.model.pooling import Kind
from embedwright.model.verify import by_hand, doctor


@pytest.fixture
def folder(tmp_path: Path, tiny_embedder: Callable[..., Embedder]) -> Callable[..., Path]:
    """`folder("latent", **tiny_embedder's)`: a tiny saved model."""

    def make(pooling: str, **options: object) -> Path:
        tiny_embedder(pooling, **options).save(tmp_path / "model")
        return tmp_path / "model"

    return make


def bad(findings: list[doctor.Finding]) -> dict[str, str]:
    return {finding.name: finding.detail for finding in findings if not finding.ok}


def detail(findings: list[doctor.Finding], name: str) -> str:
    return next(finding.detail for finding in findings if finding.name == name)


@pytest.mark.parametrize(
    ("pooling", "word", "bos"),
    [
        ("latent", "bidirectional", False),
        ("latent", "causal", True),
        *((kind, "bidirectional", True) for kind in get_args(Kind)),
        ("mean", "causal", False),
        ("last", "bidirectional", False),
        ("last", "causal", True),
        ("self", "causal", False),
    ],
)
def test_a_healthy_model_passes(folder: Callable[..., Path], pooling: str, word: str, bos: bool) -> None:
    findings = doctor.examine_name(str(folder(pooling, attention=word, bos=bos)))
    assert bad(findings) == {}
    assert detail(findings, "attention as configured, near").startswith(word)
    assert detail(findings, "own instruction").startswith("none")
    assert len({finding.name for finding in findings}) == len(findings) >= 15


@pytest.mark.parametrize("pooling", ["mean", "latent"])
def test_a_model_of_texts_shorter_than_an_instruction_is_saved_and_passes(
    pooling: str, folder: Callable[..., Path]
) -> None:
    assert bad(doctor.examine_name(str(folder(pooling, max_tokens=8)))) == {}


def test_a_length_that_sentence_transformers_alone_has_is_found(folder: Callable[..., Path]) -> None:
    saved = folder("mean", max_tokens=40)
    file = saved / "sentence_bert_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_seq_length": 16}))
    assert bad(doctor.examine_name(str(saved))) == {
        "through sentence-transformers": "it cuts texts at 16 tokens, not at 40"
    }


def test_every_family_passes(folder: Callable[..., Path], family: str) -> None:
    """Gemma without BOS is the one that must not."""
    bos = family.startswith("gemma")
    word = "causal" if family in ("qwen2", "gemma3") else "bidirectional"
    assert bad(doctor.examine_name(str(folder("latent", family=family, attention=word, bos=bos)))) == {}


def test_a_family_that_needs_bos_and_gets_none(folder: Callable[..., Path]) -> None:
    found = bad(doctor.examine_name(str(folder("latent", family="gemma"))))
    assert found == {"BOS as the tokenizer has it": "gemma needs one, but none is added"}


@pytest.mark.parametrize("name", ["qwen3-embedding", "e5-mistral", "gritlm", "bge-en-icl", "embeddinggemma"])
def test_embedders_of_others_pass(family_folder: Callable[[str], Path], name: str) -> None:
    findings = doctor.examine_name(str(family_folder(name)))
    assert bad(findings) == {} and len(findings) >= 3
    if name == "qwen3-embedding":
        assert detail(findings, "own instruction").startswith("'Given a web search query, retrieve")
    if name == "e5-mistral":
        assert detail(findings, "EOS ends every text").endswith("appended by id, the tokenizer alone adds none")


def test_an_embedder_that_loses_its_eos_is_a_finding(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    mine = Path(shutil.copytree(family_folder("e5-mistral"), tmp_path / "mine"))
    (mine / "config_sentence_transformers.json").unlink()  # nothing says its family any more
    assert "asks for EOS" in bad(doctor.examine_name(str(mine)))["opens"]


def test_an_untrained_head_is_told(folder: Callable[..., Path], tiny_decoder: Callable[..., Path]) -> None:
    fresh = Embedder.from_decoder(tiny_decoder("llama"), pooling="latent", latents=4, heads=2, multiple=1)
    assert "untrained: the identity" in detail(doctor.examine(fresh), "pooling block")
    assert "untrained" not in detail(doctor.examine_name(str(folder("latent"))), "pooling block")


def test_a_model_of_short_texts_passes(folder: Callable[..., Path]) -> None:
    """The doctor's own texts are cut there."""
    assert bad(doctor.examine_name(str(folder("latent", max_tokens=64)))) == {}


def test_half_precision_passes(folder: Callable[..., Path]) -> None:
    path = folder("latent")
    findings = doctor.examine(Embedder.load(path, dtype="bfloat16"), path)
    assert bad(findings) == {} and detail(findings, "one type, finite weights") == "bfloat16"


def test_an_adapter_passes(folder: Callable[..., Path], tmp_path: Path) -> None:
    model = Embedder.load(folder("latent")).add_lora(rank=2, alpha=4)
    for name, parameter in model.network.backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save(tmp_path / "adapter")
    findings = doctor.examine_name(str(tmp_path / "adapter"))
    assert bad(findings) == {} and "without it" in detail(findings, "adapter active")


def test_what_is_refused_when_opened_is_a_finding(folder: Callable[..., Path]) -> None:
    path = folder("latent")
    content = json.loads((path / "config.json").read_text())
    content["backbone"]["is_causal"] = True
    (path / "config.json").write_text(json.dumps(content))
    assert "saved with" in bad(doctor.examine_name(str(path)))["opens"]


def test_a_proof_that_cannot_be_carried_out_is_no_pass(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder("latent")
    model = Embedder.load(path)
    monkeypatch.setattr(by_hand, "text_hidden", lambda *_: torch.zeros(3)[7])
    assert bad(doctor.examine(model, path)) == {
        "packed = one by one, stock masks": "IndexError: index 7 is out of bounds for dimension 0 with size 3"
    }


def test_bad_input_is_not_a_finding(folder: Callable[..., Path]) -> None:
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        doctor.examine_name("./absent")
    path = folder("latent")
    content = json.loads((path / "config.json").read_text())
    content["backbone"]["num_hidden_layers"] = 4
    (path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"num_hidden_layers=4, but has weights for only"):
        doctor.examine_name(str(path))


def test_the_environment_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.setattr(doctor, "version", lambda name: absent() if name == "peft" else "1.0")
    found = doctor.environment()
    assert found["torch"] == "1.0" and found["peft"] == "not installed"
    assert found["threads"].startswith("OMP_PROC_BIND=true")
    assert found["cores / torch threads"].endswith(f"/ {torch.get_num_threads()}")


def absent() -> str:
    raise doctor.PackageNotFoundError("peft")
