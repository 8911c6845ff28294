"""The table of a benchmark: mean over tasks, mean over types, each type, beside published scores (`anchors.yaml`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mteb.abstasks import AbsTask
from mteb.results import TaskResult

from embedwright.config import load_yaml
from embedwright.evaluation.bench.names import Chosen, choose
from embedwright.evaluation.bench.run import Bench
from embedwright.locate import text_of
from embedwright.model.formats.detect import detect

ANCHORS = Path(__file__).with_name("anchors.yaml")
TASKS, TYPES = "mean over tasks", "mean over types"


def lines(chosen: Chosen, bench: Bench, released: str | None = None) -> list[str]:
    """Returns the lines of the table, in points: each task, then the means with the anchors of this benchmark.

    For a `released` model whose scores are published task by task, these and the differences stand beside its own.
    """
    results = {task.metadata.name: bench.result(task) for task in chosen.tasks}
    done = {name: result for name, result in results.items() if result is not None}
    ours = {name: 100 * result.get_score() for name, result in done.items()}
    anchors = load_anchors()
    published: dict[str, Any] = anchors["tasks"].get(released or "", {"scores": {}})
    # they are those of MTEB(eng, v1): a task of the same name may have other subsets or splits elsewhere
    asked = {task.metadata.name: _asks(task) for task in choose("MTEB(eng, v1)").tasks} if published["scores"] else {}
    used: list[str] = []
    shown = [f"{chosen.name}: {len(done)} of {len(results)} tasks, in points"]
    for task in chosen.tasks:
        name = task.metadata.name
        if name in ours:
            theirs, beside = published["scores"].get(name), ""
            if theirs is not None and asked.get(name) == _asks(task):
                beside = f"   published {theirs:6.2f}   difference {ours[name] - theirs:+6.2f}"
                used = [published["source"]]
            shown.append(f"  {name:<44} {task.metadata.type:<22} {ours[name]:6.2f}{beside}")
    if chosen.benchmark is not None and done:
        rows = {
            bench.meta.name if len(done) == len(results) else f"{bench.meta.name}, {len(done)} tasks": aggregate(done)
        }
        listed = anchors["benchmarks"].get(chosen.name, {})
        rows |= {f"{name} [{row['source']}]": row["scores"] for name, row in listed.items()}
        shown += ["", *_grid(rows)]
        used += [row["source"] for row in listed.values()]
    return shown + [f"  [{key}] {anchors['sources'][key]}" for key in dict.fromkeys(used)]


def _asks(task: AbsTask) -> tuple[set[str], set[str]]:
    """Returns the subsets and splits that a task is scored on."""
    return set(task.hf_subsets), set(task.eval_splits)


def aggregate(results: Mapping[str, TaskResult]) -> dict[str, float]:
    """Returns the mean over tasks, the mean over the types' means, and each type's mean, in points."""
    by_type: dict[str, list[float]] = {}
    for result in results.values():
        by_type.setdefault(result.task_type, []).append(100 * result.get_score())
    every = [score for scores in by_type.values() for score in scores]
    types = {name: sum(scores) / len(scores) for name, scores in sorted(by_type.items())}
    return {TASKS: sum(every) / len(every), TYPES: sum(types.values()) / len(types)} | types


def released_as(model: str) -> str | None:
    """Returns `NV-Embed-v1` or `NV-Embed-v2` for a folder or hub id of that release, else None."""
    if "://" in model:
        return None
    place, form = detect(model)
    if form != "nvembed":
        return None
    said = f"{model} {place.path.name} {text_of(place.path, 'config.json')}"
    found = re.search(r"NV-Embed-v([12])", said, re.IGNORECASE)
    return found and f"NV-Embed-v{found[1]}"


@cache
def load_anchors() -> dict[str, dict[str, Any]]:
    """Reads the published scores: `sources`, `benchmarks` and `tasks`."""
    return load_yaml(ANCHORS)


def _grid(rows: Mapping[Any, Mapping[str, float]]) -> list[str]:
    """Returns rows of numbers under the columns of the first row."""
    columns = list(next(iter(rows.values())))
    width = max(len(str(name)) for name in rows)
    grid = [f"  {'':<{width}}  {'  '.join(columns)}"]
    for name, row in rows.items():
        cells = (f"{f'{row[column]:.2f}' if column in row else '-':>{len(column)}}" for column in columns)
        grid.append(f"  {name:<{width}}  {'  '.join(cells)}")
    return grid
