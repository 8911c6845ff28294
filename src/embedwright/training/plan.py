"""What a recipe would do and cost: rows, steps, tokens, memory, time, and where each of its values comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from embedwright.data.sources.catalog import find_entry, load_catalog
from embedwright.errors import InputError
from embedwright.training.batches.blend import share
from embedwright.training.batches.sources import drawable_rows
from embedwright.training.cost import (
    GB,
    GPUS,
    Device,
    Flops,
    Memory,
    NoEstimate,
    Sizes,
    flops_of,
    memory_of,
    seconds_of,
    sizes_of,
    this_cpu,
)
from embedwright.training.lengths import Tokens, tokens_of
from embedwright.training.parts import StagePart
from embedwright.training.recipe import Recipe, expand


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
    negatives of each. `rows` and `passes` count what is known of the data; `tokens` is None where it was not asked for.
    """

    name: str
    shares: tuple[Share, ...]
    rows: int
    steps: int
    queries: int
    texts: int
    passes: float
    tokens: Tokens | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one device: the stage that needs most memory, and the seconds of a step in each stage."""

    device: Device
    memory: Memory
    seconds: tuple[float, ...]


# ---- rows, steps, passes


def plan(recipe: Recipe) -> list[StagePlan]:
    """The size of each stage. Files that are there are read; of others, the recipe or the catalogue says how many rows.

    Rows are those that training can draw. Raises ConfigError or DataError for a file that is there and cannot be
    read, or of which nothing can be trained.
    """
    return [_stage(recipe, stage) for stage in recipe.stages]


def _stage(recipe: Recipe, stage: StagePart) -> StagePlan:
    counted = [(entry, *_rows(recipe, stage, number)) for number, entry in enumerate(stage.data)]
    weights = [share(entry.weight, rows or 0, stage.sampling_alpha) for entry, rows, _ in counted]
    total = sum(weights) or 1.0
    shares = [
        Share(entry.path, rows, who, weight / total)
        for (entry, rows, who), weight in zip(counted, weights, strict=True)
    ]
    rows = sum(known.rows or 0 for known in shares)
    queries = stage.optim.steps * stage.optim.batch_queries
    texts = queries * (2 + stage.hard_negatives)
    return StagePlan(
        stage.name, tuple(shares), rows, stage.optim.steps, queries, texts, queries / rows if rows else 0.0
    )


def _rows(recipe: Recipe, stage: StagePart, number: int) -> tuple[int | None, str]:
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


def with_tokens(recipe: Recipe, stages: Sequence[StagePlan]) -> list[StagePlan]:
    """The stages with the tokens of their steps, from texts of the files that are there. Errors as in `tokens_of`."""
    there = [[part.counted == "counted" for part in stage.shares] for stage in stages]
    return [replace(stage, tokens=tokens) for stage, tokens in zip(stages, tokens_of(recipe, there), strict=True)]


# ---- memory and time


def estimate(
    recipe: Recipe,
    stages: Sequence[StagePlan],
    sizes: Sizes,
    *,
    processes: int = 1,
    devices: Sequence[Device] | None = None,
) -> list[Estimate]:
    """Of each device, by default the table of GPUs, and this CPU for one process; `stages` as `with_tokens` gives them.

    `processes` share the texts of a step, a device each; what they send each other is not counted.
    """
    run = recipe.run
    chosen = devices or [*([this_cpu()] if processes == 1 else []), *GPUS]
    return [
        Estimate(
            device,
            max(
                (_memory(recipe, number, stage, sizes, device, processes) for number, stage in enumerate(stages)),
                key=lambda memory: memory.total,
            ),
            tuple(
                seconds_of(step_flops(recipe, stage, sizes, processes), device, run.precision, processes)
                for stage in stages
            ),
        )
        for device in chosen
    ]


def _memory(recipe: Recipe, number: int, stage: StagePlan, sizes: Sizes, device: Device, processes: int) -> Memory:
    tokens = _of(stage)
    # a text longer than batch_tokens is a micro-batch of its own
    longest = max(kind.longest for kind in tokens.kinds.values())
    micro_batch = min(-(-tokens.largest // processes), max(recipe.run.batch_tokens, longest))
    part = recipe.stages[number]
    queries = part.optim.batch_queries
    scores = queries * queries * (1 + part.hard_negatives) if tokens.shared else 0
    return memory_of(recipe, sizes, micro_batch, device.kind, scores=scores, processes=processes)


def step_flops(recipe: Recipe, stage: StagePlan, sizes: Sizes, processes: int = 1) -> Flops:
    """Of one step of a stage whose tokens are known."""
    tokens = _of(stage)
    again = max(0, 1 - processes * recipe.run.batch_tokens / tokens.step) if tokens.shared else 0
    return flops_of(recipe, sizes, tokens.step, tokens.squares, again=again)


def _of(stage: StagePlan) -> Tokens:
    if stage.tokens is None:
        raise InputError(f"stage {stage.name}: its tokens are not counted yet (with_tokens)")
    return stage.tokens


# ---- lines of text


def report(recipe: Recipe, *, processes: int = 1) -> str:
    """All that can be said of a recipe before it runs; cost is unknown where base or tokenizer cannot be had.

    Errors as in `plan`, and ConfigError where training would refuse the data.
    """
    stages = plan(recipe)
    try:
        stages = with_tokens(recipe, stages)
        sizes = sizes_of(recipe)
    except (OSError, NoEstimate) as error:
        return f"{render(recipe, stages)}\nmemory and time: unknown ({str(error).splitlines()[0]})"
    estimates = estimate(recipe, stages, sizes, processes=processes)
    return f"{render(recipe, stages)}\n{render_cost(recipe, stages, sizes, estimates, processes)}"


def render(recipe: Recipe, stages: Sequence[StagePlan]) -> str:
    """The plan as lines of text."""
    lines = []
    for stage, part in zip(stages, recipe.stages, strict=True):
        unknown = sum(part.rows is None for part in stage.shares)
        lines.append(
            f"stage {stage.name}: {stage.rows:,} rows of {len(stage.shares)} files"
            + (f" ({unknown} of unknown size)" if unknown else "")
            + f", {stage.steps:,} steps, {stage.queries:,} queries ({stage.passes:.2f} passes), {stage.texts:,} texts"
        )
        width = max(len(part.path) for part in stage.shares)
        for entry in stage.shares:
            rows = "?" if entry.rows is None else f"{entry.rows:,}"
            lines.append(f"  {entry.path:<{width}}  {rows:>9}  {entry.share:6.1%}  {entry.counted}")
        if part.mine is not None:
            again = f" and every {part.mine.every} steps" if part.mine.every else ""
            lines.append(
                f"  hard negatives are mined before it{again} by {part.mine.teacher}: that, and negatives that rows "
                "do not have yet, are not counted"
            )
        if stage.tokens is not None:
            lines += _token_lines(stage, stage.tokens)
    total, queries = sum(stage.steps for stage in stages), sum(stage.queries for stage in stages)
    lines.append(f"together: {total:,} steps, {queries:,} queries, {sum(stage.texts for stage in stages):,} texts")
    if recipe.provenance:
        values = recipe.values_by_key()
        lines.append("values, and where they come from:")
        for key, said in recipe.provenance.items():
            shown = f"{len(values[key])} files" if key.endswith(".data") else values[key]
            lines.append(f"  {key:<45} {shown!s:<28} {said}")
    return "\n".join(lines)


def _token_lines(stage: StagePlan, tokens: Tokens) -> list[str]:
    in_all = f"{tokens.step:,.0f} tokens a step, {tokens.step * stage.steps:,.0f} in all"
    if not tokens.rows:
        return [f"  at most {in_all}: no file is there to count, so every text is taken at its full length"]
    there = sum(part.counted == "counted" for part in stage.shares)
    part = "" if there == len(stage.shares) else f" if all are like the {there} files that are there"
    head = [f"tokens of {tokens.rows:,} rows", "mean", "median", "95 %", "longest"]
    rows = [
        [kind, f"{found.mean:.1f}", str(found.median), str(found.most), str(found.longest)]
        for kind, found in tokens.kinds.items()
    ]
    saved = 1 - tokens.step / tokens.padded
    return [*_columns([head, *rows]), f"  {in_all}{part}; padded {tokens.padded:,.0f} a step: {saved:.0%} saved"]


def render_cost(
    recipe: Recipe, stages: Sequence[StagePlan], sizes: Sizes, estimates: Sequence[Estimate], processes: int = 1
) -> str:
    """Parameters, memory and time as lines of text."""
    parts = f"LoRA {sizes.adapters:,}" if sizes.adapters else f"decoder {sizes.decoder:,}"
    total = sizes.decoder + sizes.adapters + sizes.head
    lines = [f"parameters: {total:,}, of which {sizes.trained:,} train ({parts}, pooling block {sizes.head:,})"]
    at_most = ["" if _of(stage).rows else "<= " for stage in stages]
    names = ["weights", "gradients", "optimizer", "activations", "work", "reserve"]
    each = "one device" if processes == 1 else f"each of {processes} devices ({recipe.run.parallel})"
    head = [f"memory in GB of {each}", *names, "all", "of", "fits"]
    rows = [
        [
            found.device.name,
            *(f"{getattr(found.memory, name) / GB:.2f}" for name in names),
            f"{found.memory.total / GB:.1f}",
            f"{found.device.memory / GB:.0f}",
            "yes" if found.memory.total <= found.device.memory else "no",
        ]
        for found in estimates
    ]
    lines += _columns([head, *rows])
    head = ["time", *(f"step of {stage.name}" for stage in stages), "all steps", "peak TFLOP/s", "reached"]
    precision = recipe.run.precision
    rows = [
        [
            found.device.name,
            *(front + _duration(seconds) for front, seconds in zip(at_most, found.seconds, strict=True)),
            max(at_most) + _duration(sum(s * stage.steps for s, stage in zip(found.seconds, stages, strict=True))),
            f"{found.device.peak[precision] / 1e12:.3g}",
            f"{found.device.efficiency[precision]:.0%}",
        ]
        for found in estimates
    ]
    lines += _columns([head, *rows])
    if any(found.device.measured for found in estimates):
        lines.append("this CPU's peak is measured, the share of it that a step reaches is of a benchmark")
    lines.append("GPUs are not measured: data sheets, and a guess of what is reached (small models reach less)")
    return "\n".join(lines)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        f"  {row[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
