"""Compares the arms of a study with its baseline, and shows this beside the paper's numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from statistics import fmean
from typing import Any

import numpy as np

from embedwright.evaluation.compare.compare import (
    DRAWS,
    MEAN,
    NONE_SHOWN,
    SEED,
    Candidate,
    Comparison,
    Difference,
    claimed,
    differences,
)
from embedwright.evaluation.compare.statistics import half_width, of_mean
from embedwright.evaluation.metrics import READOUTS
from embedwright.evaluation.results import Results
from embedwright.training.plan import columns

HEAD = ["arm", "seeds", "score", "difference", "95 % interval", "p (Holm)", "smallest visible", "claim"]


Scores = Mapping[str, Mapping[int, Results]]  # of each arm, by seed


def compared(sides: Sequence[tuple[str, Scores]], equivalent: float | None) -> list[dict[str, Any] | None]:
    """Compares all arms of each side with its baseline, over the seeds that both have and their items.

    The p-values of all sides are corrected together. A side is None while no arm shares a seed with its baseline.
    """
    found = [_differences(baseline, scores, equivalent) for baseline, scores in sides]
    rows = iter(claimed([row for own, _ in found for row in own], equivalent))
    told: list[dict[str, Any] | None] = []
    for (baseline, _), (own, left_out) in zip(sides, found, strict=True):
        whole = Comparison(baseline, tuple(islice(rows, len(own))), left_out, equivalent, DRAWS, SEED)
        told.append(json.loads(whole.to_json()) if own else None)
    return told


def _differences(baseline: str, scores: Scores, equivalent: float | None) -> tuple[list[Difference], tuple[str, ...]]:
    ours = scores.get(baseline, {})
    together: dict[tuple[int, ...], list[str]] = {}
    for arm in scores:
        if arm != baseline and (shared := tuple(seed for seed in ours if seed in scores[arm])):
            together.setdefault(shared, []).append(arm)
    rows: list[Difference] = []
    left_out: list[str] = []
    for shared, arms in together.items():
        sides = [Candidate(arm, {seed: [scores[arm][seed]] for seed in shared}) for arm in (baseline, *arms)]
        found, reasons = differences(sides, equivalent)
        rows += found
        left_out += reasons
    return rows, tuple(left_out)


def render(study: Mapping[str, Any]) -> str:
    """Returns the table of a study, as `study.json` has it. A smoke test has no numbers to show."""
    if study["smoke"]:
        lines = [f"{study['study']}: smoke test of {len(study['cells'])} cells; its scores mean nothing"]
    else:
        lines = [*_table(study), *_readouts(_runs(study), study["baseline"]), *_rates(study)]
    if study["missing"]:
        lines.append(f"NOT WHOLE, missing cells: {', '.join(_missing(study))}")
    return "\n".join([*lines, *(f"{name}: {reason}" for name, reason in study["failed"].items())])


def _missing(study: Mapping[str, Any]) -> list[str]:
    """Returns the missing cells, `ARM/SEED`; `ARM/*` where no cell of the arm has run."""
    ran = {cell["arm"] for cell in study["cells"]}
    arms = ((cell, cell.rpartition("/")[0]) for cell in study["missing"])
    return list(dict.fromkeys(cell if arm in ran else f"{arm}/*" for cell, arm in arms))


def _runs(study: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the cells, after the shared stages of their seeds: those of the trials are no row of a table."""
    seeds = {cell["seed"] for cell in study["cells"]}
    return [*(run for run in study.get("shared_stages", ()) if run["seed"] in seeds), *study["cells"]]


def _table(study: Mapping[str, Any]) -> list[str]:
    """Returns one line an arm. Differences are of the mean over tasks, or of the only task."""
    scores: dict[str, list[float]] = {}
    for cell in _runs(study):
        scores.setdefault(cell["arm"], []).append(100 * cell["mean"])
    if not scores:
        return []
    compared = study["comparison"] or {"rows": [], "baseline": study["baseline"]}
    rows = {row["candidate"]: row for row in _main(compared["rows"])}
    means = any(row["kind"] == "tasks" for row in rows.values())
    paper = study["paper"] or {"scores": {}}
    head = [*HEAD, *(["paper", "its difference"] if study["paper"] else [])]
    lines = [head]
    for arm, some in scores.items():
        row = rows.get(arm, {})
        seeds = len(_shared(study, arm, study["baseline"])) if row else len(some)
        cells = [arm, str(seeds), f"{row.get('score', fmean(some)):.2f}", *_difference(row)]
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
    for pair in study.get("pairs", ()):
        row = _main(pair["rows"])[-1]
        seeds = len(_shared(study, row["candidate"], pair["baseline"]))
        told = columns([["", *HEAD[1:]], [row["candidate"], str(seeds), f"{row['score']:.2f}", *_difference(row)]])
        shown += [f"against {pair['baseline']}:", *told]
    sides = (study["comparison"], *study.get("pairs", ()))
    shown += dict.fromkeys(f"left out: {reason}" for side in sides if side for reason in side["left_out"])
    every = [row for side in sides if side for row in side["rows"]]
    if corrected := sum(row["p"] is not None for row in every):
        shown.append(f"p is corrected for the {corrected} comparisons of this study (Holm)")
    bare = dict.fromkeys(f"{task} of {row['candidate']}" for row in every for task in row["without"])
    if bare:
        shown.append(f"intervals without items, which are not kept: {', '.join(bare)}")
    if rows:
        shown += _could_see(study, [*rows.values()])
    if study["paper"]:
        shown.append(f"paper: {paper['what']} ({paper['source']})")
    return shown


