"""The mteb wrapper: on mteb's own mock tasks, with each task's instruction on the texts that are to have it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import mteb
import numpy as np
import pytest
import torch
from mteb.mocks import MOCK_TASK_TEST_GRID
from mteb.models.models_protocols import EncoderProtocol
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from embedwright.evaluation import mteb as door
from embedwright.evaluation.mteb import MtebEncoder, instruction_of
from embedwright.model.embedder import Embedder

Make = Callable[..., Embedder]

TASKS = {task.metadata.name: task for task in MOCK_TASK_TEST_GRID}
QUERIES_ALONE = {"Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking"}
TYPES = {task.metadata.type for task in TASKS.values()}


class Recorder:
    """An embedder that notes the instruction of each text."""

    def __init__(self, model: Embedder) -> None:
        self.model, self.calls = model, []
        self.network, self.max_tokens, self.embedding_dim = model.network, model.max_tokens, model.embedding_dim
        self.fingerprint = model.fingerprint

    def encode(self, texts: Sequence[str], task: str | None = None, **options: Any) -> NDArray[Any]:
        self.calls.append((list(texts), task))
        return self.model.encode(texts, task=task, **options)


@pytest.fixture(scope="module")
def model(tiny_embedder: Make) -> Embedder:
    return tiny_embedder("latent", max_tokens=128)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any attempt to reach a hub is an error, and so is a result from the user's cache."""

    def refuse(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"network: {args}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield


def run(encoder: Any, task: Any) -> Any:
    return mteb.evaluate(encoder, task, cache=None, show_progress_bar=False, co2_tracker=False)


def metadata(**fields: Any) -> Any:
    return SimpleNamespace(**{"name": "Novel", "type": "Classification", "prompt": None, **fields})


@pytest.fixture(scope="module")
def real_tasks() -> list[Any]:
    """Metadata of all tasks, which take seconds to collect."""
    return [task.metadata for task in mteb.get_tasks(exclude_superseded=False)]


# ---- every mock task


def test_all_text_types_are_there(real_tasks: list[Any]) -> None:
    types = {task.type for task in real_tasks if task.modalities == ["text"]}
    assert types - TYPES == {"Any2AnyRetrieval"}  # which has no mock of texts alone
    assert door._table()["types"].keys() == TYPES | {"Any2AnyRetrieval"}


@pytest.mark.parametrize("name", TASKS)
def test_a_mock_task_runs_with_its_instruction(name: str, model: Embedder) -> None:
    task, recorder = TASKS[name], Recorder(model)
    result = run(MtebEncoder(recorder), task)
    scores = [row["main_score"] for split in result.task_results[0].scores.values() for row in split]
    assert scores and np.isfinite(scores).all()

    instruction = door._table()["types"][task.metadata.type]
    asked = [task for _, task in recorder.calls]
    if task.metadata.type in QUERIES_ALONE:
        assert set(asked) == {None, instruction}
    else:
        assert set(asked) == {instruction}


def test_the_instruction_is_on_queries_and_not_on_documents(model: Embedder) -> None:
    task = TASKS["MockRetrievalTask"]
    recorder = Recorder(model)
    run(MtebEncoder(recorder), task)
    task.load_data()
    data = task.dataset["default"]["test"]
    asked, unasked = ({t for texts, task in recorder.calls if bool(task) == q for t in texts} for q in (True, False))
    assert asked == set(data["queries"]["text"])
    assert unasked == {f"{row['title']} {row['text']}" for row in data["corpus"]}


@pytest.mark.parametrize("name", ["MockSTSTask", "MockPairClassificationTask", "MockBitextMiningTask"])
def test_both_sides_of_a_symmetric_task_are_the_models_own_vectors(name: str, model: Embedder) -> None:
    task = TASKS[name]
    encoded: dict[str, NDArray[Any]] = {}

    class Keeping(MtebEncoder):
        def encode(self, inputs: Any, **options: Any) -> NDArray[Any]:
            texts = [text for batch in inputs for text in batch["text"]]
            vectors = super().encode(inputs, **options)
            encoded.update(zip(texts, vectors, strict=True))
            return vectors

    run(Keeping(model), task)
    task.load_data()
    data = task.dataset["test"] if "test" in task.dataset else task.dataset["default"]["test"]
    sides = [name for name in ("sentence1", "sentence2") if name in data.column_names]
    assert len(sides) == 2
    instruction = door._table()["types"][task.metadata.type]
    for side in sides:
        texts = [text for value in data[side] for text in ([value] if isinstance(value, str) else value)]
        expected = model.encode(texts, task=instruction)
        np.testing.assert_allclose(np.stack([encoded[text] for text in texts]), expected, rtol=0, atol=1e-6)
        assert np.abs(expected - model.encode(texts)).max() > 1e-3  # the instruction matters


def test_a_saved_folder_runs_through_sentence_transformers(model: Embedder, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    opened = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    for task in ("MockRetrievalTask", "MockSTSTask"):
        plain = MtebEncoder(model, instructions={task: ""})
        by_st, by_us = (run(encoder, TASKS[task]).task_results[0].get_score() for encoder in (opened, plain))
        assert by_st == pytest.approx(by_us, abs=1e-5)


def vectors_of(base: Any, name: str, *given: Any) -> dict[tuple[Any, str], NDArray[Any]]:
    """Runs a mock task with the encoder `base(*given)`, and returns its vectors by side and text."""
    found: dict[tuple[Any, str], NDArray[Any]] = {}

    class Keeping(base):  # type: ignore[misc]
        def encode(self, inputs: Any, **options: Any) -> NDArray[Any]:
            texts = [(options.get("prompt_type"), text) for batch in inputs for text in batch["text"]]
            vectors: NDArray[Any] = super().encode(inputs, **options)
            found.update(zip(texts, vectors, strict=True))
            return vectors

    run(Keeping(*given), TASKS[name])
    return found


@pytest.mark.parametrize("name", ["MockRetrievalTask", "MockSTSTask"])
def test_a_query_without_an_instruction_stays_one_as_in_mtebs_own_wrapper(
    name: str, tiny_embedder: Make, tmp_path: Path
) -> None:
    def made(folder: str, **fields: str) -> tuple[Embedder, SentenceTransformer]:
        model = tiny_embedder("latent", max_tokens=128)
        contract = model.contract.model_copy(update=fields)
        model.network.contract, model.network.config.contract = contract, contract.model_dump()
        model = Embedder(model.network, model.tokenizer)
        model.save(tmp_path / folder)
        return model, SentenceTransformer(str(tmp_path / folder), device="cpu")

    none = {name: ""}
    sided, opened = made("sided", query_template="query: ", document_template="passage: ")
    told, other = made("told", default_task="Find it")
    without = {"query": "", "document": ""}
    for ours, theirs in (
        ((sided, none), (opened,)),
        ((opened, none), (opened,)),
        ((told, none), (other, None, "cpu", without)),
    ):
        found = vectors_of(MtebEncoder, name, *ours)
        wanted = vectors_of(SentenceTransformerEncoderWrapper, name, *theirs)
        assert found.keys() == wanted.keys()
        for key, vector in wanted.items():
            np.testing.assert_allclose(found[key], vector, atol=1e-5, err_msg=str(key))


# ---- instructions


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("SciFact", "Given a scientific claim, retrieve documents"),
        ("CQADupstackAndroidRetrieval", "Given a question, retrieve detailed question descriptions"),
        ("CQADupstackRetrieval", "Given a question, retrieve detailed question descriptions"),
        ("FEVERHardNegatives", "Given a claim, retrieve documents"),
        ("NQ-PLHardNegatives", "Given a question, retrieve passages"),
        ("NQTablesRetrieval", "Given a question, retrieve its reference Wikipedia table"),
        ("ClimateFEVER", "Given a claim about climate change"),
        ("Touche2020Retrieval.v3", "Given a question, retrieve passages"),
        ("STSBenchmark", "Retrieve semantically similar text"),
        ("RedditClustering.v2", "Identify the topic or theme of Reddit posts based on the titles"),
        ("RedditClusteringP2P.v2", "Identify the topic or theme of Reddit posts based on the titles and posts"),
        ("SummEvalSummarization.v2", "Given a news summary"),
        ("KorSTS", "Retrieve semantically similar text"),  # by its type
        ("TwitterHjerneRetrieval", "Retrieve answers to questions asked in Danish tweets"),  # of mteb's metadata
    ],
)
def test_the_instruction_of_a_real_task(name: str, starts: str) -> None:
    assert instruction_of(mteb.get_task(name).metadata).startswith(starts)


