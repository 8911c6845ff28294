"""`ablate`: runs every cell of an ablation, each an arm with a seed, and compares the arms with the baseline.

    OUT/<study>/study.json                       all cells, all trials, and the comparison
    OUT/<study>/budget.json                      the steps that the budget gives each arm
    OUT/<study>/<arm>/seed-<n>/                  a cell: a run's folder, and result.json, scores.json, scores.items.npz
    OUT/<study>/<arm>/rate-<factor>/seed-<n>/    a trial of a learning rate
    OUT/<study>/<arm>/budget/                    what a step and an evaluation of the arm take
    OUT/<study>/shared-stages/seed-<n>/          the first stages, trained once for all arms

A smoke test lies in OUT/smoke/<study>/ and begins anew each time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from embedwright.config import did_you_mean
from embedwright.errors import InputError, as_input_error, error_prefix
from embedwright.evaluation.results import Results, read_results
from embedwright.evaluation.suite import load_suite
from embedwright.files import check_folder, write_json
from embedwright.studies.ablate.budget import Cost, TokenCounter, as_written, factors, scaled, tokens_of_steps, unshared
from embedwright.studies.ablate.cell import score
from embedwright.studies.ablate.content import stage_fingerprints, suite_content
from embedwright.studies.ablate.file import SHARED, SMOKE, Budget, Rates, Study
from embedwright.studies.ablate.jobs import Job, Say, processes_of, run_jobs
from embedwright.studies.ablate.table import compared
from embedwright.training.batches.blend import Source
from embedwright.training.recipe import Recipe
from embedwright.training.run.checks import open_checked
from embedwright.training.run.save import saved_model
from embedwright.training.run.start import origin_fingerprint
from embedwright.training.stages import Stage

logger = logging.getLogger(__name__)

Cell = tuple[str, int]  # arm and seed
_MEASURED = ("unit", "fixed", "steps", "seconds")
_SCORES = ("mean", "scores", "details")
_REPORTED = ("arm", "seed", "rate", "recipe", *_SCORES, "seconds", "tokens", "peak_mb", "failed")


def ablate(
    file: Path,
    out: Path,
    *,
    side_by_side: int = 1,
    smoke: bool = False,
    only: Sequence[str] = (),
    anyway: bool = False,
    look: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Runs the cells of an ablation that have no result yet, each in a process of its own.

    Args:
        file: The ablation (docs/ablations.md).
        out: The folder of all studies.
        side_by_side: How many cells run at once. They divide the cores.
        smoke: Run one tiny cell instead, whose scores mean nothing.
        only: Cells to run, as `ARM/SEED`. Default: all.
        anyway: Run a file on this machine that is marked for another one (`run_on`).
        look: Run nothing: compare the cells that have a result, and write `study.json`.
        say: A function that gets lines of progress.

    Returns:
        What `study.json` says.

    Raises:
        InputError: Something in the file or in one of its recipes is wrong or missing. No cell has run then.
        Interrupted: SIGTERM or SIGINT stopped the cells, each after a checkpoint.
    """
    study = Study(file)
    processes = 1 if smoke or look else processes_of(study, anyway)
    check_folder(out)
    folder = out.expanduser() / (SMOKE if smoke else "") / study.said.name
    work = _Work(study, folder, smoke, look, processes)
    cells = work.cells(only)
    work.check()
    if smoke and not look:
        shutil.rmtree(folder, ignore_errors=True)
    arms, seeds = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))

    def run(jobs: Iterable[Job | None]) -> None:
        work.failed |= run_jobs([job for job in jobs if job is not None and not look], side_by_side, say)

    if study.said.budget and not smoke:
        run(work.measurement(arm) for arm in dict.fromkeys([study.said.baseline, *arms]))
        taken = work.take_budget(study.said.budget)
        if not look:
            write_json(folder / "budget.json", taken)
    result = folder / "study.json"
    _check_known(result, work.known(), look)
    try:
        if study.said.shared_stages:
            run(work.shared(seed) for seed in [*seeds, *work.tuning_seeds])
        run(trial for arm in arms for trial in work.trials(arm))
        # seed by seed, the baseline first: wherever it stops, most cells have the one that they are compared with
        run(work.cell(*cell) for cell in sorted(cells, key=lambda cell: (cell[1], cell[0] != study.said.baseline)))
    finally:  # also when the study is interrupted
        found = work.found()
        write_json(result, found)
    return found


