"""LanceDB over an index: its exact search and filters against ours, recall of its ANN, hybrid search, other models."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedwright.cli.main import app
from embedwright.compress.weights import compress_weights
from embedwright.encoders.open import open_encoder
from embedwright.errors import InputError, NotFoundError
from embedwright.index import change
from embedwright.index.build import build_index, recall
from embedwright.index.index import Index
from embedwright.model.embedder import Embedder
from embedwright.model.quantized import INT4

lancedb = pytest.importorskip("lancedb", reason="pip install 'embedwright[lancedb]'")
from embedwright.index import lancedb as ours  # noqa: E402

WORDS = ["moon", "sea", "tide", "fox", "dog", "number", "name", "query", "line", "sun", "gravity", "level", "ada"]
QUERIES = ["how do tides work?", "the dog", "numbers such as 3.14", "ada o'brien"]
TASK = "Given a question, retrieve passages that answer it"


def write_corpus(path: Path, count: int) -> Path:
    random = np.random.default_rng(0)
    rows = [
        {
            "_id": f"d{i}",
            "title": f"title {i}" if i % 3 else "",
            "text": " ".join(random.choice(WORDS, 5 + i % 30)) + f" text {i}" + " zyxomatic" * (i == 77),
            "lang": ["en", "de", "o'k", None][i % 4],
            "year": 1990 + i % 30,
            "published in year": 1990 + i % 30,
            "score": i / 7,
            "open": i % 2 == 0,
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_embedder: Callable[..., Embedder]) -> tuple[Path, Embedder]:
    at = tmp_path_factory.mktemp("lance")
    tiny_embedder("mean").save(at / "model")
    model = Embedder.load(at / "model")
    corpus = write_corpus(at / "corpus.jsonl", 300)
    build_index(model, corpus, at / "index", chunk_tokens=20, overlap=5, metadata=["all"], shard_rows=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "_ANN_FROM", 256)
        patch.setattr(ours, "_BATCH", 64)
        made = ours.to_lancedb(Index.open(at / "index"), TASK)
    index = Index.open(at / "index")
    assert made.rows == len(index.chunks) > 400 and made.recall is not None
    print(f"recall@10 of LanceDB's approximate search over {made.rows} chunks: {made.recall:.4f}")
    assert made.recall > 0.95
    return at / "index", model


def known(hits: list[list[Any]]) -> list[list[tuple[Any, ...]]]:
    return [[(hit.id, hit.text, hit.title, hit.start, hit.end, hit.metadata) for hit in of_one] for of_one in hits]


@pytest.mark.parametrize(
    "where",
    [
        None,
        ["lang=en"],
        ["lang!=en", "year>=2000"],
        {"lang": "o'k"},
        [{"column": "lang", "operator": "in", "value": ["o'k", " en,de "]}, "year>=1990"],
        ["lang in en,de", "open=true"],
        ["score<=20.5", "score>3"],
        {"year": [1991, 2003]},
        ["open!=false", "year<1995"],
        ["lang=nowhere"],
        {"lang": []},
        {"lang": [], "year": 1991},
        {"score": [float("inf"), 3 / 7]},
        ["published in year>=2000", "open=true"],
        ["score<inf"],
        ["score>-inf", "year<1995"],
        ["score>1e999"],
    ],
)
def test_exact_search_and_filters_are_ours(made: tuple[Path, Embedder], where: Any) -> None:
    folder, model = made
    index = Index.open(folder)
    wanted = index.search(model, QUERIES, 7, TASK, where)
    found = ours.search_lancedb(index, model, QUERIES, 7, TASK, where, by="exact")
    assert known(found) == known(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert [hit.score for hit in one] == pytest.approx([hit.score for hit in other], abs=1e-5)


def test_the_approximate_index_finds_most_of_it(made: tuple[Path, Embedder]) -> None:
    folder, model = made
    index = Index.open(folder)
    queries = [f"{a} {b} {c}" for a in WORDS[:4] for b in WORDS[4:8] for c in WORDS[8:10]]
    wanted = index.search(model, queries, 10, TASK, ["year>=2000"])
    found = ours.search_lancedb(index, model, queries, 10, TASK, ["year>=2000"], by="ann")
    both = [len({hit.id for hit in a} & {hit.id for hit in b}) for a, b in zip(found, wanted, strict=True)]
    assert all(len(hits) == 10 for hits in found) and sum(both) > 9 * len(queries)
    assert all(hit.metadata["year"] >= 2000 for hits in found for hit in hits)


def test_hybrid_search_finds_a_rare_word_that_vectors_miss(made: tuple[Path, Embedder]) -> None:
    folder, model = made
    index, query = Index.open(folder), "zyxomatic"
    [by_vectors] = ours.search_lancedb(index, model, [query], 5, TASK, by="exact")
    [hybrid] = ours.search_lancedb(index, model, [query], 5, TASK, by="hybrid")
    assert "d77" not in [hit.id for hit in by_vectors]
    assert "d77" in [hit.id for hit in hybrid][:2]
    [filtered] = ours.search_lancedb(index, model, [query], 5, TASK, ["lang=en"], by="hybrid")
    assert {hit.metadata["lang"] for hit in filtered} == {"en"}


def test_lancedb_itself_encodes_queries_and_documents(made: tuple[Path, Embedder]) -> None:
    """By the function that the table names, with the table's instruction, and nothing else of ours."""
    folder, model = made
    table = lancedb.connect(str(folder / "lancedb")).open_table("chunks")
    found = table.search(QUERIES[0]).distance_type("dot").bypass_vector_index().limit(5).to_list()
    [wanted] = Index.open(folder).search(model, QUERIES[:1], 5, TASK, each_chunk=True)
    assert [row["id"] for row in found] == [hit.id for hit in wanted]
    assert [row["text"] for row in found] == [hit.text[hit.start : hit.end] for hit in wanted]
    function = table.embedding_functions["vector"].function
    np.testing.assert_allclose(
        function.compute_query_embeddings(QUERIES[1])[0], model.encode(QUERIES[1:2], TASK)[0], atol=1e-6
    )
    np.testing.assert_allclose(
        function.compute_source_embeddings(["a text"])[0], model.encode(["a text"])[0], atol=1e-6
    )
    assert function.ndims() == 32


