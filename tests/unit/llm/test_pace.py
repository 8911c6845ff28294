"""When the next request may go."""

from __future__ import annotations

from email.utils import formatdate

from embedwright.llm.pace import Pace, Turn, retry_after_s


def test_retry_after_in_both_spellings() -> None:
    now = 1_700_000_000.0
    assert retry_after_s(None, now) == 0
    assert retry_after_s("17", now) == 17
    assert retry_after_s(formatdate(now + 90, usegmt=True), now) == 90
    assert retry_after_s(formatdate(now - 90, usegmt=True), now) == 0
    assert retry_after_s("soon", now) == 0


def test_pace_by_requests() -> None:
    pace = Pace(requests=2, tokens=None)
    assert pace.wait_s(0, 1) == 0
    pace._turns.extend([Turn(0, 1), Turn(10, 1)])
    assert pace.wait_s(10, 1) == 50
    assert pace.wait_s(59.5, 1) == 0.5
    assert pace.wait_s(60, 1) == 0  # the first has left the window
    pace._turns.append(Turn(60, 1))
    assert pace.wait_s(60, 1) == 10


def test_pace_by_tokens() -> None:
    pace = Pace(requests=None, tokens=100)
    pace._turns.extend([Turn(0, 40), Turn(10, 30), Turn(20, 20)])
    assert pace.wait_s(20, 10) == 0
    assert pace.wait_s(20, 11) == 40
    assert pace.wait_s(20, 50) == 40
    assert pace.wait_s(20, 51) == 50
    assert pace.wait_s(20, 500) == 60  # beyond the limit by itself: alone
    pace._turns[0].tokens = 10  # told by the server
    assert pace.wait_s(20, 40) == 0
