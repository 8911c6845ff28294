"""What a run writes about itself: `metrics.jsonl`, one object a step, and the trackers that the recipe names.

The files are the record; a tracker only shows it. One that fails is dropped with a warning, and the run goes on.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from embedwright.config import ConfigError
from embedwright.files import write_text

logger = logging.getLogger(__name__)

_EVALUATION = "evaluation/"  # in front of the names of scores
_NOT_SHOWN = ("step", "tokens", "seconds")  # of a step's record: the x axis, and what tokens_per_second is made of


class Sink(Protocol):
    """A tracker: shows numbers by name at `total`, the steps done in all stages together."""

    def log(self, values: Mapping[str, float], total: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class Tracker:
    """Opens the log of a run that stands at (stage, step); what lies behind that, a torn line included, is cut off.

    `trackers`: any of `tensorboard`, `wandb`, `trackio`; `config` is what the last two show of the run. ConfigError
    where one of them is not installed. In a run of many processes, the first one alone has a Tracker.
    """

    def __init__(
        self,
        out: Path,
        trackers: Sequence[str],
        stages: list[str],
        stage: int,
        step: int,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.file = out / "metrics.jsonl"
        found = [r for r in read_records(self.file) if r["stage"] in stages]
        kept = [r for r in found if (stages.index(r["stage"]), r["step"]) <= (stage, step)]
        write_records(self.file, kept)
        self.total = len(kept)
        begins = (stage, step) == (0, 0)
        self.sinks: dict[str, Sink] = {}
        for name in dict.fromkeys(trackers):
            if name == "tensorboard":
                self.sinks[name] = _TensorBoard(out / name, self.total)
            else:
                self.sinks[name] = _HOSTED[name](out, _run_id(out, begins), dict(config or {}))
                begins = False  # one id for both

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(lambda sink: sink.close(kind is not None))

    def step(self, record: dict[str, Any]) -> None:
        """One line, flushed: a run that is killed loses no step that was done. Trackers get its numbers."""
        with self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        self.total += 1
        values = {
            name: value for name, value in record.items() if isinstance(value, int | float) and name not in _NOT_SHOWN
        }
        values["tokens_per_second"] = record["tokens"] / max(record["seconds"], 1e-4)  # seconds are rounded to that
        self._show(lambda sink: sink.log(values, self.total))

    def evaluation(self, record: dict[str, Any]) -> None:
        """The main score of every task of one line of `evaluations.jsonl`, which the caller writes: trackers alone."""
        results = record["results"]
        values = {f"{_EVALUATION}{results['suite']}/{row['task']}": row["value"] for row in results["rows"]}
        self._show(lambda sink: sink.log(values, self.total))

    def _show(self, do: Callable[[Sink], None]) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                do(sink)
            except Exception as error:  # of any kind: days of training do not end with a chart
                logger.warning(
                    "the tracker %s failed (%s: %s): left out from here on", name, type(error).__name__, error
                )
                del self.sinks[name]


# ---------------------------------------------------------------------------------------------------- trackers


class _TensorBoard:
    """Steps that are done again replace those before them. Evaluations are not done again, and may lie behind the
    checkpoint that a run goes on from: in a folder of their own, they are not purged with the steps."""

    def __init__(self, folder: Path, total: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", "'embedwright[train]'") from error
        self.open, self.folder = SummaryWriter, folder / "evaluations"
        if not total:
            shutil.rmtree(self.folder, ignore_errors=True)  # of a run that ended before its first checkpoint
        self.steps = SummaryWriter(str(folder), purge_step=total + 1)
        self.evaluations: Any = None

    def log(self, values: Mapping[str, float], total: int) -> None:
        for name, value in values.items():
            writer = self.steps
            if name.startswith(_EVALUATION):
                writer = self.evaluations = self.evaluations or self.open(str(self.folder))
            writer.add_scalar(name, value, total)

    def close(self, failed: bool) -> None:
        for writer in (self.steps, self.evaluations):
            if writer is not None:
                writer.close()


class _WandB:
    """Weights & Biases: `<out>/wandb`. Its variables (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY) hold."""

    def __init__(self, out: Path, run_id: str, config: dict[str, Any]) -> None:
        self.run = _module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", "embedwright"),
            name=out.resolve().name,
            id=run_id,
            resume="allow",
            dir=str(out),
            config=config,
            allow_val_change=True,  # a run may go on with another `eval` or `out`
        )
        # its own step never goes back, and a run goes back to its checkpoint
        self.run.define_metric("total_step")
        self.run.define_metric("*", step_metric="total_step")

    def log(self, values: Mapping[str, float], total: int) -> None:
        self.run.log({**values, "total_step": total})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _Trackio:
    """Trackio: in its own folder (TRACKIO_DIR), or wherever its variables say. It knows a run by its name."""

    def __init__(self, out: Path, run_id: str, config: dict[str, Any]) -> None:
        name = f"{out.resolve().name}-{run_id}"
        self.run = _module("trackio").init(project="embedwright", name=name, resume="allow", config=config)

    def log(self, values: Mapping[str, float], total: int) -> None:
        self.run.log(dict(values), step=total)

    def close(self, failed: bool) -> None:
        self.run.finish()


_HOSTED: dict[str, Callable[[Path, str, dict[str, Any]], Sink]] = {"wandb": _WandB, "trackio": _Trackio}


def _run_id(out: Path, begins: bool) -> str:
    """By which trackers know this run when it goes on. One that begins at its first step is another run to them."""
    file = out / "tracker.json"
    if begins or not file.exists():
        write_text(file, json.dumps({"id": uuid.uuid4().hex[:8]}) + "\n")
    return str(json.loads(file.read_text())["id"])


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _missing(name, name) from error


def _missing(name: str, package: str) -> ConfigError:
    return ConfigError(f"run.tracker: {name} is not installed: pip install {package}, or choose another tracker")


# ---------------------------------------------------------------------------------------------------- files


def read_records(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, as far as they are whole; none where there is no file."""
    records: list[dict[str, Any]] = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # torn by a kill in the middle of a line: nothing whole comes behind it
    return records


def write_records(file: Path, records: list[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(record) + "\n" for record in records))