def test_another_model_and_another_state_are_refused(
    made: tuple[Path, Embedder], tmp_path: Path, tiny_embedder: Callable[..., Embedder]
) -> None:
    folder, model = made
    other = tiny_embedder("mean", "qwen3")
    with pytest.raises(InputError, match="another model"):
        ours.search_lancedb(Index.open(folder), other, QUERIES)
    other.save(tmp_path / "other")
    facts = dict(model.fingerprint())
    function = ours.EmbedwrightFunction.create(name=str(tmp_path / "other"), fingerprint=facts, width=32, task=TASK)
    with pytest.raises(InputError, match=r"another model than the one that made this table .*weights"):
        function.compute_query_embeddings("a query")
    corpus = write_corpus(tmp_path / "few.jsonl", 30)
    build_index(model, corpus, tmp_path / "index", dim=16)
    with pytest.raises(NotFoundError, match="--lancedb"):
        ours.search_lancedb(Index.open(tmp_path / "index"), model, QUERIES, task="")
    assert ours.to_lancedb(Index.open(tmp_path / "index"), "")[1:] == (30, None)
    index = Index.open(tmp_path / "index")
    found = ours.search_lancedb(index, model, QUERIES, 4, "", by="ann")  # few rows: exact
    assert known(found) == known(index.search(model, QUERIES, 4, ""))
    change.delete(tmp_path / "index", ["d3"])
    with pytest.raises(InputError, match="older state"):
        ours.search_lancedb(Index.open(tmp_path / "index"), model, QUERIES, task="")
    assert ours.to_lancedb(Index.open(tmp_path / "index"), "").rows == 29


