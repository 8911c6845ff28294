"""Vectors do not depend on other threads, or on what a caller does with the tokenizer that a model shows.

The ids are held to transformers' and tokenizers' own pipelines, the vectors to transformers one text at a time.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModel, AutoTokenizer

from embedwright.model.embedder import Embedder

ODD = (
    "how do tides work?",
    "",
    "  two spaces, a\ttab and\n\na line  ",
    "</s> and <s> inside, <|endoftext|> too, </s>",
    "naïve café, Straße, 漢字 🙂",
    "<instruct>Find\n<query>tide\n<response>",
    "far too long for it " * 40,
    "x",
)
TEXTS = [f"{ODD[i % len(ODD)]}{i}" for i in range(200)]
TASK = "Find the tide"
FAMILIES = ("qwen3-embedding", "e5-mistral", "gritlm", "bge-en-icl")
RELEASED = Path(__file__).parents[2] / "parity" / "fixtures" / "nvembed-tiny-v2"
OURS = {"offsets": "latent", "boundary": "mean"}


@pytest.fixture(scope="module", params=[*FAMILIES, "nvembed", *OURS])
def opened(
    request: pytest.FixtureRequest, family_folder: Callable[[str], Path], tiny_embedder: Any, tiny_decoder: Any
) -> tuple[Embedder, Path]:
    """One of each way in which a text is read, and the folder that its tokenizer comes from."""
    name = request.param
    if name in OURS:
        return tiny_embedder(OURS[name], max_tokens=64), tiny_decoder("llama")
    folder = RELEASED if name == "nvembed" else family_folder(name)
    return Embedder.load(folder if name == "nvembed" else f"{name}:{folder}"), folder


def in_eight_threads(work: Callable[[int], Any], calls: int) -> list[Any]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(work, range(calls)))


def abuse(tokenizer: Any) -> None:
    """What people do with a tokenizer, and worse."""
    tokenizer("count my tokens", truncation=True, max_length=4)
    tokenizer(["two", "of two lengths"], padding=True)
    tokenizer.add_tokens(["tides", "how do"])
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    tokenizer.model_max_length = 3
    tokenizer.chat_template = "{{ messages }}"
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = not backend.encode_special_tokens
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.post_processor = processors.TemplateProcessing(single="$A $A", special_tokens=[])
    backend.normalizer = backend.pre_tokenizer = None


@contextmanager
def abused(tokenizer: Any) -> Iterator[None]:
    """All that is inside happens while another thread abuses the tokenizer."""
    ended = Event()

    def go_on() -> None:
        while not ended.is_set():
            abuse(tokenizer)

    thread = Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_eight_threads_read_and_encode_as_one(opened: tuple[Embedder, Path]) -> None:
    model, _ = opened
    tasks = (None, TASK, "")
    texts = TEXTS if model.contract.eos_id is not None else [text for text in TEXTS if text.strip()]
    read = [model.tokenize(texts, task) for task in tasks]
    encoded = [model.encode(texts[:16], task) for task in tasks]
    with abused(model.tokenizer):
        for i, packed in enumerate(in_eight_threads(lambda i: model.tokenize(texts, tasks[i % 3]), 24)):
            assert torch.equal(packed.ids_T, read[i % 3].ids_T)
            assert torch.equal(packed.pool_mask_T, read[i % 3].pool_mask_T)
        for i, vectors in enumerate(in_eight_threads(lambda i: model.encode(texts[:16], tasks[i % 3]), 9)):
            np.testing.assert_array_equal(vectors, encoded[i % 3])


def test_in_training_mode_too(tiny_embedder: Any) -> None:
    model = tiny_embedder("latent").add_lora(2, dropout=0.5)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = model.encode(TEXTS[:16])
    model.network.train()
    for vectors in in_eight_threads(lambda _: model.encode(TEXTS[:16]), 16):
        np.testing.assert_array_equal(vectors, expected)
    assert all(module.training for module in model.network.modules())


def test_ids_are_those_of_the_files_own_pipeline(opened: tuple[Embedder, Path]) -> None:
    """BOS, the whole string as `tokenizers` alone reads it, EOS."""
    model, folder = opened
    contract, plain = model.contract, Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos = [] if contract.eos_id is None else [contract.eos_id]
    abuse(model.tokenizer)
    for text in (text for text in TEXTS if "<" not in text and len(text) < 60):
        ids = plain.encode(f"Query: {text}{contract.query_suffix}", add_special_tokens=False).ids
        assert model.tokenize([text], prefix="Query: ").ids_T.tolist() == [*contract.bos_ids, *ids, *eos]


# ---- the tokenizer that a model shows is the caller's


@pytest.mark.parametrize("pooling", ["latent", "mean"])
def test_what_a_caller_does_with_the_tokenizer_changes_no_vector_and_no_folder(
    pooling: str, tiny_embedder: Any, tmp_path: Path
) -> None:
    model = tiny_embedder(pooling, max_tokens=40)
    expected = model.encode(ODD, TASK)
    model.save(tmp_path / "before")
    door = model.to_sentence_transformer()
    abuse(model.tokenizer)
    np.testing.assert_array_equal(model.encode(ODD, TASK), expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).encode(ODD, TASK), expected)
    for made in (door, model.to_sentence_transformer()):
        vectors = made.encode(list(ODD), prompt=model.contract.prefix(TASK))
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    model.save(tmp_path / "after")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "after" / name).read_text() == (tmp_path / "before" / name).read_text()
    np.testing.assert_allclose(Embedder.load(tmp_path / "after").encode(ODD, TASK), expected, atol=1e-6)


def test_a_caller_counts_tokens_with_it(tiny_embedder: Any) -> None:
    model = tiny_embedder("latent")
    assert len(model.tokenizer("how do tides work?", truncation=True, max_length=4)["input_ids"]) == 4
    model.encode(["a tide"])
    model.fingerprint()
    assert "own_tokenizer" not in vars(model)  # a third of a large vocabulary's memory: made when a folder is written
    assert model.tokenizer is not model.own_tokenizer


def test_the_tokenizer_that_was_given_stays_the_givers(tiny_embedder: Any) -> None:
    made = tiny_embedder("latent")
    model = Embedder(made.network, made.tokenizer)
    expected = model.encode(ODD)
    abuse(made.tokenizer)
    np.testing.assert_array_equal(model.encode(ODD), expected)


def test_a_saved_tokenizer_reads_by_the_contract_whatever_it_was_set_to(tiny_embedder: Any, tmp_path: Path) -> None:
    model = tiny_embedder("latent", max_tokens=40)
    model.save(tmp_path / "saved")
    network, tokenizer = (
        AutoModel.from_pretrained(tmp_path / "saved"),
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    )
    for _ in range(2):
        with torch.inference_mode():
            vectors = network(**tokenizer(list(ODD), max_length=40)).pooler_output.numpy()
        np.testing.assert_allclose(vectors, model.encode(ODD), atol=1e-5)
        tokenizer.backend_tokenizer.enable_truncation(3)
        tokenizer.backend_tokenizer.enable_padding(length=9)
        tokenizer.backend_tokenizer.encode_special_tokens = False


def test_saving_while_others_encode(tiny_embedder: Any, tmp_path: Path) -> None:
    """A stock folder wants another pipeline and no chat template: both are set on a copy."""
    model = tiny_embedder("mean", max_tokens=40)
    expected = model.encode(ODD, TASK)

    def work(i: int) -> Any:
        return model.save(tmp_path / str(i)) if i % 4 == 0 else model.encode(ODD, TASK)

    for vectors in in_eight_threads(work, 8):
        if vectors is not None:
            np.testing.assert_array_equal(vectors, expected)
    assert "chat_template" not in (tmp_path / "4" / "tokenizer_config.json").read_text()
