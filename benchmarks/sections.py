"""The tables of docs/performance.md, each from the records of one benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from common import processor
from gpu_section import gpu_section
from tables import Records, machines, spread, table

ENCODE = """\
`queries` have an instruction in front, `passages` are long, `mixed` has as many of the one as of the other, without
instruction. MFU: FLOPs of the linear layers alone, over those of their products, each by its fastest kernel in the same
run; one over ST's is what a ratio could be at most. Cosine: the smallest between the two sides in float32; in bfloat16
of each side to our float32 (ours / ST), with the mean distance (1 - cosine) after it: a few texts decide the
smallest."""
INT8 = """\
In int8, measured in the same rounds as bfloat16 above. MFU: of the int8 products. ONNX Runtime runs our export of the
same model with int8 weights, on batches sorted by length, at its fastest number of tokens. Distance (mean 1 - cosine)
and smallest cosine to our float32: int8 / our bfloat16 / ST bfloat16 / ONNX Runtime."""
MEMORY = """\
Memory of encoding mixed texts, each side in a process of its own, in MB: what encoding adds to the loaded model at its
peak, and model and encoding together, which the goal is about. Each opens a folder that holds the
weights in its type; records before 2026-11-29 are of a folder in float32, whose conversion takes memory too."""
SERVE = """\
Requests of 1, 4 and 16 texts of mixed lengths by 16 clients at once, written beforehand; vectors in base64. `plain` is
ST behind FastAPI, `batching` collects what waits, each at its fastest setting. Client's CPU: of one core."""
COLD = """\
Seconds from `import` to the first vector in a new process, its files and compiled kernels in the caches. Ours proves at
load that the model gives the vectors that were stored with it, and that its faster forms are the stock ones."""
PEAKS = """\
GFLOP/s over shapes of decoder layers, by rows of the input. `torch`: its own product; `onednn`: oneDNN on the plain
weight, `onednn_reordered` on a reordered one; `int_mm`: torch's int8 product; `qlinear`: oneDNN's with uint8 input;
`ours`: our kernel."""
POSSIBLE = """\
What the products of a model's linear layers reach together, each by its fastest kernel; the tokens per second that they
alone would allow; and what encoding mixed texts reaches."""
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
CONTRIBUTIONS = """\
Each step's gain over the step before. Packing: from ST to no padding, with torch's own products and its fused attention
text by text. Linears: the products that we ship, and texts of equal length as one batch; that is all without a C
compiler. Kernels: attention, norms and rotary positions in C, all that we ship."""
PIECES = """\
Each piece alone: the time without it over the time with all. A piece stays if it is worth 1.05 somewhere."""
PROFILE = """\
Where our time goes. Activation: in bfloat16 with the products of gate and up, which it is part of. Rest: tokenisation,
embedding lookup, residual sums, pooling."""
# said once, above the newest tables
EXPLANATIONS = {
    ENCODE,
    INT8,
    MEMORY,
    SERVE,
    COLD,
    PEAKS,
    POSSIBLE,
    CEILINGS,
    TRAINING,
    MINING,
    CONTRIBUTIONS,
    PIECES,
    PROFILE,
}


def sections(results: Records) -> list[str]:
    """All tables of one set of records but the GPU's. Those of what was not measured are left out."""

    def of(prefix: str) -> dict[str, Mapping[str, Any]]:
        return {name: record for name, record in results.items() if name.startswith(prefix)}

    lines: list[str] = []
    for prefix, section in (
        ("encode-", encode_section),
        ("split-", split_section),
        ("cold-", cold_section),
        ("serve-", serve_section),
    ):
        lines += section(found) if (found := of(prefix)) else []
    lines += scaling_section(results["scaling"]) if "scaling" in results else []
    lines += peaks_section(results["peaks"], of("encode-")) if "peaks" in results else []
    for prefix, section in (("train-", train_section), ("mining-", mining_section)):
        lines += section(found) if (found := of(prefix)) else []
    return lines + ceiling_section(results)


