"""Encode as texts grow longer and as the corpus grows: time for each token, and peak memory in a process of its own.

The first four layers of SmolLM2-135M in float32. At 8,192 tokens, the longest text that the model takes, the vector is
held against the stock sdpa path.

    python benchmarks/scaling.py
"""

from __future__ import annotations

from common import MB, bind_main_thread, bind_threads, in_own_process, peak_during, record, resident, timed

bind_threads()

import argparse  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from texts import counter, source, text_set  # noqa: E402

from embedwright.cpu.accelerate import stock  # noqa: E402
from embedwright.model.embedder import Embedder  # noqa: E402

MODEL, LAYERS = "smollm2-135m", 4
LENGTHS = (512, 2048, 8192)  # tokens
CORPORA = (1_000, 10_000)  # texts
CHECKED = LENGTHS[-1]  # tokens of the text that is compared
TOLERANCE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, help="print the cost of one text of so many tokens: internal")
    parser.add_argument("--corpus", type=int, help="print the cost of so many texts: internal")
    options = parser.parse_args()
    bind_main_thread()
    if options.length or options.corpus:
        print(json.dumps(of_length(options.length) if options.length else of_corpus(options.corpus)))
        return
    figures: dict[str, Any] = {
        "model": f"{MODEL}, the first {LAYERS} layers, float32",
        "texts": source(),
        "lengths": {str(length): in_own_process(["--length", str(length)]) for length in LENGTHS},
        "corpora": {str(size): in_own_process(["--corpus", str(size)]) for size in CORPORA},
    }
    print(json.dumps(figures, indent=1))
    difference = figures["lengths"][str(CHECKED)]["difference_to_sdpa"]
    if not difference <= TOLERANCE:
        raise SystemExit(f"{CHECKED} tokens: the vector differs from the stock path's by {difference:.1e}")
    record("scaling", figures, {})


def of_length(length: int) -> dict[str, Any]:
    """One text of exactly so many tokens, made of passages."""
    model = Embedder.from_decoder(MODEL, pooling="mean", layers=LAYERS)
    passages, _ = text_set("passages", length + 1000, counter(model))
    text = "\n\n".join(passages)
    encode = lambda: model.encode([text], max_tokens=length)  # noqa: E731
    assert len(model.tokenize([text], max_tokens=length).ids_T) == length
    cost = _cost(encode, length)
    if length == CHECKED:
        vector = encode()
        with stock(model.network) as twin:
            expected = Embedder(twin, model.tokenizer).encode([text], max_tokens=length)
        cost["difference_to_sdpa"] = float(np.abs(vector - expected).max())
    return cost


def of_corpus(size: int) -> dict[str, Any]:
    """So many texts, queries and passages in turn."""
    model = Embedder.from_decoder(MODEL, pooling="mean", layers=LAYERS)
    texts = _texts(size)
    return _cost(lambda: model.encode(texts), len(model.tokenize(texts).ids_T))


def _texts(size: int) -> list[str]:
    """Distinct ones: where the sources are too small, they come again with a number in front."""
    texts, _ = text_set("mixed", 40_000, lambda text: len(text.split()))
    return [f"{i}: {texts[i % len(texts)]}" for i in range(size)]


def _cost(run: Callable[[], Any], tokens: int) -> dict[str, Any]:
    loaded = resident()
    seconds: list[float] = []
    peak = peak_during(lambda: seconds.append(timed(run)))
    return {
        "tokens": tokens,
        "seconds": seconds[0],
        "microseconds_per_token": 1e6 * seconds[0] / tokens,
        "encode_mb": (peak - loaded) / MB,
    }


if __name__ == "__main__":
    main()
