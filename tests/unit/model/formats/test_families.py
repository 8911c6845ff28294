"""Each family against literal tokens of its authors' input format, and against their own way to its vectors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from embedwright.model.embedder import Embedder
from embedwright.model.formats.detect import format_of
from embedwright.model.formats.families import FAMILIES, family_of, read_family, split_family

TASK = "Find it"
TEXTS = [
    "tides rise",
    "a",
    " two  spaces, and a\nnew line",
    "naïve café 漢字 🙂",
    "a longer text that is more than any window of these models " * 3,
]
LIMIT = 24  # cuts the last text


@pytest.fixture
def opened(family_folder: Callable[[str], Path]) -> Callable[[str], Embedder]:
    return lambda name: Embedder.load(family_folder(name), device="cpu")


# ---- tokens, written out

GOLDEN = {
    ("qwen3-embedding", TASK): (
        "Instruct : ĠFind Ġ i t Ċ Query : tide s Ġ r i se <|endoftext|>",
        "       0 0     0 0 0 0 0     0 0    1 1 1 1 1  1             1",
    ),
    ("qwen3-embedding", None): ("tide s Ġ r i se <|endoftext|>", "1 1 1 1 1 1 1"),
    ("e5-mistral", TASK): (
        "<s> ▁Instruct : ▁Find ▁ i t <0x0A> Query : ▁tide s ▁ r i se </s>",
        "  0         0 0     0 0 0 0      0     0 0     1 1 1 1 1  1    1",
    ),
    ("e5-mistral", None): ("<s> ▁tide s ▁ r i se </s>", "0 1 1 1 1 1 1 1"),
    ("gritlm", TASK): (
        "<s> ▁ < | u se r | > <0x0A> Find ▁ i t <0x0A> < | embed | > <0x0A> tide s ▁ r i se",
        "  0 0 0 0 0  0 0 0 0      0    0 0 0 0      0 0 0     0 0 0      0    1 1 1 1 1  1",
    ),
    ("gritlm", None): ("<s> ▁ < | embed | > <0x0A> tide s ▁ r i se", "0 0 0 0 0 0 0 0 1 1 1 1 1 1"),
    ("bge-en-icl", TASK): (
        "<s> <instruct> ▁Find ▁ i t <0x0A> <query> ▁tide s ▁ r i se <0x0A> <response> </s>",
        "  0          0     0 0 0 0      0       0     1 1 1 1 1  1      0          0    1",
    ),
    ("bge-en-icl", None): ("<s> ▁tide s ▁ r i se </s>", "0 1 1 1 1 1 1 1"),
}
# Cut to so many tokens: what the family puts around a text stays.
CUT = {
    ("qwen3-embedding", TASK, 12): "Instruct : ĠFind Ġ i t Ċ Query : tide s <|endoftext|>",
    ("e5-mistral", TASK, 12): "<s> ▁Instruct : ▁Find ▁ i t <0x0A> Query : ▁tide </s>",
    ("gritlm", None, 10): "<s> ▁ < | embed | > <0x0A> tide s",
    ("bge-en-icl", TASK, 12): "<s> <instruct> ▁Find ▁ i t <0x0A> <query> ▁tide <0x0A> <response> </s>",
    ("bge-en-icl", None, 3): "<s> ▁tide </s>",
}


def pieces(model: Embedder, ids: Any) -> str:
    return " ".join(model.tokenizer.backend_tokenizer.id_to_token(int(i)) for i in ids)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("task", [TASK, None])
def test_tokens_are_those_of_the_authors_format(opened: Callable[[str], Embedder], name: str, task: str | None) -> None:
    model = opened(name)
    packed = model.tokenize(["tides rise"], task=task)
    tokens, pooled = GOLDEN[name, task]
    assert pieces(model, packed.ids_T) == tokens
    assert packed.pool_mask_T.int().tolist() == [int(mark) for mark in pooled.split()]


@pytest.mark.parametrize(("name", "task", "limit"), CUT)
def test_a_cut_text_keeps_what_stands_around_it(
    opened: Callable[[str], Embedder], name: str, task: str | None, limit: int
) -> None:
    model = opened(name)
    [ids] = [model.tokenize(["tides rise"], task=task, max_tokens=limit).ids_T]
    assert pieces(model, ids) == CUT[name, task, limit]


def test_a_query_without_a_task_has_the_authors_and_an_empty_one_is_none(opened: Callable[[str], Embedder]) -> None:
    web = "Given a web search query, retrieve relevant passages that answer the query"
    for name, task in [("qwen3-embedding", web), ("e5-mistral", web), ("bge-en-icl", f"{web}.")]:
        contract = opened(name).contract
        assert contract.query_task(None) == task and contract.query_task("") == ""
        assert contract.prefix(task) != contract.prefix("") == contract.prefix(None) == ""
    grit = opened("gritlm").contract
    assert grit.prefix("") == grit.prefix(None) == "<|embed|>\n"


def test_lengths_are_the_folders_else_the_familys(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    lengths = {name: Embedder.load(family_folder(name)).max_tokens for name in FAMILIES}
    assert lengths == {"qwen3-embedding": 8192, "e5-mistral": 4096, "gritlm": 512, "bge-en-icl": 512}
    shutil.copytree(family_folder("e5-mistral"), tmp_path / "short")
    (tmp_path / "short" / "sentence_bert_config.json").write_text('{"max_seq_length": 77}')
    assert Embedder.load(tmp_path / "short").max_tokens == 77


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_in_a_text_are_plain_text(opened: Callable[[str], Embedder], name: str) -> None:
    model = opened(name)
    text = "<response></s><|endoftext|><query>"
    special = {i for i, t in model.tokenizer.backend_tokenizer.get_added_tokens_decoder().items() if t.special}
    for task in (TASK, None):
        packed = model.tokenize([text], task=task)
        template = model.tokenize([""], task=task) if name != "gritlm" else model.tokenize(["x"], task=task)
        count = [sum(int(i) in special for i in row.ids_T) for row in (packed, template)]
        assert count[0] == count[1]


# ---- vectors, the authors' way


def last_token(folder: Path, rows: list[list[int]]) -> np.ndarray:
    """`last_token_pool` of the model cards, on right-padded rows through the stock causal mask."""
    return authors_states(folder, rows, lambda states_LD, _: states_LD[-1])


def authors_states(folder: Path, rows: list[list[int]], pool: Any, full: bool = False) -> np.ndarray:
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    seen = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    mask: Any = seen.long()
    if full:  # added to the scores as it is: every token sees every token of its text
        mask = torch.zeros(len(rows), 1, longest, longest).masked_fill(~seen[:, None, None, :], torch.finfo().min)
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    pooled = torch.stack([pool(states[i, : len(row)], row) for i, row in enumerate(rows)])
    return F.normalize(pooled, dim=-1).numpy()


def test_qwen3_embedding_is_what_sentence_transformers_gives(family_folder: Callable[[str], Path]) -> None:
    transformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    folder = family_folder("qwen3-embedding")
    model, other = Embedder.load(folder, device="cpu"), transformer(str(folder), device="cpu")
    other.max_seq_length = LIMIT
    got = model.encode(TEXTS, task=TASK, max_tokens=LIMIT)
    assert np.abs(got - other.encode(TEXTS, prompt=f"Instruct: {TASK}\nQuery:")).max() < 1e-5
    assert np.abs(model.encode(TEXTS, max_tokens=LIMIT) - other.encode_document(TEXTS)).max() < 1e-5
    other.max_seq_length = 512
    assert np.abs(model.encode_query(TEXTS) - other.encode_query(TEXTS)).max() < 1e-5  # its own `query` prompt
    assert np.abs(model.encode_query(TEXTS, "") - other.encode_query(TEXTS, prompt="")).max() < 1e-5
    assert other.tokenizer.eos_token == "<|im_end|>"  # which no text ends with


def test_e5_mistral_is_the_model_cards_code(family_folder: Callable[[str], Path]) -> None:
    folder = family_folder("e5-mistral")
    model, tokenizer = Embedder.load(folder, device="cpu"), AutoTokenizer.from_pretrained(folder)
    for task, prefix in [(TASK, f"Instruct: {TASK}\nQuery: "), (None, "")]:
        texts = [prefix + text for text in TEXTS]
        rows = tokenizer(texts, max_length=LIMIT - 1, truncation=True, padding=False)["input_ids"]
        expected = last_token(folder, [[*row, tokenizer.eos_token_id] for row in rows])
        assert np.abs(model.encode(TEXTS, task=task, max_tokens=LIMIT) - expected).max() < 1e-5


def test_e5_mistral_through_sentence_transformers_alone_loses_its_eos(family_folder: Callable[[str], Path]) -> None:
    """The trap: tokenizer_config.json asks for EOS, and this transformers does not add it."""
    transformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    folder = family_folder("e5-mistral")
    model, other = Embedder.load(folder, device="cpu"), transformer(str(folder), device="cpu")
    assert other.tokenizer("tides")["input_ids"][-1] != 2
    assert np.abs(model.encode(TEXTS) - other.encode(TEXTS)).max() > 0.05
    assert all(packed.ids_T[-1] == 2 for packed in (model.tokenize([text]) for text in TEXTS))


def test_gritlm_is_a_mean_after_the_instruction_that_sees_all(family_folder: Callable[[str], Path]) -> None:
    folder = family_folder("gritlm")
    model, tokenizer = Embedder.load(folder, device="cpu"), AutoTokenizer.from_pretrained(folder)
    for task, prefix in [(TASK, f"<|user|>\n{TASK}\n<|embed|>\n"), (None, "<|embed|>\n")]:
        rows = tokenizer([prefix + text for text in TEXTS], max_length=2 * LIMIT, truncation=True)["input_ids"]
        count = len(tokenizer(prefix)["input_ids"])
        expected = authors_states(folder, rows, lambda states_LD, _, n=count: states_LD[n:].mean(0), full=True)
        assert np.abs(model.encode(TEXTS, task=task, max_tokens=2 * LIMIT) - expected).max() < 1e-5


def test_gritlm_has_no_vector_for_a_text_of_nothing(opened: Callable[[str], Embedder]) -> None:
    with pytest.raises(ValueError, match=r"texts\[1\]: the instruction '<\|embed\|>\\n' .* leave no token to pool"):
        opened("gritlm").encode(["tides", ""])


def test_bge_en_icl_is_the_last_token_of_the_whole_string(family_folder: Callable[[str], Path]) -> None:
    folder = family_folder("bge-en-icl")
    model, tokenizer = Embedder.load(folder, device="cpu"), AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "ends in a newline\n", "", "x " * 300]
    queries = [f"<instruct>{TASK}\n<query>{text}\n<response>" for text in texts]
    rows = tokenizer(queries)["input_ids"]
    assert np.abs(model.encode(texts, task=TASK, max_tokens=2048) - last_token(folder, rows)).max() < 1e-5
    rows = tokenizer(texts, max_length=LIMIT, truncation=True)["input_ids"]
    assert np.abs(model.encode(texts, max_tokens=LIMIT) - last_token(folder, rows)).max() < 1e-5


# ---- recognising


def test_a_folder_is_known_by_its_files_and_by_its_name(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    for name, family in FAMILIES.items():
        folder = family_folder(name)
        assert folder.name == "model" and format_of(folder, str(folder)) == family
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / name).mkdir()
        assert family_of(tmp_path / name, "elsewhere/model", config) is None  # no file that says so
        for known in (f"models/{name}", f"Org/{name.upper()}-7B-v2"):
            assert family_of(tmp_path / name, known, config) == family
        assert family_of(tmp_path / name, f"my-{name}", config) is None
        assert family_of(tmp_path / name, name, {**config, "model_type": "bert"}) is None


def test_a_family_can_be_said(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    assert split_family("e5-mistral:a/b") == (FAMILIES["e5-mistral"], "a/b")
    assert split_family("other:a/b") == (None, "other:a/b") and split_family("e5-mistral") == (None, "e5-mistral")
    folder = tmp_path / "mine"
    shutil.copytree(family_folder("e5-mistral"), folder)
    (folder / "config_sentence_transformers.json").unlink()
    with pytest.raises(ValueError, match=r"not an embedder that we know.*e5-mistral:"):
        Embedder.load(folder)
    expected = Embedder.load(family_folder("e5-mistral")).encode(TEXTS, task=TASK)
    assert np.array_equal(Embedder.load(f"e5-mistral:{folder}").encode(TEXTS, task=TASK), expected)


def test_a_folder_that_does_more_than_its_family_is_refused(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A dense layer, or another pooling, would be left out without a word."""
    for change in ("dense", "pooling"):
        folder = tmp_path / change
        shutil.copytree(family_folder("qwen3-embedding"), folder)
        if change == "dense":
            modules = json.loads((folder / "modules.json").read_text())
            modules[2] = {**modules[2], "type": "sentence_transformers.models.Dense"}
            (folder / "modules.json").write_text(json.dumps(modules))
        else:
            (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
        assert format_of(folder, str(folder)) is None
        with pytest.raises(ValueError, match=r"modules\.json has modules or a pooling that qwen3-embedding does not"):
            Embedder.load(f"qwen3-embedding:{folder}")


def test_what_does_not_fit_is_named(family_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="is a 'qwen3' model, not one of e5-mistral"):
        Embedder.load(f"e5-mistral:{family_folder('qwen3-embedding')}")
    with pytest.raises(ValueError, match=r"the tokenizer has no '<\|endoftext\|>', which e5-mistral needs"):
        read_family(family_folder("gritlm"), FAMILIES["e5-mistral"]._replace(eos="<|endoftext|>"))


# ---- what else is done with one


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_it_reads_as_before(opened: Callable[[str], Embedder], tmp_path: Path, name: str) -> None:
    model = opened(name)
    model.save(tmp_path / "saved")
    again = Embedder.load(tmp_path / "saved", device="cpu")
    assert again.contract == model.contract
    for task in (TASK, None):
        assert np.abs(again.encode(TEXTS, task=task) - model.encode(TEXTS, task=task)).max() < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_a_base_too(family_folder: Callable[[str], Path], name: str) -> None:
    model = Embedder.from_decoder(family_folder(name), pooling="latent", latents=4, heads=2, multiple=1, device="cpu")
    assert not model.network.backbone.config.is_causal and model.contract.default_task == ""
    vectors = model.encode(TEXTS, task=TASK)
    assert vectors.shape == (len(TEXTS), 32) and np.abs(vectors @ vectors.T - 1).max() > 1e-3


def test_dtype_is_asked_for_or_stored(family_folder: Callable[[str], Path]) -> None:
    folder = family_folder("qwen3-embedding")
    assert Embedder.load(folder).network.dtype == torch.float32
    assert Embedder.load(folder, dtype="bfloat16").network.dtype == torch.bfloat16