def earlier_sections(results: Records) -> list[str]:
    """The tables of a processor whose runs are not the newest. Each table is explained above, with the newest."""
    name = processor(next(iter(results.values())))
    lines = [f"## Earlier: {name}", "", *machines(results), ""]
    lines += ["#" + line if line.startswith("#") else line for line in sections(results) if line not in EXPLANATIONS]
    if "gpu" in results:
        lines += ["#" + line if line.startswith("#") else line for line in gpu_section(results["gpu"])]
    return lines


# ---- encode


def encode_section(records: Records) -> list[str]:
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
        memory += _memory_rows(record)
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
        *_int8_lines(records),
        MEMORY,
        "",
        *table(["model", "type", "encode, ours", "ST", "with model, ours", "ST", "share: encode / all"], memory),
        "",
    ]


def _int8_lines(records: Records) -> list[str]:
    """The sides that run beside bfloat16, where they were measured."""
    rows = []
    for record in records.values():
        for name, found in record["sets"].items():
            if "int8" not in found:
                continue
            rates, faster = found["tokens_per_second"], found["int8"]["faster_than"]
            sides = [side for side in ("int8", "ours", "peer", "onnx") if side in rates]
            rows.append(
                [
                    record["model"],
                    name,
                    f"{rates['int8']:,.0f}",
                    *(spread(faster[side]) if side in faster else "not measured" for side in ("ours", "peer", "onnx")),
                    f"{found['int8']['mfu']:.2f}",
                    " / ".join(f"{found['distance_to_float32'][side]:.1e}" for side in sides),
                    " / ".join(f"{found['cosine_to_float32'][side]:.4f}" for side in sides),
                ]
            )
    if not rows:
        return []
    head = [
        "model",
        "texts",
        "int8, tokens/s",
        "over our bfloat16",
        "over ST bfloat16",
        "over ONNX Runtime int8",
        "MFU",
    ]
    said = dict.fromkeys(
        reason for r in records.values() if r["dtype"] == "bfloat16" for reason in r.get("left_out", {}).values()
    )
    lines = ["### int8", "", INT8, "", *table([*head, "mean distance", "smallest cosine"], rows), ""]
    return lines + [line for reason in said for line in (f"Left out: {reason}.", "")]


def _memory_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """Ours beside the peer, then int8 beside the peer."""
    rows, peer = [], record["memory"]["peer"]
    for side, kind in (("ours", record["dtype"]), ("int8", "int8")):
        if side not in record["memory"]:
            continue
        ours = record["memory"][side]
        figures = (ours["encode_mb"], peer["encode_mb"], ours["peak_mb"], peer["peak_mb"])
        shares = f"{ours['encode_mb'] / peer['encode_mb']:.2f} / {ours['peak_mb'] / peer['peak_mb']:.2f}"
        rows.append([record["model"], kind, *(f"{figure:,.0f}" for figure in figures), shares])
    return rows


