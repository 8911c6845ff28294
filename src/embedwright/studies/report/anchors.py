"""Published scores that stand beside those of a report: of MTEB's benchmarks and of its single tasks."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from embedwright.config import load_yaml
from embedwright.evaluation import bench
from embedwright.host import restored_rng

ANCHORS = Path(bench.__file__).with_name("anchors.yaml")  # `bench.table` reads it, too, but imports mteb for seconds
MEAN = "mean"

Anchors = dict[str, list[dict[str, Any]]]


def published(suite: str, tasks: Collection[str]) -> tuple[str, Anchors]:
    """Returns the benchmark that has exactly these tasks, or "", and published scores by task and under `mean`.

    A score has `name` (the model), `value` between 0 and 1, and `source`. `suite` is a benchmark, or `mteb <version>`
    as results of `bench` are read; nothing is published of any other suite.
    """
    anchors = load_yaml(ANCHORS)
    if suite not in anchors["benchmarks"] and not suite.startswith("mteb "):
        return "", {}
    benchmark = _benchmark(anchors["benchmarks"], tasks)  # the published mean is over all of its tasks

    def score(model: str, row: dict[str, Any], key: str) -> dict[str, Any]:
        return {"name": model, "value": row["scores"][key] / 100, "source": anchors["sources"][row["source"]]}

    found = {
        task: [score(model, row, task) for model, row in anchors["tasks"].items() if task in row["scores"]]
        for task in tasks
    }
    whole = anchors["benchmarks"].get(benchmark, {})
    return benchmark, found | {MEAN: [score(model, row, "mean over tasks") for model, row in whole.items()]}


@restored_rng()  # a task of mteb seeds the generators when it is made
def _benchmark(names: Collection[str], tasks: Collection[str]) -> str:
    from mteb import get_benchmark

    same = (name for name in names if {task.metadata.name for task in get_benchmark(name).tasks} == set(tasks))
    return next(same, "")
