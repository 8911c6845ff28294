"""Encode, side by side with sentence-transformers on the same weights, tokens and pooling, at its best batch size.

Per text set: sentence-transformers' batch size is searched first, then both sides run A B A B. Outputs are compared.
Then the peak memory of each side in a process of its own.

    python benchmarks/encode.py --model smollm2-135m --dtype float32
"""

from __future__ import annotations

from common import (
    MB,
    bind_main_thread,
    bind_threads,
    in_own_process,
    linear_flops,
    peak_during,
    peak_flops,
    ratio,
    record,
    resident,
    rounds,
)

bind_threads()

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import models  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from texts import SETS, counter, source, text_set  # noqa: E402

from embedwright.model.embedder import Embedder  # noqa: E402

MEMORY_TOKENS = 10_000  # mixed: more than one batch of either side
SMALLEST_COSINE = 0.9999  # of the two sides in float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.NAMES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=4000, help="of each text set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory-of", choices=("ours", "peer"), help="measure one side's memory and print it: internal"
    )
    parser.add_argument("--folder", type=Path, help="with the models of both sides: internal")
    parser.add_argument("--batch", type=int, help="of the peer, with --memory-of: internal")
    options = parser.parse_args()
    bind_main_thread()
    if options.memory_of:
        print(json.dumps(memory(options)))
        return
    if not models.installed(options.model):
        print(f"{options.model}: its package is not installed, left out")
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        models.make_folders(options.model, options.folder)
        figures, goals = measure(options)
    record(f"encode-{options.model}-{options.dtype}", figures, goals)


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    mine, peer = models.ours(options.model, options.folder, options.dtype), models.peer(options.folder, options.dtype)
    exact = models.ours(options.model, options.folder, "float32") if options.dtype != "float32" else None
    peak = peak_flops(getattr(torch, options.dtype))
    per_token = linear_flops(mine.network.backbone)
    sets = {}
    for name in SETS:
        sets[name] = side_by_side(name, mine, peer, exact, options, per_token / peak)
        print(options.model, options.dtype, name, json.dumps(sets[name]), flush=True)
    figures: dict[str, Any] = {
        "model": models.described(options.model),
        "dtype": options.dtype,
        "texts": source(),
        "peak_flops": peak,
        "linear_flops_per_token": per_token,
        "sets": sets,
    }
    kind = {"float32": "fp32", "bfloat16": "bf16"}[options.dtype]
    goals = {f"encode_{kind}": values(options, sets, lambda found: found["ratio"]["median"])}
    if kind == "bf16":
        goals["encode_bf16_distance"] = values(
            options, sets, lambda found: found["distance_to_float32"]["ours"] / found["distance_to_float32"]["peer"]
        )
        goals["mfu_bf16"] = values(options, sets, lambda found: found["mfu"])
    del mine, peer, exact
    sides = {"ours": None, "peer": sets["mixed"]["peer_batch"]}
    figures["memory"] = {side: in_own_process(_memory_arguments(options, side, batch)) for side, batch in sides.items()}
    print(json.dumps(figures["memory"]))
    share = figures["memory"]["ours"]["peak_mb"] / figures["memory"]["peer"]["peak_mb"]
    goals["encode_memory"] = [{"of": f"{options.model}, {kind}", "value": share}]
    return figures, goals


def values(
    options: argparse.Namespace, sets: dict[str, Any], value: Callable[[dict[str, Any]], float]
) -> list[dict[str, Any]]:
    return [{"of": f"{options.model}, {name}", "value": value(found)} for name, found in sets.items()]


def side_by_side(
    name: str,
    mine: Embedder,
    peer: SentenceTransformer,
    exact: Embedder | None,
    options: argparse.Namespace,
    least_seconds: float,
) -> dict[str, Any]:
    """One text set: the peer's best batch size, times A B A B, outputs. `least_seconds` of a token at the peak."""
    texts, prefix = text_set(name, options.tokens, counter(mine))
    tokens = len(mine.tokenize(texts, prefix=prefix).ids_T)
    best, search = models.best_batch(peer, texts, prefix)
    outputs: dict[str, NDArray[np.float32]] = {}

    def run_mine() -> None:
        outputs["ours"] = mine.encode(texts, prefix=prefix)

    def run_peer() -> None:
        outputs["peer"] = models.encode_peer(peer, texts, prefix, best)

    run_mine()  # the search has warmed the peer up
    seconds = rounds({"peer": run_peer, "ours": run_mine}, options.rounds)
    found = {
        "texts": len(texts),
        "tokens": tokens,
        "longest": mine.tokenize(texts, prefix=prefix).longest,
        "peer_batch": best,
        "peer_search_seconds": search,
        "seconds": seconds,
        "tokens_per_second": {side: tokens / statistics.median(s) for side, s in seconds.items()},
        "ratio": ratio(seconds["peer"], seconds["ours"]),
        "mfu": tokens * least_seconds / statistics.median(seconds["ours"]),
        "peer_mfu": tokens * least_seconds / statistics.median(seconds["peer"]),
    }
    if exact is None:
        found["cosine"] = least_cosine(outputs["ours"], outputs["peer"])
        if not found["cosine"] > SMALLEST_COSINE:
            raise SystemExit(f"{name}: outputs differ, smallest cosine {found['cosine']}")
    else:
        reference = exact.encode(texts, prefix=prefix)
        cosines = {side: cosines_of(reference, vectors) for side, vectors in outputs.items()}
        found["cosine_to_float32"] = {side: float(each.min()) for side, each in cosines.items()}
        found["distance_to_float32"] = {side: float(1 - each.mean()) for side, each in cosines.items()}
    return found


def least_cosine(a_NE: NDArray[np.float32], b_NE: NDArray[np.float32]) -> float:
    return float(cosines_of(a_NE, b_NE).min())


def cosines_of(a_NE: NDArray[np.float32], b_NE: NDArray[np.float32]) -> NDArray[np.float64]:
    a_NE, b_NE = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a_NE.astype(float), b_NE.astype(float)))
    cosines: NDArray[np.float64] = (a_NE * b_NE).sum(1)
    return cosines


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Of one side alone, in megabytes: `encode_mb` is what encoding adds at its peak to the loaded model, `peak_mb` is
    model and encoding together, `libraries_mb` what was there before the model."""
    libraries = resident()
    if options.memory_of == "ours":
        mine = models.ours(options.model, options.folder, options.dtype)
        texts, prefix = text_set("mixed", MEMORY_TOKENS, counter(mine))
        run = lambda some: mine.encode(some, prefix=prefix)  # noqa: E731
    else:
        peer = models.peer(options.folder, options.dtype)
        texts, prefix = text_set("mixed", MEMORY_TOKENS, lambda text: len(peer.tokenizer(text).input_ids))
        run = lambda some: models.encode_peer(peer, some, prefix, options.batch)  # noqa: E731
    run(texts[:1])  # weights are mapped from their file: only now are all of them in memory
    loaded = resident()
    peak = peak_during(lambda: run(texts))
    return {
        "batch": options.batch,
        "libraries_mb": libraries / MB,
        "model_mb": (loaded - libraries) / MB,
        "encode_mb": (peak - loaded) / MB,
        "peak_mb": (peak - libraries) / MB,
    }


def _memory_arguments(options: argparse.Namespace, side: str, batch: int | None) -> list[str]:
    named = {"model": options.model, "dtype": options.dtype, "folder": options.folder}
    named |= {"memory-of": side, "batch": batch}
    return [part for name, value in named.items() if value is not None for part in (f"--{name}", str(value))]


if __name__ == "__main__":
    main()
