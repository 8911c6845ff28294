"""Results of `evaluate`: as JSON, side by side (`table`) and as text (`render`). The command line prints them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from embedwright.evaluation.metrics import Kind

Row = dict[str, str | float | None]


@dataclass(frozen=True, slots=True)
class Result:
    """The main metric of one task (`metrics.MAIN`) and its other metrics. Higher is better."""

    task: str
    kind: Kind
    metric: str
    value: float
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Results:
    """The result of `evaluate`: one row a task, in the suite's order, and the wall-clock seconds in total."""

    suite: str
    rows: tuple[Result, ...]
    seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Results:
        saved = json.loads(text)
        return cls(saved["suite"], tuple(Result(**row) for row in saved["rows"]), saved["seconds"])


def table(columns: Mapping[str, Results]) -> list[Row]:
    """Returns rows `{"task", "metric", <column>: value, ...}`: each task's main metric, and Recall@10 for retrieval.

    Tasks keep the order of the columns. The value is None if a column lacks the task.
    """
    rows: dict[tuple[str, str], Row] = {}
    for name, results in columns.items():
        for result in results.rows:
            shown = {result.metric: result.value}
            if result.kind == "retrieval":
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
