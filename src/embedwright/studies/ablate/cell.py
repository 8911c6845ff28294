"""One process of a study: `python -m embedwright.studies.ablate.cell FOLDER TIME` does what FOLDER's `cell.json` says.

`cell.json` has `kind`: `cell` and `shared` train the folder's `recipe.yaml` and score the model; `budget` measures what
its steps and an evaluation take. Each writes `result.json` when all is done; the trial of a rate also when it fails. A
process that was killed goes on from the newest checkpoint when it is started again.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from embedwright import threads
from embedwright.files import write_json

if TYPE_CHECKING:  # torch is loaded only once this process is set up (`main`)
    from embedwright.evaluation.results import Results
    from embedwright.model.embedder import Embedder
    from embedwright.training.recipe import Recipe

Spec = dict[str, Any]
T = TypeVar("T")


def main(folder: Path, started: float) -> None:
    """Does the work of a folder, for a process that was started at that time.

    It sets up threads first, as the `embedwright` command does.
    """
    threads.set_up_process()
    from embedwright.processes import joined
    from embedwright.training.recipe import Recipe

    spec = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    recipe = Recipe.load(folder / "recipe.yaml")
    try:
        is_budget = spec["kind"] == "budget"
        result = measure_seconds(spec, recipe, started) if is_budget else train_and_score(folder, spec, recipe)
    except Exception as error:
        if spec.get("trial") and _fails_by_learning_rate(error):
            write_json(folder / "result.json", spec | {"failed": f"{type(error).__name__}: {error}", "seconds": {}})
        raise
    with joined() as processes:
        if processes.is_rank_0:
            write_json(folder / "result.json", spec | result)


def _fails_by_learning_rate(error: Exception) -> bool:
    """Returns whether a trial failed because of its learning rate, so that it would fail again.

    An error of memory, disk, network or another process does not count.
    """
    from embedwright.processes import OtherProcessError

    package = type(error).__module__.partition(".")[0]  # torch: memory, devices, processes; safetensors: the disk
    if package in ("torch", "safetensors") or "allocate memory" in str(error):  # on a CPU, torch raises RuntimeError
        return False
    return not isinstance(error, (OSError, MemoryError, ImportError, OtherProcessError))


def train_and_score(folder: Path, spec: Spec, recipe: Recipe) -> Spec:
    """Trains and scores the model. Returns what it took and the main scores."""
    from embedwright.training.run.track import read_records
    from embedwright.training.train import train

    model = train(recipe)
    records = read_records(folder / "metrics.jsonl")
    result: Spec = {
        "recipe": recipe.hash(),
        "seconds": {"training": sum(record["seconds"] + record["waited"] for record in records)},
        "tokens": sum(record["tokens"] for record in records),
        "peak_mb": max((record["peak_mb"] or 0 for record in records), default=0),
    }

    def scored(model: Any) -> Spec:
        results = score(model, spec, folder / "bench")
        keep(folder, spec, results, model.fingerprint())
        result["seconds"]["evaluation"] = results.seconds
        scores = {row.task: row.value for row in results.rows}
        details = {row.task: row.details for row in results.rows if row.details}
        return result | {"scores": scores, "mean": fmean(scores.values()), "details": details}

    return encoded_by_all(model, folder, scored)


def encoded_by_all(model: Embedder, folder: Path, work: Callable[[Any], T]) -> T:
    """Runs `work` in rank 0 with its model, whose texts all processes encode. Returns its result, JSON.

    Rank 0 saves the model in `folder` for a while: each process opens it on its own device.
    """
    from embedwright.encoders.sharded import shared
    from embedwright.model.embedder import Embedder
    from embedwright.processes import start

    processes = start()
    if processes.count == 1:
        return work(model)

    place = folder / "to-score"

    def save() -> None:
        shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
        model.save(place)

    processes.on_rank_0(save)
    device = str(processes.device)
    done = shared(lambda: [Embedder.load(place, device=device)], processes, lambda models: work(models[0]))
    found: T = processes.broadcast(done)
    if processes.is_rank_0:
        shutil.rmtree(place)
    return found


def keep(folder: Path, spec: Spec, results: Results, fingerprint: dict[str, Any]) -> None:
    """Writes `scores.json` with the items of each score beside it."""
    from embedwright.evaluation.about import about
    from embedwright.evaluation.results import write_results

    facts = about(spec["name"], fingerprint) | {"command": spec["command"], "seed": spec["seed"]}
    if spec["smoke"]:
        facts["smoke"] = True
    write_results(folder / "scores.json", replace(results, about=facts))


def score(model: Any, spec: Spec, folder: Path) -> Results:
    """Scores a model, or anything that encodes, on the suite or benchmark of the study. A benchmark fills `folder`."""
    if spec["benchmark"]:
        return bench(model, spec, folder)
    from embedwright.evaluation.suite import evaluate

    return evaluate(model, spec["suite"])


def bench(model: Any, spec: Spec, folder: Path) -> Results:
    """Scores on all tasks of an MTEB benchmark. Raises RuntimeError that names the tasks that failed."""
    from embedwright.evaluation.bench.names import choose
    from embedwright.evaluation.bench.run import Bench
    from embedwright.evaluation.compare.read import read_candidates
    from embedwright.evaluation.mteb import MtebEncoder
    from embedwright.evaluation.results import Results

    began = time.monotonic()
    chosen = choose(spec["benchmark"])
    work = Bench(MtebEncoder(model, name=f"embedwright/{spec['arm']}-{spec['seed']}"), folder)
    if failed := work.run(chosen.tasks):
        raise RuntimeError("; ".join(f"{task}: {reason}" for task, reason in failed.items()))
    [found] = [results for results in read_candidates([str(work.folder)])[0].seeds.values()]
    rows = tuple(row for results in found for row in results.rows)
    return Results(chosen.name, rows, time.monotonic() - began)


def measure_seconds(spec: Spec, recipe: Recipe, started: float) -> Spec:
    """Measures the seconds of a start with an evaluation, and those of a step of each stage."""
    from embedwright.processes import start
    from embedwright.training.dry_run import measure
    from embedwright.training.run.start import merged, start_model

    model = start_model(recipe, start(recipe.run.timeout_minutes))
    began = time.time() - started
    with TemporaryDirectory() as temp:
        evaluation = encoded_by_all(merged(model), recipe.out, lambda model: score(model, spec, Path(temp)).seconds)
    del model
    stages, _ = measure(recipe, count=4)
    steps = [stage.seconds for stage in stages]
    return {"seconds": {"start": began, "evaluation": evaluation}, "fixed": began + evaluation, "steps": steps}


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
