from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from embedwright.training.run.signals import stop_on_signal

SECOND = """
import os, signal, time
from embedwright.training.run.signals import stop_on_signal
with stop_on_signal() as stop_requested:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    print(stop_requested.signal, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
print("still here")
"""


@pytest.fixture
def handlers() -> Iterator[None]:
    """Python's own; a process that a shell has started behind it ignores SIGINT."""
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    assert before == {number: signal.getsignal(number) for number in before}
    signal.signal(signal.SIGINT, outside)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_is_noted(handlers: None, number: signal.Signals) -> None:
    with stop_on_signal() as stop_requested:
        assert stop_requested.signal is None
        os.kill(os.getpid(), number)
        assert stop_requested.signal == number.name


def test_a_second_interrupt_is_one(handlers: None) -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signal():
        signal.raise_signal(signal.SIGINT)  # to this thread: two that another thread takes may be seen as one
        signal.raise_signal(signal.SIGINT)


def test_a_second_sigterm_ends_the_process_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGTERM and done.stdout == "SIGTERM\n"


def test_another_thread_takes_no_signals(handlers: None) -> None:
    seen: list[str | None] = []

    def run() -> None:
        with stop_on_signal() as stop_requested:
            seen.append(stop_requested.signal)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None]
