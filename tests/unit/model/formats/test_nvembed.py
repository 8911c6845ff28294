"""Folders that say they are NV-Embed: what may be missing or otherwise, and what is refused.

That the released layout gives the reference's vectors, in other sizes too: tests/parity.
"""

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
from embedwright.model.formats.nvembed import load_nvembed

FIXTURES = Path(__file__).parents[3] / "parity" / "fixtures"
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


TEXTS = ["a text", "  another, with spaces", "</s> inside", "many words " * 30]


def without(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda part: [part.pop(name, None) for name in names]


def of(part: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda config: change(config[part])


VARIATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no field at the top": lambda c: [
        c.pop(k) for k in set(c) - {"model_type", "latent_attention_config", "text_config"}
    ],
    "another width at the top": lambda c: c.update(hidden_size=4096),
    "dead fields changed": lambda c: c.update(mask_type="c", add_eos=False, add_pad_token=False),
    "another type at the top": lambda c: c.update(torch_dtype="bfloat16"),
    "fields of today": of("text_config", lambda t: t.update(dtype=t.pop("torch_dtype"), head_dim=16)),
    "sizes of layers missing": of(
        "text_config",
        without(
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "head_dim"
        ),
    ),
    "query heads missing": of("text_config", without("num_attention_heads")),
    "all heads missing": of(
        "text_config", lambda t: (t.update(head_dim=16), without("num_attention_heads", "num_key_value_heads")(t))
    ),
    "null instead of missing": of("text_config", lambda t: t.update(num_key_value_heads=None, head_dim=None)),
    "rotary base missing": of("text_config", without("rope_theta")),
    "padding id": of("text_config", lambda t: t.update(pad_token_id=2, sliding_window=None)),
    "a plain Mistral": of("text_config", lambda t: t.update(model_type="mistral")),
    "no model type": of("text_config", without("model_type")),
    "latent heads missing": of("latent_attention_config", without("num_cross_heads")),
    "latent head width missing": of("latent_attention_config", without("cross_dim_head")),
    "latent sizes missing": of(
        "latent_attention_config", without("num_latents_value", "hidden_dim", "latent_dim", "output_normalize")
    ),
}


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("name", VARIATIONS)
def test_a_config_may_say_it_otherwise_or_less(name: str, version: str, tmp_path: Path) -> None:
    source = FIXTURES / f"nvembed-tiny-{version}"
    folder = Path(shutil.copytree(source, tmp_path / version))
    before = (folder / "config.json").read_text()
    edit(folder / "config.json", VARIATIONS[name])
    assert json.loads((folder / "config.json").read_text()) != json.loads(before)
    expected, got = (Embedder.load(f, dtype="float32").encode(TEXTS, "a task") for f in (source, folder))
    np.testing.assert_array_equal(got, expected)


def test_the_rotary_base_is_read_wherever_it_is_said(one_file: Path) -> None:
    """At the top of text_config, as transformers 4 writes it, or in `rope_parameters`, as 5 does, or half in each."""
    default = Embedder.load(one_file).encode(TEXTS)
    vectors = []
    for said in (
        {"rope_theta": 500.0},
        {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 500, "rope_parameters": None},
    ):
        edit(one_file / "config.json", lambda c, said=said: c["text_config"].update(said))
        vectors.append(Embedder.load(one_file).encode(TEXTS))
    assert all(np.array_equal(v, vectors[0]) for v in vectors)
    assert np.abs(vectors[0] - default).max() > 1e-2


def test_almost_nothing_is_said(one_file: Path) -> None:
    expected = Embedder.load(one_file, dtype="float32").encode(TEXTS, "a task")

    def strip(config: dict[str, Any]) -> None:
        text = config["text_config"]
        latent = {"num_cross_heads": config["latent_attention_config"]["num_cross_heads"]}
        config.clear()
        text = {k: text[k] for k in ("num_attention_heads", "rms_norm_eps")}
        config.update(model_type="nvembed", text_config=text, latent_attention_config=latent)

    edit(one_file / "config.json", strip)
    for file in ("sentence_bert_config.json", "special_tokens_map.json", "tokenizer.model", "modules.json"):
        (one_file / file).unlink()
    model = Embedder.load(one_file, dtype="float32")
    assert model.max_tokens == 4096
    np.testing.assert_array_equal(model.encode(TEXTS, "a task"), expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (of("text_config", lambda t: t.update(vocab_size=32000)), "text_config says vocab_size=32000, but .* is 1500"),
        (of("text_config", lambda t: t.update(hidden_size=128)), "text_config says hidden_size=128, but .* is 64"),
        (of("text_config", lambda t: t.update(num_attention_heads=8)), "says num_key_value_heads=2, but .* is 4"),
        (of("text_config", lambda t: t.update(head_dim=32)), "says num_attention_heads=4, but .* is 2"),
        (
            of("latent_attention_config", lambda a: a.update(num_latents_value=512)),
            "num_latents_value=512, but .* is 16",
        ),
        (of("latent_attention_config", lambda a: a.update(num_cross_heads=3)), "of another shape.*to_"),
    ],
)
def test_sizes_that_contradict_the_tensors_are_refused(change: Any, reason: str, one_file: Path) -> None:
    edit(one_file / "config.json", change)
    with pytest.raises(ValueError, match=f"{one_file}: .*{reason}"):
        Embedder.load(one_file)