def test_every_task_of_the_english_benchmarks_is_in_the_table() -> None:
    types = set(door._table()["types"].values()) - set(door._table()["tasks"].values())
    for benchmark in ("MTEB(eng, v1)", "MTEB(eng, v2)"):
        tasks = mteb.get_benchmark(benchmark).tasks
        assert len(tasks) > 40
        assert [t.metadata.name for t in tasks if instruction_of(t.metadata) in types] == []


def test_every_pattern_is_of_a_task(real_tasks: list[Any]) -> None:
    names = [task.name for task in real_tasks]
    patterns = door._table()["tasks"]
    first = {next((p for p in patterns if fnmatchcase(name, p)), None) for name in names}
    assert [pattern for pattern in patterns if pattern not in first] == []


def test_where_an_instruction_comes_from(model: Embedder) -> None:
    assert instruction_of(metadata(name="SciFact", prompt="theirs")).startswith("Given a scientific claim")
    assert instruction_of(metadata(prompt="theirs")) == "theirs"
    assert instruction_of(metadata(prompt={"query": "theirs"})) == "theirs"
    assert instruction_of(metadata(prompt={"document": "theirs"})) == door._table()["types"]["Classification"]
    with pytest.raises(ValueError, match="Novel is of type ImageClustering"):
        instruction_of(metadata(type="ImageClustering"))
    encoder = MtebEncoder(model, instructions={"Novel": "mine", "SciFact": ""})
    assert encoder.instruction(metadata(prompt="theirs"), None) == "mine"
    assert encoder.instruction(metadata(), PromptType.query) == "mine"
    assert encoder.instruction(metadata(), PromptType.document) is None
    bare = metadata(name="SciFact", type="Retrieval")
    sides = (PromptType.query, PromptType.document, None)
    assert [encoder.instruction(bare, side) for side in sides] == ["", None, None]


