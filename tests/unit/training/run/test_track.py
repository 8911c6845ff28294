from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("accelerate.tracking")  # before the stand-ins: it looks for their packages
from embedwright.config import ConfigError
from embedwright.training.parts import RunPart
from embedwright.training.run.track import Tracker, read_records, write_records

STAGES = ["one", "two"]


def record(stage: str, step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"stage": stage, "step": step, "loss": loss, "lr": 0.1, "grad_norm": 2.0, "tokens": 100, "seconds": 0.5}


def steps(out: Path) -> list[tuple[str, int]]:
    return [(r["stage"], r["step"]) for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


RUN = [("one", 1), ("one", 2), ("one", 3), ("two", 1), ("two", 2), ("two", 3)]


def write_run(out: Path, *trackers: str) -> None:
    with Tracker(out, trackers, STAGES, (0, 0), {}) as track:
        for stage, step in RUN:
            track.step(record(stage, step))
            assert steps(out)[-1] == (stage, step)  # on disk at once


@pytest.mark.parametrize(("at", "kept"), [((0, 0), 0), ((0, 2), 2), ((0, 3), 3), ((1, 0), 3), ((1, 1), 4), ((1, 3), 6)])
def test_the_log_is_cut_back_to_where_the_run_stands(tmp_path: Path, at: tuple[int, int], kept: int) -> None:
    write_run(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with Tracker(tmp_path, (), STAGES, at, {}) as track:
        assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines[:kept])
        assert track.total == kept
        track.step(record("two", 99))
    assert steps(tmp_path) == [*RUN[:kept], ("two", 99)]


@pytest.mark.parametrize("torn", ['{"stage": "two", "st', "{", '"', "\x00\x00\x00", "{}garbage", '{"stage": "\udc80'])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: str) -> None:
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(torn.encode(errors="surrogateescape"))
    with Tracker(tmp_path, (), STAGES, (1, 3), {}) as track:
        track.step(record("two", 4))
    assert steps(tmp_path) == [*RUN, ("two", 4)]


def test_the_log_of_another_run_is_cut_off(tmp_path: Path) -> None:
    """A run that ended before its first checkpoint leaves a log that says nothing about the next one."""
    write_run(tmp_path)
    with Tracker(tmp_path, (), ["renamed"], (0, 0), {}) as track:
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
    with Tracker(tmp_path, ["tensorboard"], STAGES, (1, 1), {}) as track:
        track.step(record("two", 2, loss=7.0))
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 7)]
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "grad_norm", "tokens_per_second"}
    assert events.Scalars("tokens_per_second")[0].value == 200


