"""A run's evaluations: every suite, once at each point of the run, and what their scores decide."""

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

from embedwright.evaluation.suite import evaluate
from embedwright.files import whole_file
from embedwright.model.embedder import Embedder
from embedwright.training.engine.parallel import Processes, whole
from embedwright.training.parts import START, EvalPart
from embedwright.training.run.checks import suite_of
from embedwright.training.run.track import Tracker, read_records, write_records

logger = logging.getLogger(__name__)


class Judge:
    """Runs the suites in every process alike (of a cut model, all have to), and writes in the first."""

    def __init__(
        self,
        part: EvalPart,
        out: Path,
        model: Embedder,
        processes: Processes,
        progress: Callable[[str], None] | None,
        tracker: Tracker | None,
        *,
        fresh: bool,
    ) -> None:
        self.part, self.model, self.processes, self.tracker = part, model, processes, tracker
        self.progress = progress if processes.first else None
        self.file, self.best = out / "evaluations.jsonl", out / "best"
        if fresh and processes.first:  # of a run that ended before its first checkpoint
            self.file.unlink(missing_ok=True)
            shutil.rmtree(self.best, ignore_errors=True)
        processes.wait()
        self.records = read_records(self.file)

    def evaluate(self, stage: str, step: int) -> None:
        """Every suite of the recipe, unless this run has the result already; the best weights so far are kept."""
        have = {record["suite"] for record in self.records if (record["stage"], record["step"]) == (stage, step)}
        missing = [suite for suite in self.part.suites if suite not in have]
        for suite in missing:
            results = evaluate(self.model, suite_of(suite), progress=self.progress)
            found = {"stage": stage, "step": step, "suite": suite, "results": json.loads(results.to_json())}
            self.records.append(found)
        if not missing:
            return
        scores = self._scores(stage, step)
        if self.part.best and stage != START and scores[-1] == max(scores):
            self._keep(stage, step)
        if self.processes.first:  # after the weights: a run that is killed between the two evaluates again
            write_records(self.file, self.records)
        for record in self.records[-len(missing) :]:
            if self.tracker is not None:
                self.tracker.evaluation(record)

    def gave_up(self, stage: str, step: int) -> bool:
        """Whether the last `patience` evaluations of this stage, up to this step, were none better than before."""
        scores, patience = self._scores(stage, step), self.part.patience
        if patience is None or len(scores) <= patience:
            return False
        over = max(scores[-patience:]) <= max(scores[:-patience])
        if over:
            logger.info("stage %s ends at step %d: no better score in %d evaluations", stage, step, patience)
        return over

    def best_weights(self, stage: str) -> dict[str, Tensor]:
        """What trained, as it was at the best evaluation of this stage."""
        with safe_open(self._best_of(stage), "pt") as stored:
            step = stored.metadata()["step"]
            logger.info("stage %s ends on the weights of its step %s, the best evaluated", stage, step)
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  no mapping

    def _keep(self, stage: str, step: int) -> None:
        trained = whole(self.model.network)
        if self.processes.first:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in trained.items()}
            with whole_file(self._best_of(stage)) as temp:
                save_file(tensors, temp, metadata={"step": str(step)})
        self.processes.wait()

    def _best_of(self, stage: str) -> Path:
        """A file for each stage: the next one evaluates before its first checkpoint."""
        return self.best / f"{stage}.safetensors"

    def _scores(self, stage: str, step: int) -> list[float]:
        """The mean main score of each evaluation of the stage up to this step, in order."""
        return [score for at, score in mean_scores(self.records, stage).items() if at <= step]


def mean_scores(records: Iterable[Mapping[str, Any]], stage: str) -> dict[int, float]:
    """The mean main score of all tasks at each evaluated step of a stage, in order: what decides about its weights."""
    by_step: dict[int, list[float]] = {}
    for record in records:
        if record["stage"] == stage:
            by_step.setdefault(record["step"], []).extend(row["value"] for row in record["results"]["rows"])
    return {step: math.fsum(scores) / len(scores) for step, scores in sorted(by_step.items())}
