"""The tables of docs/scale.md: from the recipe's own plan, from records of benchmarks/results, and by arithmetic.

What is assumed stands at the top, and on the page. `make_docs.py` writes the page.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import MistralConfig

from embedwright.mining.mine import AT_ONCE
from embedwright.training.cost import GB, Sizes, sizes_of
from embedwright.training.lengths import Tokens, tokens_of
from embedwright.training.plan import largest_memory
from embedwright.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Assumed, not measured by us:
GPUS = 8
RATE = 400e12  # bfloat16 products a second, times two, that a GPU of 80 GB sustains with a 7B model: half of its peak
SEARCH = 40e12  # float32 products a second, times two: as benchmarks/mining_at_scale.py assumes
LINK = 300e9  # bytes a second that each GPU sends to the others of its machine
PRICE = 3.0  # dollars of a GPU hour
WORDS, LENGTHS = 150, (150, 512)  # tokens of a passage; tokens a text for the two columns of the step
LLM_TOKENS = 3500  # tokens a second that eight GPUs write with a model of Mixtral 8x22B's size
CASES = (("10 M rows, 10 M passages", 10**7, 10**7), ("10 M rows, 1 billion passages", 10**7, 10**9))


def page(text: str) -> str:
    """docs/scale.md with each table between its marks."""
    for name, made in tables().items():
        before, mark, rest = text.partition(f"<!-- {name}, made by scripts/scale.py -->\n")
        text = f"{before}{mark}{made}<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text


def tables() -> dict[str, str]:
    """The lines between each pair of marks."""
    recipe, sizes, tokens = planned()
    made = {
        "memory": memory(recipe, sizes, tokens),
        "step": step(recipe, sizes),
        "mining": mining(RESULTS),
        "cost": cost(recipe, sizes, records(RESULTS, "data-at-scale")),
    }
    return {name: "\n".join(lines) + "\n" for name, lines in made.items()}


def planned() -> tuple[Recipe, Sizes, list[Tokens]]:
    """The recipe of NV-Embed v2 on a decoder of Mistral-7B's sizes, of which only the config is needed."""
    recipe = Recipe.load(ROOT / "recipes" / "nv-embed-v2.yaml")
    with tempfile.TemporaryDirectory() as folder:
        MistralConfig().save_pretrained(folder)  # transformers' defaults are Mistral-7B-v0.1's sizes
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": folder})})
        tokens = tokens_of(recipe, [[False] * len(stage.data) for stage in recipe.stages], GPUS)
        return recipe, sizes_of(recipe), tokens


def memory(recipe: Recipe, sizes: Sizes, tokens: Sequence[Tokens]) -> list[str]:
    """What `train --plan --processes 8` says of the recipe, and of the same with other keys of `tune`."""
    parts = ("weights", "gradients", "optimizer", "activations", "work", "reserve", "total")
    rows = []
    for method, checkpointing in (("lora", True), ("lora", False), ("full", True)):
        tune = recipe.tune.model_copy(update={"method": method, "gradient_checkpointing": checkpointing})
        for parallel in ("ddp", "fsdp"):
            run = recipe.run.model_copy(update={"parallel": parallel})
            one = recipe.model_copy(update={"tune": tune, "run": run})
            trained = sizes.decoder + sizes.head if method == "full" else sizes.trained
            own = Sizes(**{**fields(sizes), "trained": trained, "adapters": 0 if method == "full" else sizes.adapters})
            found = largest_memory(one, tokens, own, "cuda", processes=GPUS)
            name = f"`{method}`{', gradient checkpointing' * checkpointing}, `{parallel}`"
            rows.append([name, *(f"{getattr(found, part) / GB:.1f}" for part in parts)])
    return table(["GB of each of 8 GPUs", *parts], rows)


def fields(sizes: Sizes) -> dict[str, Any]:
    return {name: getattr(sizes, name) for name in Sizes.__dataclass_fields__}


def texts_a_step(recipe: Recipe) -> int:
    return recipe.stages[0].optim.batch_queries * recipe.stages[0].texts_a_row


def seconds_a_step(recipe: Recipe, sizes: Sizes, length: int) -> float:
    """LoRA with gradient checkpointing: forward, forward again, and the gradient of the states, 2 products each.

    GradCache encodes all micro-batches but the first once more. It is the mean over the steps of all stages.
    """
    own = texts_a_step(recipe) * length / GPUS
    again = 2 * max(0.0, 1 - recipe.run.batch_tokens / own) * cached_share(recipe)
    return (6 + again) * own * (sizes.decoder + sizes.head) / RATE


def cached_share(recipe: Recipe) -> float:
    """The share of all steps whose queries meet candidates of other micro-batches: those need GradCache."""
    steps = [(stage.optim.steps, stage.in_batch_negatives == "all") for stage in recipe.stages]
    return sum(count for count, cached in steps if cached) / sum(count for count, _ in steps)


