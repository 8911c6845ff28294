"""Against a real server of embeddings on this machine, in a thread."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_llm import command

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
        self.too_long, self.refusals = 400, 0
        self.failures: list[int] = []
        self.longest = 10**9  # characters of a text, with its template
        self.retry_after: dict[str, str] = {"retry-after-ms": "1"}
        self.before: Callable[[], Any] = lambda: None  # what happens while a request is under way
        self.times: list[float] = []
        self.spoil: Callable[[list[dict[str, Any]]], Any] = lambda data: data
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.keys.append(self.headers["Authorization"])
                server.times.append(time.monotonic())
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.before()
                status = server.failures.pop(0) if server.failures else 200
                if status == 200 and any(len(text) > server.longest for text in body["input"]):
                    status, server.refusals = server.too_long, server.refusals + 1
                answer = json.dumps(
                    server.answer(self.path, body) if status == 200 else {"error": {"message": server.said}}
                ).encode()
                self.send_response(status)
                for name, value in server.retry_after.items():
                    self.send_header(name, value)
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
    asked = sorted((request["input"] for request in server.requests), key=lambda texts: TEXTS.index(texts[0]))
    assert asked == [TEXTS[i : i + batch] for i in range(0, 6, batch)]
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
    assert server.failures == []


def test_a_server_is_left_as_long_in_peace_as_it_asks(server: Server) -> None:
    server.failures, server.retry_after = [429], {"Retry-After": "1"}
    assert np.allclose(HttpEncoder(server.url, "bge").encode(TEXTS), unit(TEXTS), atol=1e-6)
    assert len(server.times) == 2 and server.times[1] - server.times[0] >= 1


def test_several_requests_are_under_way_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request is answered only when four are there."""
    together = threading.Barrier(4)
    monkeypatch.setattr(http, "_BATCH", 1)
    monkeypatch.setattr(http, "_AT_ONCE", 4)
    lock, under_way, most = threading.Lock(), 0, 0

    def meet() -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        together.wait(timeout=60)
        with lock:
            under_way -= 1

    server.before = meet
    texts = [f"text {i}" for i in range(12)]
    assert np.allclose(HttpEncoder(server.url, "bge").encode(texts), unit(texts), atol=1e-6)
    assert most == 4


def test_an_encoder_works_inside_of_a_running_loop(server: Server) -> None:
    async def of_a_notebook() -> np.ndarray:
        return HttpEncoder(server.url, "bge").encode(TEXTS)

    assert np.allclose(asyncio.run(of_a_notebook()), unit(TEXTS), atol=1e-6)


def test_an_outage_is_waited_out_by_an_encoder_that_was_answered_before(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http, "_RETRIES", 1)
    monkeypatch.setattr(http, "_PAUSE_S", 0.001)
    monkeypatch.setattr(http, "_BATCH", 2)
    encoder = HttpEncoder(server.url, "bge")
    server.failures = [503] * 2
    with pytest.raises(RuntimeError, match="503"):  # as a wrong address
        encoder.encode(["first"])
    encoder.encode(["first"])
    server.requests.clear()
    server.failures = [503] * 40
    assert np.allclose(encoder.encode(TEXTS), unit(TEXTS), atol=1e-6) and not server.failures
    assert sum(len(request["input"]) for request in server.requests) == len(TEXTS)  # each was answered once
    assert "asked again in" in caplog.text
    monkeypatch.setattr(http, "_OUTAGE_S", 0.0)
    server.failures = [503] * 40
    with pytest.raises(RuntimeError, match="503"):
        encoder.encode(TEXTS)


