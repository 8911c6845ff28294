from __future__ import annotations

from typing import Any

import pytest

from embedwright.cli import display
from embedwright.training.recipe import Recipe


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.strip() for line in capsys.readouterr().err.splitlines()]


def test_lines_are_seconds_apart_and_one_stands_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    update = display.counter("texts")
    for done in range(0, 10_001, 100):
        update(done, 10_000)
        clock.now += 0.1  # 1,000 a second
    said = lines(capsys)
    assert said[0] == "0/10,000 texts"
    assert said[-1] == "10,000/10,000 texts, 1,000.0 texts/s"
    assert len(said) in (3, 4)
    assert said[1] in (
        "5,000/10,000 texts, 1,000.0 texts/s, 0:05 left",
        "5,100/10,000 texts, 1,000.0 texts/s, 0:04 left",
    )


def test_the_end_is_shown_at_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    update = display.counter("texts")
    update(1, 3)
    clock.now += 0.5
    update(2, 3)
    clock.now += 0.5
    update(3, 3, "done")
    assert lines(capsys) == ["1/3 texts", "3/3 texts, 2.0 texts/s  done"]


def test_time_left_in_minutes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    update = display.counter("texts")
    update(0, 100)
    clock.now += 10
    update(10, 100)
    assert lines(capsys)[1] == "10/100 texts, 1.0 texts/s, 1:30 left"


def test_what_a_resumed_run_had_already_does_not_count(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    update = display.counter("texts")
    clock.now += 60  # the model is loaded, the checkpoint read
    update(900, 1000)
    clock.now += 10
    update(910, 1000)
    assert lines(capsys) == ["900/1,000 texts", "910/1,000 texts, 1.0 texts/s, 1:30 left"]


def test_steps_count_across_stages(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    optim = {"lr": 1e-3, "batch_queries": 2}
    rest: dict[str, Any] = {"data": [{"path": "x.jsonl"}], "in_batch_negatives": "none", "hard_negatives": 1}
    recipe = Recipe.parse(
        {
            "name": "x",
            "model": {"base": "x"},
            "stages": [
                {"name": "first", "optim": {**optim, "steps": 6}, **rest},
                {"name": "second", "optim": {**optim, "steps": 4}, **rest},
            ],
            "run": {"out": "x"},
        }
    )
    on_step = display.training(recipe)
    on_step({"stage": "first", "step": 2, "loss": 1.25, "tokens": 3000, "seconds": 2.0})
    clock.now += 10
    on_step({"stage": "second", "step": 1, "loss": 0.5, "tokens": 500, "seconds": 0.5})
    assert lines(capsys) == [
        "2/10 steps  first: loss 1.250, 1,500 tokens/s",
        "7/10 steps, 2.0 s each, 0:06 left  second: loss 0.500, 1,000 tokens/s",
    ]