def step(recipe: Recipe, sizes: Sizes) -> list[str]:
    texts, steps = texts_a_step(recipe), sum(stage.optim.steps for stage in recipe.stages)
    rows = []
    for length in LENGTHS:
        compute = seconds_a_step(recipe, sizes, length)
        micro = -(-texts * length // GPUS // recipe.run.batch_tokens)
        ddp = 2 * 4 * sizes.trained / LINK
        fsdp = (micro * 3 + (micro - 1) * cached_share(recipe)) * 2 * sizes.decoder / LINK
        cells = [texts * length, micro, compute, ddp, fsdp, (compute + ddp) * steps / 3600]
        rows.append([f"{length}", *(f"{cell:,.0f}" if cell >= 100 else f"{cell:.2g}" for cell in cells)])
    head = ["tokens a text", "tokens a step", "micro-batches of a GPU", "s of products", "s to add gradients (`ddp`)"]
    return table([*head, "s to gather weights (`fsdp`)", f"hours of {steps:,} steps (`ddp`)"], rows)


def mining(folder: Path) -> list[str]:
    """What benchmarks/mining_at_scale.py has recorded: searches, runs end to end, and what is derived from them."""
    searches, ends = records(folder, "search-"), records(folder, "mine-end-to-end-")
    if not searches:
        return ["Not measured yet."]
    rows = []
    for found in searches:
        size = found["size"]
        flops = 2 * size["queries"] * size["documents"] * size["width"] / found["seconds"] / 1e9
        what = f"{size['queries']:,} x {size['documents']:,} x {size['width']}, {size['precision']}"
        cells = [found["seconds"], flops, found["read"] / 1e9, found["peak_mb"] / 1e3]
        rows.append([what, *(f"{cell:,.0f}" if cell >= 100 else f"{cell:.2f}" for cell in cells)])
    head = ["search: queries x documents x width", "s", "GFLOP/s", "GB read", "GB of memory, queries and libraries too"]
    lines = [*table(head, rows), "", *(made(found) for found in searches), ""]
    if ends:
        rows = [
            [
                f"{found['size']['model']}, {found['size']['dtype']}, {found['size']['texts']:,} texts",
                *(f"{found['seconds'][side][0]:,.0f}" for side in ("ours", "peer")),
                f"{found['ratio']['median']:.2f}",
                f"{found['negatives_that_the_peer_found_too']:.0%}",
            ]
            for found in ends
        ]
        head = ["end to end, encode and search", "ours, s", "`mine_hard_negatives`, s", "faster by", "equal negatives"]
        lines += [*table(head, rows), "", *(made(found) for found in ends), ""]
    own = {key_of(row): row for found in searches for row in found["table"] if found["size"]["precision"] in row}
    return [*lines, *(own.get(key_of(row), row) for row in searches[-1]["table"][1:])]


def key_of(row: str) -> str:
    """The size and the precision of a row of a table derived from a search: its first four cells."""
    return "|".join(row.split("|")[:5])


def cost(recipe: Recipe, sizes: Sizes, data: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each step of a corpus and its rows: what it takes, by the rates above and the recorded ones."""
    steps = sum(stage.optim.steps for stage in recipe.stages)
    rows = []
    for name, examples, passages in CASES:
        work: list[tuple[str, str, float, float]] = []  # what, bytes, core hours, GPU hours
        if data:
            rate = data[-1]["rows_per_second"]
            work.append(
                (f"read and check {passages:,} passages, once", size(passages * 600), passages / rate["read"], 0)
            )
            work.append((f"clean {examples:,} pairs", size(examples * 600), examples / rate["clean"], 0))
        products = 2 * (sizes.decoder + sizes.head) * WORDS * passages
        work.append(("encode them, 7B, float16", size(passages * 2 * sizes.hidden), 0, products / RATE))
        found = 2 * examples * passages * sizes.hidden
        read = -(-examples // AT_ONCE) * passages * 2 * sizes.hidden
        work.append((f"search for {examples:,} queries", f"{size(read)} read", 0, found / SEARCH))
        work.append(("write rows with 7 negatives", size(examples * 5000), 0, 0))
        for what, stored, cores, gpus in work:
            hours = gpus / 3600
            shown = [f"{hours:,.0f}", f"{hours / GPUS:,.1f}", f"{hours * PRICE:,.0f}"] if gpus else ["-"] * 3
            rows.append([name, what, stored, f"{cores / 3600:.2g}" if cores else "-", *shown])
    seconds = 120_000 * 1500 / LLM_TOKENS * GPUS
    trained = seconds_a_step(recipe, sizes, WORDS) * steps * GPUS
    for what, gpus in (("synthesize 120,000 examples", seconds), (f"train {steps:,} steps", trained)):
        hours = gpus / 3600
        rows.append(["the recipe", what, "-", "-", f"{hours:,.0f}", f"{hours / GPUS:,.1f}", f"{hours * PRICE:,.0f}"])
    head = ["of", "step", "bytes", "core hours", "GPU hours", "hours on 8 GPUs", "dollars"]
    return [*table(head, rows), "", *map(made, data[-1:])]


def records(folder: Path, prefix: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(f"{prefix}*.json"))]


def made(found: Mapping[str, Any]) -> str:
    machine, command = found["machine"], re.sub(r" --folder \S+", "", found["command"])
    return f"- `{command}`, {found['date']}, {machine['cores']} cores of {machine['cpu']}."


def size(count: float) -> str:
    return f"{count / 1e12:,.1f} TB" if count >= 1e12 else f"{count / 1e9:,.0f} GB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
