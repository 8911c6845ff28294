"""GGUF files: read back by gguf's own reader, by transformers, and run by llama.cpp itself where it is installed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import llama_cpp
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from embedwright import Embedder
from embedwright.cli import main as cli
from embedwright.errors import InputError, MissingPackageError, OutputExistsError
from embedwright.export.gguf import Type, export_gguf
from embedwright.model.quantized import quantize_layers

gguf = pytest.importorskip("gguf")

# no special token among them: the server reads one as such, and Embedwright as plain text
TEXTS = ["how do tides work?", "a", "  spaces and\na new line ", "漢字 🙂", "it's 3.14, or so " * 12]
TASK = "Find the tide"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
Make = Callable[..., Embedder]
Llama = Callable[[Path, Sequence[str]], NDArray[np.float32]]


@pytest.fixture
def run_llama() -> Llama:
    """`run_llama(file, texts)`: the vectors of llama.cpp's server, which is told of the file and nothing more."""
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp (make gguf)")
    return llama_cpp


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def tensors(file: Path) -> dict[str, NDArray[np.float32]]:
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


def cosines(model: Embedder, vectors: NDArray[np.float32], texts: Sequence[str], task: str | None) -> float:
    return float((model.encode(list(texts), task) * vectors).sum(1).min())


# ---- llama.cpp


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_llama_cpp_gives_the_vectors(
    family: str, attention: Any, pooling: str, tiny_embedder: Make, run_llama: Llama, tmp_path: Path
) -> None:
    """Texts are longer than Gemma's windows; llama.cpp has none of Mistral and Qwen. It keeps keys and values in 16
    bits."""
    if attention == "causal" and family in ("mistral", "qwen2", "qwen3"):
        pytest.skip("a causal model of these has windows here, and is refused")
    bos = family in ("llama", "gemma3")
    model = tiny_embedder(pooling, family, bos, attention=attention, pool_prompt=pooling == "mean")
    file = tmp_path / "model.gguf"
    assert export_gguf(model, file, "f32") == "queries and documents"
    for task in (None, TASK):
        prompt = model.contract.prefix(task)
        assert cosines(model, run_llama(file, [prompt + text for text in TEXTS]), TEXTS, task) > 0.9999


