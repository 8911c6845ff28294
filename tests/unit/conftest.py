"""Tiny random models in the folders of other authors: their tokenizer rules, their config files, their own names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from browser import Browser, chromium
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32_768,
    "initializer_range": 0.2,
}
_WORDS = ("Instruct", "Query", "Find", "tide", "task", "search", "result", "query", "title", "none", "text", "embed")
# Of Qwen's tokenizer.json: a mark in front of a word stays with the word.
_QWEN_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WEB = "Given a web search query, retrieve relevant passages that answer the query"


def _merges(space: str) -> list[tuple[str, str]]:
    """Merges that build the known words from left to right, first bare and then behind a space."""
    bare = [(word[:i], word[i]) for word in _WORDS for i in range(1, len(word))]
    return list(dict.fromkeys([*bare, *((space, word) for word in _WORDS)]))


def _bpe(pieces: Iterable[str], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *map("".join, merges)]))}
    return Tokenizer(models.BPE(vocab, merges, **options))


def _behind(tokenizer: Tokenizer, single: str) -> Any:
    ids = [(piece, tokenizer.token_to_id(piece)) for piece in single.split() if piece != "$A"]
    return processors.TemplateProcessing(single=single, pair=f"{single} {single.replace('A', 'B')}", special_tokens=ids)


def qwen_tokenizer() -> Tokenizer:
    """Byte-level; no BOS; <|endoftext|> behind every text, although tokenizer_config.json calls <|im_end|> EOS."""
    tokenizer = _bpe(sorted(pre_tokenizers.ByteLevel.alphabet()), _merges("Ġ"))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    template = _behind(tokenizer, "$A <|endoftext|>")
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def mistral_tokenizer(single: str = "<s> $A", specials: tuple[str, ...] = ()) -> Tokenizer:
    """Byte fallback, a space in front of every piece between special tokens, and what `single` says around a text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    tokenizer = _bpe(pieces, _merges("▁"), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *specials])
    tokenizer.post_processor = _behind(tokenizer, single)
    return tokenizer


def gemma_tokenizer() -> Tokenizer:
    """Byte fallback, spaces as they are, <bos> and <eos> around a text."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokenizer = _bpe([*pieces, *map(chr, range(33, 127))], _merges("▁"), unk_token="<unk>", byte_fallback=True)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.post_processor = _behind(tokenizer, "<bos> $A <eos>")
    return tokenizer


_LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "</s>",
    "unk_token": "<unk>",
    "legacy": True,
}
_QWEN = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_GEMMA = {
    "tokenizer_class": "GemmaTokenizer",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}
_ICL = ("<instruct>", "<query>", "<response>")
_E5_PROMPTS = {"web_search_query": f"Instruct: {_WEB}\nQuery: ", "sts_query": "Instruct: Retrieve alike.\nQuery: "}
_REMOTE = {"AutoModel": "modeling_gritlm7b.MistralModel"}


def _sentence_transformers(pooling: str, prompts: dict[str, str] | None = None, **lengths: int) -> dict[str, Any]:
    old = "sentence_transformers.models"  # as all of these folders were written
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"{old}.{kind}"} for i, (kind, path) in enumerate(kinds)
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": 32, f"pooling_mode_{pooling}": True},
        "config_sentence_transformers.json": {"prompts": prompts or {}, "default_prompt_name": None},
        "sentence_bert_config.json": {"do_lower_case": False, **lengths},
    }


_FOLDERS: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "qwen3-embedding": (
        qwen_tokenizer,
        _QWEN,
        "Qwen3Config",
        {"eos_token_id": None},
        _sentence_transformers("lasttoken", {"query": f"Instruct: {_WEB}\nQuery:", "document": ""}),
    ),
    "e5-mistral": (
        mistral_tokenizer,
        {**_LLAMA, "add_eos_token": True},
        "MistralConfig",
        {"sliding_window": 8},
        _sentence_transformers("lasttoken", _E5_PROMPTS, max_seq_length=4096),
    ),
    "gritlm": (mistral_tokenizer, _LLAMA, "MistralConfig", {"sliding_window": 8, "auto_map": _REMOTE}, {}),
    "bge-en-icl": (
        lambda: mistral_tokenizer("<s> $A </s>", _ICL),
        {**_LLAMA, "add_bos_token": True, "add_eos_token": True, "additional_special_tokens": list(_ICL)},
        "MistralConfig",
        {"sliding_window": None},
        _sentence_transformers("lasttoken", max_seq_length=512),
    ),
    "embeddinggemma": (
        gemma_tokenizer,
        _GEMMA,
        "Gemma3TextConfig",
        {"sliding_window": 8, "use_bidirectional_attention": True, "query_pre_attn_scalar": 8},
        {},
    ),
}


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`family_folder("e5-mistral")`: a folder as its authors published it, but tiny and random, and named `model`.

    Made once, so leave it as it is.
    """

    @cache
    def make(name: str) -> Path:
        tokenizer, tokenizer_config, config_class, more, files = _FOLDERS[name]
        folder = tmp_path_factory.mktemp("published") / "model"
        backend = tokenizer()
        config = getattr(transformers, config_class)(**{**_SIZES, **more}, vocab_size=backend.get_vocab_size())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModel.from_config(config)
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms, which start as ones
                    parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        backend.save(str(folder / "tokenizer.json"))
        for file, content in {**files, "tokenizer_config.json": tokenizer_config}.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(json.dumps(content))
        if "auto_map" in more:  # saving drops it
            written = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**written, "auto_map": _REMOTE}))
            (folder / "modeling_gritlm7b.py").write_text("raise SystemExit('remote code ran')\n")
        return folder

    return make


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless Chromium, with a profile of its own."""
    if chromium() is None and not os.environ.get("EMBEDWRIGHT_REQUIRE_BROWSER"):
        pytest.skip("no chromium: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found