# ---- the protocol


def test_encode(model: Embedder) -> None:
    texts = ["how do tides work?", "a", "", "naïve 漢字 🙂", "long " * 200]
    batches = [{"text": texts[:2]}, {"text": texts[2:]}]
    where: dict[str, Any] = {"task_metadata": metadata(prompt="Find"), "hf_split": "test", "hf_subset": "default"}
    encoder = MtebEncoder(model)
    assert isinstance(encoder, EncoderProtocol)
    vectors = encoder.encode(batches, **where, batch_size=2, show_progress_bar=False)
    np.testing.assert_allclose(vectors, model.encode(texts, task="Find"), atol=1e-6)
    cut = MtebEncoder(model, max_tokens=16).encode(batches, **where)
    np.testing.assert_allclose(cut, model.encode(texts, task="Find", max_tokens=16), atol=1e-6)
    assert np.abs(cut - vectors).max() > 1e-3
    assert encoder.encode(batches, **where, precision="int8").dtype == np.int8
    with pytest.raises(TypeError, match="novelty"):
        encoder.encode(batches, **where, novelty=1)


def test_similarity_is_the_cosine(model: Embedder) -> None:
    encoder = MtebEncoder(model)
    a, b = np.random.default_rng(0).normal(size=(2, 5, 8))
    cosines = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    np.testing.assert_allclose(encoder.similarity(a, b), cosines, atol=1e-6)
    np.testing.assert_allclose(encoder.similarity_pairwise(a, b), cosines.diagonal(), atol=1e-6)


def test_the_revision_names_what_decides_the_vectors(model: Embedder, tiny_embedder: Make) -> None:
    meta = MtebEncoder(model, name="mine/tides").mteb_model_meta
    assert (meta.name, meta.embed_dim, meta.max_tokens) == ("mine/tides", 32, 128)
    other = tiny_embedder("latent", max_tokens=128)
    assert MtebEncoder(other).mteb_model_meta.revision == meta.revision
    other.network.head.latents.data[0, 0] += 1e-3
    revisions = [
        meta.revision,
        MtebEncoder(other).mteb_model_meta.revision,
        MtebEncoder(model, instructions={"SciFact": ""}).mteb_model_meta.revision,
        MtebEncoder(model, max_tokens=16).mteb_model_meta.revision,
        MtebEncoder(tiny_embedder("latent", max_tokens=64)).mteb_model_meta.revision,
        MtebEncoder(tiny_embedder("latent", attention="causal", max_tokens=128)).mteb_model_meta.revision,
    ]
    assert len(set(revisions)) == len(revisions)


