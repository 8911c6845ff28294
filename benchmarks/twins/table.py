"""The tables of the twins for docs/results.md, from the JSON that run.py writes: `python table.py twins.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

TOLERATED, LOST = -0.5, -1.0  # points: of the difference at equal examples; of a family's whole interval
OVER = 1.02  # of the seconds: a cell that took more is named
SYSTEMS = {"ours": "embedwright", "st": "sentence-transformers"}
Spec = Mapping[str, Any]
HEAD = ["pair", "seeds", "score", "against", "difference", "95 % interval", "smallest visible", "verdict"]


def page(folder: Path) -> list[str]:
    """Returns the section of docs/results.md: the tables of all files in `folder`, or that nothing was run."""
    files = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    if any(study["smoke"] for study in files):
        sys.exit(f"{folder}: a smoke test is not shown")
    said = "Not run: both systems on the same decoder, rows and suite ([twins](../benchmarks/twins/README.md))."
    return [line for study in files for line in render(study)] or ["## Twins\n", said, ""]


def render(study: Spec) -> list[str]:
    lines = [f"## Twins: `{study['name']}`\n"]
    if study["smoke"]:
        lines.append("SMOKE TEST: these numbers mean nothing.\n")
    lines.append(
        f"Both systems on the same decoder, rows and suite, `{study['suite']}` "
        "([how, and what may be unfair](../benchmarks/twins/README.md)). Points; scores are means over families of "
        "tasks, intervals are over paired seeds and items.\n"
    )
    for name, test in study["tests"].items():
        cells = [cell for cell in study["cells"] if cell["id"].startswith(f"{name}/")]
        length = "equal examples" if test["seconds"] is None else f"equal wall-clock, {test['seconds']:,.0f} s each"
        lines.append(f"### {name.upper()}, {length}\n")
        missing = [cell for cell in study["missing"] if cell.startswith(f"{name}/")]
        if not cells:
            lines.append(f"Not run: {len(missing)} cells.\n")
            continue
        lines += verdicts(name, test, study["comparisons"])
        lines += [*took(test, [cell for cell in cells if not cell["trial"] and "failed" not in cell])]
        lines += [*trials([cell for cell in cells if cell["trial"]])]
        if missing:
            lines.append(f"Not run: {', '.join(missing)}.\n")
    if failed := [f"{cell['id']} ({cell['failed']})" for cell in study["cells"] if "failed" in cell]:
        lines.append(f"Failed: {', '.join(failed)}.\n")
    if len(states := {cell["code"] for cell in study["cells"] if "code" in cell}) > 1:
        lines.append(f"The cells ran on {len(states)} states of the code.\n")
    machines = {
        json.dumps([cell[key] for key in ("machine", "versions")]): cell for cell in study["cells"] if "machine" in cell
    }
    for cell in machines.values():
        versions = ", ".join(f"{name} {number}" for name, number in cell["versions"].items())
        lines.append(f"On {cell['machine']['threads']} threads of {cell['machine']['processor']}; {versions}.\n")
    return lines


def verdicts(name: str, test: Spec, comparisons: Sequence[Spec]) -> list[str]:
    """Returns each pair's difference in the macro mean and what the test says of it, then the families."""
    rows, families = [HEAD], [["pair", "family", "difference", "95 % interval", "lost"]]
    for ours, other in test["pairs"]:
        pair = f"{called(ours)} - {called(other)}"
        found = [c for c in comparisons if (c["test"], c["corner"], c["baseline"]) == (name, ours, other)]
        if not found:
            rows.append([pair, "0", *["-"] * 5, "not run"])
            continue
        mean, parts = macro_and_families(found[0]["rows"])
        smallest = "-" if mean["smallest"] is None else f"{mean['smallest']:.2f}"
        scores = [f"{mean[key]:.2f}" for key in ("score", "baseline")]
        rows.append([pair, str(len(found[0]["seeds"])), *scores, *difference(mean), smallest, verdict(test, mean)])
        for family, row in parts.items():
            lost = row["high"] is not None and row["high"] < LOST
            families.append([pair, family, *difference(row), "yes" if lost else "no"])
    return [*markdown(rows), *markdown(families)]


