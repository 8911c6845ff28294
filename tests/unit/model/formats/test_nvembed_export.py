"""The released layout written back: the same tensors, settings and vectors, or a clear no."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

from embedwright.cli import main as cli
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.model.formats import nvembed_export as export
from embedwright.model.formats.nvembed_export import export_nvembed
from embedwright.model.verify.probe import ProbeError
from embedwright.text import Contract

FIXTURES = Path(__file__).parents[3] / "parity" / "fixtures"
VERSIONS = ["v1", "v2"]
TEXTS = ["a text", "  another, with spaces", "▁piece </s> inside", "", "naïve 漢字 🙂", "many words " * 30]
SETTINGS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)


def fixture_folder(version: str) -> Path:
    return FIXTURES / f"nvembed-tiny-{version}"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].numpy().tobytes() == b[n].numpy().tobytes()
        for n in a
    )


@pytest.fixture
def v2() -> Embedder:
    return Embedder.load(fixture_folder("v2"), dtype="float32", device="cpu")


# ---- the same folder


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_released_folder_comes_back(version: str, dtype: str | None, saved: bool, tmp_path: Path) -> None:
    """Its values are exact in float16, so every tensor comes back to the bit, in the type that it was stored in."""
    source, out = fixture_folder(version), tmp_path / "out"
    model = Embedder.load(source, dtype=dtype, device="cpu")
    if saved:
        model.save(tmp_path / "ours")
        model = Embedder.load(tmp_path / "ours", device="cpu")
        assert model.network.config.released["dtype"] == {"v1": "float32", "v2": "float16"}[version]
    export_nvembed(model, out)
    assert same_bytes(tensors(out), tensors(source))
    for name in SETTINGS:
        assert json.loads((out / name).read_text()) == json.loads((source / name).read_text()), name
    assert {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()} == {*SETTINGS, "model.safetensors"}
    stored, written = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (source, out))
    assert [stored.encode(t).ids for t in TEXTS] == [written.encode(t).ids for t in TEXTS]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_export_gives_the_references_vectors(version: str, tmp_path: Path) -> None:
    source = fixture_folder(version)
    export_nvembed(Embedder.load(source, dtype="float32", device="cpu"), tmp_path / "out")
    model = Embedder.load(tmp_path / "out", dtype="float32", device="cpu")
    described = json.loads((source / "expected.json").read_text())
    assert model.max_tokens == json.loads((source / "sentence_bert_config.json").read_text())["max_seq_length"]
    with np.load(source / "expected.npz") as expected:
        for name, case in described["cases"].items():
            texts = [described["texts"][i] for i in case["texts"]]
            vectors = model.encode(texts, prefix=case["instruction"], max_tokens=case["max_length"])
            np.testing.assert_allclose(vectors, expected[f"{name}/embeddings"], rtol=0, atol=1e-5)


def test_a_tuned_model_is_written_as_tuned(v2: Embedder, tmp_path: Path) -> None:
    v2.add_lora(rank=2, alpha=4)
    with torch.no_grad():
        for parameter in v2.network.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    v2.merge()
    export_nvembed(v2, tmp_path / "out")
    written = tensors(tmp_path / "out")
    assert {t.dtype for t in written.values()} == {torch.float16}
    assert not same_bytes(written, tensors(fixture_folder("v2")))
    expected, got = (m.encode(TEXTS, "a task") for m in (v2, Embedder.load(tmp_path / "out", dtype="float32")))
    assert (expected * got).sum(1).min() > 0.9999
    assert not np.allclose(got, Embedder.load(fixture_folder("v2"), dtype="float32").encode(TEXTS, "a task"), atol=1e-2)


def test_large_models_are_written_in_shards(v2: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_SHARD", "200KB")
    out = tmp_path / "out"
    export_nvembed(v2, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    source = tensors(fixture_folder("v2"))
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in source.values())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 3 and files == sorted(f.name for f in out.glob("*.safetensors"))
    for file in files:
        assert (out / file).stat().st_size < 270_000  # one tensor alone is larger than a shard may be
        with safe_open(out / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert {index["weight_map"][name] for name in shard.keys()} == {file}  # noqa: SIM118
    assert same_bytes(tensors(out), source)
    np.testing.assert_array_equal(Embedder.load(out, dtype="float32").encode(TEXTS), v2.encode(TEXTS))


def test_a_folder_without_its_small_files(tmp_path: Path) -> None:
    """The length is written in any case: the loader reads it."""
    source = shutil.copytree(fixture_folder("v1"), tmp_path / "v1")
    for name in ("sentence_bert_config.json", "special_tokens_map.json", "modules.json", "1_Pooling/config.json"):
        (source / name).unlink()
    export_nvembed(Embedder.load(source), tmp_path / "out")
    lengths = json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text())
    assert lengths == {"max_seq_length": 4096} and not (tmp_path / "out" / "modules.json").exists()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["embedwright", "export", *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    source, out = fixture_folder("v2"), tmp_path / "new" / "out"
    assert call(str(source), str(out), "--format", "nvembed") == 0
    assert same_bytes(tensors(out), tensors(source)) and str(out) in capsys.readouterr().out
    assert call(str(source), str(out)) == 2 and "not an empty folder" in capsys.readouterr().err
    assert call(str(source), str(tmp_path / "other"), "--format", "another") == 2


# ---- what the layout cannot express


Change = Callable[[Embedder], Any]


def another_contract(**changes: Any) -> Change:
    def change(model: Embedder) -> None:
        model.contract = Contract(**{**model.contract.model_dump(), **changes})

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Embedder.fold, "folded for inference: load the model again"),
        (lambda m: m.add_lora(rank=2), "LoRA adapters are not merged"),
        (
            another_contract(mask_rule="offsets"),
            "the text contract: mask_rule is 'offsets', but would be read as 'count'",
        ),
        (another_contract(query_template="{task}: "), "the text contract: query_template is '{task}: '"),
        (another_contract(bos_ids=()), "the text contract: bos_ids is"),
        (lambda m: setattr(m.network.config, "released", None), "does not come from a released NV-Embed folder"),
        (lambda m: m.network.backbone.config.update({"rope_parameters": {"rope_theta": 5e5}}), "rope_parameters is"),
        (lambda m: m.network.backbone.config.update({"rms_norm_eps": 1e-6}), "the decoder: rms_norm_eps is 1e-06"),
        (
            lambda m: setattr(m.network, "pooling", m.network.pooling.model_copy(update={"heads": 2})),
            "the pooling block: heads is 2, but would be read as 4",
        ),
    ],
)
def test_a_model_that_the_layout_cannot_express(change: Change, reason: str, v2: Embedder, tmp_path: Path) -> None:
    change(v2)
    with pytest.raises(ValueError, match=reason):
        export_nvembed(v2, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("pooling", "family", "reason"),
    [
        ("mlp", "mistral", "pooling is 'mlp': the layout knows 'latent' alone"),
        ("latent", "qwen3", "the decoder is a 'qwen3' model: the layout knows Mistral alone"),
        ("latent", "mistral", "mask_rule is 'offsets', but would be read as 'count'"),
    ],
)
def test_models_of_ours(
    pooling: str, family: str, reason: str, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        export_nvembed(tiny_embedder(pooling, family, bos=True), tmp_path / "out")


def test_layers_that_were_cut_off(v2: Embedder, tmp_path: Path) -> None:
    v2.network.backbone.layers = v2.network.backbone.layers[:1]
    v2.network.backbone.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="num_hidden_layers is 1, but would be read as 2"):
        export_nvembed(v2, tmp_path / "out")


@pytest.mark.parametrize("value", [1e5, float("nan")])
def test_weights_that_do_not_fit_the_stored_type_are_named(value: float, v2: Embedder, tmp_path: Path) -> None:
    with torch.no_grad():
        v2.network.head.attention.to_q.weight[3, 5] = value
    with pytest.raises(ValueError, match=r"cross_attend_blocks\.0\.fn\.to_q\.weight does not fit torch\.float16: its"):
        export_nvembed(v2, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r, out: r["files"].update({"../evil.json": {}}), r"names the file '\.\./evil\.json'"),
        (lambda r, out: r["files"].update({str(out / "evil.json"): {}}), r"evil\.json"),
        (lambda r, out: r["files"].update({"1_Pooling/../../evil.json": {}}), r"evil\.json"),
        (lambda r, out: r["files"].update({"model.safetensors": {}}), r"model\.safetensors"),
        (lambda r, out: r["files"].update({"modeling_nvembed.py": {}}), r"modeling_nvembed\.py"),
        (lambda r, out: r["files"].update({"config.json": "text"}), r"no settings for config\.json, but a str"),
        (lambda r, out: r["files"].pop("config.json"), r"released needs files with a config\.json"),
        (lambda r, out: r.update(files=["config.json"]), "released needs files"),
        (lambda r, out: r.update(dtype="load"), "a dtype of float32, float16, bfloat16"),
        (lambda r, out: r.update(dtype="float64"), "a dtype of"),
    ],
)
def test_a_strangers_config_names_no_other_files(
    change: Callable[[Any, Path], Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Embedder.load(fixture_folder("v1")).save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    change(config["released"], tmp_path)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=match):
        export_nvembed(Embedder.load(tmp_path / "model"), tmp_path / "a" / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_not_empty(v2: Embedder, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        export_nvembed(v2, tmp_path)
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        export_nvembed(v2, tmp_path / "kept")
    assert [f.name for f in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export_nvembed(v2, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_model_that_is_not_sound_is_not_written(
    v2: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the probe refuses; here states that come out otherwise each time."""
    monkeypatch.setattr(v2.network, "hidden", lambda packed: torch.randn(len(packed.ids_T), 64))
    with pytest.raises(ProbeError):
        export_nvembed(v2, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
