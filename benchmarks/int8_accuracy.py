"""What int8 costs: scores of one model in float32, bfloat16 and int8, and how far vectors are from float32's.

    python benchmarks/int8_accuracy.py MODEL --tasks squadshifts-amazon sts14

Differences are paired, with 95 % intervals. The distance of two unit vectors is one less their product.
"""

from __future__ import annotations

from common import bind_threads, record

bind_threads()

import argparse  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from embedwright.encoders.open import open_encoder  # noqa: E402
from embedwright.evaluation.compare.compare import Candidate, compare  # noqa: E402
from embedwright.evaluation.suite import evaluate, load_suite  # noqa: E402

DTYPES = ("float32", "bfloat16", "int8")
BOUND = 0.5  # points: differences within are equal


class Kept:
    """Keeps a model's vectors, to compare them text by text."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vectors: dict[tuple[str, str | None], NDArray[np.float32]] = {}

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        new = list(dict.fromkeys(text for text in texts if (text, task) not in self.vectors))
        if new:
            found = self.model.encode(new, task=task)
            self.vectors |= zip([(text, task) for text in new], found, strict=True)
        return np.stack([self.vectors[text, task] for text in texts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a name")
    parser.add_argument("--name", help="what the record calls it; default: the model")
    parser.add_argument("--suite", default="dev-mini")
    parser.add_argument("--tasks", nargs="+", help="of the suite; default: all")
    options = parser.parse_args()
    name, suite = options.name or options.model, load_suite(options.suite)
    chosen = tuple(task for task in suite.tasks if task.name in (options.tasks or (task.name,)))
    suite = suite.model_copy(update={"tasks": chosen})
    kept, candidates = {}, []
    for dtype in DTYPES:
        kept[dtype] = Kept(open_encoder(options.model, device="cpu", dtype=dtype))
        results = evaluate(kept[dtype], suite, name=dtype, progress=lambda line: print(line, file=sys.stderr))
        candidates.append(Candidate(dtype, {None: [results]}))
        kept[dtype].model = None
    keys = list(kept["float32"].vectors)
    exact, *others = (np.stack([kept[dtype].vectors[key] for key in keys]).astype(float) for dtype in DTYPES)
    distances = {}
    for dtype, vectors in zip(DTYPES[1:], others, strict=True):
        apart = 1 - (exact * vectors).sum(1)
        worst = keys[int(apart.argmax())]
        distances[dtype] = {
            "mean": float(apart.mean()),
            "median": float(np.median(apart)),
            "worst": float(apart.max()),
            "worst_text": worst[0][:300],
            "worst_instruction": worst[1],
        }
    shown = ("candidate", "task", "metric", "baseline", "score", "difference", "low", "high", "p_equivalent", "claim")
    rows = compare(candidates, equivalent=BOUND).rows
    differences = [{key: getattr(row, key) for key in shown} for row in rows]
    ratio = distances["int8"]["mean"] / distances["bfloat16"]["mean"]
    figures = {"texts": len(keys), "distance_to_float32": distances, "int8_over_bfloat16": ratio}
    goals = {"encode_int8_distance": [{"of": f"{name}, {len(keys)} texts", "value": ratio}]}
    record(f"int8-{name.strip('/').split('/')[-1]}", {"model": name, **figures, "differences": differences}, goals)
    for row in differences:
        print(" ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    print(distances, f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
