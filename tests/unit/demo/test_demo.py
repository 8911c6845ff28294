from __future__ import annotations

import pytest

from embedwright.demo import demo


class Clock:
    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


def test_the_time_left_follows_the_parts_that_were_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(demo, "time", clock)
    monkeypatch.setattr(demo, "SECONDS", (10, 20, 60, 30))
    part = demo._parts()
    for took in (0.5, 40, 60, 0):  # the first was done before; the second takes twice as long as expected
        part("something")
        clock.now += took
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    left = ["2:00", "1:50", "3:00", "0:37"]
    assert said == [f"{i}/4  something (about {time} to the end of the demo)" for i, time in enumerate(left, start=1)]
