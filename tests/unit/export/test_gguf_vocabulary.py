"""Tokenizers as fields of a GGUF file: what is refused, and the ids of llama.cpp itself where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from embedwright import Embedder
from embedwright.errors import InputError
from embedwright.export.gguf import export_gguf
from embedwright.export.gguf_vocabulary import vocabulary
from embedwright.text import Contract

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
TEXTS = [
    "how do tides work?",
    "It's 12345 and 3.14, isn't it? I'LL see",
    "  two spaces,\ttab and\n\n\nnew lines \r\n end  ",
    "def f(x):\n    return x[1:] + 'it''s'",
    "naïve café, Straße 漢字 🙂 ελληνικά",
    "a_b-c/d\\e @#$%^&*() ... !!!",
    "",
]
CONTRACT = Contract(eos_id=1)


def bytewise(*steps: Any, normalizer: Any = None, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level BPE that was trained on the texts, with these steps before it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(["tides"])
    return tokenizer


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


PLAIN, REGEX = pre_tokenizers.ByteLevel(False, use_regex=False), pre_tokenizers.ByteLevel(False)
NAMED = {
    "gpt-2": lambda: bytewise(REGEX),
    "smollm": lambda: bytewise(pre_tokenizers.Digits(True), REGEX),
    "qwen2": lambda: bytewise(split(QWEN), PLAIN, normalizer=normalizers.NFC()),
    "llama-bpe": lambda: bytewise(split(LLAMA3), PLAIN, ignore_merges=True),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_way_to_split_has_its_name(name: str) -> None:
    tokenizer = NAMED[name]()
    made = vocabulary(tokenizer, CONTRACT, 410)
    assert (made["tokenizer_model"], made["tokenizer_pre"]) == ("gpt2", name)
    size = tokenizer.get_vocab_size()
    assert made["token_list"][:2] == ["<s>", "</s>"] and made["token_types"][:2] == [3, 3]  # control tokens
    assert made["token_list"][size - 1] == "tides" and made["token_types"][size - 1] == 4  # one of the user's
    assert made["token_list"][409] == "[PAD409]" and made["token_types"][409] == 5  # unused
    assert len(set(made["token_list"])) == len(made["token_types"]) == 410
    assert (made["add_bos_token"], made["add_eos_token"], made["eos_token_id"]) == (False, True, 1)


@pytest.mark.parametrize("name", NAMED)
def test_llama_cpp_reads_the_same_ids(
    name: str, tiny_decoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytest.importorskip("xllamacpp", reason="pip install xllamacpp (make gguf)")
    tokenizer = NAMED[name]()
    model = Embedder.from_decoder(tiny_decoder("llama"), pooling="last")
    monkeypatch.setattr(model.text_tokenizer, "plain", tokenizer)
    model.network.backbone.resize_token_embeddings(tokenizer.get_vocab_size(), mean_resizing=False)
    export_gguf(model, tmp_path / "model.gguf")
    params = package.CommonParams()
    params.model.path, params.embedding, params.warmup = str(tmp_path / "model.gguf"), True, False
    server = package.Server(params)
    for text in TEXTS:
        said = {"content": text, "add_special": True}
        request = Request(f"{server.listening_address}/tokenize", json.dumps(said).encode())
        with urlopen(request) as answer:
            ids = json.load(answer)["tokens"]
        assert ids == [*tokenizer.encode(text, add_special_tokens=False).ids, 1], text


@pytest.mark.parametrize("family", ["e5-mistral", "embeddinggemma"])
def test_sentencepiece_has_scores(family: str, family_folder: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.from_file(str(family_folder(family) / "tokenizer.json"))
    eos, bos = (
        tokenizer.token_to_id(name) for name in (("</s>", "<s>") if family == "e5-mistral" else ("<eos>", "<bos>"))
    )
    made = vocabulary(tokenizer, Contract(eos_id=eos, bos_ids=(bos,)), tokenizer.get_vocab_size())
    score = dict(zip(made["token_list"], made["token_scores"], strict=True))
    kind = dict(zip(made["token_list"], made["token_types"], strict=True))
    assert made["tokenizer_model"] == "llama" and made["add_space_prefix"] is (family == "e5-mistral")
    assert score["In"] > score["Ins"] > score["tide"] > score["▁Instruct"] > score["z"]
    assert (kind["<unk>"], kind["<0x0A>"], kind["tide"]) == (2, 6, 1)
    assert (made["bos_token_id"], made["eos_token_id"], made["add_bos_token"]) == (bos, eos, True)
    assert made["unk_token_id"] == tokenizer.token_to_id("<unk>")


def spaces(front: bool, merges: list[tuple[str, str]], pieces: str = "abc") -> Tokenizer:
    vocab = {piece: n for n, piece in enumerate(["<unk>", *pieces, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if front else replace
    return tokenizer


def test_a_pair_that_no_merge_joins_is_refused() -> None:
    """llama.cpp would join it: of two pairs that make `abc`, one is a merge."""
    assert vocabulary(spaces(True, [("a", "b"), ("ab", "c")]), CONTRACT, 6)["token_scores"][4:] == [0.0, -1.0]
    for merges in (
        [("a", "b"), ("b", "c"), ("ab", "c")],
        [("a", "b"), ("b", "c"), ("a", "bc"), ("c", "a"), ("ab", "c")],
    ):
        with pytest.raises(InputError, match="SentencePiece"):
            vocabulary(spaces(False, merges), CONTRACT, 9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
        lambda: bytewise(split(r"\w+|\W+"), PLAIN),
        lambda: bytewise(pre_tokenizers.ByteLevel(True)),
        lambda: bytewise(pre_tokenizers.Whitespace(), REGEX),
        lambda: bytewise(REGEX, normalizer=normalizers.Lowercase()),
        lambda: bytewise(split(LLAMA3), PLAIN),
        lambda: Tokenizer(models.BPE({"a": 0}, [])),
    ],
)
def test_other_tokenizers_are_refused(make: Callable[[], Tokenizer]) -> None:
    with pytest.raises(InputError, match="tokenizer"):
        vocabulary(make(), CONTRACT, 400)
