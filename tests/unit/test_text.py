"""The text contract against references that know no offsets, and against rows of pieces written out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer

from embedwright import text as under_test
from embedwright.text import (
    BOUNDARY_TEMPLATE,
    INSTRUCTION_TEMPLATE,
    Contract,
    TextTokenizer,
    TokenizedText,
    check_texts,
    leading_ids,
    load_tokenizer,
)

PREFIX = INSTRUCTION_TEMPLATE.replace("{task}", "Given a question, retrieve passages")
TEXTS = [
    "how do tides work?",
    "a",
    "  two leading spaces",
    "\nleading newline",
    "trailing  \n",
    "naïve café, Straße",
    "漢字かな交じり文 🙂🙂🏽",
    "x = [1, 2.5e-3]\n\tif x: pass",
    "<|im_end|> and <|endoftext|><|im_start|>user",
    "</s> and <s> inside",
    "e\u0301 decomposed, zero\u200bwidth",
    "a long text of many words " * 12,
    "   ",
    "",
]


@cache
def copied(tokenizer: Tokenizer) -> TextTokenizer:
    return TextTokenizer(tokenizer)


def tokenize(tokenizer: Tokenizer, *args: Any, **kwargs: Any) -> list[TokenizedText]:
    return under_test.tokenize(copied(tokenizer), *args, **kwargs)


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def bare_tokenizer(smollm2_folder: Path) -> Tokenizer:
    """SmolLM2's tokenizer without any special token: what is written in a text can only be plain text to it."""
    content = json.loads((smollm2_folder / "tokenizer.json").read_text())
    return Tokenizer.from_str(json.dumps({**content, "added_tokens": [], "post_processor": None}))


def by_bytes(bare: Tokenizer, prefix: str, text: str, limit: int, eos: int, bos: tuple[int, ...] = ()) -> TokenizedText:
    """The offsets rule without offsets: a character of a byte-level piece is one byte of the text."""
    encoding = bare.encode(prefix + text)
    ends = np.cumsum([len(piece) for piece in encoding.tokens])
    room = limit - len(bos) - 1
    ids = [*bos, *encoding.ids[:room], eos]
    return TokenizedText(np.array(ids), np.array([False] * len(bos) + [*(ends[:room] > len(prefix.encode())), True]))


# ---- offsets