def macro_and_families(rows: Sequence[Spec]) -> tuple[Spec, dict[str, Spec]]:
    """Picks from a comparison the mean over families, and the row of each family: its mean, or its only task."""
    means = {row["kind"]: row for row in rows if row["task"] == "mean"}
    over_tasks = means.pop("tasks", rows[0])
    macro = means.pop("types", over_tasks)  # not there where each family has one task: then both are the same
    return macro, {row["kind"]: row for row in rows if row["task"] != "mean"} | means


def verdict(test: Spec, mean: Spec) -> str:
    """Equal examples: passes if the difference is not below -0.5. Equal seconds: if the interval is above zero."""
    if mean["low"] is None:
        return "no interval"
    if test["seconds"] is not None:
        return "passes" if mean["low"] > 0 else "fails"
    if mean["difference"] < TOLERATED:
        return "fails"
    return "passes" if mean["low"] >= TOLERATED else "passes; its interval reaches below"


def took(test: Spec, cells: Sequence[Spec]) -> list[str]:
    """Returns what the cells of each corner took: medians over seeds, and the largest peak of memory."""
    rows = [["corner", "score", "setting", "steps", "median training s", "start s", "queries/s", "tokens/s", "peak MB"]]
    for corner in dict.fromkeys(cell["corner"] for cell in cells):
        own = [cell for cell in cells if cell["corner"] == corner]
        parts = [cell["took"] for cell in own]
        steps = " + ".join(f"{fmean(counts):.0f}" for counts in zip(*(part["steps"] for part in parts), strict=True))
        row = [called(corner), f"{100 * fmean(cell['macro'] for cell in own):.2f}", setting(own[0]["setting"]), steps]
        row += [f"{median(part[key] for part in parts):,.0f}" for key in ("training", "start")]
        row += [f"{median(part[k] / part['training'] for part in parts):,.1f}" for k in ("queries", "tokens")]
        rows.append([*row, f"{max(part['peak_mb'] for part in parts):,}"])
    over = [c["id"] for c in cells if test["seconds"] is not None and c["took"]["training"] > OVER * test["seconds"]]
    return markdown(rows) + ([f"Took more than their seconds: {', '.join(over)}.\n"] if over else [])


def trials(cells: Sequence[Spec]) -> list[str]:
    """Returns the score of every trial, the losing ones too. The best of a corner is bold; one at an end is named."""
    at_an_end = []
    tried = list(dict.fromkeys(setting(cell["setting"]) for cell in cells))
    rows = [["trials", *tried]]
    for corner in dict.fromkeys(cell["corner"] for cell in cells):
        own = {setting(cell["setting"]): cell for cell in cells if cell["corner"] == corner}
        winner = max((cell for cell in own.values() if "macro" in cell), key=lambda cell: cell["macro"], default=None)
        best = winner and winner["macro"]
        if winner and at_end(winner["setting"], [cell["setting"] for cell in own.values()]):
            at_an_end.append(called(corner))
        scores = [own[name].get("macro", "failed") if name in own else "-" for name in tried]
        shown = [score if isinstance(score, str) else f"{100 * score:.2f}" for score in scores]
        marked = [f"**{text}**" if score == best else text for text, score in zip(shown, scores, strict=True)]
        rows.append([called(corner), *marked])
    return markdown(rows) + (
        [f"The best rate is the last of those tried: {'; '.join(at_an_end)}.\n"] if at_an_end else []
    )


def at_end(best: Spec, tried: Sequence[Spec]) -> bool:
    """Returns whether the best rate is the lowest or highest of several that were tried with its batch and weights."""
    rates = sorted(other["lr"] for other in tried if {**other, "lr": 0} == {**best, "lr": 0})
    return len(rates) > 1 and best["lr"] in (rates[0], rates[-1])


def called(corner: str) -> str:
    system, _, recipe = corner.partition("-")
    return f"{SYSTEMS[system]}, {'our recipe' if recipe == 'ours' else 'plain'}"


def setting(values: Spec) -> str:
    factors = [f"{key} x{values[key]:g}" for key in ("lr", "batch") if values[key] != 1]
    return ", ".join([values["method"], *factors])


def difference(row: Spec) -> list[str]:
    interval = "-" if row["low"] is None else f"{row['low']:+.2f} to {row['high']:+.2f}"
    return [f"{row['difference']:+.2f}", interval]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a table; nothing if there is only its head."""
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *rest, ""] if rest else []


if __name__ == "__main__":
    print("\n".join(render(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
