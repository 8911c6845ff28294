"""Encode, side by side with sentence-transformers on the same weights, tokens and pooling, at its best batch size.

With `--dtype bfloat16`, our int8 takes turns with both, and so does ONNX Runtime's int8 of the same model where it is
installed. Per text set: the peers' batch sizes are searched first, then all sides run A B A B. Outputs are compared.
Then the peak memory of each side in a process of its own.

    python benchmarks/encode.py --model smollm2-135m --dtype float32
"""

from __future__ import annotations

from common import (
    MB,
    SHORT,
    bind_main_thread,
    bind_threads,
    in_own_process,
    peak_during,
    ratio,
    resident,
    rounds,
)

bind_threads()

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import models  # noqa: E402
import numpy as np  # noqa: E402
import onnx_int8  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from peaks import flops, peak_flops  # noqa: E402
from texts import SETS, counter, source, text_set  # noqa: E402

from embedwright.compress.weights import compress_weights  # noqa: E402
from embedwright.cpu import kernels  # noqa: E402
from embedwright.model.embedder import Embedder  # noqa: E402
from embedwright.model.quantized import INT8  # noqa: E402

FIRST = {"peer": 8, "onnx": 1024}  # where the search for a side's batch size begins: texts; tokens
SIDES = {"float32": ("peer", "ours"), "bfloat16": ("peer", "ours", "int8", "onnx")}
MEMORY_TOKENS = 10_000  # mixed: more than one batch of either side
MEMORY_TEXTS = "memory-texts.json"  # in the folder with the models
STORED = "int8"  # there, a folder with weights in int8
SMALLEST_COSINE = 0.9999  # of the two sides in float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.NAMES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=tuple(SHORT), default="float32")
    parser.add_argument("--tokens", type=int, default=4000, help="of each text set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory-of", choices=SIDES["bfloat16"], help="measure one side's memory and print it: internal"
    )
    parser.add_argument("--folder", type=Path, help="with the models of all sides: internal")
    parser.add_argument("--batch", type=int, help="of a peer, with --memory-of: internal")
    options = parser.parse_args()
    bind_main_thread()
    if options.memory_of:
        print(json.dumps(memory(options)))
        return
    models.run(options, f"encode-{options.model}-{options.dtype}", measure)


def measure(options: argparse.Namespace) -> models.Measured:
    exact = models.ours(options.folder, "float32")
    left_out = why_left_out(options)
    sides = {side: opened(side, options) for side in SIDES[options.dtype] if side not in left_out}
    types = [options.dtype, *(["int8"] if "int8" in sides else [])]
    shapes = models.layer_shapes(options.model)
    peaks = {kind: peak_flops(getattr(torch, kind), shapes) for kind in types}
    least_seconds = {kind: flops(shapes) / peak for kind, peak in peaks.items()}
    sets = {}
    for name in SETS:
        sets[name] = side_by_side(name, sides, exact, options, least_seconds)
        print(options.model, options.dtype, name, json.dumps(sets[name]), flush=True)
    figures: dict[str, Any] = {
        "model": models.described(options.model),
        "dtype": options.dtype,
        "texts": source(),
        "peak_flops": peaks[options.dtype],
        "int8_peak_flops": peaks.get("int8"),
        "linear_flops_per_token": flops(shapes),
        "left_out": left_out,
        "sets": sets,
    }
    texts, prefix = text_set("mixed", MEMORY_TOKENS, counter(exact))
    names = list(sides)
    del exact, sides
    batches, place = sets["mixed"]["batches"], stored_apart(options, names)
    (place / MEMORY_TEXTS).write_text(json.dumps([texts, prefix]))
    named = {"model": options.model, "dtype": options.dtype, "folder": place}
    figures["memory"] = {side: in_own_process(memory_arguments(named, side, batches.get(side))) for side in names}
    print(json.dumps(figures["memory"]))
    return figures, goals(options, sets, figures["memory"])


def why_left_out(options: argparse.Namespace) -> dict[str, str]:
    """Which sides of a run in bfloat16 cannot be measured, and why."""
    if options.dtype != "bfloat16":
        return {}
    found = {}
    if not kernels.int8_available():
        found["int8"] = str(kernels.int8_fault())
    if reason := onnx_int8.export(models.saved(options.folder), options.folder / "onnx"):
        found["onnx"] = reason
        print(f"ONNX Runtime is left out: {reason}")
    return found


def opened(side: str, options: argparse.Namespace) -> models.Encode:
    """How this side encodes. Ours needs no batch size."""
    if side == "peer":
        return partial(models.encode_peer, models.peer(options.folder, options.dtype))
    if side == "onnx":
        return onnx_int8.Model(models.saved(options.folder), options.folder / "onnx").encode
    if side == "int8" and (options.folder / STORED).is_dir():
        mine = Embedder.load(options.folder / STORED)
    else:
        mine = models.ours(options.folder, "int8" if side == "int8" else options.dtype)
    return lambda texts, prefix, _: mine.encode(texts, prefix=prefix)


