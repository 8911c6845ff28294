"""Results of `evaluate`: on disk (`write_results`), side by side (`table`) and as text (`render`).

A result file `NAME.json` has the scores and how they were made. `NAME.items.npz` beside it has what each score was
computed from, item by item, so that two models can be compared in pairs. Its arrays are named `<task>/<array>`:

    retrieval, reranking, classification   `score` (N,) whose mean is the main score, and `id` (N,)
    sts, pair                              `cosine` (N,) and `gold` (N,): human scores, or labels of 0 and 1
    clustering                             `cluster` (S, N), one row a run of k-means, and `gold` (N,) class numbers

A classification by F1 has no items, since F1 is not computed from one number a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedwright.errors import InputError, NotFoundError, as_input_error
from embedwright.files import file_name, whole_file, write_text

Row = dict[str, str | float | None]
Items = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Result:
    """The main metric of one task and its other metrics. Higher is better. `items` is not part of the JSON.

    `data` says what was scored: a digest of a local task's data, or the splits and subsets of an MTEB task. Results
    with other `data` cannot be compared. It is empty in results of before it was kept.
    """

    task: str
    kind: str
    metric: str
    value: float
    details: dict[str, float] = field(default_factory=dict)
    items: Items = field(default_factory=dict, compare=False, repr=False)
    data: str = ""


@dataclass(frozen=True, slots=True)
class Results:
    """The result of `evaluate`: one row a task, in the suite's order, and the wall-clock seconds in total.

    `about` says how the scores were made: model, command, machine, versions (`evaluation.about`).
    """

    suite: str
    rows: tuple[Result, ...]
    seconds: float
    about: dict[str, Any] = field(default_factory=dict, compare=False)

    def to_json(self) -> str:
        bare = asdict(replace(self, rows=tuple(replace(row, items={}) for row in self.rows)))
        for row in bare["rows"]:
            del row["items"]
        return json.dumps(bare, indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Results:
        saved = json.loads(text)
        rows = tuple(Result(**row) for row in saved["rows"])
        return cls(saved["suite"], rows, saved["seconds"], dict(saved.get("about", {}).items()))


def items_file(file: Path) -> Path:
    """Returns where the items of the result file `NAME.json` lie: `NAME.items.npz`."""
    return file.with_suffix(".items.npz")


def write_results(file: Path, results: Results) -> None:
    """Writes `file`, and its items beside it if it has any.

    A file of earlier results goes first, then the items are written, then `file`. After a kill there are the earlier
    results, the new ones, or no `file`: never a result beside the items of another.
    """
    file.unlink(missing_ok=True)
    write_items(items_file(file), results)
    write_text(file, results.to_json() + "\n")


def read_results(file: Path) -> Results:
    """Reads what `write_results` wrote, with the items. Raises InputError if `file` is not a result file.

    The scores of a smoke test (`ablate --smoke`) are refused, too: they mean nothing.
    """
    return with_items(read_without_items(file), items_file(file))


def read_without_items(file: Path) -> Results:
    """Does what `read_results` does, and leaves the items where they are."""
    if not file.is_file():
        raise NotFoundError(f"no result file: {file}")
    try:
        results = Results.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not a result file of `embedwright eval`") from error
    if results.about.get("smoke"):
        raise InputError(f"{file} is of a smoke test (`ablate --smoke`): its scores mean nothing and are not shown")
    return results


def run_items_file(run: Path, stage: str, step: int, suite: str) -> Path:
    """Returns where a run folder keeps the items of one record of its `evaluations.jsonl`."""
    return run / "items" / f"{file_name(f'{stage}-{step}-{suite}')}.npz"


def write_items(file: Path, results: Results) -> None:
    """Writes the items of all tasks to one `.npz`. A file of earlier results goes if these have no items."""
    arrays = {f"{row.task}/{name}": array for row in results.rows for name, array in row.items.items()}
    if not arrays:
        file.unlink(missing_ok=True)
        return
    with whole_file(file) as temp, temp.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def with_items(results: Results, file: Path) -> Results:
    """Adds the items that `write_items` wrote to their rows. Rows have none if there is no file."""
    items: dict[str, dict[str, NDArray[Any]]] = {}
    for key, array in read_arrays(file).items():  # an MTEB task's arrays have splits and subsets in their names
        task = max((row.task for row in results.rows if key.startswith(f"{row.task}/")), key=len, default=key)
        items.setdefault(task, {})[key.removeprefix(f"{task}/")] = array
    return replace(results, rows=tuple(replace(row, items=items.get(row.task, {})) for row in results.rows))


def read_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """Reads the arrays of an `.npz` of items; there are none without the file. Raises InputError if it is broken."""
    if not file.is_file():
        return {}
    with (
        as_input_error(file, "holds no items: score again what lies beside it"),
        np.load(file, allow_pickle=False) as stored,
    ):
        return {name: stored[name] for name in stored.files}


def parts_scored(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns the splits and subsets in mteb's scores of a task, as the `data` of its result."""
    return ", ".join(sorted(f"{split}/{part.get('hf_subset')}" for split, parts in scores.items() for part in parts))


def table(columns: Mapping[str, Results]) -> list[Row]:
    """Returns rows `{"task", "metric", <column>: value, ...}`: each task's main metric, and Recall@10 for retrieval.

    Tasks keep the order of the columns. The value is None if a column lacks the task.
    """
    rows: dict[tuple[str, str], Row] = {}
    for name, results in columns.items():
        for result in results.rows:
            shown = {result.metric: result.value}
            if result.kind == "retrieval" and "Recall@10" in result.details:  # else it is the main one
                shown["Recall@10"] = result.details["Recall@10"]
            for metric, value in shown.items():
                empty: Row = {"task": result.task, "metric": metric, **dict.fromkeys(columns)}
                rows.setdefault((result.task, metric), empty)[name] = value
    return list(rows.values())


def render(rows: Sequence[Row]) -> str:
    """Returns `rows` as aligned plain text with a header, four decimals, and `-` for a missing value."""
    if not rows:
        return ""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    # the first two columns are words and align left, numbers align right
    forms = [f"{{:{'<' if place < 2 else '>'}{width}}}" for place, width in enumerate(widths)]
    return "\n".join("  ".join(forms).format(*line) for line in cells)


def _cell(value: str | float | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.4f}"
