"""The scores of a report: those of a run's evaluations and of result files, suite by suite and task by task."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedwright.errors import InputError, NotFoundError
from embedwright.evaluation.bootstrap import draw, random
from embedwright.evaluation.results import Result, Results, read_results, run_items_file, with_items
from embedwright.evaluation.statistics import half_width, of_mean
from embedwright.studies.report_run import is_run, point_name
from embedwright.training.run.scores import read_evaluations
from embedwright.training.stages import START

DRAWS = 2_000  # give the width of an interval to about 2 %
SEED = 0

Score = dict[str, Any]
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
    """Returns one table a suite: `suite`, the ends of its axis, and for each task the scores to show side by side.

    The last row is the mean over the tasks, of those who have all tasks of the suite.
    """
    suites: dict[str, dict[tuple[str, str], list[Score]]] = {}
    for name, results in named:
        for row in results.rows:
            tasks = suites.setdefault(results.suite, {})
            score = {"name": name, "value": row.value, "half": half_interval(results.suite, row)}
            tasks.setdefault((row.task, row.metric), []).append(score)
    return [_table(suite, tasks) for suite, tasks in suites.items()]


def half_interval(suite: str, result: Result) -> float | None:
    """Returns half the width of a score's 95 % interval, or None for a score without items.

    It covers what other items would have given, by a bootstrap, and what other runs of k-means would. The computation
    is that of `embedwright compare`, for one score instead of a difference.
    """
    (drawn,) = draw(random(SEED, suite, result.task), [[result]], DRAWS)
    if drawn.items < 2:
        return None
    runs = [of_mean(values) for values in drawn.runs if len(values) > 1]
    return half_width([*runs, (float(drawn.drawn_B.var(ddof=1)), drawn.items - 1)])


def _table(suite: str, tasks: Mapping[tuple[str, str], list[Score]]) -> dict[str, Any]:
    """Places every score on an axis whose ends, in tenths, hold all scores and intervals of the suite."""
    rows = {**tasks, **_mean_row(tasks)}
    every = [score for scores in rows.values() for score in scores]
    low = math.floor(10 * min(score["value"] - (score["half"] or 0) for score in every)) / 10
    high = math.ceil(10 * max(score["value"] + (score["half"] or 0) for score in every)) / 10
    width = (high - low) or 0.1

    def placed(scores: Sequence[Score]) -> list[Score]:
        best = max(score["value"] for score in scores)
        ends = [
            {"from": (score["value"] - (score["half"] or 0) - low) / width, "span": 2 * (score["half"] or 0) / width}
            for score in scores
        ]
        return [
            {**score, **end, "at": (score["value"] - low) / width, "best": len(scores) > 1 and score["value"] == best}
            for score, end in zip(scores, ends, strict=True)
        ]

    shown = [{"task": task, "metric": metric, "scores": placed(scores)} for (task, metric), scores in rows.items()]
    return {"suite": suite, "low": low, "high": low + width, "tasks": shown}


def _mean_row(tasks: Mapping[tuple[str, str], list[Score]]) -> dict[tuple[str, str], list[Score]]:
    values: dict[str, list[float]] = {}
    for scores in tasks.values():
        for score in scores:
            values.setdefault(score["name"], []).append(score["value"])
    whole = {name: own for name, own in values.items() if len(own) == len(tasks) > 1}
    means = [{"name": name, "value": math.fsum(own) / len(own), "half": None} for name, own in whole.items()]
    return {("mean", f"over {len(tasks)} tasks"): means} if means else {}


def _of_run(folder: Path) -> Iterator[Named]:
    records = read_evaluations(folder)
    last = {record["stage"]: record["step"] for record in records}
    for record in records:
        if record["stage"] == START or record["step"] == last[record["stage"]]:
            items = run_items_file(folder, record["stage"], record["step"], record["suite"])
            yield point_name(record), with_items(Results.from_json(json.dumps(record["results"])), items)


def _of_files(files: Sequence[Path], given: Path) -> Iterator[Named]:
    for file in files:
        try:
            results = read_results(file)
        except InputError:
            if file == given:
                raise
            continue  # a folder of results may have other JSON files
        yield str(results.about.get("model") or file.stem), results
