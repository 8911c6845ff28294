"""Against a real server of embeddings on this machine, in a thread."""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from embedwright.data.schema import Example, Passage
from embedwright.encoders import http
from embedwright.encoders.http import HttpEncoder
from embedwright.mining.mine import mine

pytest.importorskip("openai")


def vector(text: str) -> np.ndarray:
    return np.array([len(text), text.count("e"), 1], np.float32)


class Server:
    """Answers with `vector` of each text, last text first; `spoil` may change an answer, `failures` are sent before."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.said = "not now"
        self.failures: list[int] = []
        self.spoil: Callable[[list[dict[str, Any]]], Any] = lambda data: data
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.keys.append(self.headers["Authorization"])
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = server.failures.pop(0) if server.failures else 200
                answer = json.dumps(
                    server.answer(self.path, body) if status == 200 else {"error": {"message": server.said}}
                ).encode()
                self.send_response(status)
                self.send_header("retry-after-ms", "1")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *given: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.requests.append({"path": path, **body})
        coded = [vector(text).tolist() for text in body["input"]]
        data = [{"object": "embedding", "index": i, "embedding": coded[i]} for i in reversed(range(len(coded)))]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return {"object": "list", "model": body["model"], "data": self.spoil(data), "usage": usage}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def unit(texts: list[str]) -> np.ndarray:
    vectors = np.stack([vector(text) for text in texts])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


TEXTS = ["seven", "e", "the sea", "", "eels {text} {0}", "x" * 50]


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_order_is_kept_over_batches(server: Server, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_BATCH", batch)
    encoder = HttpEncoder(server.url, "bge")
    found = encoder.encode(TEXTS)
    assert found.dtype == np.float32 and np.allclose(found, unit(TEXTS), atol=1e-6)
    assert [request["input"] for request in server.requests] == [TEXTS[i : i + batch] for i in range(0, 6, batch)]
    assert {(r["path"], r["model"], r["encoding_format"]) for r in server.requests} == {
        ("/v1/embeddings", "bge", "float")
    }
    assert encoder.dimension == 3 and encoder.encode([]).shape == (0, 3)


def test_templates_say_what_the_model_reads(server: Server) -> None:
    templates = {"query_template": "Instruct: {task}\nQuery: {text}</s>", "document_template": "{text}</s>"}
    encoder = HttpEncoder.from_url(f"{server.url}#e5", **templates)
    mined, _ = mine(
        [Example("e1", "t", "why {task}?", (Passage("the moon"),))],
        {"1": "a boat", "2": "the moon"},
        encoder,
        rule="naive",
        task="find {text}",
    )
    assert [p.id for p in mined[0].negatives] == ["1"]
    read = [text for request in server.requests for text in request["input"]]
    assert sorted(read) == sorted(["a boat</s>", "the moon</s>", "Instruct: find {text}\nQuery: why {task}?</s>"])
    with pytest.raises(ValueError, match="no instruction is given"):
        encoder.encode(["why?"], task="")
    plain = HttpEncoder(server.url, "e5", query_template="query: {text}", document_template="passage: {text}")
    plain.encode(["why?"], task="")
    assert server.requests[-1]["input"] == ["query: why?"]


def test_a_server_that_is_busy_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.failures = [429, 503]
    assert np.allclose(HttpEncoder(server.url, "bge").encode(TEXTS), unit(TEXTS), atol=1e-6)
    server.failures = [500] * 3
    monkeypatch.setattr(http, "_RETRIES", 2)
    with pytest.raises(RuntimeError, match=rf"{server.url}, model bge, text 'seven' and 5 more: .*500"):
        HttpEncoder(server.url, "bge").encode(TEXTS)
    server.failures = [400]
    with pytest.raises(RuntimeError, match="400"):
        HttpEncoder(server.url, "bge").encode(TEXTS)
    assert server.failures == []


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[1:], "1 vectors with 1 different numbers"),
        (lambda data: [data[0], {**data[1], "index": 1}], "2 vectors with 1 different"),
        (lambda data: [{**item, "index": item["index"] + 1} for item in data], "2 vectors with 2 different"),
        (lambda data: [data[0], {**data[1], "embedding": [1.0, 2.0]}], r"different lengths came back: \[2, 3\]"),
        (lambda data: [data[0], {**data[1], "embedding": [0.0, 0.0, 0.0]}], "not finite, or zero"),
        (lambda data: [data[0], {**data[1], "embedding": [float("nan"), 0.0, 0.0]}], "not finite, or zero"),
        (lambda data: [], "0 vectors"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(server: Server, spoil: Any, reason: str) -> None:
    encoder = HttpEncoder(server.url, "bge")
    encoder.encode(["first"])
    server.spoil = spoil
    with pytest.raises(ValueError, match=reason) as caught:
        encoder.encode(["seven seas", "e"])
    assert server.url in str(caught.value) and "'seven seas' and 1 more" in str(caught.value)


def test_the_width_may_not_change_between_requests(server: Server) -> None:
    encoder = HttpEncoder(server.url, "bge")
    encoder.encode(["first"])
    server.spoil = lambda data: [{**item, "embedding": [1.0, 2.0]} for item in data]
    with pytest.raises(ValueError, match="different lengths"):
        encoder.encode(["second"])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"query_template": "Query: "}, r"must have \{text\} once"),
        ({"document_template": "{text} {text}"}, r"must have \{text\} once"),
        ({"document_template": "{task}: {text}"}, r"a document has no \{task\}"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        HttpEncoder("http://127.0.0.1:1/v1", "m", **settings)


def test_bad_texts_and_urls() -> None:
    with pytest.raises(ValueError, match="say which model"):
        HttpEncoder.from_url("http://127.0.0.1:1/v1")
    with pytest.raises(TypeError, match="1"):
        HttpEncoder("http://127.0.0.1:1/v1", "m").encode(["a", None])  # type: ignore[list-item]


def test_a_teacher_gets_its_own_key_and_does_not_show_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.setenv("OWN_KEY", "own-secret")
    HttpEncoder(server.url, "m").encode(["a"])
    HttpEncoder(server.url, "m", api_key_env="OWN_KEY").encode(["a"])
    url = server.url.replace("//", "//me:pass@")
    HttpEncoder.from_url(f"{url}#m").encode(["a"])
    assert server.keys == ["Bearer none", "Bearer own-secret", "Basic bWU6cGFzcw=="]
    server.said, server.failures = "wrong: own-secret", [403]
    with pytest.raises(RuntimeError, match=r"wrong: \*\*\*.*--api-key-env") as caught:
        HttpEncoder(server.url, "m", api_key_env="OWN_KEY").encode(["a"])
    assert "own-secret" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ValueError, match="no instruction is given") as refused:
        HttpEncoder.from_url(f"{url}#m").encode(["a"], task="")
    assert "pass" not in str(refused.value)
    with pytest.raises(ValueError, match="say which model") as refused:
        HttpEncoder.from_url(url)
    assert "pass" not in str(refused.value)
