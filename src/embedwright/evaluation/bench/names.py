"""What a name of MTEB stands for, and the name under which mteb files a model's results."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import mteb
from mteb.abstasks import AbsTask
from mteb.benchmarks import Benchmark

from embedwright.errors import InputError
from embedwright.host import restored_rng


@dataclass(frozen=True)
class Chosen:
    """What a name stands for: the tasks of a benchmark, or one task."""

    name: str
    tasks: tuple[AbsTask, ...]
    benchmark: Benchmark | None = None


def choose(name: str) -> Chosen:
    """Returns the MTEB benchmark or task of this name. Raises InputError with the nearest names; nothing is loaded."""
    known, tasks = _known()
    if name in known:
        return Chosen(known[name].name, tuple(known[name].tasks), known[name])
    if name in tasks:
        return Chosen(name, (tasks[name],))
    lower = {known.lower(): known for known in (*known, *tasks)}
    near = [lower[found] for found in get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
    raise InputError(
        f"mteb {mteb.__version__} knows no benchmark or task {name!r}"
        + (f": did you mean {', '.join(map(repr, near))}?" if near else "")
    )


@cache
def _known() -> tuple[dict[str, Benchmark], dict[str, AbsTask]]:
    """Returns all benchmarks and tasks of mteb by their names and aliases, in a second."""
    with restored_rng():  # each task seeds them when it is made
        known = {benchmark.name: benchmark for benchmark in mteb.get_benchmarks()}
        known |= {alias: benchmark for benchmark in known.values() for alias in benchmark.aliases or ()}
        return known, {task.metadata.name: task for task in mteb.get_tasks(exclude_superseded=False)}


def name_of(model: str) -> str:
    """Returns the name under which mteb files the results of a model: `org/name`, as a hub id is."""
    inner = model.rpartition("#")[2] if "://" in model else model.partition("@")[0]
    if "://" not in model and Path(model).expanduser().exists():
        parts = Path(model).expanduser().resolve().parts
        inner = parts[-2] if parts[-1] == "model" and len(parts) > 2 else parts[-1]
    inner = inner.strip("/").replace(" ", "_")
    return inner if inner.count("/") == 1 else f"embedwright/{inner.replace('/', '-')}"
