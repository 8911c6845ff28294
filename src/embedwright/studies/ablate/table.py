"""Compares the arms of a study with its baseline, and shows this beside the paper's numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from embedwright.evaluation.compare.compare import MEAN, Candidate, compare
from embedwright.evaluation.results import Results
from embedwright.studies.ablate.file import Ablation
from embedwright.training.plan import columns

HEAD = ["arm", "seeds", "score", "difference", "95 % interval", "p (Holm)", "smallest visible", "claim"]


def compared(said: Ablation, scores: Mapping[str, Mapping[int, Results]]) -> dict[str, Any] | None:
    """Compares each arm with the baseline, over its seeds and items. None while there are no two arms to compare.

    If an arm lacks seeds and all others are whole, it is compared on the seeds that it shares with the baseline.
    """
    arms = [said.baseline, *(arm for arm in scores if arm != said.baseline)]
    candidates = [
        Candidate(arm, {seed: [found] for seed, found in scores[arm].items()}) for arm in arms if arm in scores
    ]
    if len(candidates) < 2 or candidates[0].name != said.baseline:
        return None
    found: dict[str, Any] = json.loads(compare(candidates, equivalent=said.equivalent).to_json())
    return found


def render(study: Mapping[str, Any]) -> str:
    """Returns the table of a study, as `study.json` has it. A smoke test has no numbers to show."""
    if study["smoke"]:
        lines = [f"{study['study']}: smoke test of {len(study['cells'])} cells; its scores mean nothing"]
    else:
        lines = [*_table(study), *_rates(study["trials"])]
    if study["missing"]:
        lines.append(f"NOT WHOLE, missing cells: {', '.join(study['missing'])}")
    return "\n".join([*lines, *(f"{name}: {reason}" for name, reason in study["failed"].items())])


def _table(study: Mapping[str, Any]) -> list[str]:
    """Returns one line an arm. Differences are of the mean over tasks, or of the only task."""
    scores: dict[str, list[float]] = {}
    seeds = {cell["seed"] for cell in study["cells"]}  # the shared stages have those of the trials, too
    shared = [run for run in study.get("shared_stages", ()) if run["seed"] in seeds]
    for cell in [*shared, *study["cells"]]:
        scores.setdefault(cell["arm"], []).append(100 * cell["mean"])
    if not scores:
        return []
    compared = study["comparison"] or {"rows": [], "baseline": study["baseline"]}
    means = {row["candidate"]: row for row in compared["rows"] if row["kind"] == "tasks"}
    rows = means or {row["candidate"]: row for row in compared["rows"]}
    paper = study["paper"] or {"scores": {}}
    head = [*HEAD, *(["paper", "its difference"] if study["paper"] else [])]
    lines = [head]
    for arm, some in scores.items():
        cells = [arm, str(len(some)), f"{fmean(some):.2f}", *_difference(rows.get(arm, {}))]
        if study["paper"]:
            theirs, base = (paper["scores"].get(name) for name in (arm, study["baseline"]))
            known = theirs is not None and base is not None and arm != study["baseline"]
            cells += [_number(theirs, ".2f"), f"{theirs - base:+.2f}" if known else "-"]
        lines.append(cells)
    shown = [
        f"{study['study']}: {study['scored_on']}, in points, differences from {study['baseline']}",
        *columns(lines),
    ]
    if means:
        shown += ["each task:", *_tasks([row for row in compared["rows"] if row["task"] != MEAN])]
    if study["paper"]:
        shown.append(f"paper: {paper['what']} ({paper['source']})")
    return shown


def _tasks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns one line for each task and arm: what the mean hides where one task falls and another rises."""
    lines = [["task", "metric", *HEAD[:1], *HEAD[2:]]]
    for row in sorted(rows, key=lambda row: row["task"]):
        lines.append([row["task"], row["metric"], row["candidate"], f"{row['score']:.2f}", *_difference(row)])
    return columns(lines)


def _difference(row: Mapping[str, Any]) -> list[str]:
    known = row.get("low") is not None
    interval = f"{row['low']:+.2f} to {row['high']:+.2f}" if known else "-"
    numbers = [_number(row.get(key), form) for key, form in (("p_holm", ".3f"), ("smallest", ".2f"))]
    return [_number(row.get("difference"), "+.2f"), interval, *numbers, row.get("claim") or "-"]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _rates(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns one line an arm: the score of each rate that was tried, the best one marked."""
    by_arm: dict[str, dict[float, float | None]] = {}
    for trial in trials:
        by_arm.setdefault(trial["arm"], {})[trial["rate"]] = 100 * trial["mean"] if "mean" in trial else None
    lines = []
    for arm, found in by_arm.items():
        scores = {rate: score for rate, score in found.items() if score is not None}
        tried = ", ".join(f"x{rate:g} {_score(score)}" for rate, score in sorted(found.items()))
        line = f"rates of {arm}: {tried}"
        if scores:
            best = max(scores, key=lambda rate: (scores[rate], rate == 1))
            edge = ", at the edge of the grid" if best in (min(found), max(found)) else ""
            line += f"; best x{best:g}{edge}, default {_score(scores.get(1))}"
        lines.append(line)
    return lines


def _score(value: float | None) -> str:
    return "failed" if value is None else f"{value:.2f}"