@pytest.mark.parametrize("prefix", ["", PREFIX, "Instruct: x\nQuery: ", "Instruct: x\nQuery:\n", "query:", "Frage — "])
@pytest.mark.parametrize("limit", [512, 24])
def test_offsets_agree_with_counting_bytes(
    smollm2_tokenizer: Tokenizer, bare_tokenizer: Tokenizer, prefix: str, limit: int
) -> None:
    contract = Contract(eos_id=2, max_tokens=limit)
    rows = tokenize(smollm2_tokenizer, contract, TEXTS, prefix)
    assert len(rows) == len(TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        expected = by_bytes(bare_tokenizer, prefix, text, limit, eos=2)
        assert row.ids.tolist() == expected.ids.tolist(), text
        assert row.pool.tolist() == expected.pool.tolist(), text
        assert len(row.ids) <= limit and row.ids[-1] == 2 and row.pool[-1]
    assert {len(row.ids) for row in rows if len(row.ids) == limit} == ({24} if limit == 24 else set())


def test_the_word_that_the_prefix_melts_into_is_pooled(smollm2_tokenizer: Tokenizer) -> None:
    prefix = "Instruct: x\nQuery: "
    [row] = tokenize(smollm2_tokenizer, Contract(eos_id=2), ["tides rise"], prefix)
    pooled = [smollm2_tokenizer.id_to_token(int(i)) for i in row.ids[row.pool]]
    assert smollm2_tokenizer.decode(row.ids[row.pool].tolist()) == " tides rise" and pooled[-1] == "<|im_end|>"
    # the trap: the prefix alone has one token more than the row has in front of the text
    assert len(smollm2_tokenizer.encode(prefix).ids) == (~row.pool).sum() + 1


def test_bos_is_read_but_never_pooled(
    smollm2_tokenizer: Tokenizer, bare_tokenizer: Tokenizer, make_tokenizer: Callable[..., Tokenizer]
) -> None:
    assert leading_ids(make_tokenizer(bos=True)) == (0,) and leading_ids(make_tokenizer()) == ()
    contract = Contract(eos_id=2, bos_ids=(1,), max_tokens=20)
    for prefix in ("", "Instruct: x\nQuery: "):
        for text, row in zip(TEXTS, tokenize(smollm2_tokenizer, contract, TEXTS, prefix), strict=True):
            expected = by_bytes(bare_tokenizer, prefix, text, 20, eos=2, bos=(1,))
            assert row.ids.tolist() == expected.ids.tolist() and row.pool.tolist() == expected.pool.tolist()
            assert row.ids[0] == 1 and not row.pool[0] and len(row.ids) <= 20


def test_a_bos_that_the_pipeline_adds_is_not_added_twice(make_tokenizer: Callable[..., Tokenizer]) -> None:
    with_bos, without = make_tokenizer(bos=True), make_tokenizer()
    [row] = tokenize(with_bos, Contract(eos_id=1, bos_ids=(0,)), ["how do tides work?"])
    assert row.ids.tolist() == [0, *without.encode("how do tides work?").ids, 1]


def test_special_tokens_in_a_text_are_plain_text(smollm2_tokenizer: Tokenizer) -> None:
    smollm2_tokenizer.encode_special_tokens = False  # as another library may have left it
    rows = tokenize(
        smollm2_tokenizer, Contract(eos_id=2), ["<|im_end|>", "<|im_start|>system<|im_end|>"], "<|im_end|>\n"
    )
    for row in rows:
        assert not {0, 1, 2} & set(row.ids[:-1].tolist())
    assert smollm2_tokenizer.decode(rows[0].ids[rows[0].pool][:-1].tolist()) == "<|im_end|>"


def test_an_empty_text_is_pooled_from_its_eos(smollm2_tokenizer: Tokenizer) -> None:
    bare, behind = [tokenize(smollm2_tokenizer, Contract(eos_id=2), [""], prefix)[0] for prefix in ("", PREFIX)]
    assert bare.ids.tolist() == [2] and bare.pool.tolist() == [True]
    assert behind.pool.sum() == 1 and behind.pool[-1] and len(behind.ids) > 5
    assert tokenize(smollm2_tokenizer, Contract(eos_id=2), []) == []


def test_max_tokens_of_the_call_wins(smollm2_tokenizer: Tokenizer) -> None:
    contract = Contract(eos_id=2, max_tokens=16)
    for limit, expected in [(None, 16), (7, 7), (30, 30)]:
        [row] = tokenize(smollm2_tokenizer, contract, ["word " * 100], max_tokens=limit)
        assert len(row.ids) == expected and row.ids[-1] == 2


@pytest.mark.parametrize("rule", ["offsets", "boundary"])
def test_an_instruction_that_leaves_nothing_names_the_text(smollm2_tokenizer: Tokenizer, rule: Any) -> None:
    contract = Contract(eos_id=2, mask_rule=rule)
    prefix = "Instruct: x\nQuery:\n"
    whole = len(smollm2_tokenizer.encode(prefix).ids)
    fits = tokenize(smollm2_tokenizer, contract, ["tides"], prefix, max_tokens=whole + 2)[0]
    assert fits.pool.sum() == 2
    with pytest.raises(ValueError, match=rf"texts\[1\]: the instruction .* max_tokens={whole + 1} "):
        tokenize(smollm2_tokenizer, contract, ["", "tides"], prefix, max_tokens=whole + 1)
    with pytest.raises(ValueError, match=r"texts\[0\]"):  # here the prefix itself is cut
        tokenize(smollm2_tokenizer, contract, [""], prefix, max_tokens=whole)
    with pytest.raises(ValueError, match="max_tokens=1 leaves no room"):
        tokenize(smollm2_tokenizer, contract, ["tides"], max_tokens=1)


# ---- boundary


@pytest.mark.parametrize("limit", [512, 24])
def test_boundary_leaves_out_a_count_of_prompt_tokens(smollm2_tokenizer: Tokenizer, limit: int) -> None:
    prefix = BOUNDARY_TEMPLATE.replace("{task}", "Given a question")
    contract = Contract(query_template=BOUNDARY_TEMPLATE, eos_id=2, mask_rule="boundary", max_tokens=limit)
    assert contract.prefix("Given a question") == prefix
    count = len(smollm2_tokenizer.encode(prefix).ids)
    for text, row in zip(TEXTS, tokenize(smollm2_tokenizer, contract, TEXTS, prefix), strict=True):
        assert row.pool.tolist() == [False] * count + [True] * (len(row.ids) - count), text


def test_boundary_and_offsets_differ_in_melted_white_space_alone(smollm2_tokenizer: Tokenizer) -> None:
    prefix = "Query:\n"
    texts = [*TEXTS, "\n\nmore", " \n"]
    by_boundary, by_offsets = (
        tokenize(smollm2_tokenizer, Contract(eos_id=2, mask_rule=rule), texts, prefix)
        for rule in ("boundary", "offsets")
    )
    differing = 0
    for text, a, b in zip(texts, by_boundary, by_offsets, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        only_offsets = a.ids[a.pool != b.pool].tolist()
        assert smollm2_tokenizer.decode(only_offsets).isspace() or not only_offsets, text
        differing += bool(only_offsets)
    assert differing >= 3


# ---- count: a byte-fallback tokenizer as that of Llama and Mistral, small enough to write its rows by hand

MERGES = [("t", "i"), ("d", "e"), ("ti", "de"), ("▁", "Q"), ("▁", "tide"), ("▁", "a"), ("▁", "b")]


def llama_style_tokenizer() -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁tideQ:ab", *map("".join, MERGES)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize(
    ("prefix", "text", "max_tokens", "pieces", "left_out"),
    [
        ("", "tide a", 9, "<s> ▁tide ▁a </s>", 0),  # BOS is pooled
        ("Q: ", "tide a", 9, "<s> ▁Q : ▁tide ▁a </s>", 3),  # "▁Q", ":", "▁" alone; in front of a word BOS, "▁Q", ":"
        ("Q:", "tide a", 9, "<s> ▁Q : tide ▁a </s>", 2),  # no space behind the prefix: its ":" is pooled
        ("Q: ", "tide a", 5, "<s> ▁Q : ▁tide ▁a", 3),  # EOS is cut off
        ("Q: ", "tide a", 4, "<s> ▁Q : ▁tide", 3),
        ("Q: ", "", 9, "<s> ▁Q : ▁ </s>", 3),
        ("", "", 9, "<s> </s>", 0),
        ("", "a</s>b", 9, "<s> ▁a </s> ▁b </s>", 0),  # written in the text, it is the special token
        ("", "é", 9, "<s> ▁ <0xC3> <0xA9> </s>", 0),
    ],
)
def test_count_is_the_rule_of_the_reference(
    prefix: str, text: str, max_tokens: int, pieces: str, left_out: int
) -> None:
    tokenizer = llama_style_tokenizer()
    contract = Contract(eos_id=2, bos_ids=(1,), mask_rule="count", max_tokens=max_tokens)
    [row] = tokenize(tokenizer, contract, [text], prefix)
    assert [tokenizer.id_to_token(int(i)) for i in row.ids] == pieces.split()
    assert row.pool.tolist() == [i >= left_out for i in range(len(row.ids))]


def test_count_refuses_where_the_reference_gives_nan() -> None:
    contract = Contract(eos_id=2, bos_ids=(1,), mask_rule="count")
    tokenizer = llama_style_tokenizer()
    with pytest.raises(ValueError, match=r"texts\[0\]: the instruction 'Q: ' and max_tokens=3"):
        tokenize(tokenizer, contract, ["tide"], "Q: ", max_tokens=3)


@pytest.mark.parametrize(
    ("prefix", "text", "max_tokens", "pieces", "pooled"),
    [
        ("Q: ", "tide a", 9, "<s> ▁Q : ▁tide ▁a </s>", "000111"),
        ("Q: ", "tide a", 5, "<s> ▁Q : ▁tide </s>", "00011"),  # EOS stays
        ("Q:", "tide", 9, "<s> ▁Q : tide </s>", "00011"),
        ("Q: ", "é", 9, "<s> ▁Q : ▁ <0xC3> <0xA9> </s>", "0000111"),
        ("", "tide", 9, "<s> ▁tide </s>", "011"),
    ],
)
def test_offsets_on_a_tokenizer_with_bos_and_word_marks(
    prefix: str, text: str, max_tokens: int, pieces: str, pooled: str
) -> None:
    tokenizer = llama_style_tokenizer()
    [row] = tokenize(tokenizer, Contract(eos_id=2, bos_ids=(1,), max_tokens=max_tokens), [text], prefix)
    assert [tokenizer.id_to_token(int(i)) for i in row.ids] == pieces.split()
    assert "".join(str(int(p)) for p in row.pool) == pooled


def test_one_rule_does_not_change_the_other() -> None:
    """They want different settings of one tokenizer."""
    tokenizer = llama_style_tokenizer()
    contracts = [Contract(eos_id=2, bos_ids=(1,), mask_rule=rule) for rule in ("count", "offsets", "count")]
    first, between, again = [tokenize(tokenizer, contract, ["a</s>b"])[0] for contract in contracts]
    assert first.ids.tolist() == again.ids.tolist() != between.ids.tolist()
    assert first.ids.tolist().count(2) == 2 and between.ids.tolist().count(2) == 1


# ---- what models of others have besides: a suffix, special tokens in the template, no EOS

FOREIGN = {"query_template": "<q>{task}\n", "query_suffix": "\n<r>", "template_specials": True}


@pytest.mark.parametrize(
    ("prefix", "text", "max_tokens", "pieces", "pooled"),
    [
        ("<q>", "tide a", 9, "<s> <q> ▁tide ▁a <0x0A> <r> </s>", "0011001"),
        ("<q>", "tide a", 6, "<s> <q> ▁tide <0x0A> <r> </s>", "001001"),  # what stands around a text is never cut
        ("<q>Q<r>: ", "tide", 20, "<s> <q> ▁Q <r> ▁ : ▁tide <0x0A> <r> </s>", "0000001001"),
        ("Q: ", "tide", 9, "<s> ▁Q : ▁tide <0x0A> <r> </s>", "0001001"),  # no special token in front
        # in a text they are plain text
        ("<q>", "<r>a", 20, "<s> <q> ▁ <0x3C> <0x72> <0x3E> a <0x0A> <r> </s>", "0011111001"),
        ("<q>", "", 9, "<s> <q> ▁ <0x0A> <r> </s>", "000001"),
        ("", "tide", 9, "<s> ▁tide </s>", "011"),  # a document
        ("", "<q>a", 9, "<s> ▁ <0x3C> <0x71> <0x3E> a </s>", "0111111"),
    ],
)
def test_a_template_with_special_tokens_and_a_suffix(
    prefix: str, text: str, max_tokens: int, pieces: str, pooled: str
) -> None:
    tokenizer = llama_style_tokenizer()
    tokenizer.add_special_tokens(["<q>", "<r>"])
    contract = Contract(eos_id=2, bos_ids=(1,), max_tokens=max_tokens, **FOREIGN)
    [row] = tokenize(tokenizer, contract, [text], prefix)
    found = [tokenizer.id_to_token(int(i)) for i in row.ids]
    assert found == pieces.split()
    assert "".join(str(int(p)) for p in row.pool) == pooled


def test_a_template_gives_the_ids_of_the_whole_string() -> None:
    tokenizer = llama_style_tokenizer()
    tokenizer.add_special_tokens(["<q>", "<r>"])
    contract = Contract(eos_id=2, bos_ids=(1,), **FOREIGN)
    for prefix in ("<q>Q: tide\n<r>", "<q>", "Q<q>: ", "Q: "):
        for text in ("tide", " a", "a ", "", "é\n", "tide a b"):
            [row] = tokenize(tokenizer, contract, [text], prefix)
            assert row.ids[:-1].tolist() == tokenizer.encode(f"{prefix}{text}\n<r>").ids


@pytest.mark.parametrize(
    ("text", "max_tokens", "pieces", "pooled"),
    [
        ("a ti", 9, "<s> ▁Q : ▁a ▁tide </s>", "000111"),
        ("a ti", 5, "<s> ▁Q : ▁tide </s>", "00011"),  # a token that reaches into the suffix stays, and is pooled
        ("a ", 9, "<s> ▁Q : ▁a ▁ de </s>", "0001101"),
    ],
)
def test_a_suffix_may_melt_into_the_text(text: str, max_tokens: int, pieces: str, pooled: str) -> None:
    tokenizer = llama_style_tokenizer()
    contract = Contract(eos_id=2, bos_ids=(1,), query_suffix="de", max_tokens=max_tokens)
    [row] = tokenize(tokenizer, contract, [text], "Q: ")
    assert [tokenizer.id_to_token(int(i)) for i in row.ids] == pieces.split()
    assert "".join(str(int(p)) for p in row.pool) == pooled


def test_a_template_that_fills_the_length_names_the_text() -> None:
    tokenizer = llama_style_tokenizer()
    tokenizer.add_special_tokens(["<q>", "<r>"])
    contract = Contract(eos_id=2, bos_ids=(1,), **FOREIGN)
    assert len(tokenize(tokenizer, contract, ["tide"], "<q>", max_tokens=6)[0].ids) == 6
    for limit in (5, 4):
        with pytest.raises(
            ValueError, match=rf"texts\[0\]: the instruction '<q>' and max_tokens={limit} leave no token"
        ):
            tokenize(tokenizer, contract, ["tide"], "<q>", max_tokens=limit)


def test_a_model_without_eos_reads_none() -> None:
    tokenizer = llama_style_tokenizer()
    contract = Contract(eos_id=None, bos_ids=(1,), max_tokens=4)
    for text, prefix, pieces, pooled in [
        ("tide a b", "", "<s> ▁tide ▁a ▁b", "0111"),
        ("tide a b", "Q: ", "<s> ▁Q : ▁tide", "0001"),
        ("tide", "", "<s> ▁tide", "01"),
    ]:
        [row] = tokenize(tokenizer, contract, [text], prefix)
        assert [tokenizer.id_to_token(int(i)) for i in row.ids] == pieces.split()
        assert "".join(str(int(p)) for p in row.pool) == pooled
    [row] = tokenize(tokenizer, contract.model_copy(update={"query_suffix": ":"}), ["tide"], "Q: ", max_tokens=9)
    assert row.ids[-1] == tokenizer.token_to_id(":") and row.pool.tolist() == [False, False, False, True, False]
    for prefix in ("", "Q: "):  # the mean of nothing
        with pytest.raises(ValueError, match=r"texts\[1\]: the instruction .* leave no token to pool"):
            tokenize(tokenizer, contract, ["a", ""], prefix, max_tokens=9)
    with pytest.raises(ValueError, match="max_tokens=1 leaves no room"):
        tokenize(tokenizer, contract, ["a"], max_tokens=1)


# ---- texts and contracts


@pytest.mark.parametrize("rule", ["offsets", "boundary", "count"])
def test_what_is_no_text_is_named_by_its_index(make_tokenizer: Callable[..., Tokenizer], rule: Any) -> None:
    def read(texts: Any) -> None:
        tokenize(make_tokenizer(), Contract(eos_id=1, mask_rule=rule), texts)

    with pytest.raises(TypeError, match=r"texts\[2\] is int, not str"):
        read(["a", "b", 3])
    with pytest.raises(TypeError, match=r"texts\[0\] is NoneType"):
        read([None])
    with pytest.raises(TypeError, match="got one string"):
        read("a text")
    with pytest.raises(ValueError, match=r"texts\[1\] holds a lone surrogate"):
        read(["🙂", "half \ud83d of it"])


def test_good_texts_come_back_as_a_list() -> None:
    assert check_texts(("a", "é🙂\uffff")) == ["a", "é🙂\uffff"]
    assert check_texts(text for text in ["x"]) == ["x"]


def test_a_contract_is_data() -> None:
    contract = Contract(eos_id=7, bos_ids=(1,), document_template="passage: ", mask_rule="count", max_tokens=99)
    assert Contract.model_validate_json(contract.model_dump_json()) == contract
    assert contract.prefix("find {braces} \\1") == "Instruct: find {braces} \\1\nQuery: "
    assert contract.prefix(None) == contract.prefix("") == "passage: "
    assert Contract(eos_id=7, default_task="find", document_template="passage: ").prefix("") == "passage: "
    assert Contract(eos_id=7, default_task="find", document_template="passage: ").prefix(None) == "passage: "
    fixed = Contract(eos_id=7, query_template="query: ", document_template="passage: ")
    assert fixed.prefix("") == fixed.prefix("find") == "query: " and fixed.prefix(None) == "passage: "
    for foreign in ({"eos_id": None}, {"eos_id": 1, "query_suffix": "!"}, {"eos_id": 1, "template_specials": True}):
        for rule in ("count", "boundary"):
            with pytest.raises(ValidationError, match=f"not by '{rule}'"):
                Contract(**foreign, mask_rule=rule)
    with pytest.raises(ValidationError, match="mask_rules"):
        Contract.model_validate({"eos_id": 1, "mask_rules": "count"})
    with pytest.raises(ValidationError, match="max_tokens"):
        Contract(eos_id=1, max_tokens=1)


# ---- the file's ids


@pytest.fixture
def rebuilt_folder(tmp_path: Path) -> Path:
    """A tokenizer.json whose pipeline transformers 5 replaces with its own, as that of the released NV-Embed."""
    llama_style_tokenizer().save(str(tmp_path / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **special})
    )
    return tmp_path


def test_the_ids_are_those_of_the_file(rebuilt_folder: Path) -> None:
    stored = Tokenizer.from_file(str(rebuilt_folder / "tokenizer.json"))
    texts = [" tide", "▁tide", "a</s>b", "tide a", "é"]
    rebuilt = AutoTokenizer.from_pretrained(rebuilt_folder)
    if all(rebuilt(text)["input_ids"] == stored.encode(text).ids for text in texts):
        pytest.skip("this transformers no longer rebuilds the pipeline")

    loaded = load_tokenizer(rebuilt_folder)
    for text in texts:
        assert loaded(text)["input_ids"] == stored.encode(text).ids
    assert (loaded.eos_token, loaded.eos_token_id) == ("</s>", 2)
    assert leading_ids(loaded.backend_tokenizer) == (1,)


def test_a_tokenizer_that_is_not_rebuilt_is_left_to_transformers(tiny_decoder: Callable[..., Path]) -> None:
    folder = tiny_decoder("llama", bos=True)
    loaded, stored = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert type(loaded) is type(AutoTokenizer.from_pretrained(folder))
    for text in TEXTS:
        assert loaded(text)["input_ids"] == stored.encode(text).ids
