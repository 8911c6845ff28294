"""The scores of a report: those of a run's evaluations and of result files, suite by suite and task by task."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedwright.errors import InputError, NotFoundError
from embedwright.evaluation.results import Results, read_results
from embedwright.studies.report_run import is_run, point_name
from embedwright.training.run.scores import read_evaluations
from embedwright.training.stages import START

Named = tuple[str, Results]  # a model, or the point of a run, and its results on one suite


def read_scores(paths: Sequence[Path]) -> list[Named]:
    """Returns the results of runs, result files and folders of result files, each with the name of its model.

    Of a run they are those before training and at the end of each stage. Raises InputError for a path without any
    result that is no run.
    """
    runs = sum(map(is_run, paths))
    named: list[Named] = []
    for path in paths:
        if not path.exists():
            raise NotFoundError(f"no such run, result file or folder: {path}")
        if is_run(path):
            named += ((f"{path.resolve().name}: {name}" if runs > 1 else name, each) for name, each in _of_run(path))
        elif found := list(_of_files([path] if path.is_file() else sorted(path.rglob("*.json")), given=path)):
            named += found
        else:
            raise InputError(f"{path} holds neither a run (recipe.yaml) nor a result file of `embedwright eval`")
    return named


def score_tables(named: Iterable[Named]) -> list[dict[str, Any]]:
    """Returns one table a suite: `suite`, the ends of its axis, and for each task the scores to show side by side."""
    suites: dict[str, dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for name, results in named:
        for row in results.rows:
            tasks = suites.setdefault(results.suite, {})
            tasks.setdefault((row.task, row.metric), []).append({"name": name, "value": row.value})
    return [_table(suite, tasks) for suite, tasks in suites.items()]


def _table(suite: str, tasks: Mapping[tuple[str, str], list[dict[str, Any]]]) -> dict[str, Any]:
    """Places every score on an axis from 0 to 1 whose ends, in tenths, hold all of the suite's scores."""
    values = [score["value"] for scores in tasks.values() for score in scores]
    low, high = math.floor(min(values) * 10) / 10, math.ceil(max(values) * 10) / 10
    width = (high - low) or 0.1
    rows = [
        {
            "task": task,
            "metric": metric,
            "scores": [
                {**score, "at": (score["value"] - low) / width, "best": score["value"] == max(_values(scores))}
                for score in scores
            ],
        }
        for (task, metric), scores in tasks.items()
    ]
    return {"suite": suite, "low": low, "high": low + width, "tasks": rows}


def _values(scores: Sequence[Mapping[str, Any]]) -> list[float]:
    return [score["value"] for score in scores]


def _of_run(folder: Path) -> Iterator[Named]:
    records = read_evaluations(folder)
    last = {record["stage"]: record["step"] for record in records}
    for record in records:
        if record["stage"] == START or record["step"] == last[record["stage"]]:
            yield point_name(record), Results.from_json(json.dumps(record["results"]))


def _of_files(files: Sequence[Path], given: Path) -> Iterator[Named]:
    for file in files:
        try:
            results = read_results(file)
        except InputError:
            if file == given:
                raise
            continue  # a folder of results may have other JSON files
        yield str(results.about.get("model") or file.stem), results
