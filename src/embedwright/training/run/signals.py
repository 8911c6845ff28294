"""SIGTERM and SIGINT: the step is finished and kept, then the run stops. A second signal stops it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run stopped at a checkpoint because a signal asked it to: the same command resumes from there."""


class StopRequest:
    """`signal` is the name of the signal that asks the run to stop; None while none has come."""

    signal: str | None = None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Context manager: the first SIGTERM or SIGINT only sets the yielded request.

    A second one goes to the handlers from before the block, which are restored at its end. Only the main thread can
    take signals: in another thread the request is never set.
    """
    stop_requested = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested
        return

    def note(number: int, _: FrameType | None) -> None:
        if stop_requested.signal is None:
            stop_requested.signal = signal.Signals(number).name
        else:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before = {int(number): signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop_requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
