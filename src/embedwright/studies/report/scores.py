"""The scores of a report: those of a run's evaluations and of result files, suite by suite and task by task."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from embedwright.errors import InputError, NotFoundError
from embedwright.evaluation.compare.bootstrap import half_interval
from embedwright.evaluation.compare.read import RUN, STUDY, read_candidates, result_folders
from embedwright.evaluation.results import Result, Results, run_items_file, with_items
from embedwright.studies.report.anchors import MEAN, published
from embedwright.studies.report.run import point_name
from embedwright.training.run.scores import read_evaluations

Score = dict[str, Any]


class Scored(NamedTuple):
    """A model, or a point of a run, and its results: for each training seed a list of them, one a suite."""

    name: str
    seeds: Sequence[Sequence[Results]]


def read_scores(run: Path | None, others: Sequence[Path]) -> list[Scored]:
    """Returns the scores of a run before training and at the end of each stage, then those of the `others`.

    These are what `embedwright compare` reads, and folders with the results of several models. Raises InputError for a
    path without results.
    """
    given: list[str] = []
    for path in others:
        if not path.exists():
            raise NotFoundError(f"no such run, result file or folder: {path}")
        one = path.suffix == ".json" if path.is_file() else any((path / name).is_file() for name in (RUN, STUDY))
        found = [path] if one else [] if path.is_file() else result_folders(path)
        if not found:
            raise InputError(
                f"{path} holds neither a run (recipe.yaml) nor results; those of a model are written by "
                "`embedwright eval MODEL SUITE --out FILE` and by `embedwright bench`"
            )
        given += map(str, found)
    candidates = read_candidates(given) if given else []
    return [*_points(run), *(Scored(each.name, [*each.seeds.values()]) for each in candidates)]


def _points(run: Path | None) -> Iterator[Scored]:
    records = [] if run is None else read_evaluations(run)
    last = {record["stage"]: record["step"] for record in records}
    for record in records:
        if run is not None and record["step"] == last[record["stage"]]:
            items = run_items_file(run, record["stage"], record["step"], record["suite"])
            yield Scored(point_name(record), [[with_items(Results.from_json(json.dumps(record["results"])), items)]])


def score_tables(scored: Iterable[Scored]) -> list[dict[str, Any]]:
    """Returns one table a suite: `suite`, the ends of its axis, and for each task the scores to show side by side.

    The last row is the mean over the tasks, of those who have all tasks of the suite.
    """
    suites: dict[str, dict[tuple[str, str], list[Score]]] = {}
    for name, seeds in scored:
        own: dict[tuple[str, str, str], list[Result]] = {}
        for results in (results for seed in seeds for results in seed):
            for row in results.rows:
                own.setdefault((results.suite, row.task, row.metric), []).append(row)
        for (suite, task, metric), rows in own.items():
            if len(rows) == len(seeds):  # else a seed lacks the task
                value = math.fsum(row.value for row in rows) / len(rows)
                score = {"name": name, "value": value, "half": half_interval(suite, rows)}
                suites.setdefault(suite, {}).setdefault((task, metric), []).append(score)
    return [_table(suite, tasks) for suite, tasks in suites.items()]


def _table(suite: str, tasks: Mapping[tuple[str, str], list[Score]]) -> dict[str, Any]:
    """Adds the mean and published scores, and places all on an axis whose ends, in tenths, hold their intervals."""
    benchmark, anchors = published(suite, {task for task, _ in tasks})
    groups: list[dict[str, Any]] = []
    for (task, metric), own in {**tasks, **_mean_row(tasks)}.items():
        best = max((score["value"] for score in own if math.isfinite(score["value"])), default=None)
        scores = [{**score, "best": len(own) > 1 and score["value"] == best, "source": ""} for score in own]
        beside = [{**anchor, "half": None, "best": False} for anchor in anchors.get(task, [])]
        groups.append({"task": task, "metric": metric, "scores": scores + beside})
    every = [score for group in groups for score in group["scores"]]
    placed = [score for score in every if math.isfinite(score["value"])]  # any other has its row, and no place
    low = math.floor(10 * min((score["value"] - (score["half"] or 0) for score in placed), default=0)) / 10
    high = math.ceil(10 * max((score["value"] + (score["half"] or 0) for score in placed), default=1)) / 10
    width = (high - low) or 0.1
    for score in placed:
        half = score["half"] or 0
        score |= {"at": (score["value"] - low) / width, "from": (score["value"] - half - low) / width}
        score["span"] = 2 * half / width
    sources = sorted({score["source"] for score in every} - {""})
    title = f"{benchmark}, {suite}" if benchmark not in ("", suite) else suite
    return {"suite": title, "low": low, "high": low + width, "tasks": groups, "sources": sources}


def _mean_row(tasks: Mapping[tuple[str, str], list[Score]]) -> dict[tuple[str, str], list[Score]]:
    values: dict[str, list[float]] = {}
    for scores in tasks.values():
        for score in scores:
            values.setdefault(score["name"], []).append(score["value"])
    whole = {name: own for name, own in values.items() if len(own) == len(tasks) > 1}
    means = [{"name": name, "value": math.fsum(own) / len(own), "half": None} for name, own in whole.items()]
    return {(MEAN, f"over {len(tasks)} tasks"): means} if means else {}
