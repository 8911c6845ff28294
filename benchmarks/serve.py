"""Serve, side by side with sentence-transformers behind FastAPI: plain, and behind a batcher, each at its best.

All three servers hold the same weights, tokens and pooling, in processes of their own, asked in turn, A B A B. The
plain peer encodes request by request, or two at once in threads, whichever is faster here. The batching peer
collects what waits while a batch computes, as ours does, and lets sentence-transformers sort it by length; its batch
size is searched. All answer in base64, as OpenAI's client asks for it. The client's requests are written beforehand.

    python benchmarks/serve.py --model smollm2-135m --dtype float32
"""

from __future__ import annotations

from common import CORES, SHORT, bind_threads, ratio

bind_threads()

import argparse  # noqa: E402
import asyncio  # noqa: E402
import base64  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import queue  # noqa: E402
import random  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from concurrent.futures import Future, ThreadPoolExecutor  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import models  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from fastapi.responses import Response  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from pydantic import BaseModel  # noqa: E402
from pydantic_core import to_json  # noqa: E402
from texts import counter, source, text_set  # noqa: E402

from embedwright import threads  # noqa: E402
from embedwright.serve.app import create_app  # noqa: E402
from embedwright.serve.run import listen, run  # noqa: E402
from embedwright.serve.server import Limits  # noqa: E402

