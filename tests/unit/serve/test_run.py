"""The real process: what it listens at, the keys it reads, and what a signal does to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

from embedwright.errors import InputError
from embedwright.index.index import Index
from embedwright.model.embedder import Embedder
from embedwright.serve.app import create_app
from embedwright.serve.run import _Stopping, listen, read_keys

TEXTS = [f"Number {i}: the moon pulls at the sea, and the sea follows. " * 12 for i in range(256)]


def test_others_are_let_in_with_a_key_alone() -> None:
    with pytest.raises(InputError, match=r"--host 0\.0\.0\.0 .* needs a key"):
        listen("0.0.0.0", 0, [])
    for host in ("127.0.0.1", "localhost"):
        listen(host, 0, []).close()
    with listen("0.0.0.0", 0, ["key"]) as taken, pytest.raises(InputError, match="port"):
        listen("0.0.0.0", taken.getsockname()[1], ["key"])


def test_keys_come_from_a_variable_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    monkeypatch.setenv("SOME_KEY", "three")
    assert read_keys("SOME_KEY", file) == ["three", "one", "two"] and read_keys(None, None) == []
    file.write_text("\n")
    for env, path, words in (
        ("OTHER_KEY", None, "OTHER_KEY"),
        ("sk-secret", None, "NAME of the environment variable"),
        (None, file, "no key"),
        (None, tmp_path / "none", "none"),
    ):
        with pytest.raises(InputError, match=words) as found:
            read_keys(env, path)
        assert "sk-secret" not in str(found.value)


def test_at_the_deadline_everything_under_way_is_answered_wherever_it_is_held_up(
    told: Embedder, index: Index, model: Embedder, other: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, reached = threading.Event(), threading.Semaphore(0)

    def held(*_: Any, **__: Any) -> Any:
        reached.release()
        assert go.wait(60)
        raise RuntimeError

    second = create_app(model, name="other", index=other)
    app = create_app(told, name="tiny", index=index, page=True, against=second)
    second.state.server.batcher.embed = held
    monkeypatch.setattr(index, "search_vectors", held)
    monkeypatch.setattr("embedwright.serve.page.map_of", held)
    listening = listen("127.0.0.1", 0, [])
    stopping = _Stopping(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5), app.state.server, 0.1)
    running = threading.Thread(target=stopping.run, args=([listening],), daemon=True)
    running.start()
    answers: list[tuple[int, Any]] = []

    def ask(method: str, path: str, body: str, length: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", listening.getsockname()[1], timeout=60)
        headers = {"Content-Type": "application/json", "Content-Length": str(length)}
        connection.request(method, path, body.encode(), headers)
        answer = connection.getresponse()
        answers.append((answer.status, json.loads(answer.read())["error"]["code"]))

    query = '{"query": "tide"}'
    requests = [
        ("POST", "/search", query, len(query)),
        ("GET", "/map", "", 0),
        ("POST", "/against/v1/embeddings", '{"input": "a"}', 14),
        ("POST", "/v1/embeddings", '{"input": "the rest of it', 99),  # never comes
    ]
    asking = [threading.Thread(target=ask, args=request) for request in requests]
    try:
        for thread in asking:
            thread.start()
        for _ in requests[:-1]:
            assert reached.acquire(timeout=60)
        while len(app.state.server.traffic.open) < len(requests):
            assert running.is_alive()
            time.sleep(0.01)
        stopping.handle_exit(signal.SIGTERM, None)
        for thread in asking:
            thread.join(60)
        assert answers == [(503, "stopping")] * len(requests)
        works = [thread for thread in threading.enumerate() if thread.name in ("embedwright-search", "embedwright-map")]
        assert len(works) >= 2 and all(thread.daemon for thread in works)  # the process does not wait for them
    finally:
        go.set()
    running.join(60)
    assert not running.is_alive()


def test_a_signal_ends_the_process_when_all_it_has_accepted_is_answered(
    start: Callable[..., Any], model: Embedder, tmp_path: Path
) -> None:
    model.save(tmp_path / "model")
    # a batch for each text, so that the requests are still under way when the signal comes
    server = start(tmp_path / "model", "--batch-tokens", "1", "--queue-tokens", "99999", "--drain", "60")
    parts = [TEXTS[i * 24 :][:24] for i in range(4)]
    answers: list[tuple[int, bytes]] = []

    def ask(texts: list[str]) -> None:
        with suppress(OSError):  # only for one that was not accepted: all of those that were are counted below
            answers.append(server.ask("/v1/embeddings", {"input": texts}))

    asking = [threading.Thread(target=ask, args=(part,)) for part in parts]
    try:
        for thread in asking:
            thread.start()
        while (accepted := server.under_way()) < 4 and not answers:
            assert server.process.poll() is None
            time.sleep(0.02)
        os.kill(server.process.pid, signal.SIGTERM)
        for thread in asking:
            thread.join(60)
        _, errors = server.process.communicate(timeout=60)
    finally:
        server.process.kill()
    assert server.process.returncode == 0 and "Traceback" not in errors, errors
    right = 0
    for status, raw in answers:
        if status == 503:
            assert json.loads(raw)["error"]["code"] == "stopping"
            continue
        found = np.array([row["embedding"] for row in json.loads(raw)["data"]], np.float32)
        assert min(np.abs(found - model.encode(part)).max() for part in parts) < 1e-5
        right += 1
    assert right >= accepted >= 1 or right == 4
