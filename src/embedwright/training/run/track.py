"""`metrics.jsonl`, one object for each step, and the trackers that the recipe names.

The file is the record, and a tracker only shows it. A tracker that fails is dropped with a warning; the run goes on.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from embedwright.config import ConfigError
from embedwright.files import whole_lines, write_text

logger = logging.getLogger(__name__)

_NOT_SHOWN = ("step", "tokens", "seconds")  # of a step's record: the x axis, and what tokens_per_second is made of


class Tracker:
    """The log of a run, and the trackers that show it. Only rank 0 has one.

    `at`: the stage and the step that the run stands at; what the log has after that, a torn line included, is cut off.
    `trackers`: any of `tensorboard`, `wandb`, `trackio`, the last two with the run's `settings`. Raises ConfigError if
    one of them is not installed.
    """

    def __init__(
        self, out: Path, trackers: Sequence[str], stages: list[str], at: tuple[int, int], settings: Mapping[str, Any]
    ) -> None:
        self.file = out / "metrics.jsonl"
        found = [record for record in read_records(self.file) if record["stage"] in stages]
        kept = [record for record in found if (stages.index(record["stage"]), record["step"]) <= at]
        write_records(self.file, kept)
        self.total = len(kept)  # steps done in all stages together
        if at == (0, 0):  # this is another run to the trackers, too
            (out / "tracker.json").unlink(missing_ok=True)
        self.trackers: dict[str, Any] = {}
        for name in dict.fromkeys(trackers):
            self.trackers |= _start(name, out, self.total, settings)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        def finish(name: str, tracker: Any) -> None:
            if name == "wandb":
                tracker.tracker.finish(exit_code=int(kind is not None))
            else:
                tracker.finish()

        self._each(finish)

    def step(self, record: dict[str, Any]) -> None:
        """Adds the record of a step and flushes it: a run that is killed loses no step that was done."""
        with self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        self.total += 1
        values = {
            name: value for name, value in record.items() if isinstance(value, int | float) and name not in _NOT_SHOWN
        }
        values["tokens_per_second"] = record["tokens"] / max(record["seconds"], 1e-4)  # seconds are rounded to that
        self._show(values, "tensorboard")

    def evaluation(self, record: dict[str, Any]) -> None:
        """Shows the main score of each task of one record of `evaluations.jsonl`."""
        results = record["results"]
        values = {f"evaluation/{results['suite']}/{row['task']}": row["value"] for row in results["rows"]}
        self._show(values, "tensorboard/evaluations")

    def _show(self, values: Mapping[str, float], tensorboard: str) -> None:
        def log(name: str, tracker: Any) -> None:
            if name == "wandb":
                tracker.log({**values, "total_step": self.total})
            elif name in (tensorboard, "trackio"):
                tracker.log(dict(values), step=self.total)

        self._each(log)

    def _each(self, do: Callable[[str, Any], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                do(name, tracker)
            except Exception as error:  # any kind: days of training do not end with a chart
                logger.warning(
                    "the tracker %s failed (%s: %s): left out from here on", name, type(error).__name__, error
                )
                del self.trackers[name]


def _start(name: str, out: Path, total: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Starts a tracker of accelerate. TensorBoard has two: one for steps, one for evaluations.

    TensorBoard drops the steps after `total`, which are done again. Evaluations are not done again, so they are a run
    of their own there. W&B takes no step that goes back, and a run goes back to its checkpoint: `total_step` is its x
    axis. Trackio knows a run by its name.
    """
    run, config = out.resolve().name, dict(settings)
    try:
        from accelerate import PartialState, tracking

        PartialState()  # accelerate's trackers want it
        started: dict[str, Any]
        if name == "tensorboard":
            if not total:  # left by a run that ended before its first checkpoint
                shutil.rmtree(out / name / "evaluations", ignore_errors=True)
            started = {
                name: tracking.TensorBoardTracker(name, out, purge_step=total + 1),
                f"{name}/evaluations": tracking.TensorBoardTracker("evaluations", out / name),
            }
        elif name == "wandb":
            project = os.environ.get("WANDB_PROJECT", "embedwright")
            more = {"name": run, "id": _run_id(out), "dir": str(out), "config": config}
            # a run may resume with another `eval` or `out`
            started = {name: tracking.WandBTracker(project, resume="allow", allow_val_change=True, **more)}
        else:
            named = f"{run}-{_run_id(out)}"
            started = {name: tracking.TrackioTracker("embedwright", name=named, resume="allow", config=config)}
        for tracker in started.values():
            tracker.start()
    except ImportError as error:
        packages = "'embedwright[train]'" + ("" if name == "tensorboard" else f" {name}")
        message = f"run.tracker: {name} is not installed: pip install {packages}, or choose another tracker"
        raise ConfigError(message) from error
    if name == "wandb":
        started[name].tracker.define_metric("total_step")
        started[name].tracker.define_metric("*", step_metric="total_step")
    return started


def _run_id(out: Path) -> str:
    """Returns the name of this run to trackers. A resumed run keeps it."""
    file = out / "tracker.json"
    if not file.exists():
        write_text(file, json.dumps({"id": uuid.uuid4().hex[:8]}) + "\n")
    return str(json.loads(file.read_text())["id"])


def read_records(file: Path) -> list[dict[str, Any]]:
    """Reads the objects of a JSONL file, without a torn last line; there are none if there is no file."""
    return [json.loads(line) for line in whole_lines(file)]


def write_records(file: Path, records: list[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(record) + "\n" for record in records))
