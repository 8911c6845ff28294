"""The GPU's section of docs/performance.md, from the record of `gpu_smoke.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables import table

NOT_MEASURED = [
    "## GPU",
    "",
    "Not measured: no GPU has been at hand. `make gpu-smoke` measures one, into one JSON.",
]
MEASURED = """\
One GPU, bfloat16, mixed texts, `make gpu-smoke`. MFU: of the linear layers, over a large product on that GPU. MB: what
encoding, or a step of training, adds to the model. Cosine: the smallest to our float32."""
TRAINING = """\
LoRA on all linear layers of {model}:
{queries} queries, each with a passage and a negative, {tokens:,} tokens. ST at its fastest of {settings} settings
({kind}, mini-batch: {mini_batch}).
"""


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
        MEASURED,
        "",
        *table(head, rows),
        *_host(record),
        *trained,
        "",
        *table(["check", "largest relative difference"], checks),
        *cut_off(record),
        "",
        gpu_machine(record),
    ]


def _host(record: Mapping[str, Any]) -> list[str]:
    """How busy the GPU is, and what compiled layers would bring. Records before 2026-12 have neither."""
    lines = []
    for model, found in record["encode"].items():
        if "profile" not in found:
            continue
        trial = found["compiled"]
        rate = (
            " ".join(trial.get("failed", "").split())
            or f"{trial['tokens_per_second']:,.0f} tokens/s, cosine {trial['cosine']:.4f}"
        )
        lines += [
            "",
            f"{model}: the GPU computes {found['profile']['busy']:.0%} of the time. Layers compiled by torch: {rate}.",
        ]
    return lines


def _gpu_training(step: Mapping[str, Any], model: str) -> list[str]:
    rows = [
        [side, f"{rate:,.0f}", f"{step['ours_is_faster'].get(side, {'median': 1})['median']:.2f}", f"{mb:,.0f}"]
        for (side, rate), mb in zip(step["tokens_per_second"].items(), step["step_mb"].values(), strict=True)
    ]
    named = step["peer_setting"] | {"settings": len(step["peer_search_seconds"]), "model": model}
    said = TRAINING.format(**named, queries=step["queries"], tokens=step["tokens"])
    return [said, *table(["training step", "tokens/s", "faster than ST by", "MB"], rows)]


def cut_off(record: Mapping[str, Any]) -> list[str]:
    behind = record.get("cut_off_behind")
    return [] if behind is None else ["", f"Not whole: the run was cut off after {behind}."]


def gpu_machine(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{p} {record['machine'][p]}" for p in ("torch", "transformers", "sentence-transformers"))
    return f"Machine: {record['gpu']}, {record['machine']['cores']} cores; {versions}."
