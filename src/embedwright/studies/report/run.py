"""Reads a run folder for the report: what was trained, on what data, and the curves of its steps and scores."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from embedwright.errors import InputError
from embedwright.training.recipe import Recipe, leaves
from embedwright.training.run.heldout import FILE as HELDOUT
from embedwright.training.run.scores import Record, read_evaluations
from embedwright.training.run.track import read_records
from embedwright.training.stages import START, ContrastiveStage, Stage

Row = dict[str, Any]
Chart = dict[str, Any]
POINTS = 600  # of a curve: more than a screen can show make the page heavy
_CURVES = {"loss": "Loss", "lr": "Learning rate", "grad_norm": "Gradient norm", "speed": "Tokens a second"}


def chart(
    name: str,
    title: str,
    series: Sequence[Row],
    alt: str,
    *,
    marks: Sequence[Row] = (),
    x: str = "step",
    unit: str = "",
    note: str = "",
    wide: bool = False,
) -> Chart:
    """Returns a chart as the page draws it. `alt` says in words what it shows; `marks` are the stages of a run."""
    return {
        "id": name,
        "title": title,
        "series": series,
        "alt": alt,
        "marks": marks,
        "x": x,
        "unit": unit,
        "note": note,
        "wide": wide,
    }


def is_run(folder: Path) -> bool:
    """Returns whether `folder` is the folder of a run."""
    return (folder / "recipe.yaml").is_file()


def read_run(folder: Path) -> dict[str, Any]:
    """Returns what the report shows of a run, as plain values: `facts`, `stages`, `data`, `environment`, `curves`.

    A list is empty where the run has left nothing to fill it with. Raises InputError if the recipe cannot be read.
    """
    recipe = Recipe.load(folder / "recipe.yaml")
    steps, evaluations = read_records(folder / "metrics.jsonl"), read_evaluations(folder)
    marks = _marks(recipe, steps)
    return {
        "name": recipe.name,
        "steps": len(steps),
        "facts": _facts(recipe, folder, steps),
        "stages": [_stage(stage) for stage in recipe.stages],
        "data": [
            _source(stage["stage"], source)
            for stage in _json(folder / "data.json").get("stages", [])
            for source in stage["sources"]
        ],
        "environment": [
            (key.removeprefix("packages."), value)
            for key, value in leaves(_json(folder / "environment.json"))
            if value is not None and key
        ],
        "recipe": (folder / "recipe.yaml").read_text(encoding="utf-8"),
        "curves": _step_curves(marks, steps) + _score_curves(marks, evaluations),
    }


def point_name(record: Record) -> str:
    """Names the point of a run at which a record of `evaluations.jsonl` was made."""
    return "before training" if record["stage"] == START else f"{record['stage']}, step {record['step']}"


def _json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise InputError(f"{file} is no JSON: remove it, or copy the run again") from error
    return content


def _facts(recipe: Recipe, folder: Path, steps: Sequence[Row]) -> list[tuple[str, str]]:
    model, tune = recipe.model, recipe.tune
    facts = {"Starts from": model.name + (f", its first {model.layers} layers" if model.layers else "")}
    if model.base:
        sizes = f", {model.latents} latents, {model.heads} heads" if model.pooling == "latent" else ""
        facts |= {"Attention": model.attention, "Pooling": model.pooling + sizes}
        facts["Longest text"] = f"{model.max_tokens} tokens"
    if parameters := _parameters(folder / "model"):
        facts["Parameters"] = f"{parameters / 1e6:,.1f} million"
    sizes = f"rank {tune.rank}, alpha {tune.alpha}" if tune.adapters == "fresh" else "the adapters that it came with"
    adapters = f", {sizes}, dropout {tune.dropout:g}"
    facts["Tuning"] = tune.method + ("" if tune.method == "full" else adapters)
    facts |= {"Precision": recipe.run.precision, "Seed": str(recipe.seed)}
    if measured := read_records(folder / HELDOUT):
        told = ", then ".join(f"{one['loss']:.3f} ({point_name(one)})" for one in measured)
        facts["Masked loss, held-out"] = told
    if steps:
        tokens, seconds = sum(step["tokens"] for step in steps), sum(step["seconds"] for step in steps)
        facts["Training"] = f"{len(steps):,} steps, {tokens:,} tokens in {_duration(seconds)}"
        if peak := max(step.get("peak_mb") or 0 for step in steps):
            facts["Peak memory"] = f"{peak:,} MB"
    return list(facts.items())


def _parameters(model: Path) -> int:
    """Counts the numbers in the weights of a model's folder, without reading them; 0 for none or half a file."""
    total = 0
    for file in model.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as stored:
                total += sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())  # noqa: SIM118
        except SafetensorError:  # the parts that need the model say so
            return 0
    return total


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.1f} s"


