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

from embedwright.data.sources.catalog import find_entry
from embedwright.mining.mine import AT_ONCE
from embedwright.training.cost import GB, Sizes, sizes_of
from embedwright.training.lengths import Tokens, tokens_of
from embedwright.training.plan import largest_memory
from embedwright.training.recipe import Recipe
from embedwright.training.stages import ContrastiveStage

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Assumed, not measured by us:
GPUS = 8
RATE = 400e12  # bfloat16 products a second, times two, that a GPU of 80 GB sustains with a 7B model: half of its peak
SEARCH = 40e12  # float32 products a second, times two, of one H100 or H200: 60 % of its peak
DISK = 2e9  # bytes a second of one NVMe drive
LINK = 300e9  # bytes a second that each GPU sends to the others of its machine
PRICE = 3.0  # dollars of a GPU hour
WORDS, LENGTHS = 150, (150, 512)  # tokens of a passage; tokens a text for the two columns of the step
LLM_TOKENS = 3500  # tokens a second that eight GPUs write with a model of Mixtral 8x22B's size
ENCODE_PARTS = 64  # as the page's command has them; of `mine`, a part has AT_ONCE rows
CASES = (("10 M rows, 10 M passages", 10**7, 10**7), ("10 M rows, 1 billion passages", 10**7, 10**9))
SEARCHES = ((10**7, 10**7), (10**7, 10**8), (10**7, 10**9))  # queries, documents
# Documents in the mining corpora of the paper's data, as recipes/README.md names them; how many a core builds a second
CORPORA = {"msmarco": 8.8e6, "hotpotqa": 5.2e6, "fever": 5.4e6, "paq": 1e7, "stackexchange": 4.8e6, "bioasq": 1.5e7}
BUILT = 35_000
MODELS = {"minilm": "MiniLM", "flag-merged": "the flagship of 135 M, merged"}


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
        "cost": cost(recipe, sizes, RESULTS),
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


