"""Cold start: seconds from `import` to the first vector in a new process, for each way to open the same weights.

A process runs the lines that a user would write. All take turns; the first round only brings files and compiled kernels
into the caches.

    python benchmarks/cold.py
"""

from __future__ import annotations

from common import bind_threads

bind_threads()

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import models  # noqa: E402

from embedwright.cpu import kernels  # noqa: E402

SCRIPT = """\
import json, sys, time
folder, dtype, text = sys.argv[1:]
times = [time.perf_counter()]
{}
times.append(time.perf_counter())
{}
times.append(time.perf_counter())
model.encode([text])
times.append(time.perf_counter())
print(json.dumps(times))
"""
OURS = "from embedwright import Embedder", "model = Embedder.load(folder, dtype=dtype)"
PEER = (
    "import torch; from sentence_transformers import SentenceTransformer",
    "model = SentenceTransformer(folder, device='cpu', model_kwargs={'dtype': getattr(torch, dtype)})",
)
# by the names of settings on the page
SIDES = {
    "float32": (OURS, "float32"),
    "bfloat16": (OURS, "bfloat16"),
    "int8": (OURS, "int8"),
    "ST float32": (PEER, "float32"),
    "ST bfloat16": (PEER, "bfloat16"),
}
PARTS = ("import", "load", "encode")
TEXT = "How far away is the moon?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=("smollm2-135m", "qwen3-0.6b-shape"), default="smollm2-135m"
    )  # stock folders
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    models.run(options, f"cold-{options.model}", measure)


def measure(options: argparse.Namespace) -> models.Measured:
    sides = [side for side in SIDES if side != "int8" or kernels.int8_available()]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(1 + options.rounds):
        for side in sides:
            seconds = first_vector(side, models.saved(options.folder))
            print(side, json.dumps(seconds), "" if number else "(fills the caches)", flush=True)
            found[side] += [seconds] if number else []
    parts = {
        side: {part: statistics.median(each[part] for each in rounds) for part in PARTS}
        for side, rounds in found.items()
    }
    figures: dict[str, Any] = {
        "model": models.described(options.model),
        "seconds": {side: [sum(each.values()) for each in rounds] for side, rounds in found.items()},
        "parts": parts,
    }
    return figures, {}


def first_vector(side: str, folder: Path) -> dict[str, float]:
    """Seconds of each part in a process of its own, which inherits the bound threads."""
    lines, dtype = SIDES[side]
    command = [sys.executable, "-c", SCRIPT.format(*lines), str(folder), dtype, TEXT]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    times = json.loads(done.stdout.splitlines()[-1])
    return {part: after - before for part, before, after in zip(PARTS, times, times[1:], strict=False)}


if __name__ == "__main__":
    main()
