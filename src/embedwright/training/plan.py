"""What a recipe would do: rows, steps, tokens, memory, and where each of its values comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from embedwright.data.sources.catalog import find_entry, load_catalog
from embedwright.mining.mine import AT_ONCE
from embedwright.mining.rules import NAMED
from embedwright.training.batches.blend import sampling_weight
from embedwright.training.batches.sources import drawable_rows
from embedwright.training.cost import GB, Kind, Memory, NoEstimate, Sizes, memory_of, sizes_of
from embedwright.training.lengths import Tokens, tokens_of
from embedwright.training.recipe import Recipe, expand
from embedwright.training.stages import DataPart, MaskedStage, Stage, TextPart
from embedwright.vectors.search import gpu_bytes


@dataclass(frozen=True, slots=True)
class EntryPlan:
    """One entry of a stage's data: its rows (None: not known), who says so, and its part of the draws."""

    path: str
    rows: int | None
    counted: str
    share: float


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The size of a stage. `tokens` is None if base or tokenizer cannot be loaded.

    `queries` are drawn in all steps together; `texts` are these with a positive and the hard negatives of each. Of a
    masked phase, both are the documents. `rows` and `passes` go by the data whose size is known.
    """

    name: str
    entries: tuple[EntryPlan, ...]
    rows: int
    steps: int
    queries: int
    texts: int
    passes: float
    tokens: Tokens | None = None


def report(recipe: Recipe, *, processes: int = 1) -> str:
    """Says all that can be said of a recipe before it runs; memory is unknown where base or tokenizer cannot be loaded.

    Errors as in `plan`, and ConfigError if training would refuse the data.
    """
    stages = plan(recipe)
    there = [[entry.counted == "counted" for entry in stage.entries] for stage in stages]
    try:
        tokens = tokens_of(recipe, there, processes)
        sizes = sizes_of(recipe)
    except (OSError, NoEstimate) as error:
        return "\n".join([*render(recipe, stages), f"tokens and memory: unknown ({str(error).splitlines()[0]})"])
    stages = [replace(stage, tokens=found) for stage, found in zip(stages, tokens, strict=True)]
    return "\n".join([*render(recipe, stages), *render_memory(recipe, tokens, sizes, processes)])


def plan(recipe: Recipe) -> list[StagePlan]:
    """Counts the rows that each stage can draw. For a file that is missing, recipe or catalogue say how many there are.

    Raises ConfigError or DataError for a file that is there and cannot be read, or of which nothing can be trained.
    """
    return [_stage(recipe, stage) for stage in recipe.stages]


def _stage(recipe: Recipe, stage: Stage) -> StagePlan:
    data: Sequence[DataPart | TextPart] = stage.data
    counted = [(entry, *_rows(recipe, stage, number)) for number, entry in enumerate(data)]
    weights = [sampling_weight(entry.weight, rows or 0, stage.sampling_alpha) for entry, rows, _ in counted]
    total = sum(weights) or 1.0
    entries = tuple(
        EntryPlan(entry.path, rows, who, weight / total)
        for (entry, rows, who), weight in zip(counted, weights, strict=True)
    )
    rows, steps = sum(entry.rows or 0 for entry in entries), stage.optim.steps
    queries = steps * stage.optim.batch_queries
    texts = queries * stage.texts_a_row
    return StagePlan(stage.name, entries, rows, steps, queries, texts, queries / rows if rows else 0.0)


def _rows(recipe: Recipe, stage: Stage, number: int) -> tuple[int | None, str]:
    entry = stage.data[number]
    try:
        return drawable_rows(recipe, stage, number), "counted"
    except FileNotFoundError:
        if entry.rows:
            return entry.rows, "recipe"
    name = entry.task if isinstance(entry.task, str) else entry.task.name if entry.task else expand(entry.path).stem
    if name in load_catalog() and (samples := find_entry(name).samples):
        return samples, f"catalogue, {find_entry(name).marks.samples}"
    return None, "unknown"


def largest_memory(recipe: Recipe, tokens: Sequence[Tokens], sizes: Sizes, kind: Kind, *, processes: int = 1) -> Memory:
    """Returns the memory of the stage that needs most.

    `processes` share the texts of a step, a device each: `tokens` must be counted for as many.
    """
    needed = []
    for part, found in zip(recipe.stages, tokens, strict=True):
        # a text longer than batch_tokens is a micro-batch of its own
        longest = max(lengths.longest for lengths in found.kinds.values())
        micro_batch = min(found.fullest, max(recipe.run.batch_tokens, longest))
        queries = part.optim.batch_queries
        similar = part.loss.distill is not None and part.loss.distill.similarity_weight > 0
        shared = similar or part.in_batch_negatives != "none"
        scores = queries * queries * (1 + part.hard_negatives) * (2 if similar else 1) if shared else 0
        if isinstance(part, MaskedStage):
            scores = round(micro_batch * part.mask_share) * sizes.vocabulary
        memory = memory_of(recipe, sizes, micro_batch, kind, scores=scores, processes=processes)
        if kind == "cuda" and part.mine is not None and part.mine.teacher not in NAMED:
            search = gpu_bytes(AT_ONCE, sizes.hidden)  # in the place of a step's activations
            memory = replace(memory, work=max(memory.work, search - memory.activations))
        needed.append(memory)
    return max(needed, key=lambda memory: memory.total)


# ---- lines of text


def render(recipe: Recipe, stages: Sequence[StagePlan]) -> list[str]:
    """Returns the plan of each stage, the sums, and the recipe's provenance, as lines of text."""
    lines = []
    for stage, part in zip(stages, recipe.stages, strict=True):
        unknown = sum(entry.rows is None for entry in stage.entries)
        lines.append(
            f"stage {stage.name}: {stage.rows:,} rows of {len(stage.entries)} files"
            + (f" ({unknown} of unknown size)" if unknown else "")
            + f", {stage.steps:,} steps, "
            + (
                f"{stage.queries:,} documents ({stage.passes:.2f} passes)"
                if isinstance(part, MaskedStage)
                else f"{stage.queries:,} queries ({stage.passes:.2f} passes), {stage.texts:,} texts"
            )
        )
        width = max(len(entry.path) for entry in stage.entries)
        for entry in stage.entries:
            rows = "?" if entry.rows is None else f"{entry.rows:,}"
            lines.append(f"  {entry.path:<{width}}  {rows:>9}  {entry.share:6.1%}  {entry.counted}")
        if part.mine is not None:
            again = f" and every {part.mine.every} steps" if part.mine.every else ""
            uncounted = "the time is not counted" + (", nor that model's memory" if part.mine.teachers else "")
            lines.append(f"  hard negatives are mined before it{again} by {part.mine.teacher}: {uncounted}")
        if part.loss.distill is not None and part.loss.distill.teacher:
            teachers = ", ".join(part.loss.distill.teacher)
            lines.append(f"  {teachers}: encodes each of its texts once, before the first step, which is not counted")
        if stage.tokens is not None:
            lines += _token_lines(stage, stage.tokens)
    total, queries = sum(stage.steps for stage in stages), sum(stage.queries for stage in stages)
    lines.append(f"together: {total:,} steps, {queries:,} queries, {sum(stage.texts for stage in stages):,} texts")
    if recipe.provenance:
        values = recipe.values_by_key()
        lines.append("values, and where they come from:")
        for key, source in recipe.provenance.items():
            shown = f"{len(values[key])} files" if key.endswith((".data", ".text")) else values[key]
            lines.append(f"  {key:<45} {shown!s:<28} {source}")
    return lines


