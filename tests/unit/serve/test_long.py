"""Proofs of the server that take minutes: generated requests, many clients with faults, overload, signals, a soak.

What needs packages of its own runs in a second environment, which a variable names.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embedwright.index.build import build_index
from embedwright.index.index import Index
from embedwright.model.embedder import Embedder
from embedwright.serve.server import Limits

pytestmark = pytest.mark.long

TASK = "Find a passage"


# A condition names columns of the index, which OpenAPI does not say: 400 is right for many.
CONFIG = """
[[operations]]
include-path = "/search"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400"]
"""


def needed(variable: str, packages: str) -> str:
    """Returns the program that an environment variable names, or skips with how to get it."""
    program = os.environ.get(variable)
    if not program:
        pytest.skip(
            f"python -m venv own && own/bin/pip install {packages}, then set {variable} to its program in own/bin"
        )
    return program


@pytest.fixture(scope="module")
def told(tiny_embedder: Callable[..., Embedder]) -> Embedder:
    """A model with an instruction of its own for queries."""
    model = tiny_embedder("latent")
    model.contract = model.network.contract = model.contract.model_copy(update={"default_task": TASK})
    return model


@pytest.fixture(scope="module")
def index(told: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index")
    rows = [
        {"id": str(i), "text": f"Number {i} of the sea", "year": i or None, "part": i / 7, "lang": "en", "new": i > 9}
        for i in range(50)
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_index(told, folder / "documents.jsonl", folder / "index", metadata=["year", "part", "lang", "new"])
    return Index.open(folder / "index")


@pytest.mark.parametrize(("key", "seed"), [((), ["--seed", "1"]), (("a-key",), [])])
def test_schemathesis_finds_nothing_in_two_thousand_cases(
    serving: Any, told: Embedder, index: Index, key: tuple[str, ...], seed: list[str], tmp_path: Path
) -> None:
    program = needed("SCHEMATHESIS", "schemathesis")
    (tmp_path / "config.toml").write_text(CONFIG)
    with serving(told, index=index, keys=key) as server:
        words = [program, "--config-file", str(tmp_path / "config.toml"), "run", *seed, "--max-examples", "950"]
        words += ["--checks", "all", "--generation-database", "none", "--no-color", "--continue-on-failure"]
        words += ["--header", f"Authorization: Bearer {key[0]}"] if key else []
        words += [f"http://127.0.0.1:{server.port}/openapi.json"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=3000, check=False, cwd=tmp_path)
        counted = server.ask("GET", "/metrics", headers={"Authorization": "Bearer a-key"}).raw.decode()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    cases = re.search(r"(\d+) generated", done.stdout)
    assert cases and int(cases[1]) >= 2000, done.stdout[-2000:]
    assert 'status="500"' not in counted and 'status="503"' not in counted


def test_no_filter_is_a_fault_of_the_server(serving: Any, told: Embedder, index: Index) -> None:
    values = ["", "1", "-1.5", "1e400", "nan", "inf", "true", "9" * 400, "a,b", "en", "\ud800", "'", " ", "in"]
    counts = Counter[int]()
    with serving(told, index=index) as server:
        for column in ("year", "part", "lang", "new", "none", ""):
            for sign in ("=", "==", "!=", "<", "<=", ">", ">=", " in ", "~"):
                for value in values:
                    in_parts = {"column": column, "operator": sign.strip(), "value": value}
                    for where in (f"{column}{sign}{value}", in_parts, in_parts | {"value": [value, 1, 0.5, True]}):
                        asked = {"query": "a", "k": 1, "where": [where]}
                        answer = server.ask("POST", "/search", asked)
                        assert answer.status in (200, 400), asked
                        counts[answer.status] += 1
    assert counts[200] > 100 and counts[400] > 100


# ---- many clients


class Connection:
    """A kept connection, by asyncio alone. It is opened when it is first asked, and again after it was closed."""

    def __init__(self, port: int) -> None:
        self.port, self.writer = port, None

    async def send(self, body: Any) -> None:
        path = "/search" if "query" in body else "/v1/embeddings"
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        sent = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.writer.write(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        await self.writer.drain()

    async def answer(self) -> tuple[int, Any]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = re.search(r"content-length: (\d+)", head)
        assert length
        return int(head.split()[1]), json.loads(await self.reader.readexactly(int(length[1])))

    async def ask(self, body: Any) -> tuple[int, Any]:
        await self.send(body)
        return await asyncio.wait_for(self.answer(), 300)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class Asked:
    """Random requests over a pool of texts, each of whose vectors is computed beforehand by `Embedder.encode`.

    With an index, some are searches, whose hits are those that `Index.search` finds.
    """

    def __init__(self, model: Embedder, index: Index | None = None, texts: int = 300) -> None:
        random.seed(1)
        words = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox", "lazy", "quick"]
        self.texts = [" ".join(random.choices(words, k=random.choice([1, 3, 8, 30, 90]))) for _ in range(texts)]
        self.texts[0] = " ".join(random.choices(words, k=30_000))
        self.tasks = (None, TASK, "Find the moon")
        self.vectors = {task: model.encode(self.texts, task=task) for task in self.tasks}
        self.hits = [] if index is None else index.search(model, self.texts, 5, TASK)

    def draw(self) -> tuple[list[int], str | None, dict[str, Any]]:
        chosen = [random.randrange(len(self.texts)) for _ in range(random.choice([1, 1, 1, 4, 16]))]
        if self.hits and random.random() < 0.2:
            return chosen, TASK, {"query": [self.texts[i] for i in chosen], "k": 5, "task": TASK}
        task = random.choice(self.tasks)
        more = {} if task is None else {"task": task}
        return chosen, task, {"input": [self.texts[i] for i in chosen], **more}

    def right(self, chosen: list[int], task: str | None, answer: Any) -> bool:
        if "hits" in answer["data"][0]:
            rows = [[hit["score"] for hit in row["hits"]] for row in answer["data"]]
            wanted = [[hit.score for hit in self.hits[i]] for i in chosen]
            return np.shape(rows) == np.shape(wanted) and float(np.abs(np.subtract(rows, wanted)).max()) < 1e-5
        found = np.array([row["embedding"] for row in answer["data"]], np.float32)
        return found.shape == (len(chosen), 32) and float(np.abs(found - self.vectors[task][chosen]).max()) < 1e-5


@pytest.mark.parametrize(("clients", "queue"), [(64, 16_384), (256, 1_000_000)])  # one is full at times, one never
def test_many_clients_with_faults_and_aborts_get_no_wrong_vector(
    serving: Any, told: Embedder, index: Index, clients: int, queue: int
) -> None:
    asked, counts, poison = Asked(told, index), Counter[str](), "a poisoned text"
    poisoned_ids = [tuple(told.tokenize([poison], task=task).ids_T.tolist()) for task in asked.tasks]

    async def client(port: int) -> None:
        connection = Connection(port)
        for _ in range(100):
            chosen, task, body = asked.draw()
            bad = random.random() < 0.02
            if bad:
                body["query" if "query" in body else "input"].insert(random.randrange(len(chosen) + 1), poison)
            if random.random() < 0.05:
                await connection.send(body)
                await asyncio.sleep(random.random() * 0.05)
                connection.close()
                counts["aborted"] += 1
                continue
            status, answer = await connection.ask(body)
            counts[str(status)] += 1
            counts["searches"] += "query" in body and status == 200
            if status == 200:
                assert not bad and asked.right(chosen, task, answer)
            elif status == 503:
                assert bad and answer["error"]["code"] == "model_failed"
            else:
                assert status == 429, answer
        connection.close()

    async def all_of_them(port: int) -> None:
        await asyncio.gather(*(client(port) for _ in range(clients)))

    with serving(told, index=index, limits=Limits(queue_tokens=queue)) as server:
        state = server.app.state.server
        embed = state.batcher.embed

        def faulty(texts: Any) -> Any:
            if any(tuple(text.ids.tolist()) in poisoned_ids for text in texts):
                raise RuntimeError("poisoned")
            if len(texts) > 1 and random.random() < 0.02:
                raise RuntimeError("passing")
            return embed(texts)

        state.batcher.embed = faulty
        asyncio.run(all_of_them(server.port))
        ends = time.monotonic() + 60
        while state.traffic.under_way or state.batcher.waiting_tokens:
            assert time.monotonic() < ends, "something is stuck"
            time.sleep(0.05)
    print(f"{clients} clients: {dict(counts)}")
    assert counts.pop("searches") > 0
    assert sum(counts.values()) == clients * 100 and counts["200"] > 0 and counts["503"] > 0
    assert (counts["429"] > 0) == (queue < 1_000_000)


def test_four_times_the_load_it_can_bear(serving: Any, told: Embedder) -> None:
    body = {"input": ["the moon pulls at the sea " * 40] * 8}
    tokens = len(told.tokenize(body["input"]).ids_T)
    right = told.encode(body["input"][:1])[0]
    waits: list[float] = []
    statuses: Counter[int] = Counter()

    async def ask(port: int, note: bool) -> None:
        connection = Connection(port)
        began = time.perf_counter()
        status, answer = await connection.ask(body)
        statuses[status] += note
        if status == 200:
            waits.append(time.perf_counter() - began)
            assert np.abs(np.array(answer["data"][7]["embedding"]) - right).max() < 1e-5
        connection.close()

    async def closed_loop(port: int, clients: int, each: int) -> float:
        async def client() -> None:
            for _ in range(each):
                await ask(port, False)

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return clients * each / (time.perf_counter() - began)

    async def open_loop(port: int, per_s: float, seconds: float) -> None:
        tasks = []
        for _ in range(int(per_s * seconds)):
            tasks.append(asyncio.ensure_future(ask(port, True)))
            await asyncio.sleep(1 / per_s)
        await asyncio.gather(*tasks)

    with serving(told, limits=Limits(queue_tokens=2 * tokens, batch_tokens=2048)) as server:
        batcher, most, ends = server.app.state.server.batcher, [0], threading.Event()

        def watch() -> None:
            while not ends.wait(0.001):
                most[0] = max(most[0], batcher.waiting_tokens)

        threading.Thread(target=watch, daemon=True).start()
        asyncio.run(closed_loop(server.port, 1, 20))
        waits.clear()
        asyncio.run(closed_loop(server.port, 1, 50))
        alone = np.quantile(waits, 0.99)
        bears = asyncio.run(closed_loop(server.port, 2, 50))
        waits.clear()
        memory = resident()
        asyncio.run(open_loop(server.port, 4 * bears, 60))
        crowded = np.quantile(waits, 0.99)
        grown = resident() / memory - 1
        began = time.perf_counter()
        asyncio.run(ask(server.port, False))
        calm = time.perf_counter() - began
        ends.set()
    print(
        f"bears {bears:.1f} requests/s of {tokens} tokens; at four times that {dict(statuses)}, "
        f"p99 {crowded * 1000:.0f} ms (alone {alone * 1000:.0f} ms), queue {most[0]} of {2 * tokens}; "
        f"then {calm * 1000:.0f} ms; memory {grown:+.1%}"
    )
    assert statuses.keys() <= {200, 429} and statuses[200] > 0.5 * 60 * bears and statuses[429] > 0
    assert most[0] <= 2 * tokens and calm < 2 and grown < 0.05
    assert crowded < 10 * alone  # two requests wait in front at most, and this process asks and answers


def resident(process: str = "self") -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- the process


def test_ten_signals_under_load(start: Callable[..., Any], model: Embedder, other: Index, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    asked, took = Asked(model, other), []
    for round in range(10):
        process = start(tmp_path / "model", "--drain", "8", "--index", str(other.folder))
        port, stopped, counts = int(process.url.rpartition(":")[2]), [0.0], Counter[str]()

        async def client(port: int = port, stopped: list[float] = stopped, counts: Counter[str] = counts) -> None:
            connection = Connection(port)
            while True:
                chosen, task, body = asked.draw()
                sent = 0.0
                try:
                    await connection.send(body)
                    sent = time.monotonic()
                    status, answer = await asyncio.wait_for(connection.answer(), 60)
                except (OSError, asyncio.IncompleteReadError):
                    assert stopped[0] and not 0 < sent < stopped[0], "a request of before the signal was not answered"
                    counts["closed"] += 1
                    return
                counts[str(status)] += 1
                if status == 200:
                    assert asked.right(chosen, task, answer)
                elif status != 429:  # which was not accepted
                    assert stopped[0] and status == 503 and answer["error"]["code"] == "stopping"

        async def load(process: Any = process, stopped: list[float] = stopped) -> None:
            clients = [asyncio.ensure_future(client()) for _ in range(32)]
            await asyncio.sleep(1 + random.random())
            stopped[0] = time.monotonic()
            os.kill(process.process.pid, signal.SIGTERM)
            await asyncio.gather(*clients)

        asyncio.run(load())
        _, errors = process.process.communicate(timeout=30)
        took.append(time.monotonic() - stopped[0])
        print(f"signal {round}: {dict(counts)}, {took[-1]:.1f} s")
        assert process.process.returncode == 0 and "Traceback" not in errors, errors
        assert took[-1] < 13 and counts["200"] > 0  # 8 seconds of drain, and the five that are promised after it


def test_memory_and_file_handles_stay_flat(start: Callable[..., Any], told: Embedder, tmp_path: Path) -> None:
    told.save(tmp_path / "model")
    process, asked = start(tmp_path / "model"), Asked(told)
    port, pid = int(process.url.rpartition(":")[2]), str(process.process.pid)

    async def client(requests: int) -> None:
        connection = Connection(port)
        for i in range(requests):
            chosen, task, body = asked.draw()
            if i % 20 == 19:  # leaves
                await connection.send(body)
                connection.close()
            elif i % 20 == 9:  # is refused
                assert (await connection.ask(body | {"dimensions": 0}))[0] == 400
            else:
                status, answer = await connection.ask(body)
                assert status == 429 or asked.right(chosen, task, answer)
        connection.close()

    async def load(requests: int) -> None:
        await asyncio.gather(*(client(requests) for _ in range(32)))

    seen = []
    for _ in range(8):
        asyncio.run(load(int(os.environ.get("SOAK", "2400")) // 8))
        time.sleep(0.5)
        seen.append((resident(pid), len([*Path(f"/proc/{pid}/fd").iterdir()])))
    process.process.kill()
    print("MB and handles:", [(memory // 2**20, handles) for memory, handles in seen])
    assert seen[-1][0] < 1.05 * seen[2][0] and seen[-1][1] <= seen[2][1] + 2


# ---- clients of others


LIBRARIES = """
import json, sys
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai import OpenAIEmbedding

