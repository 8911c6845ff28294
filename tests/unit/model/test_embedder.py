"""`Embedder.encode`: the same vectors in whatever order, batch, precision or backend they are asked for."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from embedwright.model.embedder import Embedder
from embedwright.model.pooling import WEIGHTLESS, Kind
from embedwright.text import BOUNDARY_TEMPLATE

POOLINGS = get_args(Kind)
WORDS = ["how", "do", "tides", "work", "moon", "sun", "sea", "fox", "dog", "漢字", "🙂", "3.14", "Query:", "x"]
TASK = "Given a question, retrieve passages that answer it"


def made_up_texts(count: int) -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, random.integers(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tiny_embedder: Callable[..., Embedder]) -> Embedder:
    return tiny_embedder("latent", max_tokens=64)


# ---- what vectors depend on


@pytest.mark.parametrize("pooling", POOLINGS)
def test_batches_and_order_change_nothing(pooling: Any, tiny_embedder: Callable[..., Embedder]) -> None:
    model, texts = tiny_embedder(pooling), made_up_texts(40)
    expected = model.encode(texts, TASK)
    assert expected.shape == (40, model.embedding_dim) and expected.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    assert (np.triu(expected @ expected.T, 1) < 0.9999).all()  # different texts, different vectors
    for batch_tokens in (1, 70, 300):  # 1: each text is a batch of its own
        np.testing.assert_allclose(model.encode(texts, TASK, batch_tokens=batch_tokens), expected, atol=1e-5)
    order = np.random.default_rng(1).permutation(40)
    np.testing.assert_allclose(model.encode([texts[i] for i in order], TASK), expected[order], atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_backends_agree(pooling: Any, backend: Any, tiny_embedder: Callable[..., Embedder]) -> None:
    texts = made_up_texts(8)
    packed, stock = (tiny_embedder(pooling, "mistral", backend=b) for b in ("packed", backend))
    assert stock.network.implementation == backend
    for task in (None, TASK):
        np.testing.assert_allclose(stock.encode(texts, task), packed.encode(texts, task), atol=1e-5)


def test_repeats_are_equal_and_in_place(model: Embedder) -> None:
    a, b, c = model.encode(["a", "b", "c"])
    np.testing.assert_allclose(model.encode(["b", "a", "b", "c", "a"]), [b, a, b, c, a], atol=1e-6)


def test_repeats_are_encoded_once(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda packed: (seen.append(sum(n for n, _ in packed.runs)), embed(packed))[1])
    assert len(model.encode(["b", "a", "b", "c", "a"])) == 5
    assert seen == [3]


@pytest.mark.parametrize(("threads", "largest"), [(1, 1024), (4, 1024), (16, 4096)])
def test_a_batch_has_rows_for_all_threads(
    model: Embedder, monkeypatch: pytest.MonkeyPatch, threads: int, largest: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seen: list[int] = []
    monkeypatch.setattr(
        model,
        "embed",
        lambda packed: (seen.append(len(packed.ids_T)), torch.ones(sum(n for n, _ in packed.runs), 1))[1],
    )
    model.encode([f"{i} " + "word " * 60 for i in range(200)])
    assert largest - 64 < max(seen) <= largest


def test_a_model_can_be_sent_to_another_process(model: Embedder) -> None:
    """As the pools of sentence-transformers do it: with its faster classes, which have no name to be found by."""
    sent = pickle.loads(pickle.dumps(model))
    assert [type(part) for part in sent.network.modules()] == [type(part) for part in model.network.modules()]
    np.testing.assert_array_equal(sent.encode(["a", "some words"]), model.encode(["a", "some words"]))


def test_chunks_of_a_corpus_meet_in_order(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = made_up_texts(23)
    expected = model.encode(texts)
    monkeypatch.setattr("embedwright.model.encode._CHUNK", 5)
    np.testing.assert_allclose(model.encode(texts), expected, atol=1e-5)


def test_a_text_longer_than_a_batch_is_encoded_whole(model: Embedder) -> None:
    texts = ["word " * 50, "a", "word " * 49]
    np.testing.assert_allclose(model.encode(texts, batch_tokens=10), model.encode(texts), atol=1e-5)
    assert model.tokenize(texts).longest == 64  # max_tokens
    cut = model.encode(texts[:1], max_tokens=16)
    np.testing.assert_allclose(cut, model.encode([texts[2]], max_tokens=16), atol=1e-5)
    assert np.abs(cut - model.encode(texts[:1])).max() > 1e-3


def test_task_is_the_template_and_prefix_is_raw(model: Embedder, tiny_embedder: Callable[..., Embedder]) -> None:
    texts = made_up_texts(4)
    by_task = model.encode(texts, TASK)
    np.testing.assert_array_equal(by_task, model.encode(texts, prefix=f"Instruct: {TASK}\nQuery: "))
    assert np.abs(by_task - model.encode(texts)).max() > 1e-3
    np.testing.assert_array_equal(model.encode(texts, prefix=""), model.encode(texts))
    mean = tiny_embedder("mean")
    boundary = BOUNDARY_TEMPLATE.replace("{task}", TASK)
    np.testing.assert_array_equal(mean.encode(texts, TASK), mean.encode(texts, prefix=boundary))


def with_contract(model: Embedder, **fields: Any) -> Embedder:
    """The same network, read in another way."""
    contract = model.contract.model_copy(update=fields)
    model.network.contract, model.network.config.contract = contract, contract.model_dump()
    return Embedder(model.network, model.tokenizer)


@pytest.mark.parametrize("pooling", ["latent", "mean"])
def test_each_side_has_its_method_as_in_sentence_transformers(
    pooling: Any, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    model = with_contract(tiny_embedder(pooling), default_task=TASK)
    model.save(tmp_path / "model")
    theirs, texts = SentenceTransformer(str(tmp_path / "model"), device="cpu"), made_up_texts(4)
    np.testing.assert_allclose(model.encode_query(texts), theirs.encode_query(texts), atol=1e-6)
    np.testing.assert_allclose(model.encode_document(texts), theirs.encode_document(texts), atol=1e-6)
    np.testing.assert_array_equal(model.encode_query(texts), model.encode(texts, task=TASK))
    np.testing.assert_array_equal(
        model.encode_query(texts, "Find another", dim=8), model.encode(texts, "Find another", dim=8)
    )
    assert np.abs(model.encode_query(texts) - model.encode_document(texts)).max() > 1e-3
    # an empty one means none on both sides, though the model has one
    for bare in (model.encode_query(texts, ""), model.encode(texts, ""), theirs.encode_query(texts, prompt="")):
        np.testing.assert_allclose(bare, model.encode_document(texts), atol=1e-6)


def test_queries_never_become_documents_unsaid(model: Embedder) -> None:
    """Where a model has no instruction of its own, as those that are trained here."""
    texts = made_up_texts(4)
    with pytest.raises(ValueError, match="no instruction of its own") as refused:
        model.encode_query(texts)
    assert 'task=""' in str(refused.value)
    for asked in ({"task": ""}, {"prefix": ""}):
        np.testing.assert_array_equal(model.encode_query(texts, **asked), model.encode_document(texts))  # type: ignore[arg-type]
    np.testing.assert_array_equal(model.encode_query(texts, TASK), model.encode(texts, TASK))
    with pytest.raises(TypeError, match="task"):
        model.encode_document(texts, task=TASK)


def test_a_fixed_query_template_needs_no_instruction(tiny_embedder: Callable[..., Embedder]) -> None:
    model, texts = with_contract(tiny_embedder("latent"), query_template="query: "), made_up_texts(4)
    for found in (model.encode_query(texts), model.encode(texts, task=""), model.encode_query(texts, TASK)):
        np.testing.assert_array_equal(found, model.encode(texts, prefix="query: "))
    assert np.abs(model.encode_query(texts) - model.encode(texts)).max() > 1e-3


@pytest.mark.parametrize("pooling", ["latent", "mean"])
def test_the_instruction_is_read_but_not_pooled(pooling: Any, tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder(pooling)
    packed = model.tokenize(["tides rise"], prefix="Query:\n")
    with torch.no_grad():
        tokens_TD = model.network.token_states(packed).numpy()
    mean = tokens_TD[packed.pool_mask_T.numpy()].mean(0)
    assert 0 < packed.pool_mask_T.sum() < len(tokens_TD)
    expected = mean / np.linalg.norm(mean)
    np.testing.assert_allclose(model.encode(["tides rise"], prefix="Query:\n")[0], expected, atol=1e-5)


# ---- shapes and precisions


def test_nothing_in_nothing_out(model: Embedder) -> None:
    assert model.encode([]).shape == (0, 32) and model.encode([]).dtype == np.float32
    assert model.encode([], dim=8).shape == (0, 8)
    assert model.encode([], precision="int8").shape == (0, 32)
    assert model.encode([], dim=16, precision="binary").shape == (0, 2)
    assert len(model.tokenize([])) == 0


def test_fewer_dimensions_are_normalised_again(model: Embedder) -> None:
    texts = made_up_texts(5)
    full = model.encode(texts)
    for dim in (1, 8, 32):
        first = full[:, :dim]
        expected = first / np.linalg.norm(first, axis=1, keepdims=True)
        np.testing.assert_allclose(model.encode(texts, dim=dim), expected, atol=1e-6)


def test_int8_keeps_cosines(model: Embedder) -> None:
    texts = made_up_texts(20)
    full, small = model.encode(texts), model.encode(texts, precision="int8")
    assert small.dtype == np.int8 and small.shape == full.shape
    assert (np.abs(small.astype(int)).max(1) == 127).all()
    unit = small / np.linalg.norm(small.astype(np.float32), axis=1, keepdims=True)
    assert np.abs(unit @ unit.T - full @ full.T).max() < 0.01


def test_binary_holds_the_signs(model: Embedder) -> None:
    texts = made_up_texts(6)
    bits = model.encode(texts, precision="binary")
    assert bits.dtype == np.uint8 and bits.shape == (6, 4)
    np.testing.assert_array_equal(np.unpackbits(bits, axis=1).astype(bool), model.encode(texts) > 0)


# ---- errors


def test_bad_texts_are_named(model: Embedder) -> None:
    with pytest.raises(TypeError, match=r"texts\[2\] is float"):
        model.encode(["a", "a", 1.0])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="got one string"):
        model.encode("a")
    with pytest.raises(ValueError, match=r"texts\[1\] holds a lone surrogate"):
        model.encode(["a", "\udc00"])


def test_an_instruction_without_room_is_an_error(model: Embedder) -> None:
    with pytest.raises(ValueError, match=r"texts\[0\]: the instruction 'Instruct: .*max_tokens=8"):
        model.encode(["a"], TASK, max_tokens=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "x", "prefix": "y"}, "task or prefix, not both"),
        ({"dim": 0}, "dim=0"),
        ({"dim": 33}, "dim=33: the model has 32"),
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"max_tokens": 1}, "max_tokens=1"),
        ({"precision": "int4"}, "precision='int4' is none of"),
    ],
)
def test_bad_options_are_named(model: Embedder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.encode(["a"], **options)


# ---- made from a decoder


def test_facts(model: Embedder) -> None:
    assert (model.max_tokens, model.embedding_dim, model.device.type) == (64, 32, "cpu")
    assert not model.network.training


@pytest.mark.parametrize("pooling", [kind for kind in POOLINGS if kind not in WEIGHTLESS])
def test_a_new_model_is_its_decoder_with_mean_pooling(pooling: Any, tiny_decoder: Callable[..., Path]) -> None:
    fresh = Embedder.from_decoder(tiny_decoder("qwen3"), pooling=pooling, latents=4, heads=2)
    mean = Embedder.from_decoder(tiny_decoder("qwen3"), pooling="mean")
    texts = made_up_texts(5)
    np.testing.assert_allclose(fresh.encode(texts, prefix="Q:\n"), mean.encode(texts, prefix="Q:\n"), atol=1e-6)


def test_a_new_head_depends_on_its_seed_alone(tiny_decoder: Callable[..., Path]) -> None:
    def latents(seed: int) -> torch.Tensor:
        model = Embedder.from_decoder(tiny_decoder("llama"), latents=4, heads=2, seed=seed)
        return model.network.head.latents.detach()

    torch.manual_seed(3)
    first = latents(0)
    assert torch.equal(first, latents(0)) and not torch.equal(first, latents(1))


def test_the_contract_follows_tokenizer_and_pooling(tiny_embedder: Callable[..., Embedder]) -> None:
    for pooling in ("mean", "last", "latent"):
        for bos in (False, True):
            contract = tiny_embedder(pooling, bos=bos).contract
            stock = pooling != "latent" and not bos  # what plain sentence-transformers can open
            assert contract.mask_rule == ("boundary" if stock else "offsets")
            assert contract.bos_ids == ((0,) if bos else ()) and contract.eos_id == 1


def test_causal_attention_sees_no_later_token(tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("last", attention="causal")
    with torch.no_grad():
        a, b = (model.network.hidden(model.tokenize([text])) for text in ("tides rise", "tides fall down"))
    shared = 0
    ids = [model.tokenize([text]).ids_T for text in ("tides rise", "tides fall down")]
    while ids[0][shared] == ids[1][shared]:
        shared += 1
    assert shared >= 1
    torch.testing.assert_close(a[:shared], b[:shared], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latentz": 4}, "latentz"),
        ({"pooling": "median"}, "median"),
        ({"dtype": "float8"}, "dtype='float8' is none of float32"),
        ({"heads": 5}, "heads"),
        ({"latents": 0}, "latents"),
        ({"attention": "Causal"}, "attention='Causal' is none of bidirectional, causal"),
        ({"backend": "flash"}, "backend='flash' is none of sdpa, eager"),
    ],
)
def test_an_unknown_argument_is_named(options: dict[str, Any], message: str, tiny_decoder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=message):
        Embedder.from_decoder(tiny_decoder("llama"), **options)


def test_an_embedder_that_is_read_as_a_decoder_is_told(
    tiny_embedder: Callable[..., Embedder], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_embedder("mean", default_task=TASK).save(tmp_path / "embedder")
    with caplog.at_level("WARNING"):
        model = Embedder.from_decoder(tmp_path / "embedder", device="cpu")
    assert "its text contract and pooling are left out; Embedder.load keeps them" in caplog.text
    assert model.contract.default_task == "" and model.network.config.pooling["kind"] == "latent"


def test_the_real_model_tells_meanings_apart(smollm2: Embedder) -> None:
    """A sanity check on real weights: the same words in another order are nearer than other words."""
    e = smollm2.encode(["the cat sat on the mat", "on the mat the cat sat", "quarterly revenue grew by nine percent"])
    assert e[0] @ e[1] > e[0] @ e[2]


def test_the_real_model_is_the_same_in_any_batch(smollm2: Embedder) -> None:
    texts = ["how do tides work?", "a " * 300, "b", "<|im_end|>", ""]
    together, alone = smollm2.encode(texts, TASK), [smollm2.encode([text], TASK)[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_an_instruction_without_room_names_the_callers_index(tiny_embedder: Any) -> None:
    model = tiny_embedder("mean", "llama")
    prefix = "a b c d e f g h\n"
    limit = len(model.tokenize([""], prefix=prefix).ids_T)  # the prefix and EOS fit, and nothing else
    with pytest.raises(ValueError, match=r"texts\[2\]"):
        model.encode(["", "", "words that do not fit"], prefix=prefix, max_tokens=limit)