# ---- other types and files


@pytest.mark.parametrize(("dtype", "lowest"), [("float32", 1 - 1e-6), ("float16", 1 - 1e-6), ("bfloat16", 0.995)])
def test_any_stored_type(dtype: str, lowest: float, one_file: Path) -> None:
    """The fixture's values are exact in float16. Without a type asked for, the stored one is kept."""
    expected = Embedder.load(one_file, dtype="float32").encode(TEXTS)
    edit_weights(one_file, lambda w: w.update({n: t.to(getattr(torch, dtype)) for n, t in w.items()}))
    assert (Embedder.load(one_file, dtype="float32").encode(TEXTS) * expected).sum(1).min() > lowest
    network = Embedder.load(one_file).network
    assert {p.dtype for p in network.parameters()} == {getattr(torch, dtype)}
    assert network.config.released["dtype"] == dtype


def test_of_mixed_types_the_widest_is_kept(one_file: Path) -> None:
    expected = Embedder.load(one_file).encode(TEXTS)
    edit_weights(one_file, lambda w: w.update({n: t.half() for n, t in w.items() if "norm" not in n}))
    model = Embedder.load(one_file)
    assert model.network.config.released["dtype"] == "float32"
    np.testing.assert_array_equal(model.encode(TEXTS), expected)


def test_a_type_that_is_not_a_plain_float_is_refused(one_file: Path) -> None:
    edit_weights(one_file, lambda w: w.update({LATENTS: w[LATENTS].to(torch.int8)}))
    with pytest.raises(ValueError, match=f"{LATENTS} is stored as I8, not as one of F32, F16, BF16"):
        Embedder.load(one_file)


def test_shards_and_one_file_are_the_same(shards: Path) -> None:
    expected = Embedder.load(shards).encode(TEXTS)
    save_file({n: t for f in shards.glob("*.safetensors") for n, t in load_file(f).items()}, shards / "all.safetensors")
    for file in shards.glob("model*"):
        file.unlink()
    (shards / "all.safetensors").rename(shards / "model.safetensors")
    np.testing.assert_array_equal(Embedder.load(shards).encode(TEXTS), expected)


# ---- weights


def test_missing_and_unexpected_tensors_are_named(one_file: Path) -> None:
    norm = "embedding_model.norm.weight"
    edit_weights(one_file, lambda w: w.pop(norm))
    with pytest.raises(ValueError, match=f"1 tensors are missing, e.g. {norm}"):
        Embedder.load(one_file)
    edit_weights(one_file, lambda w: w.update({norm: torch.ones(64), "lm_head.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"1 tensors are unexpected, e\.g\. lm_head\.weight"):
        Embedder.load(one_file)
    edit_weights(one_file, lambda w: (w.pop("lm_head.weight"), w.update({norm: torch.ones(63)})))
    with pytest.raises(ValueError, match=f"1 tensors are of another shape than the model's, e.g. {norm}"):
        Embedder.load(one_file)
    edit_weights(one_file, lambda w: w.pop(LATENTS))
    with pytest.raises(ValueError, match=f"{LATENTS} is missing"):
        Embedder.load(one_file)


def test_a_layer_more_than_the_config_says_is_unexpected(one_file: Path) -> None:
    edit(one_file / "config.json", lambda c: c["text_config"].update(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"9 tensors are unexpected, e\.g\. embedding_model\.layers\.2\."):
        Embedder.load(one_file)


def test_stored_rotary_buffers_are_passed_over(one_file: Path) -> None:
    name = "embedding_model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(one_file, lambda w: w.update({name: torch.ones(8)}))
    assert Embedder.load(one_file).embedding_dim == 64


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", 3])
def test_an_index_that_leaves_the_folder_is_refused(name: Any, shards: Path) -> None:
    save_file({LATENTS: torch.zeros(16, 64)}, shards.parent / "outside.safetensors")
    edit(shards / INDEX, lambda c: c["weight_map"].update({LATENTS: name}))
    with pytest.raises(ValueError, match=r"is not a \.safetensors file of this folder"):
        Embedder.load(shards)


def test_files_that_are_not_there_or_not_whole(shards: Path) -> None:
    second = shards / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{second.name} is not a whole safetensors file"):
        Embedder.load(shards)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {second.name}"):
        Embedder.load(shards)
    (shards / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        Embedder.load(shards)


def test_one_tensor_in_two_files_is_refused(shards: Path) -> None:
    save_file({LATENTS: torch.zeros(16, 64)}, shards / "extra.safetensors")
    edit(shards / INDEX, lambda c: c["weight_map"].update({"other": "extra.safetensors"}))
    with pytest.raises(ValueError, match=f"{LATENTS} is in both|but {INDEX} puts it into"):
        Embedder.load(shards)
