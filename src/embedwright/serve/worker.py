"""A thread for long work beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from embedwright import threads

_Call = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Worker:
    """A thread that runs one function after another. A process that ends does not wait for it, unlike for executors."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def run(self, function: Callable[..., Any], *given: Any) -> Any:
        """Returns what the function returns. A caller that is cancelled before it has begun leaves the queue."""
        call: Future[Any] = Future()
        self._calls.put((call, function, given))
        return await asyncio.wrap_future(call)

    def _work(self) -> None:
        threads.unbind()
        while True:
            call, function, given = self._calls.get()
            if not call.set_running_or_notify_cancel():
                continue
            try:
                call.set_result(function(*given))
            except BaseException as error:  # whoever awaits it gets it
                call.set_exception(error)
