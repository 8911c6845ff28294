"""A training step in bfloat16 where the processor has no products of 16 bits, beside float32 and sentence-transformers.

There our linear layers convert their factors to float32 (`embedwright.cpu.onednn.is_faster`). `torch's own products`
is our step without that. LoRA on the first layers of SmolLM2-135M, as in `train.py`; all sides run A B A B. Gradients
are compared with our float32's.

    python benchmarks/sixteen_bits.py
"""

from __future__ import annotations

from common import bind_main_thread, bind_threads, ratio, record, rounds

bind_threads()

import argparse  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import models  # noqa: E402
import torch  # noqa: E402
from texts import source  # noqa: E402
from train import MODEL, WHOLE, Ours, Peer, difference, gradients, opened, triples  # noqa: E402

from embedwright.cpu import onednn  # noqa: E402

OURS, OWN = "ours, bfloat16", "ours, bfloat16, torch's own products"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1, help="of the decoder")
    parser.add_argument("--queries", type=int, default=4, help="each has a positive and a negative")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    bind_main_thread()
    if not onednn.is_faster(torch.bfloat16):
        print("this processor multiplies bfloat16: nothing to measure")
        return
    exact, mine = Ours(options.layers, "float32"), Ours(options.layers, "bfloat16")
    texts = triples(mine.model, options.queries)
    sides: dict[str, Any] = {"ours, float32": exact, OURS: mine, OWN: mine}
    with tempfile.TemporaryDirectory() as folder:
        opened(options.layers, "float32").save(Path(folder) / "peer")
        for dtype, kind in (("float32", "float32"), ("bfloat16", "bf16 weights, float32 adapters, autocast")):
            sides[f"ST, {dtype}"] = Peer(Path(folder), dtype, kind, 0)

    def run(name: str, step: str) -> None:
        has = (lambda dtype: dtype != torch.float32) if name == OWN else onednn.has_product
        with mock.patch.object(onednn, "has_product", has):
            side = sides[name]
            getattr(side, step)(texts, WHOLE) if isinstance(side, Ours) else getattr(side, step)(texts)

    found = {}
    for name, side in sides.items():  # this warms up, too
        run(name, "backward")
        found[name] = gradients(side.backbone)
    off = {name: difference(one, found["ours, float32"]) for name, one in found.items()}
    seconds = rounds({name: lambda name=name: run(name, "step") for name in sides}, options.rounds)
    figures: dict[str, Any] = {
        "model": f"{models.described(MODEL)}, {options.layers} layers",
        "texts": source(),
        "tokens": mine.tokens,
        "seconds": seconds,
        "ratio": {name: ratio(seconds[name], seconds[OURS]) for name in sides},
        "gradient_difference_to_float32": off,
    }
    for name, of_ours in figures["ratio"].items():
        print(f"{name:38} {statistics.median(seconds[name]):7.2f} s {of_ours['median']:6.2f}x  {off[name]:.1e}")
    record("sixteen-bits", figures, None)


if __name__ == "__main__":
    main()
