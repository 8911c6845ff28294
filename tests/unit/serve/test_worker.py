"""A thread beside the event loop: one function after another, and a caller that leaves."""

from __future__ import annotations

import asyncio
import threading

import pytest

from embedwright.serve.worker import Worker


def test_functions_run_in_turn_and_a_caller_that_leaves_is_skipped() -> None:
    go, ran = threading.Event(), list[str]()

    def held(name: str) -> str:
        assert go.wait(20)
        ran.append(name)
        return name.upper()

    async def ask() -> None:
        worker = Worker("test-worker")
        first, left, last = [asyncio.ensure_future(worker.run(held, name)) for name in ("a", "b", "c")]
        await asyncio.sleep(0)  # all three are in the queue
        left.cancel()
        await asyncio.wait([left])
        go.set()
        assert await asyncio.gather(first, last) == ["A", "C"]
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda: 1 // 0)
        assert await worker.run(threading.current_thread) is next(
            thread for thread in threading.enumerate() if thread.name == "test-worker" and thread.daemon
        )

    asyncio.run(ask())
    assert ran == ["a", "c"]
