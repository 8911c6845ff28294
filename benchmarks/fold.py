"""The latent block of the released NV-Embed sizes, as it is and folded: parameters, bytes, time per 1,000 tokens.

Random weights. Each round times both, one behind the other, so that what else the machine does meets both; the medians
are printed as a table, and everything as one line of JSON. Exits 1 where the two do not give the same outputs.

    python benchmarks/fold.py --dtype float32 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from embedwright.model.pooling import FoldedLatent, LatentPooling, PoolingConfig
from embedwright.packing import pack
from embedwright.text import TokenizedText

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3}  # of an output vector's length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--hidden", type=int, default=4096, help="width, and width of each of the 8 heads")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    latent = random_block(options.hidden, dtype)
    before = size_of(latent)
    started = time.perf_counter()
    folded = FoldedLatent(latent)
    folding = time.perf_counter() - started
    states_TD = torch.randn(options.tokens, options.hidden, dtype=dtype)
    packed = pack([TokenizedText(np.zeros(options.tokens, np.int64), np.ones(options.tokens, bool))])

    with torch.inference_mode():
        expected_TD, got_TD = latent(states_TD, packed).float(), folded(states_TD, packed).float()
        difference = float(((got_TD - expected_TD).norm(dim=1) / expected_TD.norm(dim=1)).max())
        seconds = {"latent": [], "folded": []}
        for _ in range(options.rounds):
            for name, block in (("latent", latent), ("folded", folded)):
                seconds[name].append(timed(lambda block=block: block(states_TD, packed)))

    rows = {"latent": before, "folded": size_of(folded)}
    per_1k = {name: statistics.median(s) / options.tokens * 1000 for name, s in seconds.items()}
    print(f"{'':8} {'parameters':>14} {'bytes':>14} {'s / 1k tokens':>14}")
    for name, (count, size) in rows.items():
        print(f"{name:8} {count:>14,} {size:>14,} {per_1k[name]:>14.3f}")
    print(f"folded in {folding:.1f} s; outputs differ by at most {difference:.1e} of their length")
    record = {
        **vars(options),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": {name: count for name, (count, _) in rows.items()},
        "bytes": {name: size for name, (_, size) in rows.items()},
        "seconds": seconds,
        "seconds_per_1k_tokens": per_1k,
        "fold_seconds": folding,
        "largest_relative_difference": difference,
    }
    print(json.dumps(record))
    if not difference <= TOLERANCE[options.dtype]:
        sys.exit(f"outputs differ by {difference:.1e}, more than {TOLERANCE[options.dtype]:.0e}")


def random_block(hidden: int, dtype: torch.dtype) -> LatentPooling:
    """Weights of the released shapes, at deviations that keep all intermediates near unit variance."""
    with torch.device("meta"):
        block = LatentPooling(PoolingConfig(latents=512, heads=8, head_dim=hidden, multiple=4), hidden)
    block = block.to(dtype).to_empty(device="cpu")
    block.reset()
    for linear in (block.attention.to_out, block.feed_forward.narrow):  # zero in a fresh block
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    return block.requires_grad_(False)


def size_of(block: nn.Module) -> tuple[int, int]:
    """Parameters, and their bytes."""
    parameters = list(block.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def timed(run: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
