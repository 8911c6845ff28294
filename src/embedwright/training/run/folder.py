"""The files that describe a run: recipe, environment, data, and the facts of its model card."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml

from embedwright.evaluation.about import installed, processor
from embedwright.evaluation.compare.bootstrap import half_interval
from embedwright.evaluation.results import Result, Results, run_items_file, with_items
from embedwright.files import write_text
from embedwright.threads import cores
from embedwright.training.batches.blend import Source
from embedwright.training.batches.sources import data_fingerprint, entry_of
from embedwright.training.recipe import Recipe, differences, leaves
from embedwright.training.run.checks import is_suite_file
from embedwright.training.run.scores import mean_scores
from embedwright.training.stages import Stage

logger = logging.getLogger(__name__)

PACKAGES = (
    "embedwright",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "safetensors",
    "numpy",
)
_RECIPE_HEADER = "# The recipe of this run, every default filled in: `embedwright train` takes it as it is.\n"


def describe_run(out: Path, recipe: Recipe, sources: Sequence[Sequence[Source]]) -> None:
    """Writes `recipe.yaml`, `environment.json` and `data.json` into the folder `out`, which must exist.

    It is called whenever the run starts or resumes. A file with other content is kept as `<name>.1.<suffix>`, and the
    log says what changed. `sources` are those of each stage (`open_sources`).
    """
    _write(out / "recipe.yaml", recipe_text(recipe))
    _write(out / "environment.json", _json(environment()))
    _write(out / "data.json", _json(data(recipe, sources)))


def recipe_text(recipe: Recipe) -> str:
    """Returns a recipe as YAML. `Recipe.load` reads it back with the same hash, so a run can resume from its folder."""
    values = recipe.model_dump(mode="json")
    return _RECIPE_HEADER + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def environment() -> dict[str, Any]:
    """Collects versions, hardware and threads, without names of users, hosts and folders.

    `commit` is that of a checkout, with `-dirty` appended if tracked files were changed; None for an installed package.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in PACKAGES},
        "commit": _commit(Path(__file__).resolve().parents[4]),
        "device": torch.cuda.get_device_name() if gpus else processor(),
        "gpus": gpus,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def data(recipe: Recipe, sources: Sequence[Sequence[Source]]) -> dict[str, Any]:
    """Lists every source of every stage: file as the recipe names it, task, drawable rows, and part of the draws.

    A source's `fingerprint` is that of its table (content of the files, task, seed). The one for all of them is in each
    checkpoint, too.
    """
    stages = [
        {"stage": stage.name, "sources": [_source(stage, source, own) for source in own]}
        for stage, own in zip(recipe.stages, sources, strict=True)
    ]
    return {"fingerprint": data_fingerprint([list(own) for own in sources]), "stages": stages}


