"""How fast a server may be asked: a limit of requests and tokens a minute, and the pauses that it asks for."""

from __future__ import annotations

import asyncio
import email.utils
from collections import deque
from dataclasses import dataclass


def retry_after_s(header: str | None, now: float) -> float:
    """Seconds that a Retry-After header (seconds, or a date; RFC 9110) asks for at `now` (Unix time); 0 without one."""
    if header is None:
        return 0.0
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now)
    except ValueError:
        return 0.0


@dataclass(slots=True)
class Turn:
    """When a request went out, and its tokens: an estimate first, corrected when the server has told."""

    at: float
    tokens: int


class Pace:
    """At most so many requests and tokens in any `window_s` seconds, first come first served."""

    def __init__(self, requests: int | None, tokens: int | None, window_s: float = 60.0) -> None:
        self.requests, self.tokens, self.window_s = requests, tokens, window_s
        self._turns: deque[Turn] = deque()
        self._lock = asyncio.Lock()

    async def turn(self, tokens: int) -> Turn:
        """Wait until a request of so many tokens may go."""
        now = asyncio.get_running_loop().time
        async with self._lock:
            while (wait := self.wait_s(now(), tokens)) > 0:
                await asyncio.sleep(wait)
            turn = Turn(now(), tokens)
            self._turns.append(turn)
            return turn

    def wait_s(self, now: float, tokens: int) -> float:
        """Seconds from `now` until the next turn. One that is beyond the limit by itself waits for an empty window."""
        while self._turns and self._turns[0].at + self.window_s <= now:
            self._turns.popleft()
        left, used = len(self._turns), sum(turn.tokens for turn in self._turns)
        wait = 0.0
        for turn in self._turns:  # until the oldest of them have left the window
            many = self.requests is not None and left >= self.requests
            if not many and (self.tokens is None or used + tokens <= self.tokens):
                break
            wait = turn.at + self.window_s - now
            left, used = left - 1, used - turn.tokens
        return wait
