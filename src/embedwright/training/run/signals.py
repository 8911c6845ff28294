"""SIGTERM and SIGINT: the step is finished and kept, then the run stops. A second signal stops it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run stopped because it was asked to, behind a checkpoint: the same command goes on from there."""


class Asked:
    """`signal` is the name of the signal that asked to stop, None so far."""

    signal: str | None = None


@contextmanager
def stop_when_asked() -> Iterator[Asked]:
    """Within it, a first signal is noted and a second one does what it does outside. In the main thread alone: others
    cannot take signals, and there nothing is ever asked."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _: FrameType | None) -> None:
        if asked.signal is None:
            asked.signal = signal.Signals(number).name
        else:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before = {int(number): signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