url, texts = sys.argv[1], json.load(sys.stdin)
query = {"extra_body": {"input_type": "query"}}
lang = dict(base_url=url, api_key="none", model="tiny", check_embedding_ctx_length=False, chunk_size=256)
llama = dict(api_base=url, api_key="none", model_name="tiny", embed_batch_size=7)
print(json.dumps({
    "langchain documents": OpenAIEmbeddings(**lang).embed_documents(texts),
    "langchain queries": [OpenAIEmbeddings(**lang, model_kwargs=query).embed_query(text) for text in texts],
    "llamaindex documents": OpenAIEmbedding(**llama).get_text_embedding_batch(texts),
    "llamaindex queries": [OpenAIEmbedding(**llama, additional_kwargs=query).get_query_embedding(t) for t in texts],
}))
"""


def test_langchain_and_llamaindex_get_the_vectors_of_encode(serving: Any, told: Embedder) -> None:
    python = needed("CLIENTS_PYTHON", "langchain-openai llama-index-embeddings-openai")
    texts = Asked(told).texts[:20]
    with serving(told) as server:
        words = [python, "-c", LIBRARIES, server.url]
        done = subprocess.run(words, input=json.dumps(texts), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for kind, found in json.loads(done.stdout).items():
        expected = told.encode_query(texts) if kind.endswith("queries") else told.encode_document(texts)
        assert np.abs(np.array(found) - expected).max() < 1e-5, kind


def test_mtebs_openai_wrapper_scores_as_the_model_does(
    serving: Any, model: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mteb
    import openai
    from mteb.mocks import MOCK_TASK_TEST_GRID
    from mteb.models.model_implementations.openai_models import OpenAIModel

    from embedwright.evaluation.mteb import MtebEncoder

    letters = SimpleNamespace(encode=list, decode="".join)  # tiktoken's own encodings are downloaded
    tiktoken = SimpleNamespace(get_encoding=lambda name: letters, Encoding=type("Encoding", (), {}))
    monkeypatch.setitem(sys.modules, "tiktoken", tiktoken)
    tasks = [task for task in MOCK_TASK_TEST_GRID if task.metadata.name in ("MockRetrievalTask", "MockSTSTask")]
    assert len(tasks) == 2

    def scores(encoder: Any) -> list[Any]:
        found = mteb.evaluate(encoder, tasks, cache=None, show_progress_bar=False, co2_tracker=False)
        return [result.get_score() for result in found.task_results]

    with serving() as server:
        client = openai.OpenAI(base_url=server.url, api_key="none")
        wrapped = OpenAIModel("tiny", max_tokens=10_000, embed_dim=32, client=client)
        served = scores(wrapped)
        asked = server.app.state.server.metrics.registry.get_sample_value("embedwright_texts_total")
    without = MtebEncoder(model, {task.metadata.name: "" for task in tasks})
    assert served == pytest.approx(scores(without), abs=1e-5) and asked > 4
