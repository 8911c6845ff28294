"""The table of goals, docs/performance.md and its picture, the README's headlines and docs/planning.md's table of runs,
from the results that are there.

python benchmarks/report.py             # prints the table, writes the pages and the picture
python benchmarks/report.py --check     # exits 1 where a page is not what the results give
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "performance.md"
PICTURE = PAGE.with_suffix(".png")
README = HERE.parent / "README.md"
PLANNING = HERE.parent / "docs" / "planning.md"
HEADLINE_MARKS = "<!-- headlines -->\n", "<!-- end of headlines -->\n"
PLANNING_MARKS = "<!-- runs -->\n", "<!-- end of runs -->\n"
# the README's four goals, and the result of each: of one command, which it names
HEADLINES = {
    "encode_fp32": "encode-smollm2-135m-float32",
    "encode_bf16": "encode-smollm2-135m-bfloat16",
    "train_bf16": "train-bfloat16-4-layers",
    "mining": "mining-100000x768",
}

# name: (what, must, stretch, whether more is better, unit)
GOALS: dict[str, tuple[str, float | None, float | None, bool, str]] = {
    "encode_fp32": ("encode fp32, cosine > 0.9999", 2.5, 3, True, "x"),
    "encode_bf16": ("encode bf16 against ST bf16", 1.5, 2, True, "x"),
    "encode_bf16_distance": ("its mean distance from float32, over ST's", 1, None, False, "x"),
    "encode_int8": ("encode int8 against ST bf16, min cosine >= 0.99", None, 2.8, True, "x"),
    "mfu_bf16": ("MFU bf16, linear layers' FLOPs only", 0.60, 0.75, True, ""),
    "train_fp32": ("train step fp32, gradients within 1e-4 of ST's", 2.2, 3, True, "x"),
    "train_bf16": ("train step bf16", 3, 3.4, True, "x"),
    "train_bf16_equal_memory": ("train step bf16 at equal peak memory", 2.3, 2.5, True, "x"),
    "mining": ("mining, exact top-100 with the 95 % rule", 2.8, 4, True, "x"),
    "serve_plain_fp32": ("serve fp32 against ST behind FastAPI", 2, None, True, "x"),
    "serve_plain_bf16": ("serve bf16 against ST behind FastAPI", 2, None, True, "x"),
    "serve_batching_fp32": ("serve fp32 against ST behind a batching server", 1.2, None, True, "x"),
    "serve_batching_bf16": ("serve bf16 against ST behind a batching server", 1.1, None, True, "x"),
    "encode_memory": ("peak memory of encode, against ST at its best", 1, 0.7, False, "x"),
}
NOT_MEASURED = "not measured"
GPU = "gpu"  # results/gpu.json, which somebody with a GPU commits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args()
    results = read(RESULTS)
    pages = {
        PAGE: render(results),
        README: with_headlines(README.read_text(), results),
        PLANNING: with_runs(PLANNING.read_text(), results),
    }
    if options.check:
        wrong = [path.name for path, page in pages.items() if not path.is_file() or path.read_text() != page]
        sys.exit(f"{' and '.join(wrong)}: not what the results give" if wrong else 0)
    for path, page in pages.items():
        path.write_text(page)
    picture(results, PICTURE)
    print("\n".join(goal_table(results)))


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of speed in a folder, by name, in order of their names."""
    records = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    return {name: record for name, record in records.items() if "goals" in record}


# ---- goals