SIDES = ("plain", "batching", "ours")
SIZES = (1, 1, 1, 1, 4, 16)  # texts of a request, drawn
GOALS = {"plain": "serve_plain", "batching": "serve_batching"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.NAMES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=tuple(SHORT), default="float32")
    parser.add_argument("--tokens", type=int, default=8000, help="of the texts that requests are drawn from")
    parser.add_argument("--requests", type=int, default=150, help="of each side and round")
    parser.add_argument("--clients", type=int, default=16, help="at once, each with one request under way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="be this server: internal")
    parser.add_argument("--folder", type=Path, help="with the models: internal")
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    models.run(options, f"serve-{options.model}-{options.dtype}", measure)


# ---- the client


def measure(options: argparse.Namespace) -> models.Measured:
    reference = models.ours(options.folder, "float32")
    texts, _ = text_set("mixed", options.tokens, counter(reference))
    random.seed(0)
    asked = [random.choices(texts, k=random.choice(SIZES)) for _ in range(options.requests)]
    expected = reference.encode(texts)
    row = {text: i for i, text in enumerate(texts)}
    del reference
    servers = {side: Server(side, options) for side in SIDES}
    try:
        settings = {side: server.tune(asked) for side, server in servers.items()}
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side, server in servers.items():
                found, answers = server.ask(asked, options.clients)
                found["smallest_cosine"] = smallest_cosine(
                    answers, [expected[[row[t] for t in some]] for some in asked]
                )
                rounds[side].append(found)
                print(options.model, options.dtype, side, json.dumps(found), flush=True)
    finally:
        for server in servers.values():
            server.process.terminate()
            server.process.wait()
    sides = {side: summary(found) | {"settings": settings[side]} for side, found in rounds.items()}
    times = {side: [found["seconds"] for found in all_of_it] for side, all_of_it in rounds.items()}
    ratios = {side: ratio(times[side], times["ours"]) for side in GOALS}
    kind = SHORT[options.dtype]
    goals = {f"{goal}_{kind}": [{"of": options.model, "value": ratios[side]["median"]}] for side, goal in GOALS.items()}
    figures = {
        "model": models.described(options.model),
        "dtype": options.dtype,
        "texts": source(),
        "requests": len(asked),
        "texts_asked": sum(map(len, asked)),
        "clients": options.clients,
        "sides": sides,
        "times_faster": ratios,
    }
    return figures, goals


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over the rounds, and the seconds of all of them."""
    medians = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    return medians | {"seconds_of_rounds": [found["seconds"] for found in rounds]}


def smallest_cosine(answers: list[bytes], expected: list[NDArray[np.float32]]) -> float:
    """Over all vectors, each beside that of our model in float32."""
    least = 1.0
    for answer, vectors in zip(answers, expected, strict=True):
        rows = json.loads(answer)["data"]
        found = np.stack([np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in rows])
        least = min(least, float((found * vectors).sum(1).min()))
    return least


class Server:
    """One side, in a process of its own, and its client."""

    def __init__(self, side: str, options: argparse.Namespace) -> None:
        words = ["--side", side, "--folder", str(options.folder), "--model", options.model, "--dtype", options.dtype]
        os.sched_setaffinity(0, CORES)  # the child inherits them
        command = [sys.executable, sys.argv[0], *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().split()[-1])

    def tune(self, asked: list[list[str]]) -> dict[str, Any]:
        """Warms the server up; a peer then tries its settings on these requests and keeps the fastest."""
        found, _ = self.ask(asked[:40], 4)
        choices = json.loads(asyncio.run(_one(self.port, _request("GET", "/settings", b"")))) if found else []
        seconds = {}
        for setting in choices if isinstance(choices, list) else []:
            asyncio.run(_one(self.port, _request("POST", f"/settings/{setting}", b"")))
            seconds[str(setting)] = self.ask(asked[:60], 16)[0]["seconds"]
        if not seconds:
            return {}
        best = min(seconds, key=lambda setting: seconds[setting])
        asyncio.run(_one(self.port, _request("POST", f"/settings/{best}", b"")))
        return {"best": best, "seconds": seconds}

    def ask(self, asked: list[list[str]], clients: int) -> tuple[dict[str, Any], list[bytes]]:
        """Asks all, each client the next one that is left. Returns figures, and the answers in order."""
        bodies = [json.dumps({"input": texts, "encoding_format": "base64"}).encode() for texts in asked]
        requests = [_request("POST", "/v1/embeddings", body) for body in bodies]
        answers, waits = [b""] * len(requests), [0.0] * len(requests)
        left = iter(range(len(requests)))

        async def client() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            for i in left:
                began = time.perf_counter()
                writer.write(requests[i])
                answers[i] = await _answer(reader)
                waits[i] = time.perf_counter() - began
            writer.close()

        async def all_of_them() -> None:
            await asyncio.gather(*(client() for _ in range(clients)))

        began, spent = time.perf_counter(), time.process_time()
        asyncio.run(all_of_them())
        seconds, spent = time.perf_counter() - began, time.process_time() - spent
        texts = sum(map(len, asked))
        figures = {"seconds": seconds, "texts_per_s": texts / seconds, "client_cpu_share": spent / seconds}
        quantiles = {f"p{p}_ms": 1000 * float(np.quantile(waits, p / 100)) for p in (50, 99)}
        return figures | quantiles, answers


def _request(method: str, path: str, body: bytes) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _answer(reader: asyncio.StreamReader) -> bytes:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    body = await reader.readexactly(int(head.partition("content-length:")[2].split()[0]))
    if " 200 " not in head and " 404 " not in head:  # ours has no /settings
        raise RuntimeError(f"{head.splitlines()[0]}: {body[:200]!r}")
    return body


async def _one(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    body = await _answer(reader)
    writer.close()
    return body


# ---- the servers


class Request(BaseModel):
    input: list[str]
    encoding_format: str = "float"


def serve(options: argparse.Namespace) -> None:
    listening = listen("127.0.0.1", 0, [])
    if options.side == "ours":
        limits = Limits(queue_tokens=10**7)  # the peers refuse nobody either
        app = create_app(models.ours(options.folder, options.dtype).fold(), name="ours", limits=limits)
    else:
        app = peer_app(options)
    print(listening.getsockname()[1], flush=True)
    if options.side == "ours":
        run(app, listening, 1)
    else:
        uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run(sockets=[listening])


def peer_app(options: argparse.Namespace) -> FastAPI:
    """sentence-transformers behind FastAPI. `/settings` lists what it can be set to, and sets it."""
    peer = models.peer(options.folder, options.dtype)
    app, batcher = FastAPI(), Batcher(peer)
    state: dict[str, Any] = {"settings": [1, 2] if options.side == "plain" else [2, 4, 8, 16]}
    threads_of = {1: ThreadPoolExecutor(1), 2: ThreadPoolExecutor(2, initializer=alone)}
    state["setting"] = state["settings"][0]

    def plain(texts: list[str]) -> NDArray[np.float32]:
        return threads_of[state["setting"]].submit(models.encode_peer, peer, texts, None, max(SIZES)).result()

    def batched(texts: list[str]) -> NDArray[np.float32]:
        waiting: Future[NDArray[np.float32]] = Future()
        batcher.waiting.put((texts, waiting))
        return waiting.result()

    encode = plain if options.side == "plain" else batched

    @app.post("/v1/embeddings")
    def embeddings(asked: Request) -> Response:
        shown = [base64.b64encode(vector.tobytes()).decode() for vector in encode(asked.input)]
        data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(shown)]
        return Response(to_json({"object": "list", "data": data, "model": "peer"}), media_type="application/json")

    @app.get("/settings")
    def settings() -> list[int]:
        return list(state["settings"])

    @app.post("/settings/{setting}")
    def choose(setting: int) -> None:
        state["setting"] = batcher.batch = setting

    return app


def alone() -> None:
    """Lets this thread compute by itself, on whichever core is free."""
    threads.unbind()
    torch.set_num_threads(1)


class Batcher:
    """A thread that encodes all that waits at once, in batches of `batch` texts, sorted by length."""

    def __init__(self, peer: Any) -> None:
        self.peer, self.batch = peer, 8
        self.waiting: queue.Queue[tuple[list[str], Future[Any]]] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            jobs = [self.waiting.get()]
            while sum(len(texts) for texts, _ in jobs) < 2 * self.batch:  # larger ones keep the first ones waiting
                try:
                    jobs.append(self.waiting.get_nowait())
                except queue.Empty:
                    break
            texts = [text for some, _ in jobs for text in some]
            vectors = models.encode_peer(self.peer, texts, None, self.batch)
            for some, answer in jobs:
                answer.set_result(vectors[: len(some)])
                vectors = vectors[len(some) :]


if __name__ == "__main__":
    main()