@pytest.mark.parametrize("too_long", [400, 413, 422, 500])
def test_a_text_that_is_too_long_is_named_and_costs_no_other(
    server: Server, too_long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_RETRIES", 0)
    server.longest, server.too_long, server.said = 40, too_long, "input is too large to process"
    encoder = HttpEncoder(server.url, "bge", document_template="{text}</s>")
    texts = [f"text {i}" for i in range(60)]
    texts[7], texts[33] = "seven " * 20, "thirty " * 30
    with pytest.raises(
        http.RefusedTextsError, match=r"2 texts were refused.* 120 characters: 'seven .*too large"
    ) as caught:
        encoder.encode(texts)
    assert caught.value.texts == [texts[7], texts[33]]
    taken = [text.removesuffix("</s>") for request in server.requests for text in request["input"]]
    assert sorted(taken) == sorted(set(texts) - {texts[7], texts[33]})  # each once
    assert server.refusals <= 2 * (1 + 6)  # in halves, not one by one


def test_a_text_that_is_too_long_is_cut_by_choice_and_keeps_the_end_of_its_template(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.longest = 40
    encoder = HttpEncoder(server.url, "bge", document_template="{text}</s>", cut=True)
    texts = ["short", "seven " * 2000, "e"]
    with caplog.at_level(logging.WARNING):
        vectors = encoder.encode(texts)
    taken = max((r["input"][0] for r in server.requests if len(r["input"]) == 1), key=len)
    assert taken.endswith("</s>") and 36 < len(taken) <= 40 and texts[1].startswith(taken.removesuffix("</s>"))
    expected = unit(["short</s>", taken, "e</s>"])
    assert np.allclose(vectors, expected, atol=1e-6)
    assert "a text is cut from 12000 to" in caplog.text and "'seven seven" in caplog.text


def test_mine_names_what_is_too_long_or_cuts_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.longest = 60
    rows = [{"id": f"{i}", "query": f"q{i}", "positives": [f"{'very ' * (30 if i == 2 else 1)}{i}"]} for i in range(5)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = ("mine", tmp_path / "x.jsonl", "--out", tmp_path / "mined.jsonl", "--teacher", f"{server.url}#m")
    mine = (*mine, "--rule", "naive", "--task", "find")
    assert command(monkeypatch, *mine) == 2
    said = capsys.readouterr().err
    assert "1 texts were refused, each alone; the first has 151 characters: 'very very" in said
    assert said.splitlines()[-1:] == [f"{tmp_path / 'x.jsonl'}: row 3, id '2'"]
    (tmp_path / "n.jsonl").write_text(json.dumps(rows[0] | {"negatives": ["short", "long " * 20]}) + "\n")
    assert command(monkeypatch, "mine", tmp_path / "n.jsonl", *mine[2:]) == 2
    assert capsys.readouterr().err.splitlines()[-1:] == [f"{tmp_path / 'n.jsonl'}: row 1, id '0'"]
    documents = [{"_id": "a", "text": "short"}, {"_id": "b", "title": "A", "text": "long " * 20}]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    assert command(monkeypatch, *mine, "--corpus", tmp_path / "docs.jsonl") == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'docs.jsonl'}:2" in said
    assert command(monkeypatch, *mine, "--cut") == 0 and (tmp_path / "mined.jsonl").exists()
    capsys.readouterr()
    assert command(monkeypatch, *mine, "--cut", "--out", tmp_path / "parts", "--shard", "0/2") == 0
    assert "each of 2 parts encodes all 5 documents" in capsys.readouterr().err


def test_mine_asks_for_the_instruction_that_a_template_wants_before_it_encodes(server: Server, tmp_path: Path) -> None:
    rows = [
        Example("squad", "squad", "q", (Passage("p"),)),  # of the catalogue, which has its instruction
        Example("own", "mine", "q", (Passage("p"),)),
    ]
    teacher = HttpEncoder(server.url, "bge")
    with pytest.raises(ValueError, match=r"'own'.* task 'mine' has no instruction.*--task.*--query-template"):
        mine(rows, {"1": "p", "2": "n"}, teacher)
    assert not server.requests
    mine(rows[:1], {"1": "p", "2": "n"}, teacher)
    mine(rows, {"1": "p", "2": "n"}, teacher, task="find")
    mine(rows, {"1": "p", "2": "n"}, HttpEncoder(server.url, "bge", query_template="query: {text}"))
    pair = Example("scored", "mine", "q", (), (Passage("p"),), score=0.0)  # nothing is mined for it
    mine([rows[0], pair], {"1": "p", "2": "n"}, teacher)


def test_a_server_that_refuses_all_is_not_asked_for_each(server: Server) -> None:
    server.longest, server.said = -1, "no such model here"
    with pytest.raises(RuntimeError, match="no such model here"):
        HttpEncoder(server.url, "bge").encode([f"text {i}" for i in range(2000)])
    assert server.refusals < 300
    with pytest.raises(RuntimeError, match="no such model here"):
        HttpEncoder(server.url, "bge").encode(["one", "two"])


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