def test_no_tracker_writes_no_events(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---- trackers


def evaluation(stage: str, step: int, **scores: float) -> dict[str, Any]:
    rows = [
        {"task": task, "kind": "sts", "metric": "spearman", "value": value, "details": {}}
        for task, value in scores.items()
    ]
    return {"stage": stage, "step": step, "suite": "a/b.yaml", "results": {"suite": "dev", "rows": rows, "seconds": 1}}


class StandIn:
    """What wandb or trackio is asked for: `init`'s arguments, and everything told to the run that it gives back."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.told: list[tuple[Any, ...]] = []

    def init(self, **arguments: Any) -> Any:
        self.runs.append(arguments)
        return SimpleNamespace(
            log=lambda values, **where: self.told.append((values, where)),
            define_metric=lambda name, **options: self.told.append((name, options)),
            finish=lambda **how: self.told.append(("finish", how)),
        )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], StandIn]:
    def make(name: str) -> StandIn:
        made = StandIn()
        monkeypatch.setitem(sys.modules, name, made)  # type: ignore[arg-type]
        return made

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return make


@pytest.mark.parametrize(
    ("written", "taken"),
    [("none", ()), ("trackio", ("trackio",)), (["tensorboard", "wandb"], ("tensorboard", "wandb")), ([], ())],
)
def test_a_recipe_names_none_one_or_several(written: Any, taken: tuple[str, ...]) -> None:
    part = RunPart(out="x", tracker=written)
    assert part.tracker == taken and RunPart(out="x").tracker == ("tensorboard",)
    assert RunPart(**part.model_dump(mode="json")) == part
    for wrong in ("tensorbord", ["none"], ["wandb", "x"], [["wandb"]], False, None):
        with pytest.raises(ValueError, match=r"tracker"):
            RunPart(out="x", tracker=wrong)


def test_wandb_gets_the_steps_and_scores_and_goes_on_with_the_same_run(
    tmp_path: Path, stand_in: Callable[[str], StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = stand_in("wandb")
    out = tmp_path / "my-run"
    out.mkdir()
    with Tracker(out, ["wandb"], STAGES, (0, 0), {"seed": 7}) as track:
        track.evaluation(evaluation("start", 0, docs=0.25, code=0.5))
        for stage, step in RUN[:4]:
            track.step({**record(stage, step), "ids": "abc", "peak_mb": None, "head_change": 0.125})
    asked = wandb.runs[0]
    assert (asked["name"], asked["dir"], asked["config"], asked["resume"]) == ("my-run", str(out), {"seed": 7}, "allow")
    assert asked["project"] == "embedwright"
    (total, _), (every, options), scores, *steps, end = wandb.told
    assert (total, every, options) == ("total_step", "*", {"step_metric": "total_step"})
    assert scores == ({"evaluation/dev/docs": 0.25, "evaluation/dev/code": 0.5, "total_step": 0}, {"step": None})
    shown = {"loss": 1.0, "lr": 0.1, "grad_norm": 2.0, "head_change": 0.125, "tokens_per_second": 200}
    assert steps == [
        ({**shown, "total_step": total}, {"step": None}) for total in (1, 2, 3, 4)
    ]  # no step of wandb's own
    assert end == ("finish", {"exit_code": 0})

    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with pytest.raises(RuntimeError), Tracker(out, ["wandb"], STAGES, (0, 2), {}) as track:
        track.step(record("one", 3))
        raise RuntimeError
    assert wandb.runs[1] == {**asked, "config": {}, "project": "mine"}  # the id among them
    assert wandb.told[-2][0]["total_step"] == 3 and wandb.told[-1] == ("finish", {"exit_code": 1})
    with Tracker(out, ["wandb"], STAGES, (0, 0), {}):  # from the first step again: another run
        assert wandb.runs[2]["id"] != asked["id"]


def test_a_step_too_short_to_be_measured_has_a_speed(tmp_path: Path, stand_in: Callable[[str], StandIn]) -> None:
    wandb = stand_in("wandb")
    with Tracker(tmp_path, ["wandb"], STAGES, (0, 0), {}) as track:
        track.step(record("one", 1) | {"seconds": 0.0})
    assert wandb.told[2][0]["tokens_per_second"] == 1e6


def test_trackio_goes_on_with_the_same_run_by_its_name(tmp_path: Path, stand_in: Callable[[str], StandIn]) -> None:
    trackio, wandb = stand_in("trackio"), stand_in("wandb")
    for stage, step in ((0, 0), (0, 1), (0, 0)):
        with Tracker(tmp_path, ["trackio", "wandb"], STAGES, (stage, step), {"seed": 7}) as track:
            track.step(record("one", step + 1))
            track.evaluation(evaluation("one", step + 1, docs=0.5))
    first, again, other = trackio.runs
    assert first == again and first["resume"] == "allow" and first["config"] == {"seed": 7}
    assert first["name"] == f"{tmp_path.name}-{wandb.runs[0]['id']}" and other["name"] != first["name"]
    assert [run["id"] for run in wandb.runs] == [run["name"].rpartition("-")[2] for run in trackio.runs]
    steps = [told for told in trackio.told if "loss" in told[0]]
    assert [where for _, where in steps] == [{"step": 1}, {"step": 2}, {"step": 1}]
    assert steps[0][0] == {"loss": 1.0, "lr": 0.1, "grad_norm": 2.0, "tokens_per_second": 200}
    scores = [told for told in trackio.told if "evaluation/dev/docs" in told[0]]
    assert scores == [({"evaluation/dev/docs": 0.5}, {"step": total}) for total in (1, 2, 1)]
    assert trackio.told[-1] == ("finish", {})


def test_a_run_that_takes_a_tracker_on_later_gets_an_id_then(
    tmp_path: Path, stand_in: Callable[[str], StandIn]
) -> None:
    wandb = stand_in("wandb")
    write_run(tmp_path)
    for _ in range(2):
        Tracker(tmp_path, ["wandb"], STAGES, (1, 1), {}).__exit__(None, None, None)
    assert wandb.runs[0]["id"] == wandb.runs[1]["id"]


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("wandb", "wandb", r"'embedwright\[train\]' wandb"),
        ("trackio", "trackio", r"'embedwright\[train\]' trackio"),
        ("tensorboard", "torch.utils.tensorboard", r"'embedwright\[train\]'"),
    ],
)
def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr("torch.utils.tensorboard", raising=False)  # where another test has imported it
    with pytest.raises(ConfigError, match=f"run.tracker: {name} is not installed: pip install {package}, "):
        Tracker(tmp_path, [name], STAGES, (0, 0), {})


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_tracker_that_fails_is_left_out_and_the_rest_goes_on(
    tmp_path: Path, stand_in: Callable[[str], StandIn], caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    wandb, trackio = stand_in("wandb"), stand_in("trackio")
    with caplog.at_level(logging.WARNING), Tracker(tmp_path, ["wandb", "trackio"], STAGES, (0, 0), {}) as track:
        track.step(record("one", 1))
        asked: list[int] = []

        def fail(*_: Any, **__: Any) -> None:
            asked.append(1)
            raise ConnectionError("no route")

        setattr(track.trackers["wandb"].run, fails, fail)
        track.step(record("one", 2))
        track.step(record("one", 3))
    assert steps(tmp_path) == RUN[:3] and len(asked) == 1
    assert [where["step"] for values, where in trackio.told if "loss" in values] == [1, 2, 3]
    assert trackio.told[-1] == ("finish", {})
    (warning,) = caplog.records
    assert "tracker wandb failed (ConnectionError: no route)" in warning.message
    assert len(wandb.told) == {"log": 3, "finish": 5}[fails]  # two definitions, then the steps that arrived


def test_tensorboard_keeps_evaluations_whose_steps_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    # it orders the files of one second by their number as text: 10 would come before 9
    monkeypatch.setattr(
        "tensorboard.summary.writer.event_file_writer._global_uid", SimpleNamespace(get=count().__next__)
    )

    def scalars(folder: str, tag: str) -> list[tuple[int, float]]:
        events = accumulators.EventAccumulator(str(tmp_path / folder)).Reload()
        return [(event.step, event.value) for event in events.Scalars(tag)]

    with Tracker(tmp_path, ["tensorboard", "tensorboard"], STAGES, (0, 0), {}) as track:  # named twice is named
        track.evaluation(evaluation("start", 0, docs=0.25))
        for step in (1, 2, 3):
            track.step(record("one", step))
        track.evaluation(evaluation("one", 3, docs=0.5))
    with Tracker(tmp_path, ["tensorboard"], STAGES, (0, 1), {}) as track:  # before the evaluation
        for step in (2, 3):
            track.step(record("one", step, loss=7.0))
        track.evaluation(evaluation("one", 6, docs=0.75))
    assert scalars("tensorboard", "loss") == [(1, 1.0), (2, 7.0), (3, 7.0)]
    assert scalars("tensorboard/evaluations", "evaluation/dev/docs") == [(0, 0.25), (3, 0.5), (3, 0.75)]
    with Tracker(tmp_path, ["tensorboard"], STAGES, (0, 0), {}) as track:
        track.step(record("one", 1))
        track.evaluation(evaluation("one", 1, docs=1.0))
    assert scalars("tensorboard", "loss") == [(1, 1.0)]
    assert scalars("tensorboard/evaluations", "evaluation/dev/docs") == [(1, 1.0)]