def _stage(stage: Stage) -> Row:
    optim = stage.optim
    return {
        "stage": stage.name,
        "steps": f"{optim.steps:,}",
        "queries a step": optim.batch_queries,
        "learning rate": f"{optim.lr:g}",
        "warm-up steps": optim.warmup_steps,
        "in-batch negatives": stage.in_batch_negatives,
        "hard negatives": stage.hard_negatives,
        "temperature": f"{stage.temperature:g}" if isinstance(stage, ContrastiveStage) else "-",
        "more": ", ".join(f"{key} {value}" for key, value in leaves(stage.chosen()) if key) or "-",
    }


def _source(stage: str, source: Mapping[str, Any]) -> Row:
    return {
        "stage": stage,
        "data": source["path"] + (f", corpus {source['corpus']}" if source["corpus"] else ""),
        "task": source["task"],
        "family": source["family"],
        "rows": f"{source['rows']:,}",
        "share of draws": f"{source['share']:.1%}",
        "licence": source["licence"] or "not stated",
        "source": source["source"] or "not stated",
    }


# ---------------------------------------------------------------------------------------------------- curves


def _step_curves(marks: Sequence[Row], steps: Sequence[Row]) -> list[Chart]:
    rows = [{**step, "speed": step["tokens"] / max(step["seconds"], 1e-4)} for step in steps]
    curves = []
    for key, title in _CURVES.items():
        lost = sum(_finite(row.get(key)) is None for row in rows)
        if len(steps) < 2 or lost == len(rows):
            continue
        series = [_series(title.lower(), [row.get(key) for row in rows])]
        if key == "loss" and any("chance" in row for row in rows):
            series.append({**_series("guessing: log(candidates)", [row.get("chance") for row in rows]), "dashed": True})
        note = f"{lost} steps have no finite value: gaps." if lost else ""
        curves.append(chart(key, title, series, _in_words(title, series), marks=marks, note=note))
    return curves


def _score_curves(marks: Sequence[Row], evaluations: Sequence[Record]) -> list[Chart]:
    """Returns one chart a suite with a line a task, over the steps of all stages together."""
    begins = {mark["name"]: mark["from"] for mark in marks} | {START: 0}
    suites: dict[str, dict[str, Row]] = {}
    for record in evaluations:
        for row in record["results"]["rows"]:
            lines = suites.setdefault(record["results"]["suite"], {})
            name = f"{row['task']}, {row['metric']}"
            line = lines.setdefault(name, {"name": name, "x": [], "y": [], "dots": True})
            line["x"].append(begins.get(record["stage"], 0) + record["step"])
            line["y"].append(_finite(row["value"]))
    curves: list[Chart] = []
    for suite, lines in suites.items():
        if any(len(line["x"]) > 1 for line in lines.values()):
            title, series = f"Scores on {suite}", list(lines.values())
            made = chart(f"scores-{len(curves)}", title, series, _in_words(title, series), marks=marks, wide=True)
            curves.append(made)
    return curves


def _marks(recipe: Recipe, steps: Sequence[Row]) -> list[Row]:
    """Returns where each stage begins and ends, in steps of all stages together. A stage may have ended early."""
    done = Counter(step["stage"] for step in steps)
    marks, begin = [], 0
    for stage in recipe.stages:
        if done[stage.name]:
            marks.append({"name": stage.name, "from": begin, "to": begin + done[stage.name]})
        begin += done[stage.name]
    return marks


def _series(name: str, values: Sequence[Any]) -> Row:
    """Returns a line over the steps. Of a long run, each point is the mean of the steps that it stands for."""
    width = math.ceil(len(values) / POINTS)
    parts = [[_finite(value) for value in values[at : at + width]] for at in range(0, len(values), width)]
    means = [None if None in part else math.fsum(v for v in part if v is not None) / len(part) for part in parts]
    return {"name": name, "x": [min((i + 1) * width, len(values)) for i in range(len(parts))], "y": means}


def _in_words(title: str, series: Sequence[Row]) -> str:
    """Describes a chart for those who do not see it."""
    lines = []
    for line in series:
        known = [value for value in line["y"] if value is not None]
        if known:
            span = f"lowest {min(known):.4g}, highest {max(known):.4g}"
            lines.append(f"{line['name']} goes from {known[0]:.4g} to {known[-1]:.4g} ({span})")
    return f"{title} by step: {'; '.join(lines)}."


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
