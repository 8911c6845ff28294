"""/search gives what `Index.search` gives, over the same batcher as all other texts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fake_llm import command

from embedwright.errors import InputError
from embedwright.index.build import build_index
from embedwright.index.change import delete
from embedwright.index.documents import Document
from embedwright.index.index import Hit, Index
from embedwright.model.embedder import Embedder
from embedwright.serve.app import create_app

TASK = "Find a passage"
QUERIES = ["how do tides work?", "the quick brown fox"]


@pytest.fixture(scope="module")
def index(model: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index")
    rows = [
        {"_id": f"d{i}", "title": f"Part {i}", "text": f"Number {i} of the sea. " * (1 + i % 5), "year": 2000 + i}
        for i in range(40)
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_index(model, folder / "documents.jsonl", folder / "index", chunk_tokens=16, metadata=["year"])
    return Index.open(folder / "index")


@pytest.fixture(scope="module")
def searched(serving: Any, index: Index) -> Iterator[Any]:
    with serving(index=index) as made:
        yield made


def in_parts(operator: str, value: Any) -> dict[str, Any]:
    return {"column": "year", "operator": operator, "value": value}


def same(found: list[dict[str, Any]], expected: list[Hit]) -> bool:
    plain = [hit._asdict() for hit in expected]
    close = all(abs(one.pop("score") - other.pop("score")) < 1e-5 for one, other in zip(found, plain, strict=True))
    return close and found == plain


def test_hits_are_those_of_the_index(searched: Any, index: Index, model: Embedder) -> None:
    answer = searched.ask("POST", "/search", {"query": QUERIES, "k": 7, "task": TASK, "where": ["year>=2010"]}).body
    expected = index.search(model, QUERIES, 7, TASK, ["year>=2010"])
    for row, query, hits in zip(answer["data"], QUERIES, expected, strict=True):
        assert (row["query"], row["task"]) == (query, TASK)
        assert len(hits) == 7 and same(row["hits"], hits)
    assert answer["model"] == "tiny" and answer["usage"]["prompt_tokens"] == len(model.tokenize(QUERIES, TASK).ids_T)
    one = searched.ask("POST", "/search", {"query": QUERIES[1], "task": ""}).body["data"]
    assert len(one) == 1 and one[0]["task"] == "" and same(one[0]["hits"], index.search(model, QUERIES[1:], 10, "")[0])


def test_conditions_in_parts_are_those_of_the_index(searched: Any, index: Index, model: Embedder) -> None:
    some = [in_parts("in", [2003, "2004", 2005.0]), "year!=2004"]
    for where, count in (([in_parts(">=", 2010)], 10), (some, 2), ([in_parts("in", [])], 0)):
        (found,) = searched.ask("POST", "/search", {"query": QUERIES[0], "task": "", "where": where}).body["data"]
        (expected,) = index.search(model, QUERIES[:1], 10, "", where)
        assert len(expected) == count and same(found["hits"], expected)


def test_the_models_own_task_is_taken_and_named(
    serving: Any, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    model = tiny_embedder("mean")
    model.contract = model.network.contract = model.contract.model_copy(update={"default_task": TASK})
    (tmp_path / "documents.txt").write_text("tides\nthe moon\nthe sea\n")
    build_index(model, tmp_path / "documents.txt", tmp_path / "index")
    index = Index.open(tmp_path / "index")
    with serving(model, index=index) as server:
        (found,) = server.ask("POST", "/search", {"query": QUERIES[0]}).body["data"]
        (bare,) = server.ask("POST", "/search", {"query": QUERIES[0], "task": ""}).body["data"]
        assert server.ask("GET", "/index").body["task"] == TASK
    assert abs(found["hits"][0]["score"] - bare["hits"][0]["score"]) > 1e-4
    assert found["task"] == TASK and same(found["hits"], index.search(model, QUERIES[:1], 10, TASK)[0])
    [without] = index.search_vectors(model.encode_document(QUERIES[:1]), 10)
    assert index.search(model, QUERIES[:1], 10, "") == [without]
    assert bare["task"] == "" and same(bare["hits"], without)


def test_a_document_is_answered_by_its_id(
    searched: Any, index: Index, serving: Any, model: Embedder, tmp_path: Path
) -> None:
    for id in ("d7", "d39"):
        document = index.document(id)
        assert document is not None and document.id == id
        assert searched.ask("GET", f"/document?id={id}").body == document._asdict()
    assert (document.title, document.metadata) == ("Part 39", {"year": 2039}) and document.text.startswith("Number 39")
    absent = searched.ask("GET", "/document?id=d40")
    assert (absent.status, absent.body["error"]["code"]) == (404, "document_not_found")
    assert searched.ask("GET", "/document").body["error"]["param"] == "id"
    rows = [{"_id": "a/b?c=d&é", "text": "odd"}, {"text": "second"}]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_index(model, tmp_path / "odd.jsonl", tmp_path / "odd")
    with serving(index=Index.open(tmp_path / "odd")) as server:
        assert server.ask("GET", f"/document?id={quote('a/b?c=d&é', safe='')}").body["text"] == "odd"
    delete(tmp_path / "odd", ["a/b?c=d&é"])
    assert Index.open(tmp_path / "odd").document("a/b?c=d&é") is None


def test_openapi_has_the_fields_of_hits_and_documents(searched: Any) -> None:
    shown = searched.ask("GET", "/openapi.json").body["components"]["schemas"]
    for name, row in (("FoundHit", Hit), ("FoundDocument", Document)):
        assert list(shown[name]["properties"]) == shown[name]["required"] == list(row._fields)
    assert shown["FoundHit"]["properties"]["score"]["type"] == "number"


def test_the_index_is_described(searched: Any, index: Index) -> None:
    facts = searched.ask("GET", "/index").body
    assert facts == {
        "documents": 40,
        "chunks": len(index.vectors),
        "model": "tiny",
        "dimension": 32,
        "precision": "float32",
        "metadata": {"year": "int"},
        "task": None,
    }
    assert facts["chunks"] > 40


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"query": "a"}, "no instruction of its own"),
        ({"query": [], "task": ""}, "not empty"),
        ({"query": ["a"] * 257, "task": ""}, "at most 256"),
        ({"query": 3, "task": ""}, "a text"),
        ({"query": "a", "task": "", "k": 0}, "greater than or equal to 1"),
        ({"query": "a", "task": "", "k": 1001}, "less than or equal to 1000"),
        ({"query": "a", "task": "", "k": True}, "whole number"),
        ({"query": "a", "task": "", "where": ["yeer=3"]}, "year"),
        ({"query": "a", "task": "", "where": "year=3"}, "list"),
        ({"query": "a", "task": "", "filter": []}, "there is no field 'filter'"),
        ({"query": "a", "task": "", "f" * 10**6: []}, "there is no field 'fff"),
        ({"query": "a", "task": "", "where": ["y" * 10**6 + "=3"]}, "no metadata column 'yyy"),
        ({"query": "a", "task": "", "where": ["year=\ud800"]}, "year"),
        ({"query": "a", "task": "", "where": [in_parts("~", 3)]}, "operator: Input should"),
        ({"query": "a", "task": "", "where": [in_parts("in", 3)]}, "`in` takes a list"),
        ({"query": "a", "task": "", "where": [in_parts("=", None)]}, "value"),
        ({"query": "a", "task": "", "where": [in_parts("=", 3) | {"or": 4}]}, "there is no field"),
        ({"query": "a", "task": "", "where": [3]}, "where.0"),
    ],
)
def test_bad_searches_are_refused(searched: Any, body: dict[str, Any], words: str) -> None:
    answer = searched.ask("POST", "/search", body)
    assert answer.status == 400 and words in answer.body["error"]["message"]
    assert len(answer.raw) < 1000


def test_an_answer_has_bounds_whatever_is_asked_for(
    searched: Any, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = searched.ask("POST", "/search", {"query": ["a"] * 256, "task": ""})
    assert many.status == 200 and sum(len(row["hits"]) for row in many.body["data"]) == 2560
    monkeypatch.setattr("embedwright.serve.search.Index.search_vectors", None)  # refused before anything is searched
    for path, body in (("/search", {"query": ["a"] * 256, "k": 1000}), ("/search", {"query": ["a"] * 11, "k": 1000})):
        answer = searched.ask("POST", path, body | {"task": ""})
        assert answer.status == 400 and "too many" in answer.body["error"]["message"]
    monkeypatch.undo()
    asked = {"query": ["a", "b"], "task": "", "k": 40}
    size = 2 * sum(len(text) for text in index.documents["text"].to_pylist())
    monkeypatch.setattr("embedwright.serve.search._MOST_BYTES", size)
    assert searched.ask("POST", "/search", asked).status == 200
    monkeypatch.setattr("embedwright.serve.search._MOST_BYTES", size - 1)
    monkeypatch.setattr(index, "chunks_at", None)  # refused before a text is read
    answer = searched.ask("POST", "/search", asked)
    assert answer.status == 400 and f"{size:,} bytes of text, more than" in answer.body["error"]["message"]


def test_an_index_of_shortened_texts_is_served_with_the_option_that_made_it(
    model: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save(tmp_path / "model")
    (tmp_path / "documents.txt").write_text("tides\nthe moon\nthe sea\n" + "far " * 50)
    served: list[Any] = []
    monkeypatch.setattr(
        "embedwright.serve.run.run", lambda app, listening, drain: (served.append(app), listening.close())
    )
    folder, shorter = tmp_path / "index", ["--max-tokens", "30"]
    assert command(monkeypatch, "index", tmp_path / "model", tmp_path / "documents.txt", folder, *shorter) == 0
    words = ["serve", tmp_path / "model", "--index", folder, "--port", "0"]
    assert command(monkeypatch, *words, *shorter) == 0 and served[0].state.server.packed.max_tokens == 30
    monkeypatch.chdir(tmp_path / "model")
    assert command(monkeypatch, "serve", ".", *words[2:], *shorter) == 0 and served[1].state.server.name == "model"
    assert command(monkeypatch, *words) == 2 and "opened with the same --max-tokens" in capsys.readouterr().err


def test_another_model_is_refused_and_without_an_index_there_is_no_search(
    server: Any, index: Index, tiny_embedder: Callable[..., Embedder]
) -> None:
    with pytest.raises(InputError, match="model"):
        create_app(tiny_embedder("mean"), name="other", index=Index.open(index.folder))
    assert server.ask("POST", "/search", {"query": "a"}).status == server.ask("GET", "/index").status == 404


def test_a_search_is_not_logged(searched: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert searched.ask("POST", "/search", {"query": "a secret", "task": "", "where": ["year=1"]}).status == 200
    assert "secret" not in caplog.text
