"""The tokenizer that carries the contract, and the folder that sentence-transformers opens, against the library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor, AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerFast

from embedwright.model.embedder import Embedder
from embedwright.model.interop.tokenizer import EmbedwrightTokenizer, sentence_transformers_files, tokenizer_for
from embedwright.model.pooling import Kind
from embedwright.text import Contract, TextTokenizer, load_tokenizer, tokenize

TEXTS = ["how do tides work?", "a", "", " leading and trailing ", "naïve 漢字 🙂", "</s> and <s>", "long " * 60]
PREFIXES = ["Instruct: x\nQuery: ", "Query:", "Query:\n", ""]
MAX_TOKENS = 40
USER = {"role": "user", "content": "how do tides work?"}
SYSTEM = {"role": "system", "content": "Query: "}

Make = Callable[..., Embedder]


@pytest.fixture
def tokenizer(tiny_embedder: Make) -> EmbedwrightTokenizer:
    model = tiny_embedder("latent", bos=True, max_tokens=MAX_TOKENS)
    return tokenizer_for(model.tokenizer, model.contract)


def rows_of(encoded: Any) -> list[tuple[list[int], list[int]]]:
    """(ids, pool mask) of each row without its padding."""
    rows = zip(*(encoded[name].tolist() for name in ("input_ids", "attention_mask", "pool_mask")), strict=True)
    return [
        ([i for i, a in zip(ids, attended, strict=True) if a], [p for p, a in zip(pool, attended, strict=True) if a])
        for ids, attended, pool in rows
    ]


def expected(tokenizer: Any, prefix: str = "", max_tokens: int | None = None) -> list[tuple[list[int], list[int]]]:
    rows = tokenize(TextTokenizer(tokenizer.backend_tokenizer), tokenizer.text_contract, TEXTS, prefix, max_tokens)
    return [(row.ids.tolist(), row.pool.astype(int).tolist()) for row in rows]


# ---- a call


@pytest.mark.parametrize("rule", ["offsets", "count"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_call_is_the_contract(prefix: str, rule: str, tiny_embedder: Make) -> None:
    model = tiny_embedder("latent", bos=True, max_tokens=MAX_TOKENS)
    contract = model.contract.model_copy(update={"mask_rule": rule})
    tokenizer = tokenizer_for(model.tokenizer, contract)
    assert tokenizer.text_contract == contract
    for side in ("right", "left"):
        encoded = tokenizer(TEXTS, prefix=prefix, padding_side=side)
        assert encoded["input_ids"].shape == encoded["pool_mask"].shape == (len(TEXTS), MAX_TOKENS)
        assert rows_of(encoded) == expected(tokenizer, prefix)
        assert not encoded["pool_mask"][encoded["attention_mask"] == 0].any()
        assert encoded["attention_mask"][1, 0 if side == "right" else -1] == 1  # padded on the other side


def test_without_a_prefix_a_text_is_a_document(tiny_embedder: Make) -> None:
    model = tiny_embedder("latent")
    contract = model.contract.model_copy(update={"document_template": "title: none | text: "})
    tokenizer = tokenizer_for(model.tokenizer, contract)
    assert rows_of(tokenizer(TEXTS)) == expected(tokenizer, "title: none | text: ")
    assert rows_of(tokenizer(TEXTS, prefix="")) == expected(tokenizer, "") != rows_of(tokenizer(TEXTS))


def test_lengths(tokenizer: Any) -> None:
    assert tokenizer.model_max_length == MAX_TOKENS
    assert rows_of(tokenizer(TEXTS, max_length=9)) == expected(tokenizer, max_tokens=9)
    assert rows_of(tokenizer(TEXTS, truncation=False)) == expected(tokenizer, max_tokens=1000)
    tokenizer.model_max_length = 7
    assert rows_of(tokenizer(TEXTS)) == expected(tokenizer, max_tokens=7) != expected(tokenizer, max_tokens=8)
    tokenizer.model_max_length = None
    assert rows_of(tokenizer(TEXTS)) == expected(tokenizer)
    with pytest.raises(ValueError, match="max_tokens=0"):
        tokenizer(TEXTS, max_length=0)


def test_one_text_and_lists(tokenizer: Any) -> None:
    ids, pool = expected(tokenizer)[0]
    assert dict(tokenizer(TEXTS[0], return_tensors=None)) == {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "pool_mask": pool,
    }
    assert tokenizer(TEXTS[0])["input_ids"].tolist() == [ids]
    assert tokenizer.encode(TEXTS[0]) == ids
    ragged = tokenizer(TEXTS, padding=False, return_tensors=None)
    assert list(zip(ragged["input_ids"], ragged["pool_mask"], strict=True)) == expected(tokenizer)
    assert tokenizer(TEXTS[:2], pad_to_multiple_of=16)["pool_mask"].shape == (2, 16)
    assert tokenizer(TEXTS[:2], padding="max_length", max_length=30)["pool_mask"].shape == (2, 30)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_data_collator_pads_the_pool_mask(side: str, tokenizer: Any) -> None:
    tokenizer.padding_side = side
    features = [tokenizer(text, return_tensors=None) for text in TEXTS]
    assert rows_of(DataCollatorWithPadding(tokenizer)(features)) == expected(tokenizer)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"text_pair": "b"}, "text pairs"),
        ({"add_special_tokens": False}, "add_special_tokens"),
        ({"return_offsets_mapping": True, "stride": 4}, "return_offsets_mapping, stride"),
        ({"is_split_into_words": True}, "is_split_into_words"),
        ({"truncation": "only_second"}, "only_second"),
        ({"prefix": "far too long " * 30}, r"texts\[0\].*no token to pool"),
    ],
)
def test_what_would_change_the_ids_is_refused(options: dict[str, Any], named: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=named):
        tokenizer(["a"], **options)


def test_what_is_no_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(TypeError, match=r"texts\[1\] is tuple"):
        tokenizer(["a", ("b", "c")])
    # options that ask for nothing, or for what is done anyway
    tokenizer("a", text_pair=None, add_special_tokens=True, return_attention_mask=True, is_split_into_words=False)


@pytest.mark.parametrize("eos_id", [1, None])
def test_a_tokenizer_without_a_pad_token_gets_one(eos_id: int | None, make_tokenizer: Callable[..., Any]) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer())
    assert bare.pad_token is None
    tokenizer = tokenizer_for(bare, Contract(eos_id=eos_id, max_tokens=MAX_TOKENS))
    texts = [text for text in TEXTS if text or eos_id]  # without EOS there is nothing to pool of an empty one
    expected = tokenize(TextTokenizer(tokenizer.backend_tokenizer), tokenizer.text_contract, texts)
    assert [ids for ids, _ in rows_of(tokenizer(texts))] == [row.ids.tolist() for row in expected]


def test_a_tokenizer_without_contract_says_so(tokenizer: Any) -> None:
    bare = EmbedwrightTokenizer(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="</s>")
    with pytest.raises(ValueError, match="no text contract"):
        bare(["a"])


# ---- conversations


def test_the_system_message_is_the_prefix(tokenizer: Any) -> None:
    conversations = [[SYSTEM, {"role": "user", "content": text}] for text in TEXTS]
    encoded = tokenizer.apply_chat_template(conversations, return_tensors="pt", truncation="longest_first")
    assert rows_of(encoded) == expected(tokenizer, "Query: ")
    alone = tokenizer.apply_chat_template([[c[1]] for c in conversations], return_tensors="pt", max_length=9)
    assert rows_of(alone) == expected(tokenizer, max_tokens=9)
    assert tokenizer.apply_chat_template(conversations, tokenize=False) == ["Query: " + text for text in TEXTS]


def test_each_row_has_its_own_prefix(tokenizer: Any) -> None:
    prefixes = [PREFIXES[i % 4] for i in range(len(TEXTS))]
    conversations = [
        [{"role": "system", "content": prefix}, {"role": "user", "content": text}]
        for prefix, text in zip(prefixes, TEXTS, strict=True)
    ]
    encoded = tokenizer.apply_chat_template(conversations, return_tensors="pt")
    assert rows_of(encoded) == [expected(tokenizer, prefix)[i] for i, prefix in enumerate(prefixes)]
    conversations[5][0] = {"role": "system", "content": "far too long " * 30}
    with pytest.raises(ValueError, match=r"texts\[5\].*no token to pool"):
        tokenizer.apply_chat_template(conversations)


def test_one_conversation(tokenizer: Any) -> None:
    ids = expected(tokenizer)[0][0]
    assert tokenizer.apply_chat_template([USER])["input_ids"] == ids
    assert tokenizer.apply_chat_template([USER], return_dict=False) == ids
    assert tokenizer.apply_chat_template([USER], return_tensors="pt")["input_ids"].tolist() == [ids]
    assert tokenizer.apply_chat_template([SYSTEM, USER], tokenize=False) == "Query: how do tides work?"


@pytest.mark.parametrize(
    ("conversation", "options", "named"),
    [
        ([USER, USER], {}, r"roles \['user', 'user'\]"),
        ([SYSTEM], {}, r"roles \['system'\]"),
        ([USER, SYSTEM], {}, r"roles \['user', 'system'\]"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], {}, "content of a message must be a string"),
        ([USER], {"add_generation_prompt": True}, "add_generation_prompt"),
        ([USER], {"chat_template": "{{ messages }}"}, "chat_template"),
        ([USER], {"tokenizer_kwargs": {"stride": 2}}, "stride"),
    ],
)
def test_other_conversations_are_refused(
    conversation: Any, options: dict[str, Any], named: str, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=named):
        tokenizer.apply_chat_template(conversation, **options)


# ---- on disk


def test_it_is_loaded_by_its_folder(tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder("latent", bos=True, max_tokens=MAX_TOKENS)
    model.tokenizer.chat_template = "{{ messages }}"
    model.save(tmp_path / "saved")
    for opened in (AutoTokenizer, AutoProcessor):
        tokenizer = opened.from_pretrained(tmp_path / "saved")
        assert type(tokenizer) is EmbedwrightTokenizer and tokenizer.chat_template is None
        assert tokenizer.text_contract == model.contract
        assert rows_of(tokenizer(TEXTS, prefix="Query: ")) == expected(tokenizer, "Query: ")
        assert tokenizer.special_tokens_map == model.tokenizer.special_tokens_map
    again = load_tokenizer(tmp_path / "saved")
    assert type(again) is EmbedwrightTokenizer
    tokenizer_for(again, model.contract).save_pretrained(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "saved" / name).read_text()


@torch.inference_mode()
@pytest.mark.parametrize("prefix", PREFIXES)
def test_automodel_and_its_tokenizer_give_the_vectors(prefix: str, tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder("latent", max_tokens=MAX_TOKENS)
    model.save(tmp_path / "saved")
    opened, tokenizer = (cls.from_pretrained(tmp_path / "saved") for cls in (AutoModel, AutoTokenizer))
    output = opened(**tokenizer(TEXTS, prefix=prefix))
    np.testing.assert_allclose(output.pooler_output, model.encode(TEXTS, prefix=prefix), rtol=0, atol=1e-6)


# ---- sentence-transformers


def opened_by_st(model: Embedder, folder: Path) -> SentenceTransformer:
    model.save(folder)
    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("pooling", "bos", "attention"),
    [
        *((kind, True, "bidirectional") for kind in get_args(Kind)),
        ("latent", False, "bidirectional"),
        ("latent", True, "causal"),
        ("last", True, "causal"),
    ],
)
def test_sentence_transformers_gives_the_same_vectors(
    pooling: str, bos: bool, attention: str, tiny_embedder: Make, tmp_path: Path
) -> None:
    model = tiny_embedder(pooling, "mistral", bos, attention=attention, max_tokens=MAX_TOKENS)
    opened = opened_by_st(model, tmp_path / "saved")
    assert [type(module).__name__ for module in opened] == ["Transformer", "Pooling", "Normalize"]
    assert opened.max_seq_length == MAX_TOKENS and opened.get_embedding_dimension() == model.embedding_dim
    for prefix, batch_size in zip(PREFIXES, (1, 3, 3, 32), strict=True):
        found = opened.encode(TEXTS, prompt=prefix, batch_size=batch_size)
        np.testing.assert_allclose(found, model.encode(TEXTS, prefix=prefix), rtol=0, atol=1e-6)
    np.testing.assert_allclose(opened.encode(TEXTS), model.encode(TEXTS), rtol=0, atol=1e-6)
    opened.max_seq_length = 9
    np.testing.assert_allclose(opened.encode(TEXTS), model.encode(TEXTS, max_tokens=9), rtol=0, atol=1e-6)


def test_it_does_for_the_count_rule(tiny_embedder: Make, tmp_path: Path) -> None:
    """Under which EOS is cut off with the rest, and nobody may put it back."""
    model = tiny_embedder("latent", bos=True, max_tokens=MAX_TOKENS)
    contract = model.contract.model_copy(update={"mask_rule": "count"})
    model.network.contract, model.network.config.contract = contract, contract.model_dump()
    model = Embedder(model.network, model.tokenizer)
    opened = opened_by_st(model, tmp_path / "saved")
    assert model.tokenize(TEXTS).ids_T[-1] != contract.eos_id
    for prefix in PREFIXES:
        expected = model.encode(TEXTS, prefix=prefix)
        np.testing.assert_allclose(opened.encode(TEXTS, prompt=prefix), expected, rtol=0, atol=1e-6)


def test_it_does_in_bfloat16(tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder("mean", bos=True, dtype="bfloat16")
    opened = opened_by_st(model, tmp_path / "saved")
    assert next(opened.parameters()).dtype == torch.bfloat16
    # `forward` runs transformers' own blocks and `encode` the faster forms: in 16 bits they round at other places
    np.testing.assert_allclose(opened.encode(TEXTS), model.encode(TEXTS), rtol=0, atol=2e-2)


def test_prompts_of_the_folder(tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder("latent")
    contract = model.contract.model_copy(update={"document_template": "title: none | text: ", "default_task": "Find"})
    model.network.contract, model.network.config.contract = contract, contract.model_dump()
    model = Embedder(model.network, model.tokenizer)
    opened = opened_by_st(model, tmp_path / "saved")
    for got, wanted in [
        (opened.encode(TEXTS), model.encode(TEXTS)),
        (opened.encode_document(TEXTS), model.encode(TEXTS)),
        (opened.encode_query(TEXTS), model.encode(TEXTS, task="Find")),
        (opened.encode(TEXTS, prompt=""), model.encode(TEXTS, prefix="")),
        (opened.encode_query(TEXTS, prompt="Q: "), model.encode(TEXTS, prefix="Q: ")),
    ]:
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)
    file = tmp_path / "saved" / "config_sentence_transformers.json"
    config = json.loads(file.read_text())
    config["prompts"]["tides"] = model.contract.prefix("Find tides")
    file.write_text(json.dumps(config))
    named = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS, prompt_name="tides")
    np.testing.assert_allclose(named, model.encode(TEXTS, task="Find tides"), rtol=0, atol=1e-6)


def test_it_takes_messages_and_no_pairs(tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder("latent")
    opened = opened_by_st(model, tmp_path / "saved")
    np.testing.assert_allclose(
        opened.encode([[SYSTEM, USER], [USER]]),
        np.concatenate([model.encode([USER["content"]], prefix=prefix) for prefix in ("Query: ", "")]),
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="pair"):
        opened.encode([("a", "b")])


def test_what_it_saves_is_an_embedder(tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder("latent")
    opened_by_st(model, tmp_path / "saved").save_pretrained(str(tmp_path / "again"))
    np.testing.assert_allclose(Embedder.load(tmp_path / "again").encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_it_trains_there(tiny_embedder: Make, tmp_path: Path) -> None:
    opened = opened_by_st(tiny_embedder("latent"), tmp_path / "saved")
    embedding = opened(opened.preprocess(TEXTS, prompt="Query: "))["sentence_embedding"]
    (embedding * torch.randn_like(embedding)).sum().backward()
    assert [name for name, p in opened.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("fields", "prompts"),
    [
        ({}, {"query": "", "document": ""}),
        ({"query_template": "q: ", "document_template": "d: "}, {"query": "q: ", "document": "d: "}),
        ({"default_task": "Find"}, {"query": "Instruct: Find\nQuery: ", "document": ""}),
    ],
)
def test_prompts_are_the_templates(fields: dict[str, str], prompts: dict[str, str]) -> None:
    files = sentence_transformers_files(Contract(eos_id=1, **fields), "mean", 8, {})
    config = files["config_sentence_transformers.json"]
    assert config["prompts"] == prompts
    assert config["default_prompt_name"] == ("document" if prompts["document"] else None)
    assert files["sentence_bert_config.json"]["max_seq_length"] == Contract(eos_id=1).max_tokens