def measured(results: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """All that was measured for each goal. KeyError for a goal that is none of `GOALS`."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in GOALS}
    for record in results.values():
        for name, values in record["goals"].items():
            found[name] += values
    return found


def verdict(name: str, values: Sequence[float]) -> str:
    """`stretch`, `must` or `missed`, as the median of the values is; `not measured` without any."""
    _, must, stretch, more, _ = GOALS[name]
    if not values:
        return NOT_MEASURED
    middle = statistics.median(values)

    def reached(goal: float | None) -> bool:
        return goal is not None and (middle >= goal if more else middle <= goal)

    return "stretch" if reached(stretch) else "must" if reached(must) else "missed"


def goal_table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    for name, found in measured(results).items():
        what, must, stretch, more, unit = GOALS[name]
        values = [item["value"] for item in found]
        sign = "" if more else "<= "
        goals = ["-" if goal is None else f"{sign}{goal:g}{unit}" for goal in (must, stretch)]
        seen = NOT_MEASURED
        if values:
            middle = f"**{statistics.median(values):.2f}{unit}**"
            seen = middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"
        rows.append([what, *goals, seen, verdict(name, values)])
    return table(["", "must", "stretch", "seen", "goal"], rows)


def with_headlines(readme: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The README with the four headline ratios between its marks, each with the command that printed it."""
    head = [f"{line} {more} |" for line, more in zip(goal_table({})[:2], ("command", "---"), strict=True)]
    lines = []
    for goal, name in HEADLINES.items():
        row = goal_table({name: results[name]})[2 + list(GOALS).index(goal)]
        lines.append(f"{row} `{results[name]['command']}` |")
    return between(readme, HEADLINE_MARKS, [*head, *lines])


def with_runs(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/planning.md with what `train --plan` said of each run of benchmarks/plan.py, and what was measured."""
    if "plan" not in results:
        return page
    plan = results["plan"]
    said, *rows = _runs(plan)
    lines = [f"Layers of {plan['model']}; `python benchmarks/plan.py`. {said}", "", *rows]
    lines += ["", *machines({"plan": plan})]
    if gpu := results.get("plan-gpu"):
        said, *rows = _runs(gpu)
        lines += ["", f"The same on a GPU, all layers, without the reserve. {said}", "", *rows]
        lines += [*_cut_off(gpu), "", gpu_machine(gpu)]
    return between(page, PLANNING_MARKS, lines)


def _runs(record: Mapping[str, Any]) -> list[str]:
    """The ratio in one line, then a table of what was planned and measured."""
    rows = [
        [case, *(f"{found['memory_mb'][side]:,.0f}" for side in ("estimated", "measured"))]
        for case, found in record["cases"].items()
    ]
    head = ["run", "memory planned, MB", "measured"]
    return [f"Planned over measured: {spread(record['estimated_over_measured'])}.", *table(head, rows)]


def between(page: str, marks: tuple[str, str], lines: Sequence[str]) -> str:
    """The page with these lines between its marks."""
    before, rest = page.split(marks[0])
    return before + marks[0] + "\n".join(lines) + "\n" + marks[1] + rest.split(marks[1])[1]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, as lines."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def spread(ratio: Mapping[str, float]) -> str:
    """A ratio over its rounds."""
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


# ---- the page


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/performance.md. Sections of what was not measured are left out."""
    lines = ["# Performance", "", INTRODUCTION, "", *goal_table(results), "", READING, ""]
    lines += [f"![ratios by run]({PICTURE.name})", ""]
    lines += [*machines({name: record for name, record in results.items() if "gpu" not in record}), ""]

    def of(prefix: str) -> dict[str, Mapping[str, Any]]:
        return {name: record for name, record in results.items() if name.startswith(prefix)}

    for prefix, section in (("encode-", encode_section), ("split-", split_section), ("serve-", serve_section)):
        lines += section(found) if (found := of(prefix)) else []
    for name, single in (("scaling", scaling_section), ("linears", linears_section)):
        lines += single(results[name]) if name in results else []
    for prefix, section in (("train-", train_section), ("mining-", mining_section)):
        lines += section(found) if (found := of(prefix)) else []
    lines += ceiling_section(results)
    lines += gpu_section(results[GPU]) if GPU in results else GPU_NOT_MEASURED
    return "\n".join(lines).rstrip() + "\n"


INTRODUCTION = """\
Generated by `make bench` (`benchmarks/report.py`) from `benchmarks/results/*.json`; not edited by hand. Every ratio is
to sentence-transformers (ST) on the same weights, tokens and pooling, at the batch size or loss setting that was
fastest for it in the same run. Both sides have bound OpenMP threads and take turns (A B A B); a ratio is the median
over the rounds, above 1 where we are faster."""
READING = """\
`seen` is the median over models and text sets, with the smallest and largest; the goals were set before. The tables
below have the spread of each ratio over its rounds. Encode in int8, which was optional, is not built.

ST runs on torch. Its other engines gave no figure: for ONNX Runtime, optimum-onnx 0.1 asks for transformers below 4.58
where ST 6.2 asks for 5; OpenVINO, in an environment of its own (optimum-intel 2.2, OpenVINO 2026.4, transformers 5.5),
exports SmolLM2 and gives vectors that are not numbers, bidirectional or causal, whatever its settings for precision."""
GPU_NOT_MEASURED = [
    "## GPU",
    "",
    "Not measured: no GPU has been at hand. `make gpu-smoke` measures one, into one JSON.",
]
GPU_MEASURED = """\
One GPU, bfloat16, mixed texts, `make gpu-smoke`. MFU: of the linear layers, over a large product on that GPU. MB: what
encoding, or a step of training, adds to the model. Cosine: the smallest to our float32."""
GPU_TRAINING = """\
LoRA on all linear layers of {model}:
{queries} queries, each with a passage and a negative, {tokens:,} tokens. ST at its fastest of {settings} settings
({kind}, mini-batch: {mini_batch}).
"""
ENCODE = """\
`queries` have an instruction in front, `passages` are long, `mixed` has as many of the one as of the other, without
instruction. MFU: FLOPs of the linear layers alone, over those of the fastest matrix product that this machine showed
in the same run; one over ST's is what a ratio could be at most. Cosine: the smallest between the two sides in float32;
in bfloat16 of each side to our float32 (ours / ST), with the mean distance (1 - cosine) behind it: a few texts decide
the smallest."""
SERVE = """\
Requests of 1, 4 and 16 texts of mixed lengths by 16 clients at once, written beforehand; vectors in base64. `plain` is
ST behind FastAPI, `batching` collects what waits, each at its fastest setting. Client's CPU: of one core."""
CEILINGS = """\
What a ratio could be at most: ST's time over that of the matrix products that the work takes, and of nothing else, at
the fastest that this machine showed in the same run. For encode these are those of the linear layers, in the type that
is measured; for a search those of all queries with all documents in int8, where they were timed. Reached: our share of
that. A goal above what is possible is missed because ST itself is that near to the processor's limit."""
TRAINING = """\
From texts to updated adapters, InfoNCE over all candidates of a batch; ST with its fastest loss, mini-batch and kind of
bf16. Memory is model and step together, each side in a process of its own."""
TRAINED = {"ours": "one forward", "ours_equal": "{batch_tokens_at_equal_memory:,} tokens at a time (GradCache)"}
MINING = """\
Exact top 100 and the 95 % rule, vectors at hand: whole is from them to negatives, as ST's `mine_hard_negatives` does it
with its faster backend, which the goal is about; search is that part alone."""
MEMORY = """\
Memory of encoding mixed texts, each side in a process of its own, in MB: what encoding adds to the loaded model at its
peak, and model and encoding together, which the goal is about."""
CONTRIBUTIONS = """\
Each step's gain over the step before. Packing: from ST to no padding, with torch's own products and its fused attention
text by text. Linears: the products that we ship, and texts of equal length as one batch; that is all without a C
compiler. Kernels: attention, norms and rotary positions in C, all that we ship."""


def machines(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each machine and set of versions, with the names of its results."""
    runs: dict[str, list[str]] = {}
    for name, record in results.items():
        m = record["machine"]
        versions = ", ".join(f"{p} {m[p]}" for p in ("python", "torch", "transformers", "sentence-transformers"))
        cores = f"{m['cores']} cores, {m['threads']} threads, {m['instructions']}, {m['memory_gb']} GB"
        line = f"{m['cpu']}, {cores}; {versions}"
        runs.setdefault(line, []).append(name)
    return [f"Machine: {line} ({', '.join(names)})." for line, names in runs.items()]


def serve_section(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    for record in records.values():
        for side, found in record["sides"].items():
            rows.append(
                [
                    record["model"],
                    record["dtype"],
                    side,
                    f"{found['texts_per_s']:,.1f}",
                    f"{found['p50_ms']:,.0f} / {found['p99_ms']:,.0f}",
                    spread(record["times_faster"][side]) if side in record["times_faster"] else "",
                    f"{found['smallest_cosine']:.6f}",
                    f"{found['client_cpu_share']:.1%}",
                ]
            )
    head = ["model", "type", "server", "texts/s", "p50 / p99 ms", "ours over it", "cosine", "client's CPU"]
    return ["## Serve", "", SERVE, "", *table(head, rows), ""]


def encode_section(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    speed, memory = [], []
    for record in records.values():
        for name, found in record["sets"].items():
            rates, gain = found["tokens_per_second"], found["ratio"]
            cosines = found.get("cosine_to_float32") or {"ours": found["cosine"], "peer": found["cosine"]}
            speed.append(
                [
                    record["model"],
                    record["dtype"],
                    name,
                    f"{found['texts']} / {found['tokens']}",
                    f"{rates['peer']:,.0f} (batch {found['peer_batch']})",
                    f"{rates['ours']:,.0f}",
                    spread(gain),
                    f"{found['mfu']:.2f} / {found['peer_mfu']:.2f}",
                    f"{cosines['ours']:.6f}" + (f" / {cosines['peer']:.6f}" if "cosine_to_float32" in found else ""),
                    " / ".join(f"{found['distance_to_float32'][side]:.1e}" for side in ("ours", "peer"))
                    if "distance_to_float32" in found
                    else "",
                ]
            )
        ours, peer = record["memory"]["ours"], record["memory"]["peer"]
        figures = (ours["encode_mb"], peer["encode_mb"], ours["peak_mb"], peer["peak_mb"])
        shares = f"{ours['encode_mb'] / peer['encode_mb']:.2f} / {ours['peak_mb'] / peer['peak_mb']:.2f}"
        memory.append([record["model"], record["dtype"], *(f"{figure:,.0f}" for figure in figures), shares])
    head = [
        "model",
        "type",
        "texts",
        "count / tokens",
        "ST tokens/s",
        "ours",
        "ratio",
        "MFU ours / ST",
        "cosine",
        "mean distance",
    ]
    return [
        "## Encode",
        "",
        ENCODE,
        "",
        *table(head, speed),
        "",
        MEMORY,
        "",
        *table(["model", "type", "encode, ours", "ST", "with model, ours", "ST", "share: encode / all"], memory),
        "",
    ]


def split_section(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    gains, sizes, profiles = [], [], []
    for record in records.values():
        for name, found in record["contributions"].items():
            gains.append([record["dtype"], name, *map(spread, found["gains"].values())])
        sizes.append([record["dtype"], *(f"{rate:,.0f}" for rate in record["batch_tokens"].values())])
        for name, shares in record["profile"].items():
            profiles.append([record["dtype"], name, *(f"{share:.1%}" for share in shares.values())])
    first = next(iter(records.values()))
    return [
        "### What contributes",
        "",
        f"{first['model']}. {CONTRIBUTIONS}",
        "",
        *table(["type", "texts", "packing", "linears", "kernels"], gains),
        "",
        "Tokens per second by `batch_tokens`, mixed texts:",
        "",
        *table(["type", *first["batch_tokens"]], sizes),
        "",
        "Where our time goes. Activation: in bfloat16 with the products of gate and up, which it is",
        "part of. Rest: tokenisation, embedding lookup, residual sums, pooling.",
        "",
        *table(["type", "texts", *next(iter(first["profile"].values()))], profiles),
        "",
    ]


def scaling_section(record: Mapping[str, Any]) -> list[str]:
    rows = [
        [f"{kind} {int(size):,}", f"{c['tokens']:,}", f"{c['microseconds_per_token']:,.0f}", f"{c['encode_mb']:,.0f}"]
        for kind, costs in (("one text of", record["lengths"]), ("texts:", record["corpora"]))
        for size, c in costs.items()
    ]
    checked = {size: c["difference_to_sdpa"] for size, c in record["lengths"].items() if "difference_to_sdpa" in c}
    return [
        "## As texts and the corpus grow",
        "",
        f"{record['model']}; memory is what encoding adds to the loaded model.",
        *(
            f"At {int(size):,} tokens the vector differs from the stock sdpa path's by {d:.0e} at most."
            for size, d in checked.items()
        ),
        "",
        *table(["", "tokens", "µs per token", "MB"], rows),
        "",
    ]


def linears_section(record: Mapping[str, Any]) -> list[str]:
    rows = [
        [dtype, rows, *(f"{rate:,.0f}" for rate in rates.values())]
        for dtype, by_rows in record["gflops"].items()
        for rows, rates in by_rows.items()
    ]
    return [
        "## Matrix products",
        "",
        "GFLOP/s over shapes of decoder layers: torch's own, oneDNN on the plain weight, oneDNN on a reordered one.",
        "",
        *table(["type", "rows", "torch", "oneDNN", "oneDNN, reordered"], rows),
        "",
    ]


def gpu_section(record: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            model,
            side,
            f"{found['tokens']:,}",
            str(of["batch"] or "default"),
            f"{of['tokens_per_second']:,.0f}",
            " to ".join(f"{of['ours_is_faster'][key]:.2f}" for key in ("least", "most"))
            + f", median {of['ours_is_faster']['median']:.2f}",
            f"{of['mfu']:.3f}",
            f"{of['encode_mb']:,.0f}",
            f"{of['cosine']:.4f}",
        ]
        for model, found in record["encode"].items()
        for side, of in found["sides"].items()
    ]
    head = ["model", "side", "tokens", "batch", "tokens/s", "ours is faster by", "MFU", "MB", "cosine"]
    checks = [[name, f"{seen:.1e}"] for name, seen in record["checks"].items()]
    step = record.get("train")
    trained = [] if step is None else ["", *_gpu_training(step, next(iter(record["encode"])))]
    return [
        "## GPU",
        "",
        GPU_MEASURED,
        "",
        *table(head, rows),
        *trained,
        "",
        *table(["check", "largest relative difference"], checks),
        *_cut_off(record),
        "",
        gpu_machine(record),
    ]


def _gpu_training(step: Mapping[str, Any], model: str) -> list[str]:
    rows = [
        [side, f"{rate:,.0f}", f"{step['ours_is_faster'].get(side, {'median': 1})['median']:.2f}", f"{mb:,.0f}"]
        for (side, rate), mb in zip(step["tokens_per_second"].items(), step["step_mb"].values(), strict=True)
    ]
    named = step["peer_setting"] | {"settings": len(step["peer_search_seconds"]), "model": model}
    said = GPU_TRAINING.format(**named, queries=step["queries"], tokens=step["tokens"])
    return [said, *table(["training step", "tokens/s", "faster than ST by", "MB"], rows)]


def _cut_off(record: Mapping[str, Any]) -> list[str]:
    behind = record.get("cut_off_behind")
    return [] if behind is None else ["", f"Not whole: the run was cut off after {behind}."]


def gpu_machine(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{p} {record['machine'][p]}" for p in ("torch", "transformers", "sentence-transformers"))
    return f"Machine: {record['gpu']}, {record['machine']['cores']} cores; {versions}."


def train_section(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            record["model"],
            record["dtype"],
            TRAINED[side].format(**record),
            f"{record['median_seconds'][side]:.2f} / {record['median_seconds']['peer']:.2f}",
            spread(seen),
            f"{record['memory'][side]['peak_mb']:,.0f} / {record['memory']['peer']['peak_mb']:,.0f}",
        ]
        for record in records.values()
        for side, seen in record["ratio"].items()
    ]
    head = ["model", "type", "ours", "seconds, ours / ST", "ratio", "MB, ours / ST"]
    return ["## Training step", "", TRAINING, "", *table(head, rows), ""]


def mining_section(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    ordered = sorted(records.values(), key=lambda record: record["size"]["documents"])
    for record in ordered:
        size, ratios = record["size"], record["ratios"]
        seconds = {name: statistics.median(each) for name, each in record["seconds"].items()}
        peer = min(("peer, torch", "peer, faiss"), key=seconds.__getitem__)
        rows.append(
            [
                f"{size['documents']:,} x {size['width']}, {size['queries']} queries",
                f"{seconds['ours']:.2f} / {seconds[peer]:.2f}",
                *(spread(ratios[what]) for what in ("whole", "search", "to faiss, search")),
            ]
        )
    head = ["documents", "seconds, ours / ST", "whole", "search", "search, to faiss alone"]
    parts = [_parts_of_mining(record) for record in ordered if "parts" in record]
    return ["## Mining", "", MINING, "", *table(head, rows), "", *parts, *([""] if parts else [])]


def _parts_of_mining(record: Mapping[str, Any]) -> str:
    """Where one run of ours went, the largest part first."""
    parts = sorted(record["parts"].items(), key=lambda part: -part[1])
    whole = sum(seconds for _, seconds in parts)
    shares = "; ".join(f"{name} {seconds / whole:.0%}" for name, seconds in parts)
    return f"Where our time goes, {record['size']['documents']:,} documents: {shares}."


def ceiling_section(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How far the processor itself would let each ratio of encode and search go."""
    rows = []
    for record in results.values():
        for name, found in record.get("sets", {}).items():
            most = 1 / found["peer_mfu"]
            rows.append((f"encode, {record['model']}, {record['dtype']}, {name}", found["ratio"]["median"], most))
        seconds = {name: statistics.median(each) for name, each in record.get("seconds", {}).items()}
        if "int8 product alone" in seconds:
            most = min(seconds["peer, torch, search"], seconds["peer, faiss, search"]) / seconds["int8 product alone"]
            size = record["size"]
            of = f"search, {size['documents']:,} x {size['width']}, {size['queries']} queries"
            rows.append((of, record["ratios"]["search"]["median"], most))
    if not rows:
        return []
    cells = [[of, f"{seen:.2f}x", f"{most:.2f}x", f"{seen / most:.0%}"] for of, seen, most in rows]
    return ["## What is possible", "", CEILINGS, "", *table(["", "seen", "at most", "reached"], cells), ""]


# ---- the picture


def picture(results: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """All ratios that were seen, one row for each goal, with the goals as marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {name: values for name, values in measured(results).items() if values}
    figure, axes = pyplot.subplots(figsize=(9, 0.55 * len(found) + 1.2), layout="constrained")
    for row, (name, values) in enumerate(found.items()):
        _, must, stretch, _, _ = GOALS[name]
        axes.plot([item["value"] for item in values], [row] * len(values), "o", color="tab:blue", alpha=0.7)
        for goal, color in ((stretch, "tab:green"), (must, "tab:orange")):
            if goal is not None:
                axes.plot([goal], [row], "|", color=color, markersize=22)
    axes.set_yticks(range(len(found)), [GOALS[name][0] for name in found])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("seen (dots), must (orange), stretch (green)")
    figure.savefig(out, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
