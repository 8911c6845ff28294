"""`curves.png`: the loss, learning rate, gradient norm and scores of a run over all its steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedwright.files import whole_file
from embedwright.training.run.track import read_records

logger = logging.getLogger(__name__)

_PANELS = {"loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm"}
_NOISY = ("loss", "grad_norm")
_MOST_TASKS = 10  # that have a line each; of more, every suite's mean is drawn

Points = dict[str, list[tuple[int, float]]]  # label -> (step of the whole run, score)


def write_curves(out: Path) -> None:
    """Draw `out/curves.png` anew from `metrics.jsonl` and `evaluations.jsonl`; nothing where no step is done yet.

    Without matplotlib, a warning says what to install: a run does not end for want of a picture.
    """
    metrics = read_records(out / "metrics.jsonl")
    if not metrics:
        return
    try:
        drawn = figure(metrics, read_records(out / "evaluations.jsonl"))
    except ImportError as error:
        logger.warning("curves.png is not drawn (%s): pip install 'embedwright[train]'", error)
        return
    with whole_file(out / "curves.png") as temp:
        drawn.savefig(temp, format="png", dpi=110)


def figure(metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> Any:
    """A matplotlib Figure with a panel for each of loss, learning rate and gradient norm, and one for scores if any.

    A step without a number (it was not finite) leaves a gap. A stage of 100 steps or more has its running mean drawn
    over loss and norm. Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure  # not pyplot, whose state is the caller's

    begins = _begins(metrics)
    scores = _scores(evaluations, begins)
    rows = len(_PANELS) + bool(scores)
    drawn = Figure(figsize=(9, 2.2 * rows), layout="constrained")
    panels = drawn.subplots(rows, sharex=True)
    for axes, (key, label) in zip(panels, _PANELS.items(), strict=False):
        values = np.array([math.nan if m.get(key) is None else m[key] for m in metrics], dtype=np.float64)
        lines = _means(values, begins) if key in _NOISY else []
        axes.plot(np.arange(1, len(values) + 1), values, color="tab:blue", lw=0.8, alpha=0.35 if lines else 1.0)
        for window, steps, mean in lines:
            axes.plot(steps, mean, color="tab:blue", lw=1.4, label=f"mean of {window} steps")
        if lines:
            axes.legend(handles=axes.lines[-1:], fontsize=7)
        axes.set_ylabel(label)
    for label, points in scores.items():
        panels[-1].plot(*zip(*points, strict=True), marker="o", ms=3, lw=1, label=label)
    if scores:
        panels[-1].set_ylabel("score")
        panels[-1].legend(fontsize=7, ncols=2)
    for name, begin in begins.items():
        panels[0].text(begin, 1.02, f" {name}", transform=panels[0].get_xaxis_transform(), fontsize=8)
        for axes in panels:
            axes.axvline(begin, color="0.6", lw=0.8, ls=":")
    panels[-1].set_xlabel("step, all stages")
    return drawn


def _begins(metrics: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The steps done before each stage, in their order."""
    begins: dict[str, int] = {}
    for number, record in enumerate(metrics):
        begins.setdefault(record["stage"], number)
    return begins


def _scores(evaluations: Sequence[Mapping[str, Any]], begins: Mapping[str, int]) -> Points:
    places = {"start": 0, **begins}
    tasks: Points = {}
    means: Points = {}
    for record in evaluations:
        if record["stage"] not in places:
            continue  # no step of that stage is done: a run that went back to an older checkpoint
        place, suite = places[record["stage"]] + record["step"], record["results"]["suite"]
        rows = record["results"]["rows"]
        for row in rows:
            tasks.setdefault(f"{suite}: {row['task']} ({row['metric']})", []).append((place, row["value"]))
        mean = sum(row["value"] for row in rows) / len(rows)
        means.setdefault(f"{suite}: mean of {len(rows)} tasks", []).append((place, mean))
    return tasks if len(tasks) <= _MOST_TASKS else means


def _means(values: NDArray[np.float64], begins: Mapping[str, int]) -> list[tuple[int, NDArray[Any], NDArray[Any]]]:
    """Of each long enough stage: how many steps are averaged over, the steps, the mean of the last so many of each.

    Steps without a number do not count.
    """
    window = max(20, len(values) // 100)
    lines = []
    for begin, end in zip(begins.values(), [*list(begins.values())[1:], len(values)], strict=True):
        if end - begin < 5 * window:
            continue
        part = values[begin:end]
        known = np.isfinite(part)
        sums, counts = (np.cumsum(np.concatenate([[0.0], each])) for each in (np.where(known, part, 0.0), known))
        number = counts[window:] - counts[:-window]
        mean = np.divide(sums[window:] - sums[:-window], number, out=np.full(len(number), math.nan), where=number > 0)
        lines.append((window, begin + np.arange(window, end - begin + 1), mean))
    return lines