def with_tokenizer(decoder: Path, tokenizer: Tokenizer, eos: str, out: Path) -> Path:
    """The decoder in a new folder with another tokenizer, which transformers leaves as it is."""
    shutil.copytree(decoder, out)
    for file in out.glob("*token*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos).save_pretrained(out)
    return out


@pytest.mark.parametrize(("family", "eos"), [("e5-mistral", "</s>"), ("embeddinggemma", "<eos>")])
def test_tokenizers_in_the_manner_of_sentencepiece(
    family: str, eos: str, family_folder: Callable[[str], Path], run_llama: Llama, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(family_folder(family) / "tokenizer.json"))
    folder, file = with_tokenizer(family_folder(family), tokenizer, eos, tmp_path / "decoder"), tmp_path / "model.gguf"
    if family == "embeddinggemma":  # whose tiny folder has windows alone
        config = json.loads((folder / "config.json").read_text())
        config["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
        (folder / "config.json").write_text(json.dumps(config))
    model = Embedder.from_decoder(folder, pooling="mean", pool_prompt=True)
    assert model.contract.bos_ids
    export_gguf(model, file, "f32")
    for task in (None, TASK):
        texts = [model.contract.prefix(task) + text for text in TEXTS]
        assert cosines(model, run_llama(file, texts), TEXTS, task) > 0.9999


def test_a_real_model_in_each_type(smollm2_folder: Path, run_llama: Llama, tmp_path: Path) -> None:
    """SmolLM2's tokenizer and weights, four layers of it."""
    model = Embedder.from_decoder(smollm2_folder, layers=4, pooling="mean", pool_prompt=True)
    lowest, texts = {}, [*TEXTS, Path(__file__).read_text()[:400]]
    types: list[tuple[Type, float]] = [("f32", 0.99999), ("f16", 0.9999), ("q8_0", 0.99)]
    for type, least in types:
        file = tmp_path / f"{type}.gguf"
        export_gguf(model, file, type)
        for task in (None, TASK):
            vectors = run_llama(file, [model.contract.prefix(task) + text for text in texts])
            lowest[type, task] = cosines(model, vectors, texts, task)
            assert lowest[type, task] > least, lowest
    assert lowest["q8_0", None] < lowest["f16", None]


def test_documents_alone(tiny_embedder: Make, run_llama: Llama, tmp_path: Path) -> None:
    model, file = tiny_embedder("mean"), tmp_path / "model.gguf"
    assert export_gguf(model, file, "f32") == "documents alone"
    assert cosines(model, run_llama(file, TEXTS), TEXTS, None) > 0.9999
    queries = [model.contract.prefix(TASK) + text for text in TEXTS]
    assert cosines(model, run_llama(file, queries), TEXTS, TASK) < 0.99


@pytest.mark.parametrize("rope", ["linear", "llama3"])
def test_scaled_positions(rope: str, tiny_decoder: Callable[..., Path], run_llama: Llama, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_decoder("llama"), tmp_path / "decoder"))
    config = json.loads((folder / "config.json").read_text())
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config["rope_parameters"] = {
        "rope_type": rope,
        "rope_theta": 10000.0,
        "factor": 8.0,
        **(more if rope == "llama3" else {}),
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = Embedder.from_decoder(folder, pooling="last")
    plain = Embedder.from_decoder(tiny_decoder("llama"), pooling="last")
    assert cosines(model, plain.encode(TEXTS), TEXTS, None) < 0.999
    export_gguf(model, tmp_path / "model.gguf", "f32")
    assert cosines(model, run_llama(tmp_path / "model.gguf", TEXTS), TEXTS, None) > 0.9999


# ---- the file, without llama.cpp


@pytest.mark.parametrize(
    ("family", "arch"),
    [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("gemma3", "gemma-embedding")],
)
def test_the_file_says_what_the_model_is(family: str, arch: str, tiny_embedder: Make, tmp_path: Path) -> None:
    model, file = tiny_embedder("mean", family, True, pool_prompt=True, max_tokens=99), tmp_path / "tiny.gguf"
    export_gguf(model, file)
    said, config = fields(file), model.network.backbone.config
    expected = {
        "general.architecture": arch,
        "general.name": "tiny",
        "general.file_type": 1,
        f"{arch}.attention.causal": False,
        f"{arch}.pooling_type": 1,
        f"{arch}.embedding_length": 32,
        f"{arch}.feed_forward_length": 48,
        f"{arch}.block_count": 3,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.key_length": 8,
        f"{arch}.rope.dimension_count": 8,
        f"{arch}.context_length": 1024,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
    }
    assert {key: said.get(key) for key in expected} == expected
    assert said[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert json.loads(said["embedwright.contract"]) == json.loads(model.contract.model_dump_json())
    assert "Instruct: {task}" in said["general.description"] and "99 tokens" in said["general.description"]
    if family == "gemma3":
        assert said[f"{arch}.attention.sliding_window"] == 16 and said[f"{arch}.attention.sliding_window_pattern"] == 2


def test_last_pooling_of_a_causal_gemma(tiny_embedder: Make, tmp_path: Path) -> None:
    export_gguf(tiny_embedder("last", "gemma3", attention="causal"), tmp_path / "tiny.gguf")
    said = fields(tmp_path / "tiny.gguf")
    assert said["gemma3.attention.causal"] is True and said["gemma3.pooling_type"] == 3
    assert said["gemma3.attention.sliding_window"] == 8 and said["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_every_weight_is_there(family: str, tiny_embedder: Make, tmp_path: Path) -> None:
    """By gguf's reader: names, the order of rows that llama.cpp rotates, and the 1 that Gemma adds to its norms."""
    model, file = tiny_embedder("last", family), tmp_path / "tiny.gguf"
    export_gguf(model, file, "f32")
    found, weights = tensors(file), {n: p.detach().numpy() for n, p in model.network.backbone.named_parameters()}
    assert sum(values.size for values in found.values()) == sum(values.size for values in weights.values())
    shift = family == "gemma3"
    np.testing.assert_array_equal(found["token_embd.weight"], weights["embed_tokens.weight"])
    np.testing.assert_array_equal(found["output_norm.weight"], weights["norm.weight"] + shift)
    for name, rows in (("attn_q", 32), ("attn_k", 16)):
        ours, theirs = weights[f"layers.1.self_attn.{name[-1]}_proj.weight"], found[f"blk.1.{name}.weight"]
        half = [(head * 8 + i, head * 8 + i + 4) for head in range(rows // 8) for i in range(4)]
        order = [row for pair in half for row in pair] if family == "llama" else range(rows)
        np.testing.assert_array_equal(theirs, ours[list(order)])
    np.testing.assert_array_equal(found["blk.2.ffn_down.weight"], weights["layers.2.mlp.down_proj.weight"])
    np.testing.assert_array_equal(found["blk.0.attn_norm.weight"], weights["layers.0.input_layernorm.weight"] + shift)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_opens_the_file_and_gives_the_vectors(
    family: str, tiny_decoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads neither attention nor pooling, adds one token where it is missing, and of Qwen takes the way to split a
    text as given, and the width of a head too."""
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    if family != "llama":
        steps = [pre_tokenizers.Split(Regex(QWEN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, TASK] * 3, trainer)
    decoder = tiny_decoder(family, **({"head_dim": 128} if family == "qwen3" else {}))
    options: dict[str, Any] = {"pooling": "mean", "pool_prompt": True, "max_tokens": 64}
    model = Embedder.from_decoder(with_tokenizer(decoder, tokenizer, "</s>", tmp_path / "decoder"), **options)
    types: list[tuple[Type, float]] = [("f32", 1 - 1e-6), ("f16", 1 - 1e-5), ("q8_0", 0.99)]
    for type, least in types:
        export_gguf(model, tmp_path / f"{type}.gguf", type)
        again = Embedder.from_decoder(tmp_path / f"{type}.gguf", **options)
        assert again.contract == model.contract
        for task in (None, TASK):
            assert cosines(model, again.encode(TEXTS, task), TEXTS, task) > least, type


def test_types_of_weights(tiny_embedder: Make, tmp_path: Path) -> None:
    """Blocks of q8_0 hold 32 numbers: of a narrower or odder row it stays float16, as in llama.cpp's own files."""
    for type in ("f32", "f16", "q8_0"):
        export_gguf(tiny_embedder("last"), tmp_path / f"{type}.gguf", type)  # type: ignore[arg-type]
    kinds = {
        type: {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / f"{type}.gguf").tensors}
        for type in ("f32", "f16", "q8_0")
    }
    assert set(kinds["f32"].values()) == {"F32"}
    assert {kinds[type]["blk.0.attn_norm.weight"] for type in kinds} == {"F32"}
    assert kinds["f16"]["blk.0.ffn_down.weight"] == kinds["q8_0"]["blk.0.ffn_down.weight"] == "F16"
    assert kinds["f16"]["blk.0.attn_v.weight"] == "F16" and kinds["q8_0"]["blk.0.attn_v.weight"] == "Q8_0"


def test_adapters_are_merged_on_the_way(tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder("last").add_lora(rank=2, alpha=8)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_" in name:
                parameter += 0.1
    export_gguf(model, tmp_path / "a" / "tiny.gguf", "f32")
    export_gguf(model.merge(), tmp_path / "b" / "tiny.gguf", "f32")
    a, b = tensors(tmp_path / "a" / "tiny.gguf"), tensors(tmp_path / "b" / "tiny.gguf")
    assert a.keys() == b.keys()
    for name, values in a.items():
        np.testing.assert_allclose(values, b[name], atol=1e-6)


# ---- what is refused


@pytest.mark.parametrize(
    ("pooling", "family", "options", "match"),
    [
        ("latent", "llama", {}, "pooling is 'latent'.*compress --student.*model: {pooling: mean}"),
        ("mean", "llama", {"bos": True}, "leaves them out of the mean.*pool_prompt"),
        ("last", "phi3", {}, "'phi3' model: GGUF files are written of llama"),
        ("last", "mistral", {"attention": "causal"}, "sliding_window=8.*max_tokens=8"),
        ("last", "qwen3", {"attention": "causal"}, "sliding_window=8.*max_tokens=8"),
        ("last", "gemma3", {"layers": 1}, "all layers have sliding_attention.*more layers"),
    ],
)
def test_models_that_llama_cpp_cannot_run(
    pooling: str, family: str, options: dict[str, Any], match: str, tiny_embedder: Make, tmp_path: Path
) -> None:
    model = tiny_embedder(pooling, family, **options)
    with pytest.raises(InputError, match=match):
        export_gguf(model, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "rope_parameters"),
    ],
)
def test_settings_that_llama_cpp_does_not_read(
    key: str, value: Any, match: str, tiny_embedder: Make, tmp_path: Path
) -> None:
    model = tiny_embedder("last")
    setattr(model.network.backbone.config, key, value)
    with pytest.raises(InputError, match=match):
        export_gguf(model, tmp_path / "model.gguf")


def test_quantised_weights_are_refused(tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder("last")
    quantize_layers(model.network)
    with pytest.raises(InputError, match=r"has no place in a GGUF file.*float weights"):
        export_gguf(model, tmp_path / "model.gguf")


def test_numbers_that_a_type_cannot_hold(tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder("last")
    with torch.no_grad():
        model.network.backbone.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight.*--weights f32"):
        export_gguf(model, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []
    export_gguf(model, tmp_path / "model.gguf", "f32")


def test_names_of_the_file(tiny_embedder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = tiny_embedder("last"), tmp_path / "model.gguf"
    with pytest.raises(InputError, match=r"ends in \.gguf"):
        export_gguf(model, tmp_path / "model")
    with pytest.raises(InputError, match="type='F16' is none of f32, f16, q8_0"):
        export_gguf(model, file, "F16")  # type: ignore[arg-type]
    file.write_text("mine")
    with pytest.raises(OutputExistsError, match="exists"):
        export_gguf(model, file)
    assert file.read_text() == "mine"
    monkeypatch.setattr("embedwright.export.gguf.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"embedwright\[gguf\]"):
        export_gguf(model, tmp_path / "other.gguf")


def test_the_command(
    tiny_embedder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_embedder("mean").save(tmp_path / "model")

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["embedwright", "export", str(tmp_path / "model"), *words])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    file = str(tmp_path / "tiny.gguf")
    assert run(file, "--format", "gguf", "--weights", "q8_0") == 0
    assert (
        capsys.readouterr().out
        == f"{file}: q8_0, not run: by its source, llama.cpp gives the vectors of documents alone\n"
    )
    assert fields(Path(file))["general.file_type"] == 7
    assert run(file, "--format", "gguf") == 2
    assert run(str(tmp_path / "folder"), "--weights", "f32") == 2
    assert "--format gguf" in capsys.readouterr().err
