"""What a new embedder is made from: one whole decoder, from one commit, and nothing that lies about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from embedwright.encoders.open import open_encoder
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.model.formats.base import resolve_base

TEXTS = ["how do tides work?", "the moon"]


@pytest.fixture
def base(tiny_decoder: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a decoder that may be changed, untied, in one file."""
    return Path(shutil.copytree(tiny_decoder("llama"), tmp_path / "base"))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def mean_of(folder: Any, **options: Any) -> Embedder:
    return Embedder.from_decoder(folder, pooling="mean", **options)


@pytest.mark.parametrize("layout", ["shards", "tied"])
def test_shards_and_tied_embeddings_give_the_same_model(
    layout: str, base: Path, tmp_path: Path, tiny_decoder: Callable[..., Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    if layout == "tied":
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    shutil.copytree(base, tmp_path / layout)
    (tmp_path / layout / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / layout, max_shard_size="40KB" if layout == "shards" else "1GB")
    assert (tmp_path / layout / "model.safetensors.index.json").exists() == (layout == "shards")
    found, expected = (mean_of(folder).encode(TEXTS) for folder in (tmp_path / layout, base))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), r"lacks 1 weights, e\.g\. layers\.1\.mlp\.up_proj"),
        (lambda w: w.pop("model.norm.weight"), "lacks 1 weights"),
        (lambda w: w.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(48, 32)}), "1 weights have no place"),
        (lambda w: w.update({"model.layers.0.extra.weight": torch.zeros(3)}), r"e\.g\..*layers\.0\.extra"),
        (lambda w: w.update({"score.weight": torch.zeros(3)}), "score"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"norm\.weight has the shape \[3\]"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(32).long()}), "stored as I64"),
    ],
)
def test_every_weight_has_a_place_and_every_place_a_weight(
    change: Callable[[Any], Any], match: str, base: Path
) -> None:
    edit_weights(base, change)
    with pytest.raises(InputError, match=match):
        mean_of(base)


def test_layers_that_are_cut_on_purpose_and_the_lm_head_are_left_out(base: Path) -> None:
    assert mean_of(base, layers=2).network.backbone.config.num_hidden_layers == 2
    edit_config(base, num_hidden_layers=2)
    with pytest.raises(InputError, match=r"9 weights have no place in a 'llama' model of 2 layers"):
        mean_of(base)


def test_an_adapter_is_no_base(base: Path) -> None:
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere/model", "peft_type": "LORA"}')
    with pytest.raises(InputError, match="is an adapter, not a decoder"):
        resolve_base(base)


def test_weights_that_torch_would_unpickle_are_not_read(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        mean_of(base)


@pytest.mark.parametrize(
    "values", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"rms_norm_eps": None}, {"hidden_act": "os.system"}]
)
def test_a_config_that_makes_no_model(values: dict[str, Any], base: Path) -> None:
    edit_config(base, **values)
    with pytest.raises(InputError, match=str(base)):
        mean_of(base)


@pytest.mark.parametrize("damage", ["absent", "{}", '{"model": {"type": "BPE"}}', "[3"])
def test_a_tokenizer_that_cannot_be_opened(damage: str, base: Path) -> None:
    (base / "tokenizer.json").unlink()
    if damage != "absent":
        (base / "tokenizer.json").write_text(damage)
    with pytest.raises(InputError, match="has no tokenizer that can be opened"):
        mean_of(base)


# ---- revisions


@pytest.fixture
def hub(tiny_decoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of `org/name` as huggingface_hub keeps it: `main` and `v1` differ in config, weights, tokenizer."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--name"
    for folder in ("blobs", "refs"):
        (repo / folder).mkdir(parents=True)
    for commit, ref, source in (
        ("a" * 40, "v1", tiny_decoder("llama")),
        ("b" * 40, "main", tiny_decoder("qwen3", True)),
    ):
        (repo / "refs" / ref).write_text(commit)
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in source.iterdir():
            shutil.copy(file, repo / "blobs" / f"{ref}-{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/{ref}-{file.name}")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "revision", "kind"),
    [
        ("org/name", None, "qwen3"),
        ("org/name", "v1", "llama"),
        ("org/name@v1", None, "llama"),
        ("org/name", "a" * 40, "llama"),
    ],
)
def test_one_commit_gives_config_weights_and_tokenizer(
    name: str, revision: str | None, kind: str, hub: Path, tiny_decoder: Callable[..., Path]
) -> None:
    model = mean_of(name, revision=revision)
    expected = mean_of(tiny_decoder(kind, kind == "qwen3"))
    assert model.network.backbone.config.model_type == kind
    np.testing.assert_array_equal(model.encode(TEXTS), expected.encode(TEXTS))


def test_an_adapter_finds_the_commit_of_its_base(hub: Path, tmp_path: Path) -> None:
    model = mean_of("org/name", revision="v1").add_lora(rank=2)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] == "v1"
    np.testing.assert_allclose(Embedder.load(tmp_path / "adapter").encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_a_saved_model_opens_at_a_revision(hub: Path, tmp_path: Path, tiny_embedder: Callable[..., Embedder]) -> None:
    repo = tmp_path / "models--org--embedder"
    (repo / "refs").mkdir(parents=True)
    vectors = {}
    for commit, ref, pooling in (("c" * 40, "v1", "latent"), ("d" * 40, "main", "mean")):
        model = tiny_embedder(pooling)
        (repo / "refs" / ref).write_text(commit)
        model.save(repo / "snapshots" / commit)
        vectors[ref] = model.encode(TEXTS)
    for found, ref in (
        (Embedder.load("org/embedder"), "main"),
        (Embedder.load("org/embedder", revision="v1"), "v1"),
        (open_encoder("org/embedder@v1"), "v1"),
        (open_encoder("org/embedder", "main"), "main"),
    ):
        np.testing.assert_allclose(found.encode(TEXTS), vectors[ref], atol=1e-5)


def test_a_local_folder_has_no_revision(base: Path) -> None:
    with pytest.raises(InputError, match="is for a hub id"):
        mean_of(base, revision="v1")


# ---- names


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m", "minilm"])
def test_a_local_folder_of_a_packaged_name_is_opened(
    name: str, base: Path, monkeypatch: pytest.MonkeyPatch, tiny_embedder: Callable[..., Embedder]
) -> None:
    monkeypatch.chdir(base.parent)
    base.rename(name)
    assert Path(resolve_base(name)).samefile(name)
    shutil.rmtree(name)
    model = tiny_embedder("mean")
    model.save(name)
    for opened in (open_encoder(name), Embedder.load(name)):
        np.testing.assert_allclose(opened.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
