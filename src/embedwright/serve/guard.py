"""What every request passes before and after the app: host, key, size, and what happens when its client leaves.

It works on ASGI messages, below the framework, so that no path is left out.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
import traceback
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedwright.serve.errors import ApiError, busy
from embedwright.serve.metrics import Metrics
from embedwright.serve.page import AGAINST, PAGE_PATHS

log = logging.getLogger(__name__)

# They want no key, and are answered while the server stops. The page is static, and asks for the key itself.
OPEN_PATHS = ("/health", "/ready", *PAGE_PATHS)
_METRICS = ("/metrics", f"/{AGAINST}/metrics")  # answered also when nothing else is: then they are looked at
_AT_ONCE = 1024  # requests under way
_BODIES = 64  # bodies that have begun to arrive, and are not answered, hold at most the bytes of so many of the largest
_BODY_S = 30.0  # a body that takes longer to arrive is given up
_PIECE = 2**18  # bytes of an answer handed on at once: the web server keeps what its client has not read
_READ_S = 30.0  # a client that takes longer to read the piece before is given up
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_CLIENT_LEFT = 499


@dataclass
class Traffic:
    """Requests whose body has been read and that are not answered yet. `draining`: no new ones are taken.

    `open` holds the task of each request, and its answer, also while the body is read. `cut`: they were given up.
    """

    under_way: int = 0
    body_bytes: int = 0
    draining: bool = False
    cut: bool = False
    open: dict[asyncio.Task[Any], _Answer] = field(default_factory=dict)

    def cut_off(self) -> None:
        """Has every request whose answer has not begun answered with 503, wherever it is held up."""
        self.cut = True
        for task, answer in self.open.items():
            if not answer.status:
                task.cancel()


class Guard:
    """ASGI middleware. Without `keys`, only requests that name this machine are answered: a page on the web may have
    its own name lead here, and would read what it is not meant to.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], max_body: int, traffic: Traffic, metrics: Metrics) -> None:
        self.app, self.max_body, self.traffic, self.metrics = app, max_body, traffic, metrics
        self.keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, answer = time.perf_counter(), _Answer(send)
        try:
            try:
                await self._answer(scope, receive, answer)
            except ApiError as error:
                await error.response()(scope, receive, answer.send)
            except asyncio.CancelledError:
                if not self.traffic.cut:
                    raise
                if not answer.status:
                    await _stops().response()(scope, receive, answer.send)
            except Exception as error:
                log.error("%s", _without_message(error))
                if not answer.status:
                    await ApiError(500, "the server has failed").response()(scope, receive, answer.send)
        finally:
            path = getattr(scope.get("route"), "path", None)
            path = "other" if path is None else scope.get("root_path", "") + path  # that of a second model, too
            self.metrics.requests.labels(path, str(answer.status or _CLIENT_LEFT)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        headers = Headers(scope=scope)
        if scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, answer.send)
            return
        self._check_caller(headers)
        self._check_open(scope["path"])
        task = asyncio.current_task()
        assert task is not None
        self.traffic.open[task] = answer
        try:
            if (body := await self._body(headers, receive, answer)) is None:
                return
            self._check_open(scope["path"])
            self.traffic.under_way += 1
            try:
                await self._run(scope, body, receive, answer.send)
            finally:
                self.traffic.under_way -= 1
        finally:
            del self.traffic.open[task]
            self.traffic.body_bytes -= answer.body_bytes

    def _check_caller(self, headers: Headers) -> None:
        """Raises ApiError for a wrong key; without keys, for a name of the host that is not this machine's own."""
        if not self.keys:
            host = headers.get("host", "")
            if (host if host.endswith("]") else host.rpartition(":")[0] or host) not in _LOOPBACK:
                raise ApiError(403, "without an API key this server answers as localhost alone", code="wrong_host")
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1")) if kind.casefold() == "bearer" else b""
        # all are compared, each in constant time: how long it takes tells nothing
        if not sum(hmac.compare_digest(given, known) for known in self.keys):
            raise ApiError(
                401,
                "send the API key as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_open(self, path: str) -> None:
        if path in _METRICS:
            return
        if self.traffic.draining:
            raise _stops()
        if self.traffic.under_way >= _AT_ONCE:
            raise busy("too many requests are under way", 429, "too_many_requests", 1)

    async def _body(self, headers: Headers, receive: Receive, answer: _Answer) -> bytes | None:
        """Reads the body; None if the client leaves.

        Raises ApiError: 413 as soon as it is known to be too large, 429 if all bodies together are.
        """
        too_large = ApiError(413, f"the body has more than {self.max_body:,} bytes", code="body_too_large")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.max_body:
            raise too_large
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(_BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    answer.body_bytes += len(parts[-1])
                    self.traffic.body_bytes += len(parts[-1])
                    if answer.body_bytes > self.max_body:
                        raise too_large
                    if self.traffic.body_bytes > _BODIES * self.max_body:
                        raise busy("the bodies of all requests are too large", 429, "too_many_bytes", 1)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {_BODY_S:.0f} seconds") from None

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Runs the app, and cancels it when the client leaves, so that its texts leave the queue."""
        left: asyncio.Future[Any] = asyncio.ensure_future(_disconnect(receive))
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await asyncio.shield(left)

        work: asyncio.Future[Any] = asyncio.ensure_future(_awaited(self.app(scope, replay, send)))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)


class _Answer:
    """Hands the messages of an answer on, and keeps its status; 0 before it begins. `body_bytes` came of the request.

    A large answer goes in pieces, each when the client has read most of the one before. Raises TimeoutError if it does
    not: the web server then closes the connection.
    """

    def __init__(self, send: Send) -> None:
        self._send, self.status, self.body_bytes = send, 0, 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        body = message.get("body", b"")
        for at in range(0, max(1, len(body)), _PIECE):
            more = at + _PIECE < len(body) or message.get("more_body", False)
            piece = {"body": body[at : at + _PIECE], "more_body": more} if len(body) > _PIECE else {}
            async with asyncio.timeout(_READ_S):
                await self._send({**message, **piece})


def _stops() -> ApiError:
    return busy("the server stops", 503, "stopping", 1)


async def _awaited(running: Awaitable[None]) -> None:
    await running


async def _disconnect(receive: Receive) -> Message:
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _without_message(error: Exception) -> str:
    """Says what an error is and where it was raised, without its message, which may quote a text."""
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    return " < ".join([type(error).__name__, *reversed(places[-5:])])