def micro_batches(recipe: Recipe, stage: ContrastiveStage, length: int) -> tuple[int, float]:
    """Of a GPU's part of a step: its micro-batches, and the operations for each parameter and token.

    With LoRA and gradient checkpointing these are forward, forward again, and the gradient of the states: 2 each.
    Where queries need the texts of others, GradCache adds a forward of all micro-batches but the first.
    """
    budget, queries = recipe.run.batch_tokens, stage.optim.batch_queries // GPUS
    if stage.in_batch_negatives == "none":  # split by queries
        return -(-queries // (budget // (stage.texts_a_row * length))), 6.0
    texts, first = queries * stage.texts_a_row, budget // length
    return -(-texts // first), 6 + 2 * max(0, 1 - first / texts)


def seconds_a_step(recipe: Recipe, stage: ContrastiveStage, sizes: Sizes, length: int) -> float:
    """The seconds of products: those of attention are not in it."""
    tokens = stage.optim.batch_queries * stage.texts_a_row * length
    return micro_batches(recipe, stage, length)[1] * tokens * (sizes.decoder + sizes.head) / GPUS / RATE


def stages_of(recipe: Recipe) -> list[ContrastiveStage]:
    return [stage for stage in recipe.stages if isinstance(stage, ContrastiveStage)]


def step(recipe: Recipe, sizes: Sizes) -> list[str]:
    rows, ddp = [], 2 * 4 * sizes.trained / LINK
    for length in LENGTHS:
        hours = 0.0
        for stage in stages_of(recipe):
            (micro, work), compute = micro_batches(recipe, stage, length), seconds_a_step(recipe, stage, sizes, length)
            gathers = 3 * micro + (micro - 1) * (work > 6)
            hours += (own := (compute + ddp) * stage.optim.steps / 3600)
            tokens = stage.optim.batch_queries * stage.texts_a_row * length
            cells = [tokens, micro, work, compute, ddp, gathers * 2 * sizes.decoder / LINK, own]
            name = f"{stage.name}, {stage.optim.steps:,} steps"
            rows.append([name, f"{length}", *(f"{x:,.0f}" if x >= 100 else f"{x:.2g}" for x in cells)])
        rows.append(["both", f"{length}", *["-"] * 6, f"{hours:,.0f}"])
    head = ["stage", "tokens a text", "tokens a step", "micro-batches of a GPU", "operations a parameter and token"]
    return table(
        [*head, "s of products", "s to add gradients (`ddp`)", "s to gather weights (`fsdp`)", "hours (`ddp`)"], rows
    )


def mining(folder: Path) -> list[str]:
    """What benchmarks/mining_at_scale.py has recorded, and what follows from its searches for larger ones."""
    searches = records(folder, "search-")
    if not searches:
        return ["Not measured yet."]
    rows = []
    for found in searches:
        of = found["size"]
        what = f"{of['queries']:,} x {of['documents']:,} x {of['width']}, {of['precision']}"
        cells = [found["seconds"], rate_of(found) / 1e9, found["read"] / 1e9, found["peak_mb"] / 1e3]
        rows.append([what, *(f"{cell:,.0f}" if cell >= 100 else f"{cell:.2f}" for cell in cells)])
    head = ["search: queries x documents x width", "s", "GFLOP/s", "GB read", "GB of memory, queries and libraries too"]
    lines = [*table(head, rows), "", *(made(found) for found in searches), ""]
    return [*lines, *memory_by_rows(folder), *end_to_end(folder), *extrapolated(searches)]


def memory_by_rows(folder: Path) -> list[str]:
    """Memory of a whole run of `mine` by the number of its rows."""
    found = records(folder, "mine-memory")
    if not found:
        return ["Memory by the number of rows: no record yet.", ""]
    of = found[-1]["size"]
    head = [f"rows, in {of['documents']:,} documents x {of['width']}, {of['at_once']:,} rows at once", "MB added"]
    rows = [[f"{one['examples']:,}", f"{one['added_mb']:,.0f}", f"{one['peak_mb']:,.0f}"] for one in found[-1]["rows"]]
    return [*table([*head, "MB of memory, libraries too"], rows), "", made(found[-1]), ""]


def end_to_end(folder: Path) -> list[str]:
    """Runs that encode and search, ours beside sentence-transformers', with one teacher."""
    found = records(folder, "mine-end-to-end-")
    rows = [
        [
            f"{MODELS.get(name := one['size']['model'], name)}, {one['size']['dtype']}, {one['size']['texts']:,} texts",
            *(f"{one['seconds'][side][0]:,.0f}" for side in ("ours", "peer")),
            f"{one['ratio']['median']:.2f}",
            f"{one['negatives_that_the_peer_found_too']:.0%}",
        ]
        for one in found
    ]
    head = ["end to end, encode and search", "ours, s", "`mine_hard_negatives`, s", "faster by", "equal negatives"]
    lines = [*table(head, rows), "", *map(made, found), ""] if found else []
    if all(one["size"]["model"] == "minilm" for one in found):
        lines += ["**Not run: end to end with a decoder of ours as the teacher** (the goal is twice as fast).", ""]
    return lines


def extrapolated(searches: Sequence[Mapping[str, Any]]) -> list[str]:
    """Larger searches, each by the rate that was measured for its precision."""
    rows = []
    for queries, documents in SEARCHES:
        for width in dict.fromkeys([*(found["size"]["width"] for found in searches), 4096]):
            for precision, found in {one["size"]["precision"]: one for one in searches}.items():
                stored = documents * width * {"float32": 4, "float16": 2}[precision]
                read, work = -(-queries // AT_ONCE) * stored, 2 * queries * documents * width
                cells = [stored / 1e12, read / 1e12, work / rate_of(found) / 86400, work / SEARCH / 3600]
                named = [f"{queries:,}", f"{documents:,}", f"{width}", precision]
                cells.append(read / DISK / 3600)
                rows.append([*named, *(f"{cell:,.3g}" if cell < 100 else f"{cell:,.0f}" for cell in cells)])
    head = ["queries", "documents", "width", "stored as", "vectors, TB", "read, TB", "this machine, days"]
    return [
        f"Assumed: time goes with queries x documents x width, by the rate above of each precision; one pass over the "
        f"corpus for {AT_ONCE:,}",
        f"queries; a disk reads {DISK / 1e9:.0f} GB/s, and a GPU multiplies {SEARCH / 1e12:.0f} TFLOP/s in float32 "
        "(neither was measured); GPUs share the work evenly.",
        "",
        *table([*head, "one GPU, hours", "disk alone, hours"], rows),
    ]


def rate_of(found: Mapping[str, Any]) -> float:
    """Products a second, times two, of a recorded search."""
    of = found["size"]
    return float(2 * of["queries"] * of["documents"] * of["width"] / found["seconds"])


def cost(recipe: Recipe, sizes: Sizes, folder: Path) -> list[str]:
    """What each step of a corpus and its rows, and of the recipe, takes, by the rates above and the recorded ones."""
    [data], searches = records(folder, "data-at-scale"), records(folder, "search-")
    rate, both = data["rows_per_second"], sizes.decoder + sizes.head
    work: list[tuple[str, str, str, float, float]] = []  # of, step, bytes, core seconds, GPU seconds
    waits = ", while a GPU waits"
    for name, rows, passages in CASES:
        parts, stored = -(-rows // AT_ONCE), passages * 2 * sizes.hidden
        first = parts * (rows / rate["mine_rows"] + passages / rate["mine_documents"])
        checked = ENCODE_PARTS * passages / rate["read"]
        work += [
            (name, f"clean {rows:,} pairs", size(rows * 600), rows / rate["clean"], 0),
            (name, f"check {passages:,} passages in {ENCODE_PARTS} parts of `encode`{waits}", "-", checked, checked),
            (name, "encode them, 7B, float16", size(stored), 0, 2 * both * WORDS * passages / RATE),
            (name, f"read rows and corpus in {parts} parts of `mine`{waits}", "-", first, first),
            (name, "search", f"{size(parts * stored)} read", 0, 2 * rows * passages * sizes.hidden / SEARCH),
            (name, "write rows with 7 negatives", size(rows * 5000), 0, 0),
        ]
    documents = sum(CORPORA.values())
    found = sum(2 * (find_entry(name).samples or 0) * count * sizes.hidden for name, count in CORPORA.items())
    trained = [seconds_a_step(recipe, one, sizes, WORDS) * one.optim.steps for one in stages_of(recipe)]
    own = [
        (f"build corpora of {documents / 1e6:.0f} M documents", size(documents * 800), documents / BUILT, 0.0),
        ("encode them", size(documents * 2 * sizes.hidden), 0, 2 * both * WORDS * documents / RATE),
        (f"search in them, {found:.0e} operations", "-", 0, found / SEARCH),
        ("synthesize 120,000 examples", "-", 0, 120_000 * 1500 / LLM_TOKENS * GPUS),
        (f"train {sum(one.optim.steps for one in stages_of(recipe)):,} steps", "-", 0, sum(trained) * GPUS),
    ]
    own.append(("**together**", "-", sum(one[2] for one in own), sum(one[3] for one in own)))
    slow = [found / rate_of(one) * one["machine"]["cores"] for one in searches[:1]]
    own += [("or the search on CPU cores, not on a GPU", "-", cores, 0) for cores in slow]
    rows = []
    for name, what, stored, cores, gpus in [*work, *(("the recipe", *one) for one in own)]:
        hours = gpus / 3600
        shown = [f"{hours:,.0f}", f"{hours / GPUS:,.1f}", f"{hours * PRICE:,.0f}"] if gpus else ["-"] * 3
        spent = f"{cores / 3600:,.0f}" if cores > 36_000 else f"{cores / 3600:.2g}" if cores else "-"
        rows.append([name, what, stored, spent, *shown])
    head = ["of", "step", "bytes", "core hours", "GPU hours", "hours on 8 GPUs", "dollars"]
    return [*table(head, rows), "", made(data)]


def records(folder: Path, prefix: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(f"{prefix}*.json"))]


def made(found: Mapping[str, Any]) -> str:
    command = re.sub(r" --folder \S+", "", found["command"])
    machine, command = found["machine"], re.sub(r"(--model )\S*/", r"\1", command)  # a folder of that machine
    return f"- `{command}`, {found['date']}, {machine['cores']} cores of {machine['cpu']}."


def size(count: float) -> str:
    return f"{count / 1e12:,.1f} TB" if count >= 1e12 else f"{count / 1e9:,.0f} GB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
