"""Keys, hosts, body sizes, slow and leaving clients: what every path shares."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from typing import Any

import openai
import pytest
from fastapi.responses import Response

from embedwright.serve.guard import _Answer
from embedwright.serve.server import Limits

KEYS = ("first key", "zweiter Schlüssel")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_path_and_method_wants_a_key_but_health_and_readiness(serving: Any) -> None:
    with serving(keys=KEYS) as server:
        schema = server.ask("GET", "/openapi.json", headers=bearer(KEYS[0])).body
        paths = [*schema["paths"], "/openapi.json", "/docs", "/nothing", "/v1/embeddings/", "//health", "/health/x"]
        assert {"/v1/embeddings", "/v1/models", "/metrics", "/health", "/ready"} <= {*paths}
        for path in paths:
            for method in ("GET", "POST", "PUT", "OPTIONS"):
                answer = server.ask(method, path, headers=bearer("first"))
                assert (answer.status == 401) == (path not in ("/health", "/ready")), (method, path)
        for headers in ({}, bearer(""), {"Authorization": KEYS[0]}, {"Authorization": f"Basic {KEYS[0]}"}):
            assert server.embed({"input": "a"}, headers=headers).status == 401
        assert server.embed({"input": "a"}).body["error"]["code"] == "invalid_api_key"
        for key in KEYS:
            assert server.embed({"input": "a"}, headers=bearer(key.encode().decode("latin-1"))).status == 200
        assert openai.OpenAI(base_url=server.url, api_key=KEYS[0]).embeddings.create(model="tiny", input="a").data
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url, api_key="none").embeddings.create(model="tiny", input="a")


def test_without_a_key_only_this_machines_name_is_answered(server: Any) -> None:
    for host in ("evil.example", f"evil.example:{server.port}", "localhost.evil.example", "[::2]", ""):
        answer = server.embed({"input": "a"}, headers={"Host": host})
        assert answer.status == 403 and answer.body["error"]["code"] == "wrong_host"
    for host in ("localhost", f"127.0.0.1:{server.port}", "[::1]", "[::1]:80"):
        assert server.embed({"input": "a"}, headers={"Host": host}).status == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_read(serving: Any) -> None:
    body = json.dumps({"input": "a" * 40}).encode()
    with serving(limits=Limits(max_body=len(body))) as server:
        assert server.embed(raw=body).status == 200
        answer = server.embed(raw=body + b" ")
        assert answer.status == 413 and answer.body["error"]["code"] == "body_too_large"
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n"
        for sent in (b"Content-Length: 99999999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n400\r\n" + b"a" * 1024):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
                connection.sendall(head + sent)  # the end of the body never comes
                assert connection.recv(100).startswith(b"HTTP/1.1 413")
        assert server.embed(raw=body).status == 200


def test_clients_that_never_finish_their_body_hold_up_nobody(server: Any) -> None:
    sockets = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(100)]
    try:
        for i, slow in enumerate(sockets):
            slow.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"[: 30 + i])
        assert server.embed({"input": "a"}).status == 200
        wait_for(lambda: server.app.state.server.traffic.under_way == 0)  # the answer comes before it is counted
    finally:
        for slow in sockets:
            slow.close()


def test_a_client_that_leaves_takes_its_texts_along(serving: Any) -> None:
    with serving() as server:
        batcher, go, began, seen = server.app.state.server.batcher, threading.Event(), threading.Event(), []
        embed = batcher.embed

        def held_up(texts: Any) -> Any:
            seen.append(len(texts))
            began.set()
            assert go.wait(20)
            return embed(texts)

        batcher.embed = held_up
        first = threading.Thread(target=server.embed, args=({"input": "first"},))
        first.start()
        assert began.wait(20)
        body = json.dumps({"input": ["one", "two"]}).encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as leaving:
            head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            leaving.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_for(lambda: batcher.waiting_tokens > 0)
        wait_for(lambda: batcher.waiting_tokens == 0)
        go.set()
        first.join(20)
        assert server.embed({"input": ["a", "b", "c"]}).status == 200
        assert seen == [1, 3]
        assert 'path="/v1/embeddings",status="499"' in server.ask("GET", "/metrics").raw.decode()


def wait_for(condition: Any) -> None:
    async def ask() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(ask(), 20))


def test_a_server_that_stops_takes_no_more(serving: Any) -> None:
    with serving() as server:
        server.app.state.server.traffic.draining = True
        answer = server.embed({"input": "a"})
        assert answer.status == 503 and answer.headers["retry-after"] == "1"
        assert answer.body["error"]["code"] == "stopping"
        assert server.ask("GET", "/metrics").status == 200  # to be looked at now
        assert server.ask("GET", "/ready").status == 503 and server.ask("GET", "/health").status == 200
        wait_for(lambda: b'status="503"' in server.ask("GET", "/metrics").raw)  # which is not refused


def test_the_bytes_of_bodies_under_way_are_bounded(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedwright.serve.guard._BODIES", 3)
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n"
    with serving(limits=Limits(max_body=1000)) as server:
        traffic = server.app.state.server.traffic
        slow = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(3)]
        for each in slow:
            each.sendall(head + b"a" * 899)  # the last byte does not come
        wait_for(lambda: traffic.body_bytes == 3 * 899)
        asked = {"input": "a" * 400}
        answer = server.embed(asked)
        assert answer.status == 429 and answer.headers["retry-after"] == "1"
        assert answer.body["error"]["code"] == "too_many_bytes"
        assert server.embed({"input": "a"}).status == 200  # there is room for this one
        for each in slow:
            each.close()
        wait_for(lambda: traffic.body_bytes == 0)
        assert server.embed(asked).status == 200
        wait_for(lambda: traffic.body_bytes == 0)


def test_a_large_answer_goes_in_pieces_and_waits_for_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    body, sent = bytes(range(256)) * 4000, list[dict[str, Any]]()

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 9:
            await asyncio.Event().wait()

    async def answer() -> None:
        own = _Answer(send)
        await own.send({"type": "http.response.start", "status": 200, "headers": []})
        await own.send({"type": "http.response.body", "body": body})
        assert own.status == 200 and b"".join(message["body"] for message in sent[1:]) == body
        assert [message["more_body"] for message in sent[1:]] == [True] * (len(sent) - 2) + [False]
        assert len(sent) == 5 and max(len(message["body"]) for message in sent[1:]) == 2**18
        monkeypatch.setattr("embedwright.serve.guard._READ_S", 0.05)
        with pytest.raises(TimeoutError):
            await own.send({"type": "http.response.body", "body": body * 3})
        assert len(sent) == 10

    asyncio.run(answer())


def test_a_client_that_does_not_read_its_answer_is_given_up(
    serving: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("embedwright.serve.guard._READ_S", 1.0)
    with serving() as server:
        traffic = server.app.state.server.traffic
        server.app.get("/large")(lambda: Response(b"a" * 50_000_000))
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as reader:
            reader.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_for(lambda: traffic.under_way == 1)  # it is no more than that until it is read
            wait_for(lambda: traffic.under_way == 0)
            wait_for(lambda: "TimeoutError" in caplog.text)  # told after the request has ended
            got = 0
            while part := reader.recv(2**20):
                got += len(part)
            assert got < 50_000_000  # the connection was closed
        assert len(server.ask("GET", "/large").raw) == 50_000_000


def test_an_error_of_the_server_has_openais_shape(serving: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise KeyError("secret")

    with serving() as server:
        server.app.get("/fails")(fail)
        with caplog.at_level(logging.DEBUG):
            answer = server.ask("GET", "/fails")
    assert answer.status == 500 and answer.body["error"]["type"] == "server_error"
    assert "KeyError" in caplog.text and "test_guard.py" in caplog.text and "secret" not in caplog.text