def split_section(records: Records) -> list[str]:
    gains, alone, sizes, profiles = [], [], [], []
    for record in records.values():
        for name, found in record["contributions"].items():
            if len(found["gains"]) == 3:  # all but int8
                gains.append([record["dtype"], name, *map(spread, found["gains"].values())])
            for piece, worth in found.get("alone", {}).items():
                alone.append([record["dtype"], name, piece, spread(worth)])
        sizes.append([record["dtype"], *(f"{rate:,.0f}" for rate in record["batch_tokens"].values())])
        for name, shares in record["profile"].items():
            profiles.append([record["dtype"], name, *(f"{share:.1%}" for share in shares.values())])
    first = next(iter(records.values()))
    pieces = [PIECES, "", *table(["type", "texts", "piece", "worth"], alone), ""] if alone else []
    return [
        "### What contributes",
        "",
        f"{first['model']}.",
        CONTRIBUTIONS,
        "",
        *table(["type", "texts", "packing", "linears", "kernels"], gains),
        "",
        *pieces,
        "Tokens per second by `batch_tokens`, mixed texts:",
        "",
        *table(["type", *first["batch_tokens"]], sizes),
        "",
        PROFILE,
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


def cold_section(records: Records) -> list[str]:
    rows = [
        [record["model"], side, *(f"{seconds:.2f}" for seconds in record["parts"][side].values()), f"{whole:.2f}"]
        for record in records.values()
        for side, each in record["seconds"].items()
        for whole in [statistics.median(each)]
    ]
    head = ["model", "setting", "import", "load", "first encode", "whole"]
    return ["## Cold start", "", COLD, "", *table(head, rows), ""]


def peaks_section(record: Mapping[str, Any], encoded: Records) -> list[str]:
    rates = []
    for dtype, by_rows in record["gflops"].items():
        for kernel in next(iter(by_rows.values())):
            rates.append([dtype, kernel, *(f"{found[kernel]:,.0f}" for found in by_rows.values())])
    rows = next(iter(record["gflops"].values()))
    lines = ["## Matrix products", "", PEAKS, "", *table(["type", "kernel", *(f"{n} rows" for n in rows)], rates), ""]
    reached = {(r["model"], kind): rate for r in encoded.values() for kind, rate in _rates(r).items()}
    possible = []
    for model, found in record.get("models", {}).items():  # which the first records have not
        for kind, peak in found["peak_flops"].items():
            most, seen = peak / found["linear_flops_per_token"], reached.get((model, kind))
            ours = "not measured" if seen is None else f"{seen:,.0f} ({seen / most:.0%})"
            possible.append([model, kind, f"{peak / 1e9:,.0f}", f"{most:,.0f}", ours])
    if possible:
        head = ["model", "type", "GFLOP/s", "tokens/s at most", "reached"]
        lines += [POSSIBLE, "", *table(head, possible), ""]
    return lines


def _rates(record: Mapping[str, Any]) -> dict[str, float]:
    """Our tokens per second of mixed texts, by type."""
    rates = record["sets"]["mixed"]["tokens_per_second"]
    return {kind: rates[side] for kind, side in ((record["dtype"], "ours"), ("int8", "int8")) if side in rates}


def serve_section(records: Records) -> list[str]:
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


def train_section(records: Records) -> list[str]:
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


def mining_section(records: Records) -> list[str]:
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
    parts += [_pieces_of_mining(record) for record in ordered if record.get("alone")]
    return ["## Mining", "", MINING, "", *table(head, rows), "", *parts, *([""] if parts else [])]


def _parts_of_mining(record: Mapping[str, Any]) -> str:
    """Where one run of ours went, the largest part first."""
    parts = sorted(record["parts"].items(), key=lambda part: -part[1])
    whole = sum(seconds for _, seconds in parts)
    shares = "; ".join(f"{name} {seconds / whole:.0%}" for name, seconds in parts)
    return f"Where our time goes, {record['size']['documents']:,} documents: {shares}."


def _pieces_of_mining(record: Mapping[str, Any]) -> str:
    """What each piece in C is worth to the search, alone."""
    worth = "; ".join(f"{piece} {spread(value)}" for piece, value in record["alone"].items())
    about = f"{record['size']['documents']:,} documents, time without it over time with all"
    return f"Each piece in C alone, {about}: {worth}."


def ceiling_section(results: Records) -> list[str]:
    """How far the processor itself would let each ratio of encode and search go."""
    rows = []
    for record in results.values():
        for name, found in record.get("sets", {}).items():
            most = 1 / found["peer_mfu"]
            rows.append((f"encode, {record['model']}, {record['dtype']}, {name}", found["ratio"]["median"], most))
            if low := found.get("int8"):
                seen = low["faster_than"]["peer"]["median"]
                rows.append((f"encode, {record['model']}, int8, {name}", seen, 1 / low["peer_mfu"]))
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