def _check_known(file: Path, known: Sequence[str], look: bool) -> None:
    """Where `study.json` has more cells and trials than are known, a look raises InputError, and a run warns before it
    spends hours on them."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"cells": [], "trials": []}
    had = [cell["folder"] for cell in (*before["cells"], *before["trials"])]
    if len(known) < len(had):
        lost = ", ".join(folder for folder in had if folder not in known)
        differs = "recipe, data, model, suite, rates or measured budget"
        why = f"of which this ablation knows {len(known)}: {differs} differ ({lost})"
        if look:
            raise InputError(f"{file} has {len(had)} cells, {why}; move the file away to write a smaller one")
        logger.warning("%s has %d cells, %s", file, len(had), why)


class _Work:
    """The jobs of a study. Each can be made once what it needs is there: until then it is None."""

    def __init__(self, study: Study, folder: Path, smoke: bool, look: bool, processes: int) -> None:
        self.study, self.said, self.folder = study, study.said, folder
        self.smoke, self.look, self.processes = smoke, look, processes
        self.failed: dict[Job, str] = {}
        self.data: dict[str, list[str]] = {}  # of each arm: the fingerprints of its stages' data
        self.opened: dict[str, list[list[Source]]] = {}  # by what asks for them: opening warns of each once
        self.origins: dict[str, str] = {}  # of each model that an arm begins with: its fingerprint
        self.tuning_seeds = [self.said.rates.seed] if self.said.rates and not smoke else []
        self.suite, self.tasks = study.suite(smoke), ""
        self.benchmark = None if smoke else self.said.benchmark
        self.arms = (self.said.smoke.arms or [*self.said.arms][-1:]) if smoke else [*self.said.arms]
        self.seeds = self.said.smoke.seeds if smoke else self.said.seeds
        # by how much steps change: those of the shared stages, and of each arm; nothing while a budget is not measured
        self.common = 1.0
        self.factors = {} if self.said.budget and not smoke else dict.fromkeys(self.arms, 1.0)

    def cells(self, only: Sequence[str]) -> list[Cell]:
        """Returns the cells to run. Raises InputError for one that the study has not."""
        cells = {f"{arm}/{seed}": (arm, seed) for arm in self.arms for seed in self.seeds}
        for name in only:
            if name not in cells:
                raise InputError(f"--only {name}: {self.said.name} has no such cell{did_you_mean(name, cells)}")
        return [cells[name] for name in only or cells]

    def check(self) -> None:
        """Opens all that the cells need. Raises InputError, with the arm, if something is missing or wrong."""
        self.tasks = self._tasks()
        for arm in self.arms:
            with error_prefix(f"{self.study.file}: arms.{arm}"):
                recipe = self._recipe(arm, self.seeds[0])
                self.data[arm] = stage_fingerprints(recipe, self._sources(recipe))
                if recipe.model.name not in self.origins:
                    self.origins[recipe.model.name] = origin_fingerprint(recipe.model)
                unshared(recipe, self.said.shared_stages, 1.0, 1.0, self.folder)  # raises where it cannot be

    def _tasks(self) -> str:
        """Returns what cells are scored on, as a fingerprint. Raises InputError if there is no such thing."""
        if self.benchmark is not None:
            with error_prefix(f"{self.study.file}: benchmark"), as_input_error(self.benchmark):
                from embedwright.evaluation.bench.names import choose
                from embedwright.evaluation.bench.run import check_data

                check_data(tasks := choose(self.benchmark).tasks)
                return json.dumps([version("mteb"), *(task.metadata.name for task in tasks)])
        with error_prefix(f"{self.study.file}: {'smoke.suite' if self.smoke and self.said.smoke.suite else 'suite'}"):
            return json.dumps(suite_content(load_suite(self.suite)))

    def _sources(self, recipe: Recipe) -> list[list[Source]]:
        """Opens what a recipe reads, once for all arms that differ neither in data nor in what is compared."""
        differs = {"stages": {"__all__": {"optim"}}}
        asked = recipe.model_dump_json(include={"seed", "strict", "tune", "stages", "eval"}, exclude=differs)
        if asked not in self.opened:
            self.opened[asked] = open_checked(recipe)
        return self.opened[asked]

    def _recipe(self, arm: str, seed: int) -> Recipe:
        """Returns the recipe of a cell, which keeps no model: its scores are what a study is made for."""
        recipe = self.study.recipe(arm, seed, smoke=self.smoke)
        stages = tuple(stage.model_copy(update={"save": False}) for stage in recipe.stages)
        run = recipe.run.model_copy(update={"save": (), "dtype": "float32"})
        return recipe.model_copy(update={"stages": stages, "run": run})

    def _job(self, kind: str, arm: str, place: str, recipe: Recipe, begin: Job | None = None, **facts: Any) -> Job:
        """Makes a job. Its key covers recipe, content of the data and of the model that it begins with, and suite."""
        data = {stage.name: found for stage, found in zip(self._stages(arm), self.data[arm], strict=True)}
        origin = begin.key if begin else self.origins[recipe.model.name]
        own = [data[stage.name] for stage in recipe.stages]
        decisive = [kind, recipe.hash(), own, origin, self.tasks, facts.get("unit")]
        key = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]
        spec = {"name": f"{self.said.name}/{place}", "kind": kind, "arm": arm, "seed": recipe.seed, **facts}
        spec |= {"arm": SHARED} if kind == "shared" else {}
        spec |= {"smoke": self.smoke, "benchmark": self.benchmark, "suite": self.suite}
        return Job(self.folder / place, key, recipe, spec, self.processes)

    def _stages(self, arm: str) -> tuple[Stage, ...]:
        return self._recipe(arm, self.seeds[0]).stages

    # ---- budget

    def measurement(self, arm: str) -> Job:
        """Returns the job that measures what an arm takes. Tokens are counted at once, but for a look."""
        unit = "tokens" if self.said.budget and self.said.budget.tokens else "seconds"
        recipe = self._recipe(arm, self.seeds[0])
        job = self._job("budget", arm, f"{arm}/budget", recipe, unit=unit)
        if unit == "tokens" and job.result is None and not self.look:
            counter = TokenCounter(recipe)
            with TemporaryDirectory() as temp:
                score(counter, job.spec, Path(temp))
            steps = tokens_of_steps(recipe, self._sources(recipe))
            job.finish({"fixed": counter.total, "steps": steps})
        return job

    def take_budget(self, budget: Budget) -> dict[str, Any]:
        """Turns the budget into steps, for the arms that were measured. Returns what `budget.json` says."""
        found = {arm: result for arm in self.arms if (result := self.measurement(arm).result)}
        count, baseline = self.said.shared_stages, self.said.baseline
        if baseline in found:
            costs = {arm: Cost(cost["fixed"], tuple(cost["steps"])) for arm, cost in found.items()}
            stages = {arm: self._stages(arm) for arm in found}
            with error_prefix(str(self.study.file)):
                asked = float(budget.tokens or budget.seconds or 0)
                self.common, self.factors = factors(asked, costs, stages, baseline, count)
        arms = {
            arm: {key: found[arm][key] for key in _MEASURED if key in found[arm]}
            | {"factor": factor, "stages": as_written(scaled(self._stages(arm)[count:], factor))}
            for arm, factor in self.factors.items()
        }
        first = as_written(scaled(self._stages(baseline)[:count], self.common))
        return {"budget": budget.model_dump(exclude_none=True), "shared_stages": first, "arms": arms}

    # ---- runs

    def shared(self, seed: int) -> Job | None:
        """Returns the run of the first stages, the same for all arms."""
        if not self.factors:
            return None
        recipe = self._recipe(self.arms[0], seed)  # any arm: they do not differ in these stages
        stages = tuple(scaled(recipe.stages[: self.said.shared_stages], self.common))
        form = "adapter" if recipe.tune.adapters == "continue" else "merged"  # what the other stages train on
        run = recipe.run.model_copy(update={"save": (form,)})
        named = {"name": f"{self.said.name} {SHARED} seed {seed}", "stages": stages, "run": run}
        return self._job("shared", self.arms[0], f"{SHARED}/seed-{seed}", recipe.model_copy(update=named))

    def trials(self, arm: str) -> list[Job | None]:
        """Returns the trials of an arm's learning rates; none if the study chooses no rates."""
        rates = self.said.rates
        return [
            self._run(arm, seed, f"{arm}/rate-{factor:g}/seed-{seed}", factor, rates)
            for seed in self.tuning_seeds
            for factor in (rates.factors if rates else ())
        ]

    def rate(self, arm: str) -> float | None:
        """Returns the factor of the best trial, the recipe's own rate among equals; None while one is missing.

        A trial that failed has lost. None, too, where all have failed.
        """
        if not self.tuning_seeds:
            return 1.0
        found = [job.result if job else None for job in self.trials(arm)]
        done = [result for result in found if result]
        scored = [result for result in done if "mean" in result]
        if len(done) < len(found) or not scored:
            return None
        return float(max(scored, key=lambda result: (result["mean"], result["rate"] == 1))["rate"])

    def cell(self, arm: str, seed: int) -> Job | None:
        rate = self.rate(arm)
        return None if rate is None else self._run(arm, seed, f"{arm}/seed-{seed}", rate)

    def _run(self, arm: str, seed: int, place: str, rate: float, tried: Rates | None = None) -> Job | None:
        factor, begin, count = self.factors.get(arm), None, self.said.shared_stages
        if factor is None or (count and ((begin := self.shared(seed)) is None or begin.result is None)):
            return None
        recipe = self._recipe(arm, seed)
        saved = saved_model(begin.folder) if begin else None
        recipe = unshared(recipe, count, factor * (tried.length if tried else 1.0), rate, saved)
        return self._job("cell", arm, place, recipe, begin, rate=rate, trial=tried is not None)

    def known(self) -> list[str]:
        """Lists the folders of the cells and trials that have a result."""
        jobs = [job for arm in self.arms for job in (*(self.cell(arm, seed) for seed in self.seeds), *self.trials(arm))]
        return [str(job.folder.relative_to(self.folder)) for job in jobs if job and job.result]

    def found(self) -> dict[str, Any]:
        """Says all that is known of the study: what `study.json` holds."""
        shared = [self.shared(seed) for seed in (*self.seeds, *self.tuning_seeds)] if self.said.shared_stages else []
        trials = [trial for arm in self.arms for trial in self.trials(arm)]
        cells = {(arm, seed): self.cell(arm, seed) for arm in self.arms for seed in self.seeds}
        missing = [f"{arm}/{seed}" for (arm, seed), job in cells.items() if job is None or job.result is None]
        scores = {} if self.smoke else self._scores(cells, shared)
        bound = self.said.equivalent
        sides = [(other, {name: scores.get(name, {}) for name in (other, arm)}) for arm, other in self.said.pairs]
        comparison, *pairs = compared([(self.said.baseline, scores), *sides], bound)
        return {
            "study": self.said.name,
            "smoke": self.smoke,
            "baseline": self.said.baseline,
            "scored_on": self.benchmark or Path(self.suite).name,
            "run_on": self.said.run_on,
            "paper": self.said.paper.model_dump() if self.said.paper else None,
            "missing": missing,
            "failed": self._failures(),
            "cells": [self._report(job) for job in cells.values() if job and job.result],
            "rates": list(self.said.rates.factors) if self.tuning_seeds and self.said.rates else [],
            "trials": [self._report(job) for job in trials if job and job.result],
            "shared_stages": [self._report(job) for job in shared if job and job.result],
            "comparison": comparison,
            "pairs": [pair for pair in pairs if pair is not None],
        }

    def _failures(self) -> dict[str, str]:
        """Returns why jobs have no result, and which arms have no rate that works."""
        found = {job.spec["name"]: reason for job, reason in self.failed.items() if job.result is None}
        for arm in self.arms:
            tried = [job.result if job else None for job in self.trials(arm)]
            if tried and all(result and "failed" in result for result in tried):
                reasons = "; ".join(f"x{result['rate']:g} {result['failed']}" for result in tried if result)
                found[f"{self.said.name}/{arm}"] = f"all its rates failed: {reasons}"
        return found

    def _scores(self, cells: Mapping[Cell, Job | None], shared: Sequence[Job | None]) -> dict[str, dict[int, Results]]:
        """Returns the results of each arm by seed, and those of the shared stages as if they were an arm."""
        found: dict[str, dict[int, Results]] = {}
        cells = {**cells, **{(SHARED, seed): job for seed, job in zip(self.seeds, shared, strict=False)}}
        for (arm, seed), job in cells.items():
            if job and job.result:
                found.setdefault(arm, {})[seed] = read_results(job.folder / "scores.json")
        return found

    def _report(self, job: Job) -> dict[str, Any]:
        hidden = _SCORES if self.smoke else ()
        kept = {key: value for key, value in (job.result or {}).items() if key in _REPORTED and key not in hidden}
        return {"folder": str(job.folder.relative_to(self.folder))} | kept
