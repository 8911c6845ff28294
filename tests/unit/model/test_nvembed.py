"""What a folder that says it is NV-Embed is refused for. That it gives the reference's vectors: tests/parity."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedwright.model.embedder import Embedder
from embedwright.model.nvembed import is_nvembed, load_nvembed

FIXTURES = Path(__file__).parents[2] / "parity" / "fixtures"
INDEX = "model.safetensors.index.json"
LATENTS = "latent_attention_model.latents"


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    """A copy of the v1 folder, weights in one file."""
    return Path(shutil.copytree(FIXTURES / "nvembed-tiny-v1", tmp_path / "v1"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A copy of the v2 folder, weights in two files with an index."""
    return Path(shutil.copytree(FIXTURES / "nvembed-tiny-v2", tmp_path / "v2"))


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_it_is_known_by_its_model_type() -> None:
    assert is_nvembed({"model_type": "nvembed"})
    assert not is_nvembed({"model_type": "mistral"}) and not is_nvembed({})


# ---- settings


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(is_mask_instruction=False), "is_mask_instruction must be true"),
        (lambda c: c.update(padding_side="left"), "padding_side 'right'"),
        (lambda c: c["latent_attention_config"].update(output_normalize=False), "output_normalize is false"),
        (lambda c: c["text_config"].update(model_type="qwen2"), "'qwen2' model"),
    ],
)
def test_settings_that_we_do_not_follow_are_refused(change: Any, reason: str, one_file: Path) -> None:
    edit(one_file / "config.json", change)
    with pytest.raises(ValueError, match=reason):
        load_nvembed(one_file, torch.float32)


def test_missing_fields_come_from_defaults_and_shapes(one_file: Path) -> None:
    """The released latent_attention_config has no size at all, and nothing is known of v1's config."""
    expected = Embedder.load(one_file, dtype="float32").encode(["a text", "another"], "a task")

    def strip(config: dict[str, Any]) -> None:
        text = config["text_config"]
        config["text_config"] = {k: text[k] for k in ("num_attention_heads", "rms_norm_eps", "sliding_window")}
        config["latent_attention_config"] = {"model_type": "latent_attention", "num_cross_heads": 4}
        for key in ("is_mask_instruction", "padding_side", "auto_map", "architectures", "torch_dtype"):
            del config[key]

    edit(one_file / "config.json", strip)
    (one_file / "sentence_bert_config.json").unlink()
    model = Embedder.load(one_file, dtype="float32")
    assert model.max_tokens == 4096
    np.testing.assert_array_equal(model.encode(["a text", "another"], "a task"), expected)


# ---- weights


def test_missing_and_unexpected_tensors_are_named(one_file: Path) -> None:
    norm = "embedding_model.norm.weight"
    edit_weights(one_file, lambda w: w.pop(norm))
    with pytest.raises(ValueError, match=f"missing: {norm}"):
        Embedder.load(one_file)
    edit_weights(one_file, lambda w: w.update({norm: torch.ones(64), "lm_head.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"unexpected: lm_head\.weight"):
        Embedder.load(one_file)
    edit_weights(one_file, lambda w: (w.pop("lm_head.weight"), w.update({norm: torch.ones(63)})))
    with pytest.raises(ValueError, match=f"not of the shape that the config says: {norm}"):
        Embedder.load(one_file)
    edit_weights(one_file, lambda w: w.pop(LATENTS))
    with pytest.raises(ValueError, match=f"{LATENTS} is missing"):
        Embedder.load(one_file)


def test_a_layer_more_than_the_config_says_is_unexpected(one_file: Path) -> None:
    edit(one_file / "config.json", lambda c: c["text_config"].update(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"unexpected: embedding_model\.layers\.2\..* more"):
        Embedder.load(one_file)


def test_stored_rotary_buffers_are_passed_over(one_file: Path) -> None:
    name = "embedding_model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(one_file, lambda w: w.update({name: torch.ones(8)}))
    assert Embedder.load(one_file).embedding_dim == 64


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", 3])
def test_an_index_that_leaves_the_folder_is_refused(name: Any, shards: Path) -> None:
    save_file({LATENTS: torch.zeros(16, 64)}, shards.parent / "outside.safetensors")
    edit(shards / INDEX, lambda c: c["weight_map"].update({LATENTS: name}))
    with pytest.raises(ValueError, match=r"is not the name of a \.safetensors file in this folder"):
        Embedder.load(shards)


def test_files_that_are_not_there_or_not_whole(shards: Path) -> None:
    second = shards / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{second.name} is not a whole safetensors file"):
        Embedder.load(shards)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {second.name}"):
        Embedder.load(shards)
    (shards / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        Embedder.load(shards)


def test_one_tensor_in_two_files_is_refused(shards: Path) -> None:
    save_file({LATENTS: torch.zeros(16, 64)}, shards / "extra.safetensors")
    edit(shards / INDEX, lambda c: c["weight_map"].update({"other": "extra.safetensors"}))
    with pytest.raises(ValueError, match=f"{LATENTS} is in more than one file"):
        Embedder.load(shards)
