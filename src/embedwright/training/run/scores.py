"""A run's evaluations: every suite once at each point of the run, and what their scores decide.

`evaluations.jsonl` has one record for each suite and point: stage, step, suite, and `results` (evaluation/results.py).
`items/<stage>-<step>-<suite>.npz` has what its scores were computed from, item by item.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from embedwright.encoders.protocol import Encoder
from embedwright.encoders.sharded import shared
from embedwright.errors import InputError
from embedwright.evaluation.results import Results, run_items_file, write_items
from embedwright.evaluation.suite import Suite, run_suite
from embedwright.files import file_name, whole_file
from embedwright.model.embedder import Embedder
from embedwright.processes import Processes
from embedwright.training.engine.parallel import gather_trainable
from embedwright.training.parts import EvalPart
from embedwright.training.run import heldout, watch
from embedwright.training.run.checks import open_suite
from embedwright.training.run.track import read_records, write_records
from embedwright.training.stages import START

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def read_evaluations(out: Path) -> list[Record]:
    """Reads the records of a run folder's `evaluations.jsonl`; there are none if there is no file."""
    return read_records(out / "evaluations.jsonl")


class Scores:
    """The evaluations of one run. Rank 0 scores and writes; all processes encode, and hold its records."""

    def __init__(self, part: EvalPart, out: Path, model: Embedder, processes: Processes) -> None:
        self.part, self.out, self.model, self.processes = part, out, model, processes
        if len({file_name(suite) for suite in part.suites}) < len(set(part.suites)):
            raise InputError(
                f"eval.suites: two of {', '.join(part.suites)} have one file name for their items: rename one"
            )
        self.records: list[Record] = processes.on_rank_0(lambda: read_evaluations(out))

    def forget(self) -> None:
        """Removes what a run left that ended before its first checkpoint."""
        self.records = []
        with self.processes.together():
            if self.processes.is_rank_0:
                for file in ("evaluations.jsonl", heldout.FILE, watch.FILE):
                    (self.out / file).unlink(missing_ok=True)
                for folder in ("best", "items"):
                    shutil.rmtree(self.out / folder, ignore_errors=True)

    def evaluate(self, stage: str, step: int, progress: Callable[[str], None] | None = None) -> list[Record]:
        """Runs the suites without a result at this point, keeps the best weights, and returns the new records."""
        have = {record["suite"] for record in self.records if (record["stage"], record["step"]) == (stage, step)}
        fresh: list[Record] = []

        def work(models: list[Encoder]) -> None:
            for suite in self.part.suites:
                if suite not in have:
                    found = score_suite(models[0], suite, progress or logger.info)
                    write_items(run_items_file(self.out, stage, step, suite), found)
                    fresh.append({"stage": stage, "step": step, "suite": suite, "results": json.loads(found.to_json())})

        shared(lambda: [self.model], self.processes, work)
        fresh = self.processes.broadcast(fresh)
        if not fresh:
            return []
        self.records += fresh
        scores = self._scores(stage, step)
        if self.part.best and stage != START and scores[-1] == max(scores):
            self._keep_weights(stage, step)
        # after weights and items: a run that is killed in between evaluates again
        self.processes.on_rank_0(lambda: write_records(self.out / "evaluations.jsonl", self.records))
        return fresh

    def gave_up(self, stage: str, step: int) -> bool:
        """Returns whether the last `patience` evaluations of this stage, up to this step, brought no better score."""
        scores, patience = self._scores(stage, step), self.part.patience
        if patience is None or len(scores) <= patience:
            return False
        over = max(scores[-patience:]) <= max(scores[:-patience])
        if over:
            logger.info("stage %s ends at step %d: no better score in %d evaluations", stage, step, patience)
        return over

    def best_weights(self, stage: str) -> dict[str, Tensor]:
        """Reads the trained tensors as they were at the best evaluation of this stage."""
        with safe_open(self._best_file(stage), "pt") as stored:
            step = stored.metadata()["step"]
            logger.info("stage %s ends on the weights of its step %s, the best evaluated", stage, step)
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  no mapping

    def _keep_weights(self, stage: str, step: int) -> None:
        weights = gather_trainable(self.model.network, self.processes)
        with self.processes.together():
            if self.processes.is_rank_0:
                with whole_file(self._best_file(stage)) as temp:
                    save_file(weights, temp, metadata={"step": str(step)})

    def _best_file(self, stage: str) -> Path:
        """Each stage has a file of its own, because the next stage evaluates before its first checkpoint."""
        return self.out / "best" / f"{stage}.safetensors"

    def _scores(self, stage: str, step: int) -> list[float]:
        """Returns the mean main score of each evaluation of the stage up to this step, in order."""
        return [score for at, score in mean_scores(self.records, stage).items() if at <= step]


def score_suite(model: Encoder, name: str, say: Callable[[str], None]) -> Results:
    """Scores a model that trains on a suite of its recipe, which may be a benchmark or task of mteb.

    Of several processes, the model is a `ShardedEncoder`.
    """
    opened = open_suite(name)
    if isinstance(opened, Suite):
        return run_suite(model, opened, say)
    from embedwright.evaluation.bench.run import score_tasks

    return score_tasks(model, opened, say)


def mean_scores(records: Iterable[Mapping[str, Any]], stage: str) -> dict[int, float]:
    """Returns the mean main score of all tasks, by evaluated step of a stage. It decides which weights are the best."""
    by_step: dict[int, list[float]] = {}
    for record in records:
        if record["stage"] == stage:
            by_step.setdefault(record["step"], []).extend(row["value"] for row in record["results"]["rows"])
    return {step: math.fsum(scores) / len(scores) for step, scores in sorted(by_step.items())}