def test_the_commands(made: tuple[Path, Embedder], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = made
    model, corpus = str(folder.with_name("model")), str(write_corpus(tmp_path / "corpus.jsonl", 90))
    app(["index", model, corpus, str(tmp_path / "index"), "--metadata", "year", "--lancedb"], standalone_mode=False)
    assert "lancedb: 90 chunks\n" in capsys.readouterr().out
    asked = ["search", model, str(tmp_path / "index"), "zyxomatic", "--task", "", "--json", "--where", "year>=2000"]
    found = {}
    for by in ("exact", "ann", "hybrid"):
        app([*asked, "--by", by], standalone_mode=False)
        found[by] = [hit["id"] for hit in json.loads(capsys.readouterr().out)["hits"]]
    assert found["ann"] == found["exact"] and "d77" in found["hybrid"][:2]
    with pytest.raises(InputError, match="--chunks"):
        app([*asked, "--by", "ann", "--chunks"], standalone_mode=False)
    again = ["index", model, corpus, str(tmp_path / "index"), "--metadata", "year", "--lancedb", "--task"]
    for task in (TASK, ""):
        app([*again, task], standalone_mode=False)
        table = lancedb.connect(str(tmp_path / "index" / "lancedb")).open_table("chunks")
        found = table.search("the moon").distance_type("dot").limit(5).to_list()
        [wanted] = Index.open(tmp_path / "index").search(Embedder.load(model), ["the moon"], 5, task, each_chunk=True)
        assert [row["id"] for row in found] == [hit.id for hit in wanted]
        assert table.embedding_functions["vector"].function.task == task


def test_a_table_of_a_model_in_another_length_or_type_opens_it_so(
    tmp_path: Path, tiny_decoder: Callable[..., Path]
) -> None:
    Embedder.from_decoder(tiny_decoder("llama", intermediate_size=64), pooling="mean").save(tmp_path / "model")
    corpus = write_corpus(tmp_path / "corpus.jsonl", 12)
    compress_weights(tmp_path / "model", tmp_path / "small", INT4)
    adapted = Embedder.load(tmp_path / "model").add_lora(2)
    for parameter_name, parameter in adapted.network.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.constant_(parameter, 0.1)
    adapted.save(tmp_path / "adapter")
    asked: list[tuple[str, dict[str, Any]]] = [
        ("small", {}),
        ("model", {"max_tokens": 20}),
        ("model", {"dtype": "int8"}),
    ]
    asked += [(name, {"dtype": kind}) for name in ("model", "adapter") for kind in ("bfloat16", "float16", "float32")]
    for number, (folder, how) in enumerate(asked):
        name = str(tmp_path / folder)
        model, out = open_encoder(name, **how), tmp_path / f"index-{number}"
        build_index(model, corpus, out)
        index = Index.open(out)
        ours.to_lancedb(index, TASK)
        function = lancedb.connect(str(out / "lancedb")).open_table("chunks").embedding_functions["vector"].function
        text = "the moon " * 20
        np.testing.assert_allclose(function.compute_source_embeddings([text])[0], model.encode([text])[0], atol=1e-3)
    with pytest.raises(InputError, match="an empty query"):
        ours.search_lancedb(index, model, ["moon", " "], task=TASK, by="hybrid")


def test_the_printed_recall_does_not_count_a_chunk_that_finds_itself(
    made: tuple[Path, Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index.open(made[0])
    table, real = lancedb.connect(str(made[0] / "lancedb")).open_table("chunks"), ours._chunks
    assert recall(index, partial(ours._nearest, table)) > 0.95
    monkeypatch.setattr(ours, "_chunks", lambda *given: (real(*given)[0][:1], []))  # each finds itself alone
    assert recall(index, partial(ours._nearest, table)) < 0.01


@pytest.mark.parametrize("query", ["?!", '"zyxomatic"', '"tide zyxomatic', "text:(zyxomatic"])
def test_hybrid_search_takes_signs_as_they_are(made: tuple[Path, Embedder], query: str) -> None:
    folder, model = made
    index = Index.open(folder)
    [found] = ours.search_lancedb(index, model, [query], 5, TASK, by="hybrid")
    if "zyxomatic" in query:
        assert "d77" in [hit.id for hit in found][:2]
    else:  # no word: the ranks are those of the vectors
        [by_vectors] = ours.search_lancedb(index, model, [query], 5, TASK, by="ann")
        assert [hit.id for hit in found] == [hit.id for hit in by_vectors]


@pytest.mark.parametrize("name", ["a.b", "a`b", "vector", "start"])
def test_a_column_that_lancedb_cannot_have_is_named(made: tuple[Path, Embedder], tmp_path: Path, name: str) -> None:
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "moon", name: 1}) + "\n")
    build_index(made[1], tmp_path / "corpus.jsonl", tmp_path / "index", metadata=["all"])
    with pytest.raises(InputError, match="rename it"):
        ours.to_lancedb(Index.open(tmp_path / "index"), TASK)
