"""Does the suite `dev-mini` rank ten models as `dev` does? Kendall's tau of the mean main scores, and of each task's.

    python benchmarks/dev_mini.py       # about a quarter of an hour of one core; writes results/dev_mini.json

The models differ in size, depth, pooling, mask and width. Narrow ones are the first numbers of a wider one's vectors.
Texts are cut to 64 tokens, in both suites alike: it saves time and changes the scores, but not what is asked.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import common
import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from embedwright import Embedder
from embedwright.encoders.open import open_encoder
from embedwright.evaluation.suite import evaluate

MAX_TOKENS = 64
Vectors = NDArray[np.float32]


def smollm2(layers: int, pooling: str, attention: str) -> Any:
    sizes = {"layers": layers, "max_tokens": MAX_TOKENS, "dtype": "bfloat16"}
    return Embedder.from_decoder("smollm2-135m", pooling=pooling, attention=attention, **sizes)


# base model: how it is made, and the widths of its vectors that count as models
MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "minilm": (lambda: open_encoder("minilm"), (384, 96, 24)),
    "smollm2, 2 layers, mean, bidirectional": (lambda: smollm2(2, "mean", "bidirectional"), (576, 96)),
    "smollm2, 2 layers, mean, causal": (lambda: smollm2(2, "mean", "causal"), (576,)),
    "smollm2, 3 layers, last, causal": (lambda: smollm2(3, "last", "causal"), (576,)),
    "smollm2, 5 layers, mean, causal": (lambda: smollm2(5, "mean", "causal"), (576, 96, 24)),
}


class Kept:
    """Keeps a model's vectors, so that narrower models and the second suite cost nothing."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vectors: dict[tuple[str, str | None], Vectors] = {}

    def of(self, texts: Sequence[str], task: str | None) -> Vectors:
        new = [text for text in texts if (text, task) not in self.vectors]
        if new:
            self.vectors |= zip([(text, task) for text in new], self.model.encode(new, task=task), strict=True)
        return np.stack([self.vectors[text, task] for text in texts])


class Narrow:
    """The first numbers of a model's vectors, as a model."""

    def __init__(self, kept: Kept, width: int) -> None:
        self.kept, self.width = kept, width

    def encode(self, texts: Sequence[str], task: str | None = None) -> Vectors:
        vectors_NE = self.kept.of(texts, task)[:, : self.width]
        return vectors_NE / np.maximum(np.linalg.norm(vectors_NE, axis=1, keepdims=True), 1e-12)


def main() -> None:
    scores: dict[str, dict[str, dict[str, float]]] = {"dev": {}, "dev-mini": {}}
    for base, (make, widths) in MODELS.items():
        model = make()
        if base == "minilm":
            model.model.max_seq_length = MAX_TOKENS
        kept = Kept(model)
        for width in widths:
            name = base if width == widths[0] else f"{base}, {width} numbers"
            for suite, found in scores.items():
                rows = evaluate(Narrow(kept, width), suite, progress=lambda line: print(line, file=sys.stderr)).rows
                found[name] = {row.task: row.value for row in rows}
                found[name]["mean"] = statistics.fmean(row.value for row in rows)
    shared = list(next(iter(scores["dev-mini"].values())))
    columns = [[[found[name][task] for name in found] for found in scores.values()] for task in shared]
    tau = {task: float(kendalltau(*pair).statistic) for task, pair in zip(shared, columns, strict=True)}
    for name in scores["dev"]:
        print(f"{name:50} {scores['dev'][name]['mean']:.4f} {scores['dev-mini'][name]['mean']:.4f}")
    print(tau)
    common.record("dev_mini", {"max_tokens": MAX_TOKENS, "kendall_tau": tau, "scores": scores}, None)


if __name__ == "__main__":
    common.bind_threads()
    main()
