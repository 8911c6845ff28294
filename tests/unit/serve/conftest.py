"""One tiny model behind a real uvicorn, shared by the tests of the server; and others where a test needs its own."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI

from embedwright.index.build import build_index
from embedwright.index.index import Index
from embedwright.model.embedder import Embedder
from embedwright.serve.app import create_app
from embedwright.serve.server import Limits


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


class Running(NamedTuple):
    """A server in a thread of this process."""

    app: FastAPI
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, raw: bytes | None = None
    ) -> Answer:
        """Asks by the standard library alone."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = raw if body is None else json.dumps(body).encode()
        connection.request(method, path, sent, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        found = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        connection.close()
        return found

    def embed(self, body: Any = None, **how: Any) -> Answer:
        return self.ask("POST", "/v1/embeddings", body, **how)


@contextmanager
def running(app: FastAPI) -> Iterator[Running]:
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield Running(app, listening.getsockname()[1])
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="session")
def model(tiny_embedder: Callable[..., Embedder]) -> Embedder:
    return tiny_embedder("latent")


@pytest.fixture(scope="session")
def serving(model: Embedder) -> Callable[..., AbstractContextManager[Running]]:
    """`serving(**options of create_app)`: a server of its own, for as long as the block runs."""

    def serve(own: Embedder = model, **options: Any) -> AbstractContextManager[Running]:
        return running(create_app(own, **{"name": "tiny", **options}))

    return serve


@pytest.fixture(scope="session")
def server(serving: Callable[..., AbstractContextManager[Running]]) -> Iterator[Running]:
    """The shared server. Leave it as it is."""
    with serving(limits=Limits(queue_tokens=100_000)) as made:
        yield made


# ---- two indexes of the same documents, for the page


@pytest.fixture(scope="session")
def told(tiny_embedder: Callable[..., Embedder]) -> Embedder:
    """A model with an instruction of its own."""
    model = tiny_embedder("mean")
    model.contract = model.contract.model_copy(update={"default_task": "Find the text about it"})
    return model


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of several chunks, with emoji before them; one that is a script."""
    words = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox"]
    random = np.random.default_rng(0)
    rows = [
        {"id": f"d{i}", "title": f"Of {words[i % 10]}" if i % 3 else "", "year": 1990 + i, "lang": ["en", "de"][i % 2],
         "text": "🌕🌊 " + " ".join(random.choice(words, 12 + 3 * i))}
        for i in range(14)
    ]  # fmt: skip
    rows[4]["title"] = "<img src=x onerror=\"document.title='owned'\">"
    rows[4]["text"] = "<script>document.title='owned'</script> " + rows[4]["title"] + rows[4]["text"]
    rows[5]["lang"], rows[9]["lang"] = None, " at, de "
    file = tmp_path_factory.mktemp("documents") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def index(told: Embedder, documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("served") / "index"
    return Index.open(build_index(told, documents, out, chunk_tokens=40, metadata=["year", "lang"]))


@pytest.fixture(scope="session")
def other(model: Embedder, documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Of `model`, whole documents."""
    out = tmp_path_factory.mktemp("other") / "index"
    return Index.open(build_index(model, documents, out, metadata=["year", "lang"]))


class Process:
    """`embedwright serve` as a user starts it."""

    def __init__(self, folder: Path, *options: str) -> None:
        words = [sys.executable, "-m", "embedwright", "serve", str(folder), "--port", "0", "--name", "tiny", *options]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        said = re.search(r"http://[^\s,]+", line)
        assert said, (line, self.process.communicate(timeout=60))
        self.url = said[0].removesuffix("/v1")

    def ask(self, path: str, body: Any = None) -> tuple[int, bytes]:
        sent = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, sent, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def under_way(self) -> int:
        """The number of requests that the server has accepted and not answered, without this one."""
        counted = self.ask("/metrics")[1].decode()
        found = re.search(r"^embedwright_requests_under_way (\d+)", counted, re.MULTILINE)
        assert found
        return int(found[1]) - 1


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """`start(folder, *options)`: a process of the command, killed when the test ends."""
    started: list[Process] = []

    def begin(folder: Path, *options: str) -> Process:
        started.append(Process(folder, *options))
        return started[-1]

    yield begin
    for made in started:
        made.process.kill()
        made.process.communicate(timeout=60)
