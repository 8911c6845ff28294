"""Conversions of GGUF files: every weight of the model and every weight of the file, or none at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from embedwright.errors import InputError
from embedwright.model.formats import gguf as ours
from embedwright.model.formats.gguf import convert_gguf

gguf = pytest.importorskip("gguf")

HIDDEN, HEADS, KEYS, WIDE, LAYERS = 32, 4, 2, 48, 2
_SHAPES = {
    "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // HEADS * KEYS, HIDDEN),
    "attn_v": (HIDDEN // HEADS * KEYS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (WIDE, HIDDEN),
    "ffn_up": (WIDE, HIDDEN),
    "ffn_down": (HIDDEN, WIDE),
}


@pytest.fixture
def write_gguf(
    tmp_path: Path, make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """`write_gguf(change=None)`: a tiny Llama as llama.cpp writes it; `change` edits the tensors by their names."""
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))

    def make(change: Callable[[dict[str, np.ndarray]], Any] | None = None, name: str = "tiny.gguf") -> Path:
        vocabulary = json.loads(make_tokenizer().to_str())["model"]
        tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_context_length(256)
        writer.add_embedding_length(HIDDEN)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(WIDE)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KEYS)
        writer.add_rope_dimension_count(HIDDEN // HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(len(tokens))
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
        writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        random = np.random.default_rng(0)
        shapes = {"token_embd.weight": (len(tokens), HIDDEN), "output_norm.weight": (HIDDEN,)}
        shapes |= {f"blk.{n}.{part}.weight": shape for n in range(LAYERS) for part, shape in _SHAPES.items()}
        tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        if change is not None:
            change(tensors)
        for tensor, values in tensors.items():
            writer.add_tensor(tensor, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return make


def test_a_whole_file_is_converted_once(write_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = convert_gguf(write_gguf())
    weights = load_file(folder / "model.safetensors")
    assert len(weights) == LAYERS * len(_SHAPES) + 2
    monkeypatch.setattr(ours, "_read", lambda _: pytest.fail("converted again"))
    assert convert_gguf(folder.parents[2] / "tiny.gguf") == folder
    os.utime(folder / "model.safetensors")  # as when the cache is copied
    assert convert_gguf(folder.parents[2] / "tiny.gguf") == folder


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), r"lacks 1 weights, e\.g\. layers\.1\.mlp\.up_proj\.weight"),
        (lambda t: t.pop("output_norm.weight"), "lacks 1 weights"),
        (lambda t: t.update({"rope_freqs.weight": np.ones(4, np.float32)}), r"rope_freqs\.weight"),
        (lambda t: t.update({"blk.0.attn_q.bias": np.ones(HIDDEN, np.float32)}), "has place for"),
        (lambda t: t.update({"blk.2.ffn_up.weight": np.ones((WIDE, HIDDEN), np.float32)}), "has place for"),
        (lambda t: t.update({"blk.1.ffn_up.weight": np.ones((WIDE + 8, HIDDEN), np.float32)}), "has the shape"),
    ],
)
def test_weights_that_are_not_those_of_the_model(
    change: Callable[[Any], Any], match: str, write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    file = write_gguf(change)
    for _ in range(2):  # nothing is cached
        with pytest.raises(InputError, match=match):
            convert_gguf(file)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_an_lm_head_is_left_out(write_gguf: Callable[..., Path]) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["output.weight"] = np.ones_like(tensors["token_embd.weight"])

    weights = load_file(convert_gguf(write_gguf(add)) / "model.safetensors")
    assert len(weights) == LAYERS * len(_SHAPES) + 2


@pytest.mark.parametrize("length", [0, 10, 3000, -100])
def test_a_file_that_is_cut(length: int, write_gguf: Callable[..., Path]) -> None:
    file = write_gguf()
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match=r"is not a GGUF file that can be opened|lacks"):
        convert_gguf(file)


def test_what_lies_beside_the_file_is_not_read(
    write_gguf: Callable[..., Path], tmp_path: Path, tiny_decoder: Callable[..., Path]
) -> None:
    file = write_gguf()
    plain = load_file(convert_gguf(file) / "model.safetensors")
    shutil.rmtree(tmp_path / "cache")
    for neighbour in tiny_decoder("qwen2").iterdir():
        shutil.copy(neighbour, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere/model", "peft_type": "LORA"}')
    again = convert_gguf(file)
    assert AutoModel.from_pretrained(again).config.model_type == "llama"
    assert all(torch.equal(plain[name], weight) for name, weight in load_file(again / "model.safetensors").items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-4]),
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-4] + b"\0\0\0\1"),
        lambda f: (f / "tokenizer.json").write_text("{}"),
        lambda f: (f / "adapter_config.json").write_text("{}"),
        lambda f: (f / "conversion.json").unlink(),
        lambda f: (f / "conversion.json").write_text("[]"),
        lambda f: (f / "conversion.json").write_text('{"model.safetensors": 3}'),
        lambda f: (shutil.rmtree(f), f.write_text("a file")),
    ],
)
def test_a_damaged_conversion_is_made_again(damage: Callable[[Path], Any], write_gguf: Callable[..., Path]) -> None:
    file = write_gguf()
    folder = convert_gguf(file)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "conversion.json"}
    damage(folder)
    assert convert_gguf(file) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "conversion.json"} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_of_several_at_once_one_converts_and_the_others_wait(
    write_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, read, made = write_gguf(), ours._read, list[Path]()

    def counted(path: Path) -> Any:
        made.append(path)
        return read(path)

    monkeypatch.setattr(ours, "_read", counted)
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(convert_gguf, [file] * 3))
    assert len(made) == len(folders) == 1
    assert [path.name for path in file.parent.glob(".*")] == []


def test_two_processes_at_once_where_the_file_system_has_no_locks(
    write_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", none)
    file, read = write_gguf(), ours._read
    made = []

    def and_meanwhile_another(path: Path) -> Any:
        found = read(path)
        if not made:
            made.append(None)
            made.append(convert_gguf(path))
        return found

    monkeypatch.setattr(ours, "_read", and_meanwhile_another)
    assert convert_gguf(file) == made[1]
    assert [path.name for path in made[1].parent.iterdir()] == [made[1].name]


def test_a_full_disk_is_a_full_disk(write_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="No space") as raised:
            convert_gguf(file)
    assert not isinstance(raised.value, InputError)
    assert list(convert_gguf(file).parent.iterdir()) == [convert_gguf(file)]