def _shared(study: Mapping[str, Any], *arms: str) -> set[int]:
    """Returns the seeds that all these arms have."""
    runs = _runs(study)
    return set.intersection(*({run["seed"] for run in runs if run["arm"] == arm} for arm in arms))


def _main(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the rows of the mean over tasks, or of the only task."""
    return [row for row in rows if row["kind"] == "tasks"] or list(rows)


def _could_see(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says what a study of so many seeds could have found, and what its intervals do not cover."""
    common = {row["candidate"]: len(_shared(study, row["candidate"], study["baseline"])) for row in rows}
    lines = []
    for count in sorted({*common.values()}):
        arms = [row for row in rows if common[row["candidate"]] == count]
        seen = [row["smallest"] for row in arms if row["smallest"] is not None]
        which = "" if len({*common.values()}) == 1 else f" ({', '.join(row['candidate'] for row in arms)})"
        if count < 2:
            lines.append(
                f"one seed{which}: an interval covers the items of these runs alone. Another seed may differ by more: "
                "nothing is claimed of the arms"
            )
        elif seen:
            span = f"{min(seen):.2f}" if len(seen) == 1 else f"{min(seen):.2f} to {max(seen):.2f}"
            lines.append(
                f"{count} pairs of seeds{which}: a true difference of {span} points, tested alone, is found "
                "in four cases of five"
            )
    return lines


def _readouts(cells: Sequence[Mapping[str, Any]], baseline: str) -> list[str]:
    """Returns one line for each read-out of a retrieval task and arm, with intervals over the seeds in pairs."""
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for cell in cells:
        for task, details in cell.get("details", {}).items():
            for name in READOUTS:
                if name in details:
                    found.setdefault((task, name), {}).setdefault(cell["arm"], {})[cell["seed"]] = 100 * details[name]
    lines = [["task", "read-out", "arm", "mean", "difference", "95 % interval"]]
    for (task, name), arms in found.items():
        for arm, own in arms.items():
            ours = arms.get(baseline, {})
            change = np.array([own[seed] - ours[seed] for seed in own if seed in ours and arm != baseline])
            half = half_width([of_mean(change)]) if len(change) > 1 else None
            interval = "-" if half is None else f"{change.mean() - half:+.2f} to {change.mean() + half:+.2f}"
            mean = f"{change.mean():+.2f}" if len(change) else "-"
            lines.append([task, name, arm, f"{fmean(own.values()):.2f}", mean, interval])
    return ["read-outs, x100, intervals over seeds, no claims:", *columns(lines)] if found else []


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
    claim = row.get("claim") or "-"
    if "seeds" not in row.get("over", "seeds") and claim not in ("-", NONE_SHOWN):
        claim += ", these runs"  # with one seed, the training itself may have made the difference
    return [_number(row.get("difference"), "+.2f"), interval, *numbers, claim]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def grid(study: Mapping[str, Any]) -> list[float]:
    """Returns the factors of the rates that each arm tries, rising. None if the study chooses no rates."""
    return sorted({*study.get("rates", ()), *(trial["rate"] for trial in study["trials"])})


def _rates(study: Mapping[str, Any]) -> list[str]:
    """Returns one line an arm: the score of each rate, and the best one when all have been tried."""
    factors = grid(study)
    by_arm: dict[str, dict[float, float | None]] = {}
    for trial in study["trials"]:
        by_arm.setdefault(trial["arm"], {})[trial["rate"]] = trial.get("mean")
    lines = []
    for arm, found in by_arm.items():
        told = dict.fromkeys(factors, "not run")
        told |= {rate: "failed" if score is None else f"{100 * score:.2f}" for rate, score in found.items()}
        line = f"rates of {arm}: {', '.join(f'x{rate:g} {score}' for rate, score in told.items())}"
        scores = {rate: score for rate, score in found.items() if score is not None}
        if scores and len(found) == len(factors):
            best = max(scores, key=lambda rate: (scores[rate], rate == 1))
            edge = ", at the edge of the grid" if best in (factors[0], factors[-1]) else ""
            line += f"; best x{best:g}{edge}, default {told.get(1, 'not run')}"
        lines.append(line)
    return lines
