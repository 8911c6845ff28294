"""The evaluator of `embedwright compress`: what each step costs and gains, as one record, one table, one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedwright.compress.chain import ORIGINAL, Say
from embedwright.compress.measure import measured
from embedwright.compress.picture import Point, panels
from embedwright.compress.states import Texts
from embedwright.encoders.open import open_encoder
from embedwright.evaluation.compare.bootstrap import half_interval
from embedwright.evaluation.compare.compare import MEAN, Candidate, Difference, compare
from embedwright.evaluation.results import Results, Row, read_results, write_results
from embedwright.evaluation.suite import Suite, evaluate
from embedwright.evaluation.tasks import digest
from embedwright.files import file_name
from embedwright.locate import find
from embedwright.model.embedder import Embedder
from embedwright.model.formats.detect import history_of
from embedwright.model.formats.families import split_family

Record = dict[str, Any]


def evaluated(name: str, models: Mapping[str, str], suite: Suite, texts: Texts, say: Say) -> Record:
    """Measures and scores each model and compares it with the first one.

    `models` maps the name of a step to its model. Speed is that of encoding `texts` as documents, in tokens as the
    first model counts them. What is done is kept beside the steps, where a call after a stop goes on if it asks for the
    same suite and texts.

    Returns plain JSON: how it was made, and a row for each model with `step`, `size` (bytes of its folder),
    `parameters`, `tokens_per_second`, `peak_memory` (bytes of a process), `mean` and `tasks` in points (x100) with half
    their 95 % intervals, and the paired `difference` of each from the first model.
    """
    first, last = models[ORIGINAL], Path([*models.values()][-1])
    found: dict[str, Results] = {}
    asked = digest([suite.model_dump(mode="json"), texts.described]).removeprefix("sha256 ")
    for number, (step, model) in enumerate(models.items()):
        file = last.parent / "report" / f"{number}-{file_name(suite.name)}-{asked}.json"
        if not file.is_file():
            say(f"measuring and scoring: {step}")
            facts = {"size": size_of(model), **measured(model, texts.read())}
            results = evaluate(open_encoder(model), suite, name=step, progress=say)
            file.parent.mkdir(exist_ok=True)
            write_results(file, replace(results, about=results.about | {"measured": facts}))
        found[step] = read_results(file)
    tokens = len(Embedder.load(first).tokenize(texts.read()).ids_T)
    rows = compare([Candidate(step, {None: [results]}) for step, results in found.items()]).rows
    about = {key: said for key, said in found[ORIGINAL].about.items() if key not in ("measured", "fingerprint")}
    return {
        "name": name,
        "about": about | {"model": Path(first).name},
        "suite": suite.name,
        "texts": texts.described,
        "tokens": tokens,
        "history": history_of(last) or [],
        "rows": [_row(step, own, [r for r in rows if r.candidate == step], tokens) for step, own in found.items()],
    }


def size_of(model: str) -> int:
    """Returns the bytes of a model's folder, without hidden files; or of its one file."""
    place = find(split_family(model)[1]).path
    return sum(file.stat().st_size for file in (place, *place.rglob("[!.]*")) if file.is_file())


def _row(step: str, results: Results, differences: Sequence[Difference], tokens: int) -> Record:
    facts = results.about["measured"]
    by_task = {row.task: _difference(row) for row in differences if row.task != MEAN}
    means = [_difference(row) for row in differences if row.task == MEAN and row.kind == "tasks"]
    tasks = {
        row.task: {"metric": row.metric, "score": 100 * row.value, "half": None, "difference": by_task.get(row.task)}
        for row in results.rows
    }
    for row in results.rows:
        if half := half_interval(results.suite, [row]):
            tasks[row.task]["half"] = 100 * half
    return {
        "step": step,
        "size": facts["size"],
        "parameters": facts["parameters"],
        "tokens_per_second": round(tokens / min(facts["seconds"]), 1),
        "peak_memory": facts["peak_memory"],
        "mean": 100 * sum(row.value for row in results.rows) / len(results.rows),
        "difference": next(iter([*means, *by_task.values()]), None),
        "tasks": tasks,
    }


def _difference(row: Difference) -> dict[str, float | None]:
    return {"value": row.difference, "low": row.low, "high": row.high}


def difference_text(difference: Mapping[str, Any] | None) -> str:
    """Writes a difference. One whose 95 % interval covers zero is called `none`."""
    if difference is None:
        return ""
    value, low, high = (difference[key] for key in ("value", "low", "high"))
    if low is None:
        return f"{value:+.2f}, no interval"
    return "none" if low <= 0 <= high else f"{value:+.2f}"


def table(record: Record) -> list[Row]:
    """Returns the record as the rows of a table, for people."""
    rows: list[Row] = []
    for row in record["rows"]:
        memory, difference = row["peak_memory"], row["difference"]
        known = difference is not None and difference["low"] is not None
        shown: Row = {
            "step": row["step"],
            "size, MB": f"{row['size'] / 1e6:,.1f}",
            "parameters, M": f"{row['parameters'] / 1e6:,.1f}",
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "peak memory, MB": "not counted" if memory is None else f"{memory / 1e6:,.0f}",
            "mean": f"{row['mean']:.2f}",
            "difference": difference_text(difference),
            "95 % interval": f"{difference['low']:+.2f} to {difference['high']:+.2f}" if known else "",
        }
        for name, task in row["tasks"].items():
            half, change = "" if task["half"] is None else f" ± {task['half']:.1f}", difference_text(task["difference"])
            shown[f"{name} ({task['metric']})"] = f"{task['score']:.1f}{half}" + (f" ({change})" if change else "")
        rows.append(shown)
    return rows


def picture(records: Sequence[Record]) -> str:
    """Returns quality against size and quality against speed as SVG, the original once."""
    rows = [(record["name"], row) for record in records for row in record["rows"]]
    shown = [rows[0], *((name, row) for name, row in rows if row["step"] != ORIGINAL)]
    several = len(records) > 1
    names = [f"{name}: {row['step']}" if several and row["step"] != ORIGINAL else row["step"] for name, row in shown]

    def points(key: str, unit: float) -> list[Point]:
        return [Point(row[key] / unit, row["mean"], *_ends(row)) for _, row in shown]

    title = "Each step: mean score, with the 95 % interval of its difference from the original"
    plots = {"size on disk, MB": points("size", 1e6), "tokens a second": points("tokens_per_second", 1)}
    return panels(title, names, plots)


def _ends(row: Record) -> tuple[float | None, float | None]:
    """Returns the interval of the difference, laid around the row's own mean."""
    difference = row["difference"]
    if difference is None or difference["low"] is None:
        return None, None
    original = row["mean"] - difference["value"]
    return original + difference["low"], original + difference["high"]
