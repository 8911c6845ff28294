"""What `train --plan` says of memory, held against training: a few real steps of each of several recipes.

The first layers of SmolLM2-135M with a latent head, on this CPU, or all of them on the first GPU where there is one;
each recipe in a process of its own. Memory is the most that the process holds during a step, less what its libraries
take, or that torch holds on the GPU. Each is printed as estimated / measured.

    python benchmarks/plan.py
"""

from __future__ import annotations

from common import MB, bind_main_thread, bind_threads, in_own_process, record, resident

bind_threads()

import argparse  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import models  # noqa: E402
import peft  # noqa: E402, F401 (what training imports counts as libraries)
import torch  # noqa: E402
from texts import source, text_set  # noqa: E402

from embedwright.training.cost import sizes_of  # noqa: E402
from embedwright.training.lengths import tokens_of  # noqa: E402
from embedwright.training.plan import largest_memory  # noqa: E402
from embedwright.training.recipe import Recipe  # noqa: E402
from embedwright.training.train import train  # noqa: E402

MODEL = "smollm2-135m"
QUERIES, STEPS, TOKENS = 24, 5, 60_000
LORA = {"method": "lora", "rank": 16, "alpha": 32, "dropout": 0.0}
# layers, precision, batch_tokens, and how it is tuned
CASES: dict[str, tuple[int, str, int, dict[str, Any]]] = {
    "lora, fp32": (4, "fp32", 8192, LORA),
    "lora, bf16": (4, "bf16", 8192, LORA),
    "lora, bf16, dropout": (4, "bf16", 8192, LORA | {"dropout": 0.1}),
    "lora, bf16, 12 layers": (12, "bf16", 8192, LORA),
    "lora, bf16, 12 layers, gradient checkpointing": (12, "bf16", 8192, LORA | {"gradient_checkpointing": True}),
    "lora, bf16, 12 layers, GradCache": (12, "bf16", 1024, LORA),
    "full, fp32": (4, "fp32", 8192, {"method": "full"}),
    "full, bf16": (4, "bf16", 8192, {"method": "full"}),
}
GPU_CASES: dict[str, tuple[int, str, int, dict[str, Any]]] = {
    "lora, bf16": (30, "bf16", 10**6, LORA),
    "lora, bf16, dropout": (30, "bf16", 10**6, LORA | {"dropout": 0.1}),
    "lora, bf16, gradient checkpointing": (30, "bf16", 10**6, LORA | {"gradient_checkpointing": True}),
    "lora, bf16, GradCache": (30, "bf16", 16_384, LORA),
    "lora, fp32": (30, "fp32", 10**6, LORA),
    "full, bf16": (30, "bf16", 10**6, {"method": "full"}),
}
if torch.cuda.is_available():
    QUERIES, TOKENS, CASES = 512, 300_000, GPU_CASES
    if importlib.util.find_spec("bitsandbytes"):
        CASES["qlora, bf16"] = (30, "bf16", 10**6, LORA | {"method": "qlora"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=tuple(CASES), help="run one of them and print what it took: internal")
    parser.add_argument("--folder", type=Path, help="with the data: internal")
    options = parser.parse_args()
    bind_main_thread()
    if options.case:
        print(json.dumps(measured(recipe(options.case, options.folder))))
        return
    if not models.installed(MODEL):
        print(f"{MODEL}: its package is not installed, left out")
        return
    result = "plan-gpu" if torch.cuda.is_available() else "plan"
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "pairs.jsonl")
        for case in CASES:
            found[case] = compared(case, folder)
            print(case, found[case], flush=True)
            record(result, {"cut_off_behind": case, **summed_up(found)}, {})  # a run that is cut off keeps this
    figures = summed_up(found)
    record(result, figures, {})
    print("estimated / measured:", figures["estimated_over_measured"])


def summed_up(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    ratios = [case["memory_mb"]["ratio"] for case in found.values()]
    return {
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "model": models.described(MODEL),
        "texts": source(),
        "cases": found,
        "estimated_over_measured": {
            "least": min(ratios),
            "median": statistics.median(ratios),
            "most": max(ratios),
        },
    }


def write_data(file: Path) -> None:
    """Real pairs, each with the passages of two others as negatives."""
    mixed, _ = text_set("mixed", TOKENS, lambda text: len(text) // 4)
    queries, passages = mixed[0::2], mixed[1::2]
    queries = queries[: len(passages)]
    with file.open("w", encoding="utf-8") as lines:
        for i, query in enumerate(queries):
            others = [passages[(i + step) % len(passages)] for step in (1, 2)]
            row = {"id": str(i), "task": "own", "query": query, "positives": [passages[i]], "negatives": others}
            lines.write(json.dumps(row) + "\n")


def recipe(case: str, folder: Path) -> Recipe:
    layers, precision, batch_tokens, tune = CASES[case]
    task = {"name": "own", "instruction": "Given a question, retrieve passages that answer it"}
    stage = {
        "name": "one",
        "data": [{"path": str(folder / "pairs.jsonl"), "task": task}],
        "in_batch_negatives": "all",
        "hard_negatives": 1,
        "optim": {"lr": 1e-5, "steps": STEPS, "batch_queries": QUERIES},
    }
    run = {"out": str(folder / case), "precision": precision, "batch_tokens": batch_tokens, "tracker": "none"}
    model = {"base": MODEL, "layers": layers, "latents": 128, "max_tokens": 128}
    return Recipe.parse({"name": "plan", "model": model, "tune": tune, "stages": [stage], "run": run})


def compared(case: str, folder: Path) -> dict[str, Any]:
    asked = recipe(case, folder)
    tokens, cuda = tokens_of(asked, [[True]]), torch.cuda.is_available()
    found = largest_memory(asked, tokens, sizes_of(asked), "cuda" if cuda else "cpu")
    # torch counts what a GPU holds; what a CPU holds is counted by process
    seen = measured(asked) if cuda else in_own_process(["--case", case, "--folder", str(folder)])
    return {
        "tokens": {"estimated": tokens[0].step, "measured": seen["tokens"]},
        # of a GPU without what torch does not count: the context, gaps between blocks
        "memory_mb": _ratio((found.total - (found.reserve if cuda else 0)) / MB, seen["memory_mb"]),
    }


def _ratio(estimated: float, seen: float) -> dict[str, float]:
    return {"estimated": estimated, "measured": seen, "ratio": estimated / seen}


def measured(asked: Recipe) -> dict[str, float]:
    """Of the steps after the first: median tokens, and the most memory, in megabytes."""
    libraries = 0.0 if torch.cuda.is_available() else resident() / MB
    steps: list[dict[str, Any]] = []
    train(asked, on_step=steps.append)
    later = steps[1:]
    return {
        "tokens": statistics.median(step["tokens"] for step in later),
        "memory_mb": max(step["peak_mb"] for step in later) - libraries,
    }


if __name__ == "__main__":
    main()