def side_by_side(
    name: str,
    sides: Mapping[str, models.Encode],
    exact: Embedder,
    options: argparse.Namespace,
    least_seconds: Mapping[str, float],
) -> dict[str, Any]:
    """One text set: the peers' best batch sizes, times A B A B, outputs. `least_seconds`: of a token at the peak, by
    type."""
    texts, prefix = text_set(name, options.tokens, counter(exact))
    packed = exact.tokenize(texts, prefix=prefix)
    tokens = len(packed.ids_T)
    searched = {s: models.best_batch(sides[s], texts, prefix, first) for s, first in FIRST.items() if s in sides}
    batches = {side: best for side, (best, _) in searched.items()}
    outputs: dict[str, NDArray[np.float32]] = {}

    def run(side: str) -> None:
        outputs[side] = sides[side](texts, prefix, batches.get(side, 0))

    for side in sides.keys() - FIRST.keys():  # the search has warmed the peers up
        run(side)
    seconds = rounds({side: partial(run, side) for side in sides}, options.rounds)
    medians = {side: statistics.median(each) for side, each in seconds.items()}

    def shares(kind: str, side: str) -> dict[str, float]:
        """Of the peak of this type, by us and by the peer."""
        return {n: tokens * least_seconds[kind] / medians[s] for n, s in (("mfu", side), ("peer_mfu", "peer"))}

    found = {
        "texts": len(texts),
        "tokens": tokens,
        "longest": packed.longest,
        "peer_batch": batches["peer"],
        "batches": batches,
        "search_seconds": {side: tried for side, (_, tried) in searched.items()},
        "seconds": seconds,
        "tokens_per_second": {side: tokens / median for side, median in medians.items()},
        "ratio": ratio(seconds["peer"], seconds["ours"]),
        **shares(options.dtype, "ours"),
    }
    if "int8" in sides:
        faster_than = {side: ratio(seconds[side], seconds["int8"]) for side in sides if side != "int8"}
        found["int8"] = {"faster_than": faster_than, **shares("int8", "int8")}
    if options.dtype == "float32":
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


# ---- goals


def goals(
    options: argparse.Namespace, sets: Mapping[str, Mapping[str, Any]], memory_of: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """What was measured for each goal, by text set."""
    kind = SHORT[options.dtype]

    def values(value: Callable[[Mapping[str, Any]], float]) -> list[dict[str, Any]]:
        return [{"of": f"{options.model}, {name}", "value": value(found)} for name, found in sets.items()]

    def distances(side: str, other: str) -> list[dict[str, Any]]:
        return values(lambda found: found["distance_to_float32"][side] / found["distance_to_float32"][other])

    def share(side: str, other: str) -> list[dict[str, Any]]:
        value = memory_of[side]["peak_mb"] / memory_of[other]["peak_mb"]
        return [{"of": f"{options.model}, {kind}", "value": value}]

    found = {f"encode_{kind}": values(lambda found: found["ratio"]["median"]), "encode_memory": share("ours", "peer")}
    if kind == "bf16":
        found["encode_bf16_distance"] = distances("ours", "peer")
        found["mfu_bf16"] = values(lambda found: found["mfu"])
    if "int8" in memory_of:
        over = {"ours": "encode_int8_own", "peer": "encode_int8", "onnx": "encode_int8_onnx"}
        for side in over.keys() & memory_of.keys():
            found[over[side]] = values(lambda found, side=side: found["int8"]["faster_than"][side]["median"])
        found["encode_int8_distance"] = distances("int8", "ours")
        found["mfu_int8"] = values(lambda found: found["int8"]["mfu"])
        found["encode_int8_memory"] = share("int8", "ours")
    return found


# ---- memory


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Of one side alone, in megabytes: `encode_mb` is what encoding adds at its peak to the loaded model, `peak_mb` is
    model and encoding together, `libraries_mb` what was there before the model."""
    texts, prefix = json.loads((options.folder / MEMORY_TEXTS).read_text())
    libraries = resident()
    encode = opened(options.memory_of, options)
    encode(texts[:1], prefix, options.batch)  # weights are mapped from their file: only now are all of them in memory
    loaded = resident()
    peak = peak_during(lambda: encode(texts, prefix, options.batch))
    return {
        "batch": options.batch,
        "libraries_mb": libraries / MB,
        "model_mb": (loaded - libraries) / MB,
        "encode_mb": (peak - loaded) / MB,
        "peak_mb": (peak - libraries) / MB,
    }


def stored_apart(options: argparse.Namespace, sides: Sequence[str]) -> Path:
    """Writes and returns the folder from which the memory of all sides is measured. It holds the weights in the type
    of each side: who opens a file in float32 to run it in another type has all of both in memory for a while."""
    if options.dtype == "float32":
        return Path(options.folder)
    place = Path(options.folder) / "stored"
    models.make_folders(options.model, place, options.dtype)
    if "int8" in sides:
        compress_weights(models.saved(options.folder), place / STORED, INT8)
    if "onnx" in sides:
        (place / "onnx").symlink_to(options.folder / "onnx")
    return place


def memory_arguments(named: Mapping[str, Any], side: str, batch: int | None) -> list[str]:
    named = {**named, "memory-of": side, "batch": batch}
    return [part for name, value in named.items() if value is not None for part in (f"--{name}", str(value))]


if __name__ == "__main__":
    main()