def _token_lines(stage: StagePlan, tokens: Tokens) -> list[str]:
    in_all = f"{tokens.step:,.0f} tokens a step, {tokens.step * stage.steps:,.0f} in all"
    if not tokens.rows:
        return [f"  at most {in_all}: no file is there to count, so every text is taken at its full length"]
    there = sum(entry.counted == "counted" for entry in stage.entries)
    part = "" if there == len(stage.entries) else f" if all are like the {there} files that are there"
    head = [f"tokens of {tokens.rows:,} rows", "mean", "median", "95 %", "longest"]
    rows = [
        [kind, f"{found.mean:.1f}", str(found.median), str(found.most), str(found.longest)]
        for kind, found in tokens.kinds.items()
    ]
    saved = 1 - tokens.step / tokens.padded
    return [*columns([head, *rows]), f"  {in_all}{part}; padded {tokens.padded:,.0f} a step: {saved:.0%} saved"]


def render_memory(recipe: Recipe, tokens: Sequence[Tokens], sizes: Sizes, processes: int = 1) -> list[str]:
    """Returns the parameter counts and the memory by part, as lines of text: for one process on a GPU and on a CPU.

    For several processes, which have a GPU each, first with the recipe's `run.parallel`, then with the other.
    """
    parts = f"LoRA {sizes.adapters:,}" if sizes.adapters else f"decoder {sizes.decoder:,}"
    total = sizes.decoder + sizes.adapters + sizes.head
    names = ["weights", "gradients", "optimizer", "activations", "work", "reserve", "total"]
    wanted: list[tuple[str, Recipe, Kind]] = [("GPU", recipe, "cuda"), ("CPU", recipe, "cpu")]
    if processes > 1:
        ways = [
            recipe.run.parallel,
            *({"ddp", "fsdp"} - {recipe.run.parallel} if recipe.tune.method != "qlora" else ()),
        ]
        runs = [(way, recipe.run.model_copy(update={"parallel": way})) for way in ways]
        wanted = [
            (f"GPU, each of {processes} ({way})", recipe.model_copy(update={"run": run}), "cuda") for way, run in runs
        ]
    rows = []
    for name, one, kind in wanted:
        memory = largest_memory(one, tokens, sizes, kind, processes=processes)
        rows.append([name, *(f"{getattr(memory, part) / GB:.2f}" for part in names)])
    saves = f"at the end rank 0 merges and saves on its CPU, in {4 * total / GB:.2f} GB"
    return [
        f"parameters: {total:,}, of which {sizes.trained:,} train ({parts}, pooling block {sizes.head:,})",
        *columns([["memory in GB", *names], *rows]),
        *([saves] if processes > 1 else []),
        "a sum, not a measurement; `--dry-run` measures memory and time on this device",
    ]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the rows as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        f"  {row[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
