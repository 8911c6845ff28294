"""Shows a comparison: as plain text, and as a picture."""

from __future__ import annotations

from embedwright.evaluation.compare.compare import HIGHER, LOWER, MEAN, Comparison, Difference
from embedwright.evaluation.compare.picture import Mark, intervals
from embedwright.evaluation.results import Row, render

NAMED = 3  # tasks without items that a cell names; of more it tells the number


def text(comparison: Comparison) -> str:
    """Returns one table for each candidate, what was left out, and how to read it all."""
    blocks = []
    for candidate, rows in _by_candidate(comparison).items():
        table = render([_cells(row, comparison, rows) for row in rows])
        blocks.append(f"{candidate} against {comparison.baseline}\n{table}")
    if comparison.left_out:
        blocks.append("Left out:\n" + "\n".join(f"  {reason}" for reason in comparison.left_out))
    if any(row.without for row in comparison.rows):
        blocks.append("without: the items of these tasks are not kept. What they do by chance is not in the interval.")
    compared = sum(row.p is not None for row in comparison.rows)
    blocks.append(
        f"Points (x100). 95 % intervals, {comparison.draws:,} draws, seed {comparison.seed}. p is corrected for the "
        f"number of comparisons, {compared} (Holm). seen: the smallest true difference found in four cases of five."
    )
    return "\n\n".join(blocks)


def _by_candidate(comparison: Comparison) -> dict[str, list[Difference]]:
    found: dict[str, list[Difference]] = {}
    for row in comparison.rows:
        found.setdefault(row.candidate, []).append(row)
    return found


def _cells(row: Difference, comparison: Comparison, rows: list[Difference]) -> Row:
    cells: Row = {
        "task": _label(row, rows),
        "metric": row.metric,
        "baseline": f"{row.baseline:.2f}",
        "score": f"{row.score:.2f}",
        "difference": f"{row.difference:+.2f}",
        "95 % interval": "-" if row.low is None else f"{row.low:+.2f} to {row.high:+.2f}",
        "over": _over(row),
        "seen": "-" if row.smallest is None else f"{row.smallest:.2f}",
        "p": "-" if row.p_holm is None else _p(row.p_holm),
    }
    if comparison.equivalent is not None:
        cells["p equal"] = "-" if row.p_equivalent is None else _p(row.p_equivalent)
    return cells | {"claim": row.claim or "no interval"}


def _over(row: Difference) -> str:
    few = ", ".join(row.without) if len(row.without) <= NAMED else f"{len(row.without)} tasks"
    return f"{row.over}; without {few}" if row.without else row.over or "-"


def _label(row: Difference, rows: list[Difference]) -> str:
    """Returns the name of a row, with its suite if there are several."""
    name = row.task
    if row.task == MEAN:
        name = f"mean over {row.metric}" if row.kind in ("types", "tasks") else f"mean: {row.kind}"
    return f"{row.suite}/{name}" if len({other.suite for other in rows}) > 1 else name


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def picture(comparison: Comparison) -> str:
    """Returns the differences with their intervals as SVG."""
    groups = {
        candidate: [
            Mark(_label(row, rows), row.difference, row.low, row.high, row.claim.startswith((HIGHER, LOWER)))
            for row in rows
        ]
        for candidate, rows in _by_candidate(comparison).items()
    }
    only = next(iter(groups))
    against = f"{only} against {comparison.baseline}" if len(groups) == 1 else f"differences from {comparison.baseline}"
    return intervals(f"{against}, points with 95 % intervals", groups)
