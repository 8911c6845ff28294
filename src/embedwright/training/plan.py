"""What a recipe would do: rows, steps, passes over the data, and where each of its values comes from."""

from __future__ import annotations

from dataclasses import dataclass

from embedwright.data.catalog import find_entry, load_catalog
from embedwright.training.recipe import DataPart, Recipe, StagePart, expand
from embedwright.training.sources import open_table


@dataclass(frozen=True, slots=True)
class Share:
    """One entry of a stage's data: its rows (None: not known), who says so, and its share of the draws."""

    path: str
    rows: int | None
    counted: str
    share: float


@dataclass(frozen=True, slots=True)
class StagePlan:
    """`queries` are drawn in all steps together, `texts` go through the model with them: a positive and the hard
    negatives of each. `rows` and `passes` count what is known of the data."""

    name: str
    shares: tuple[Share, ...]
    rows: int
    steps: int
    queries: int
    texts: int
    passes: float


def plan(recipe: Recipe) -> list[StagePlan]:
    """The size of each stage. Files that are there are read; of others, the recipe or the catalogue says how many rows.

    Raises ConfigError or DataError for a file that is there and cannot be read.
    """
    return [_stage(recipe, stage) for stage in recipe.stages]


def _stage(recipe: Recipe, stage: StagePart) -> StagePlan:
    counted = [(entry, *_rows(recipe, stage, entry)) for entry in stage.data]
    weights = [entry.weight * (rows or 0) for entry, rows, _ in counted]
    total = sum(weights) or 1.0
    shares = [
        Share(entry.path, rows, who, weight / total)
        for (entry, rows, who), weight in zip(counted, weights, strict=True)
    ]
    rows = sum(share.rows or 0 for share in shares)
    queries = stage.optim.steps * stage.optim.batch_queries
    texts = queries * (2 + stage.hard_negatives)
    return StagePlan(
        stage.name, tuple(shares), rows, stage.optim.steps, queries, texts, queries / rows if rows else 0.0
    )


def _rows(recipe: Recipe, stage: StagePart, entry: DataPart) -> tuple[int | None, str]:
    try:
        return len(open_table(recipe, stage, entry)), "counted"
    except FileNotFoundError:
        if entry.rows:
            return entry.rows, "recipe"
    name = entry.task if isinstance(entry.task, str) else entry.task.name if entry.task else expand(entry.path).stem
    if name in load_catalog() and (samples := find_entry(name).samples):
        return samples, f"catalogue, {find_entry(name).marks.samples}"
    return None, "unknown"


def render(recipe: Recipe, stages: list[StagePlan]) -> str:
    """The plan as lines of text."""
    lines = []
    for stage in stages:
        unknown = sum(share.rows is None for share in stage.shares)
        lines.append(
            f"stage {stage.name}: {stage.rows:,} rows of {len(stage.shares)} files"
            + (f" ({unknown} of unknown size)" if unknown else "")
            + f", {stage.steps:,} steps, {stage.queries:,} queries ({stage.passes:.2f} passes), {stage.texts:,} texts"
        )
        width = max(len(share.path) for share in stage.shares)
        for share in stage.shares:
            rows = "?" if share.rows is None else f"{share.rows:,}"
            lines.append(f"  {share.path:<{width}}  {rows:>9}  {share.share:6.1%}  {share.counted}")
    total, queries = sum(stage.steps for stage in stages), sum(stage.queries for stage in stages)
    lines.append(f"together: {total:,} steps, {queries:,} queries, {sum(stage.texts for stage in stages):,} texts")
    if recipe.provenance:
        values = recipe.values_by_key()
        lines.append("values, and where they come from:")
        for key, said in recipe.provenance.items():
            shown = f"{len(values[key])} files" if key.endswith(".data") else values[key]
            lines.append(f"  {key:<45} {shown!s:<28} {said}")
    return "\n".join(lines)
