"""A chat-completions server in a thread, over real HTTP, that answers and fails as a test tells it."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import pytest

from embedwright.cli import main as cli

Body = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What the server does with one request: after `stall_s` it sends this, or hangs up (`status` 0)."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stall_s: float = 0.0
    drip: bool = False  # while it stalls it sends a byte now and then
    finish: str = "stop"
    tokens: int = 10
    body: bytes | None = None  # instead of a chat completion


class FakeLLM:
    """`reply(body, n)` answers the n-th request (from 0); `requests` has the bodies and `times` when they came."""

    def __init__(self, reply: Callable[[Body, int], Reply]) -> None:
        self.reply = reply
        self.requests: list[Body] = []
        self.headers: list[dict[str, str]] = []  # names in lower case
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    n = len(fake.requests)
                    fake.requests.append(body)
                    fake.headers.append({name.lower(): value for name, value in self.headers.items()})
                    fake.times.append(time.monotonic())
                    fake.at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake.at_once)
                    reply = fake.reply(body, n)
                time.sleep(0 if reply.drip else reply.stall_s)
                with lock:  # before the answer is sent: the client may ask again before this thread runs on
                    fake.at_once -= 1
                self.send(reply)

            def send(self, reply: Reply) -> None:
                if reply.status == 0:
                    return
                content = reply.body if reply.body is not None else json.dumps(completion(reply)).encode()
                try:
                    if reply.drip:
                        self.send_response(200)
                        self.send_header("content-type", "application/json")
                        self.end_headers()
                        for _ in range(int(reply.stall_s / 0.02)):
                            self.wfile.write(b" ")
                            self.wfile.flush()
                            time.sleep(0.02)
                        self.wfile.write(content)
                        return
                    self.send_response(reply.status)
                    soon = {"retry-after-ms": "1"} if reply.status >= 400 else {}
                    for name, value in {"content-type": "application/json", **(reply.headers or soon)}.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    pass  # the client has given up

            def log_message(self, *_: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128  # at the default of 5 connections are lost beside busy processes, and come late

        self._http = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> FakeLLM:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.requests]


def completion(reply: Reply) -> Body:
    if reply.status != 200:
        return {"error": {"message": f"made-up {reply.status}", "type": "made_up"}}
    message = {"role": "assistant", "content": reply.text}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "fake",
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish}],
        "usage": {"prompt_tokens": 0, "completion_tokens": reply.tokens, "total_tokens": reply.tokens},
    }


def faulty_first(faults: list[Reply], good: Callable[[Body, int], Reply]) -> Callable[[Body, int], Reply]:
    """`faults` for the first requests, in order, then `good`."""
    return lambda body, n: faults[n] if n < len(faults) else good(body, n)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `embedwright ARGUMENTS`, run in this process."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "error" if name == "TRANSFORMERS_VERBOSITY" else "1")
    monkeypatch.delenv("EMBEDWRIGHT_DEBUG", raising=False)
    monkeypatch.setattr(sys, "argv", ["embedwright", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