def card_facts(
    recipe: Recipe, sources: Sequence[Sequence[Source]], evaluations: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Collects what a model card says of the run, without folders: arguments of `model.interop.card.model_card`.

    `stages` has name, planned steps, batch (queries a step), lr and losses; `data` has path (last part), task, licence,
    source and rows. `scores` compares the untrained model (`before`, None if unknown) with the weights that the run
    ends on (`after`), with an interval over the items that the run keeps; it is empty if these were not evaluated.
    `commands` train the model and score it. `evaluations` are the records of `evaluations.jsonl`.
    """
    listed = [_source(stage, source, own) for stage, own in zip(recipe.stages, sources, strict=True) for source in own]
    entries = [
        {"path": Path(entry["path"]).name} | {key: entry[key] for key in ("task", "licence", "source", "rows")}
        for entry in listed
    ]
    return {
        "name": recipe.name,
        "base": _without_folder(recipe.model.name),
        "stages": [
            {
                "name": stage.name,
                "steps": stage.optim.steps,
                "batch": stage.optim.batch_queries,
                "lr": stage.optim.lr,
                "losses": ", ".join(f"{key} {_without_folder(value)}" for key, value in _losses(stage)),
            }
            for stage in recipe.stages
        ],
        "data": [entry for place, entry in enumerate(entries) if entry not in entries[:place]],
        "scores": _scores(recipe, evaluations),
        "commands": ["embedwright train recipe.yaml", *map(_command, recipe.eval.suites)],
    }


def _command(suite: str) -> str:
    return f"embedwright eval MODEL {Path(suite).name}" if is_suite_file(suite) else f"embedwright bench MODEL {suite}"


def _source(stage: Stage, source: Source, all_of_stage: Sequence[Source]) -> dict[str, Any]:
    entry = entry_of(stage, source)
    tasks = list(source.tasks.values()) or [source.task]
    return {
        "path": entry.path,
        "corpus": entry.corpus,
        "task": source.task.name if len(tasks) == 1 else f"{len(tasks)} tasks, {source.task.name} the first",
        "family": source.task.family,
        "licence": ", ".join(sorted({task.licence for task in tasks} - {""})),
        "source": ", ".join(sorted({task.source for task in tasks} - {""})),
        "rows": len(source.rows),
        "rows_in_file": len(source.table),
        "fingerprint": source.table.fingerprint,
        "share": round(source.sampling_weight / sum(each.sampling_weight for each in all_of_stage), 6),
    }


def _losses(stage: Stage) -> Iterator[tuple[str, Any]]:
    keys = {"in_batch_negatives", "hard_negatives", "batching", "temperature"}
    return leaves(stage.model_dump(include=keys) | stage.chosen())


def _without_folder(value: Any) -> Any:
    """Shortens a path of this machine to its last part; returns anything else as it is."""
    if isinstance(value, str) and (path := Path(value).expanduser()).exists():
        return path.name
    return value


def _scores(recipe: Recipe, evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    stage = recipe.stages[-1].name
    means = mean_scores(evaluations, stage)
    if not means:
        return []
    last = max(means, key=lambda step: (means[step], step)) if recipe.eval.best else max(means)
    before = {
        (suite, row["task"]): row["value"] for suite, row in _rows(e for e in evaluations if e["stage"] == "start")
    }
    ends = [each for each in evaluations if (each["stage"], each["step"]) == (stage, last)]
    intervals = dict(_intervals(recipe.out, ends))
    return [
        {"suite": suite, "task": row["task"], "metric": row["metric"]}
        | {"before": before.get((suite, row["task"])), "after": row["value"]}
        | intervals.get((suite, row["task"]), {})
        for suite, row in _rows(iter(ends))
    ]


def _intervals(out: Path, evaluations: Sequence[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, str], dict[str, str]]]:
    """Yields suite and task, and the 95 % interval, of each score whose items the run in `out` keeps."""
    for record in evaluations:
        found = record["results"]
        results = Results(found["suite"], tuple(Result(**row) for row in found["rows"]), 0.0)
        for row in with_items(results, run_items_file(out, record["stage"], record["step"], record["suite"])).rows:
            if half := half_interval(results.suite, [row]):
                text = f"{row.value - half:.4f} to {row.value + half:.4f}"
                yield (results.suite, row.task), {"95 % interval": text}


def _rows(evaluations: Iterator[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for record in evaluations:
        for row in record["results"]["rows"]:
            yield record["results"]["suite"], row


# ---------------------------------------------------------------------------------------------------- environment


@cache  # the code of this process is that of its start
def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():  # an installed package may lie within somebody else's repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


# ---------------------------------------------------------------------------------------------------- files


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _write(file: Path, text: str) -> None:
    """Writes a file unless it has this content already. Other content is kept under another name, and logged."""
    if file.exists():
        old = file.read_text(encoding="utf-8", errors="replace")
        if old == text:
            return
        kept = next(free for n in count(1) if not (free := file.with_name(f"{file.stem}.{n}{file.suffix}")).exists())
        file.replace(kept)
        logger.warning("%s is not as before (%s): what it said is kept in %s", file, _changes(old, text), kept.name)
    write_text(file, text)


def _changes(old: str, new: str) -> str:
    try:
        return differences(yaml.safe_load(old), yaml.safe_load(new))  # JSON is YAML
    except yaml.YAMLError:
        return "it was damaged"
