"""/v1/embeddings as the stock openai client, curl and plain HTTP ask for it; each vector is computed again."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest

from embedwright.encoders.http import HttpEncoder, RefusedTextsError
from embedwright.index.index import Index
from embedwright.model.embedder import Embedder
from embedwright.serve.app import create_app
from embedwright.serve.server import Limits

TEXTS = ["tides", "how do tides work?", "The moon pulls at the sea. " * 20, "漢字 🙂", "", "tides"]
TASK = "Given a question, retrieve passages that answer it"


def client(server: Any, **how: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, **how)


def vectors(answer: Any) -> np.ndarray:
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return np.array([item.embedding for item in answer.data], np.float32)


def close(found: Any, expected: np.ndarray) -> bool:
    return np.shape(found) == expected.shape and float(np.abs(found - expected).max()) < 1e-5


def test_the_stock_client_gets_the_vectors_of_encode_in_order(server: Any, model: Embedder) -> None:
    answer = client(server).embeddings.create(model="tiny", input=TEXTS)  # it asks for base64
    assert close(vectors(answer), model.encode(TEXTS))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == len(model.tokenize(TEXTS).ids_T)
    one = client(server).embeddings.create(model="tiny", input=TEXTS[1], user="someone")
    assert close(vectors(one), model.encode(TEXTS[1:2]))


def test_float_and_base64_have_the_same_bits(server: Any, model: Embedder) -> None:
    as_float = server.embed({"input": "tides"}).body["data"][0]["embedding"]
    as_base64 = server.embed({"input": "tides", "encoding_format": "base64"}).body["data"][0]["embedding"]
    assert np.array(as_float, np.float32).tobytes() == base64.b64decode(as_base64)
    assert close([as_float], model.encode(["tides"]))


@pytest.mark.parametrize("dimensions", [1, 7, 32, 5.0])
def test_dimensions_cut_and_normalise_again(server: Any, model: Embedder, dimensions: float) -> None:
    found = vectors(client(server).embeddings.create(model="tiny", input=TEXTS, dimensions=dimensions))  # type: ignore[arg-type]
    assert close(found, model.encode(TEXTS, dim=int(dimensions)))


def test_side_and_task_are_honoured(server: Any, model: Embedder) -> None:
    def ask(**more: Any) -> np.ndarray:
        return vectors(client(server).embeddings.create(model="tiny", input=TEXTS[:3], extra_body=more))

    plain, asked = model.encode(TEXTS[:3]), model.encode(TEXTS[:3], task=TASK)
    assert np.abs(plain - asked).max() > 0.01
    for side in ({}, {"input_type": "document"}, {"input_type": "query", "task": ""}):
        assert close(ask(**side), plain)
    for side in ({}, {"input_type": "query"}):
        assert close(ask(**side, task=TASK), asked)
    with pytest.raises(openai.BadRequestError, match="no instruction of its own"):
        ask(input_type="query")
    with pytest.raises(openai.BadRequestError, match="documents have no task"):
        ask(input_type="document", task=TASK)


def test_a_query_without_a_task_gets_the_models_own(serving: Any, tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("mean")
    model.contract = model.network.contract = model.contract.model_copy(update={"default_task": TASK})
    with serving(model) as server:
        query = server.embed({"input": "tides", "input_type": "query"}).body["data"][0]["embedding"]
        document = server.embed({"input": "tides", "input_type": "document"}).body["data"][0]["embedding"]
        bare = server.embed({"input": "tides", "input_type": "query", "task": ""}).body["data"][0]["embedding"]
    assert close([query], model.encode(["tides"], task=TASK)) and close([document], model.encode(["tides"]))
    assert close([bare], model.encode(["tides"], prefix=""))


def test_many_clients_at_once_each_get_their_own_vectors(server: Any, model: Embedder) -> None:
    async def ask(asker: openai.AsyncOpenAI, i: int) -> tuple[list[str], str | None, np.ndarray]:
        texts, task = [f"{text} {i}" for text in TEXTS[: 1 + i % 6]], (None, TASK, f"Task {i}")[i % 3]
        more = {} if task is None else {"task": task}
        answer = await asker.embeddings.create(model="tiny", input=texts, extra_body=more)
        return texts, task, vectors(answer)

    async def all_of_them() -> list[tuple[list[str], str | None, np.ndarray]]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as asker:
            return await asyncio.gather(*(ask(asker, i) for i in range(48)))

    for texts, task, found in asyncio.run(all_of_them()):
        assert close(found, model.encode(texts, task=task))


def test_curl(server: Any, model: Embedder) -> None:
    words = ["curl", "-s", f"{server.url}/embeddings", "-H", "Content-Type: application/json"]
    said = subprocess.run([*words, "-d", json.dumps({"input": TEXTS})], capture_output=True, timeout=60, check=True)
    assert close([row["embedding"] for row in json.loads(said.stdout)["data"]], model.encode(TEXTS))


BAD = {  # what is sent, the words that the answer needs, the field that it names
    "no_json": (b"{", "no JSON", None),
    "no_utf8": (b'{"input": "\xff"}', "JSON", None),
    "deep": (b'{"input": ' + b"[" * 100_000, "JSON", None),
    "a_list": (b"[]", "", None),
    "nothing": (b"", "send a JSON object", None),
    "no_input": (b"{}", "required", "input"),
    "empty_list": (b'{"input": []}', "not empty", "input"),
    "null": (b'{"input": null}', "a text", "input"),
    "a_number": (b'{"input": 3}', "a text", "input"),
    "mixed": (b'{"input": ["a", 3]}', "item 1 is no text", "input"),
    "ids": (b'{"input": [3, 5.0]}', "check_embedding_ctx_length=False", "input"),
    "lists_of_ids": (b'{"input": [[3, 5], [7]]}', "check_embedding_ctx_length=False", "input"),
    "true": (b'{"input": [true]}', "item 0 is no text", "input"),
    "too_many": (json.dumps({"input": ["a"] * 257}).encode(), "at most 256", "input"),
    "half_a_character": (b'{"input": ["a", "\\ud800"]}', "texts[1]", None),
    "dimensions_0": (b'{"input": "a", "dimensions": 0}', "greater than or equal to 1", "dimensions"),
    "dimensions_33": (b'{"input": "a", "dimensions": 33}', "less than or equal to 32", "dimensions"),
    "dimensions_true": (b'{"input": "a", "dimensions": true}', "whole number", "dimensions"),
    "dimensions_text": (b'{"input": "a", "dimensions": "3"}', "whole number", "dimensions"),
    "dimensions_half": (b'{"input": "a", "dimensions": 1.5}', "", "dimensions"),
    "dimensions_huge": (b'{"input": "a", "dimensions": 1e999}', "", "dimensions"),
    "format": (b'{"input": "a", "encoding_format": "int8"}', "'float' or 'base64'", "encoding_format"),
    "side": (b'{"input": "a", "input_type": "passage"}', "'query' or 'document'", "input_type"),
    "misspelt": (b'{"input": "a", "inputtype": "query"}', "did you mean 'input_type'", "inputtype"),
    "no_room": (json.dumps({"input": "a", "task": "x " * 600}).encode(), "no token to pool", None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_openais_shape(server: Any, name: str) -> None:
    sent, words, field = BAD[name]
    answer = server.embed(raw=sent)
    assert answer.status == 400 and answer.headers["content-type"] == "application/json"
    error = answer.body["error"]
    assert error.keys() == {"message", "type", "param", "code"} and answer.body.keys() == {"error"}
    assert words in error["message"] and error["param"] == field and error["type"] == "invalid_request_error"


def test_the_client_raises_by_kind(server: Any) -> None:
    asker = client(server).embeddings
    with pytest.raises(openai.BadRequestError, match="at most 256"):
        asker.create(model="tiny", input=["a"] * 257)
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        asker.create(model="text-embedding-3-small", input="a")


def test_paths_and_methods_that_are_none(server: Any) -> None:
    for method, path, status in (("GET", "/", 404), ("POST", "/v1/embedding", 404), ("GET", "/v1/embeddings", 405)):
        answer = server.ask(method, path)
        assert answer.status == status and answer.body["error"]["type"] == "invalid_request_error"
    assert answer.headers["allow"] == "POST"
    no_type = server.embed(raw=b'{"input": "a"}', headers={"Content-Type": "text/plain"})
    assert no_type.status == 400 and "Content-Type: application/json" in no_type.body["error"]["message"]


def test_token_ids_are_read_as_their_text_where_they_are_asked_for(serving: Any, model: Embedder) -> None:
    encoded = [model.text_tokenizer.plain.encode(text).ids for text in TEXTS[:4]]
    with serving(token_ids=True) as server:
        found = client(server).embeddings.create(model="tiny", input=encoded)
        one = client(server).embeddings.create(model="tiny", input=encoded[1])
        beyond = server.embed({"input": [[2], [400]]})
    assert close(vectors(found), model.encode(TEXTS[:4])) and close(vectors(one), model.encode(TEXTS[1:2]))
    assert beyond.status == 400 and "input[1] holds the token id 400" in beyond.body["error"]["message"]


def test_a_number_of_any_size_is_no_token_id(serving: Any) -> None:
    for token_ids in (False, True):
        with serving(token_ids=token_ids) as server:
            for given in (10**400, [10**400], [[10**400]], [1e300], [[1, 10**400]], [-(10**400)], ["a", 10**400]):
                answer = server.embed({"input": given})
                assert answer.status == 400 and answer.body["error"]["type"] == "invalid_request_error", given


def test_a_long_text_is_cut_as_encode_cuts_it_and_counted(serving: Any, tiny_embedder: Callable[..., Embedder]) -> None:
    texts, model = ["The moon pulls at the sea. " * 20, "short"], tiny_embedder("latent")
    model.contract = model.contract.model_copy(update={"max_tokens": 30})  # as --max-tokens 30 opens it
    with serving(model) as server:
        answer = client(server).embeddings.create(model="tiny", input=texts)
        counted = server.ask("GET", "/metrics").raw.decode()
        listed = server.ask("GET", "/v1/models").body["data"][0]
    assert close(vectors(answer), model.encode(texts))
    assert "embedwright_full_texts_total 1.0" in counted and "embedwright_texts_total 2.0" in counted
    assert (listed["id"], listed["max_tokens"], listed["dimension"]) == ("tiny", 30, 32)


def test_health_readiness_and_the_schema(serving: Any) -> None:
    with serving(limits=Limits(max_inputs=9)) as server:
        assert server.ask("GET", "/health").body == {"status": "ok"}
        assert server.ask("GET", "/ready").body == {"status": "ready"}
        schema = server.ask("GET", "/openapi.json").body
        assert server.embed({"input": ["a"] * 10}).status == 400
    fields = schema["components"]["schemas"]["EmbeddingRequest"]["properties"]
    bounds = next(form for form in fields["dimensions"]["anyOf"] if form["type"] == "integer")
    assert (bounds["minimum"], bounds["maximum"]) == (1, 32)
    assert fields["input"]["anyOf"][1] == {"type": "array", "minItems": 1, "maxItems": 9, "items": {"type": "string"}}
    assert "422" not in schema["paths"]["/v1/embeddings"]["post"]["responses"]


def test_a_model_that_fails_on_everything_is_not_ready_until_it_answers_again(serving: Any, model: Embedder) -> None:
    def fail(texts: Any) -> Any:
        raise RuntimeError

    with serving() as server:
        batcher = server.app.state.server.batcher
        embed, batcher.embed = batcher.embed, fail
        for texts in (["a"] * 3, ["b"] * 4):
            assert server.embed({"input": texts}).status == 503 and server.ask("GET", "/ready").status == 200
        assert server.embed({"input": "c"}).status == 503
        answer = server.ask("GET", "/ready")
        assert answer.status == 503 and answer.body["error"]["code"] == "model_failed"
        batcher.embed = embed  # those texts were at fault: nobody has to ask for another before it is ready
        assert server.ask("GET", "/ready").status == 200 and batcher.failed_in_a_row == 0


def test_a_text_without_a_finite_vector_is_refused_for_good_and_costs_no_other(
    serving: Any, told: Embedder, index: Index
) -> None:
    """A 5xx would have clients ask again: our teacher over HTTP for two hours."""
    poison, texts = "a poisoned text", [f"text {i}" for i in range(40)]
    ids = [told.tokenize([poison], task=task).ids_T.tolist() for task in (None, told.contract.default_task)]
    with serving(told, index=index) as server:
        batcher = server.app.state.server.batcher
        embed = batcher.embed

        def overflows(asked: Any) -> Any:
            vectors = embed(asked)
            vectors[[text.ids.tolist() in ids for text in asked]] = np.nan
            return vectors

        batcher.embed = overflows
        for path, field in (("/v1/embeddings", "input"), ("/search", "query")):
            answer = server.ask("POST", path, {field: ["tides", poison]})
            error = answer.body["error"]
            assert answer.status == 400 and error["param"] == f"{field}[1]" and "not finite" in error["message"]
        teacher = HttpEncoder(server.url, "tiny")
        with pytest.raises(RefusedTextsError, match="not finite") as refused:
            teacher.encode([*texts, poison])
        assert refused.value.texts == [poison] and close(teacher.encode(texts), told.encode(texts))


def test_readiness_is_that_of_both_models(serving: Any, model: Embedder) -> None:
    second = create_app(model, name="second")
    with serving(against=second) as server:
        assert server.ask("GET", "/ready").status == 200
        second.state.server.batcher.close()
        assert server.ask("GET", "/ready").status == 503


def test_the_answer_repeats_no_long_name_of_a_field(server: Any) -> None:
    answer = server.embed({"input": "a", "i" * 100_000: 1})
    assert answer.status == 400 and len(answer.raw) < 1000 and answer.body["error"]["code"] == "unknown_field"


def test_no_task_is_the_models_own_and_an_empty_one_is_none_on_every_path(
    serving: Any, told: Embedder, index: Index
) -> None:
    own = told.contract.default_task
    with serving(told, index=index) as server:
        for more in ({"task": ""}, {"task": "", "input_type": "query"}, {"input_type": "query"}, {"task": own}):
            expected = told.encode(["tides"], task=more.get("task", own))
            assert close([server.embed({"input": "tides", **more}).body["data"][0]["embedding"]], expected), more
        for asked, said in (({"task": ""}, ""), ({}, own), ({"task": None}, own)):
            (found,) = server.ask("POST", "/search", {"query": "tides", **asked}).body["data"]
            assert found["task"] == said
        shown = server.ask("GET", "/openapi.json").body["components"]["schemas"]
    described = [shown[name]["properties"]["task"]["description"] for name in ("EmbeddingRequest", "SearchRequest")]
    assert described[1].startswith(described[0]) and "empty for none" in described[0]


def test_no_text_is_logged(serving: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving() as server:
        model = server.app.state.server.packed
        model.read = lambda texts, task: (_ for _ in ()).throw(RuntimeError(f"quotes {texts}"))
        assert server.embed({"input": "a secret"}).status == 500
        del model.read
        server.app.state.server.batcher.embed = lambda texts: (_ for _ in ()).throw(RuntimeError("a secret too"))
        assert server.embed({"input": "a secret"}).status == 503
        assert server.embed({"input": ["a secret", 3], "task": "a secret"}).status == 400
    assert "RuntimeError" in caplog.text and "secret" not in caplog.text


def test_only_models_that_pack_are_served() -> None:
    with pytest.raises(TypeError, match="needs a decoder"):
        create_app(object(), name="minilm")
