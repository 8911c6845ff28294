"""One process of the twins: `python benchmarks/twins/cell.py FOLDER` trains and scores what FOLDER's cell.json says.

It writes scores.json with its items, then result.json, when all is done. The clock runs from the begin of the first
step to the end of the last; what comes before is the start. A rate that diverges is a result, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import bind_threads

bind_threads()

import shutil  # noqa: E402

import st  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from common import CORES, MB, peak_during  # noqa: E402

from embedwright.encoders.open import open_encoder  # noqa: E402
from embedwright.evaluation.about import about, code  # noqa: E402
from embedwright.evaluation.results import Results, write_results  # noqa: E402
from embedwright.evaluation.suite import evaluate  # noqa: E402
from embedwright.files import sha256_of, write_json  # noqa: E402
from embedwright.studies.ablate.budget import scaled  # noqa: E402
from embedwright.training.dry_run import measure  # noqa: E402
from embedwright.training.recipe import Recipe  # noqa: E402
from embedwright.training.run.checks import open_checked  # noqa: E402
from embedwright.training.train import train  # noqa: E402

MARGIN = 0.98  # of the seconds, which our steps are planned to take
Spec = dict[str, Any]


def main(folder: Path) -> None:
    spec = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    proof = {"proof": st.proof(Path(spec["base"]))} if spec["system"] == "st" else {}
    try:
        result = trained(folder, spec)
    except FloatingPointError as error:  # training has diverged: a trial has lost, and a seed is told as failed
        result = {"failed": str(error)}
    for heavy in ("model", "trainer", "run"):
        shutil.rmtree(folder / heavy, ignore_errors=True)
    told = {key: value for key, value in spec.items() if key not in ("base", "recipe")}  # paths of this machine
    write_json(folder / "result.json", told | proof | result)


def trained(folder: Path, spec: Spec) -> Spec:
    """Trains and scores the model, and returns what it took and the main scores."""
    started = time.perf_counter()
    recipe = recipe_for(spec, folder)
    sources = open_checked(recipe)
    took: Spec = {}
    limits: list[float | None] = [None] * len(recipe.stages)
    if spec["seconds"] is not None:
        limits = [share * spec["seconds"] for share in spec["shares"]]

    def run() -> None:
        if spec["system"] == "st":
            took.update(st.train(recipe, sources, limits, spec, folder), model=folder / "model")
        else:
            took.update(ours(recipe, limits, spec["pace"]))

    peak = peak_during(run)
    whole = time.perf_counter() - started
    model = took.pop("model")
    model = open_encoder(str(model)) if isinstance(model, Path) else model
    facts = about(spec["id"], model.fingerprint()) | {"command": spec["command"], "seed": spec["seed"]}
    facts["machine"] |= {"cores": len(CORES), "threads": torch.get_num_threads()}  # this thread is bound to one core
    if spec["smoke"]:
        facts["smoke"] = True
    scores = replace(evaluate(model, spec["suite"]), about=facts)
    write_results(folder / "scores.json", scores)
    took |= {"start": whole - took["training"], "evaluation": scores.seconds, "peak_mb": round(peak / MB)}
    result = {"took": took, "macro": macro(scores), "scores": {row.task: row.value for row in scores.rows}}
    return result | {key: facts[key] for key in ("machine", "versions", "date")} | {"code": state()}


def state() -> str:
    """Returns the fingerprint of the package's code and of the twins' scripts."""
    own = map(sha256_of, sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256("".join([code(), *own]).encode()).hexdigest()[:12]


def recipe_for(spec: Spec, folder: Path) -> Recipe:
    """Returns the recipe of a cell: its file, with the plan's base, rate, batch and method, and its steps."""
    content = yaml.safe_load(Path(spec["recipe"]).read_text(encoding="utf-8"))
    content |= {"model": {"from": spec["base"]}, "seed": spec["seed"]}
    content["run"]["out"] = str(folder / "run")
    setting = spec["setting"]
    content["tune"] = {"method": "full"} if setting["method"] == "full" else content["tune"]
    for stage in content["stages"]:
        stage["optim"]["batch_queries"] = max(2, round(setting["batch"] * stage["optim"]["batch_queries"]))
    recipe = Recipe.parse(content)
    return recipe.model_copy(update={"stages": scaled(recipe.stages, spec["steps"], setting["lr"])})


def ours(recipe: Recipe, limits: Sequence[Any], pace: Sequence[float] | None) -> Spec:
    """Trains as `embedwright train` does. With limits, each stage takes as many steps as fill it at the known pace."""
    if limits[0] is not None:
        pace = pace or [stage.seconds for stage in measure(recipe, count=4)[0]]
        factors = [MARGIN * limit / each for limit, each in zip(limits, pace, strict=True)]
        stages = [scaled([stage], n / stage.optim.steps)[0] for stage, n in zip(recipe.stages, factors, strict=True)]
        recipe = recipe.model_copy(update={"stages": tuple(stages)})
    ends: list[float] = []
    records: list[Spec] = []
    model = train(recipe, on_step=lambda record: (ends.append(time.perf_counter()), records.append(record)))
    taken = [[r["seconds"] + r["waited"] for r in records if r["stage"] == stage.name] for stage in recipe.stages]
    return {
        "model": model,
        "training": ends[-1] - ends[0] + records[0]["seconds"],
        "steps": [len(some) for some in taken],
        "queries": sum(stage.optim.steps * stage.optim.batch_queries for stage in recipe.stages),
        "tokens": sum(record["tokens"] for record in records),
        "pace": [fmean(some) for some in taken],
        "losses": [record["loss"] and round(record["loss"], 5) for record in records],
    }


def macro(scores: Results) -> float:
    """Returns the mean over families of the mean over their tasks."""
    families: dict[str, list[float]] = defaultdict(list)
    for row in scores.rows:
        families[row.kind].append(row.value)
    value = fmean(fmean(some) for some in families.values())
    return value if math.isfinite(value) else 0.0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