def test_cached_results_are_those_of_the_same_model(model: Embedder, tiny_embedder: Make, tmp_path: Path) -> None:
    cache = mteb.ResultCache(tmp_path)
    task = TASKS["MockSTSTask"]
    recorders = [Recorder(tiny_embedder("latent", max_tokens=128)) for _ in range(3)]
    torch.nn.init.normal_(recorders[2].network.head.latents, std=0.5)
    for recorder in recorders:
        mteb.evaluate(MtebEncoder(recorder), task, cache=cache, show_progress_bar=False, co2_tracker=False)
    assert [bool(recorder.calls) for recorder in recorders] == [True, False, True]


# ---- other encoders, and the vectors that are kept


class Plain:
    """An encoder that is nothing but its vectors."""

    def __init__(self, shift: float = 0.0) -> None:
        self.shift, self.texts = shift, list[str]()

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        self.texts += texts
        return np.array([[len(text) + self.shift, text.count("e"), 1] for text in texts], np.float32)


def test_an_encoder_without_a_fingerprint_is_known_by_its_vectors() -> None:
    revisions = [MtebEncoder(Plain(shift)).mteb_model_meta.revision for shift in (0, 0, 1)]
    assert revisions[0] == revisions[1] != revisions[2]


def test_an_encoder_that_is_no_embedder_cuts_texts_where_it_wants() -> None:
    with pytest.raises(ValueError, match="max_tokens=16: a Plain cuts texts where it wants"):
        MtebEncoder(Plain(), max_tokens=16)


def test_vectors_of_many_documents_are_kept_and_not_encoded_again(
    model: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "LARGE", 8)
    monkeypatch.setattr("embedwright.vectors.store._SHARD", 4)
    texts = [f"{'text ' * (i % 5)}{i}" for i in range(18)]
    batches = [{"text": texts[:10]}, {"text": texts[10:]}]
    where: dict[str, Any] = {"task_metadata": metadata(), "hf_split": "test", "hf_subset": "default"}
    calls: list[tuple[int, str | None]] = []
    encode = model.encode

    def noted(texts: Sequence[str], task: str | None = None, **options: Any) -> NDArray[Any]:
        calls.append((len(texts), task))
        return encode(texts, task, **options)

    monkeypatch.setattr(model, "encode", noted)
    encoder = MtebEncoder(model, max_tokens=16)
    plain = encoder.encode(batches, **where, prompt_type=PromptType.document)
    encoder.vectors = tmp_path
    seen: list[tuple[int, int]] = []
    encoder.watch = lambda: lambda done, total: seen.append((done, total))
    kept = encoder.encode(batches, **where, prompt_type=PromptType.document)
    np.testing.assert_allclose(kept, plain, atol=1e-6)
    assert seen == [(4, 18), (8, 18), (12, 18), (16, 18), (18, 18)] and len(list(tmp_path.glob("*/shard-*.arrow"))) == 5
    next(tmp_path.glob("*/shard-00002.arrow")).unlink()
    calls.clear()
    again = encoder.encode(batches, **where, prompt_type=PromptType.document)
    np.testing.assert_array_equal(again, kept)
    assert calls == [(4, None)]
    MtebEncoder(model).encode(batches, **where, prompt_type=PromptType.query)
    few = encoder.encode([{"text": texts[:7]}], **where, prompt_type=PromptType.document)
    np.testing.assert_allclose(few, plain[:7], atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 1  # neither queries nor a few documents
    longer = MtebEncoder(model)
    longer.vectors = tmp_path
    longer.encode(batches, **where, prompt_type=PromptType.document)
    assert len(list(tmp_path.iterdir())) == 2  # cut elsewhere, they are other vectors
