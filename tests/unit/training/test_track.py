from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embedwright.training.track import Tracker, read_records, write_records

STAGES = ["one", "two"]


def record(stage: str, step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"stage": stage, "step": step, "loss": loss, "lr": 0.1, "grad_norm": 2.0, "tokens": 100, "seconds": 0.5}


def steps(out: Path) -> list[tuple[str, int]]:
    return [(r["stage"], r["step"]) for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


RUN = [("one", 1), ("one", 2), ("one", 3), ("two", 1), ("two", 2), ("two", 3)]


def write_run(out: Path, tracker: Any = "none") -> None:
    with Tracker(out, tracker, STAGES, 0, 0) as track:
        for stage, step in RUN:
            track.step(record(stage, step))
            assert steps(out)[-1] == (stage, step)  # on disk at once


@pytest.mark.parametrize(("at", "kept"), [((0, 0), 0), ((0, 2), 2), ((0, 3), 3), ((1, 0), 3), ((1, 1), 4), ((1, 3), 6)])
def test_the_log_is_cut_back_to_where_the_run_stands(tmp_path: Path, at: tuple[int, int], kept: int) -> None:
    write_run(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with Tracker(tmp_path, "none", STAGES, *at) as track:
        assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines[:kept])
        assert track.total == kept
        track.step(record("two", 99))
    assert steps(tmp_path) == [*RUN[:kept], ("two", 99)]


@pytest.mark.parametrize("torn", ['{"stage": "two", "st', "{", '"', "\x00\x00\x00", "{}garbage", '{"stage": "\udc80'])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: str) -> None:
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(torn.encode(errors="surrogateescape"))
    with Tracker(tmp_path, "none", STAGES, 1, 3) as track:
        track.step(record("two", 4))
    assert steps(tmp_path) == [*RUN, ("two", 4)]


def test_the_log_of_another_run_is_cut_off(tmp_path: Path) -> None:
    """A run that ended before its first checkpoint leaves a log that says nothing about the next one."""
    write_run(tmp_path)
    with Tracker(tmp_path, "none", ["renamed"], 0, 0) as track:
        assert track.total == 0
    assert steps(tmp_path) == []


def test_records_are_rewritten_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.jsonl"
    assert read_records(file) == []
    write_records(file, [{"a": 1}, {"b": "é\u2028"}])
    assert read_records(file) == [{"a": 1}, {"b": "é\u2028"}]
    before = file.read_bytes()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_records(file, [{"c": 1}])
    assert file.read_bytes() == before


def test_tensorboard_keeps_what_the_log_keeps(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_run(tmp_path, "tensorboard")
    with Tracker(tmp_path, "tensorboard", STAGES, 1, 1) as track:
        track.step(record("two", 2, loss=7.0))
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 7)]
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "grad_norm", "tokens_per_second"}
    assert events.Scalars("tokens_per_second")[0].value == 200


def test_no_tracker_writes_no_events(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
