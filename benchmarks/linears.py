"""Matrix products of decoder layers on this CPU: torch's own, oneDNN on the plain weight, oneDNN on a reordered one.

What `embedwright.cpu.onednn` rests on: GFLOP/s by rows, type and kernel, best of the rounds.

    python benchmarks/linears.py
"""

from __future__ import annotations

from common import bind_main_thread, bind_threads, record, rounds

bind_threads()

import argparse  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from embedwright.cpu import onednn  # noqa: E402

SHAPES = ((576, 1536), (1536, 576), (576, 576), (1024, 3072))  # (in, out)
ROWS = (32, 128, 256, 512, 1024, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    bind_main_thread()
    if not onednn.available():
        print("oneDNN's linear is not usable on this machine: nothing to compare")
        return
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        figures[name] = {str(rows): gflops(rows, dtype, options.rounds) for rows in ROWS}
        for rows, rates in figures[name].items():
            print(name, f"{rows:>5} rows", "  ".join(f"{kernel} {rate:5.0f}" for kernel, rate in rates.items()))
    record("linears", {"gflops": figures}, {})


@torch.inference_mode()
def gflops(rows: int, dtype: torch.dtype, count: int) -> dict[str, float]:
    """By kernel: FLOPs of all `SHAPES`, one behind the other, over the seconds of the best round."""
    pointwise = torch.ops.mkldnn._linear_pointwise
    inputs = [torch.randn(rows, width, dtype=dtype) for width, _ in SHAPES]
    plain = [torch.randn(out, width, dtype=dtype) for width, out in SHAPES]
    reordered = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in plain]
    kernels = {
        "torch": lambda: [F.linear(x, w) for x, w in zip(inputs, plain, strict=True)],
        "onednn": lambda: [pointwise(x, w, None, "none", [], "") for x, w in zip(inputs, plain, strict=True)],
        "onednn_reordered": lambda: [
            pointwise(x, w, None, "none", [], "") for x, w in zip(inputs, reordered, strict=True)
        ],
    }
    rounds(kernels, 2)
    flops = sum(2 * rows * width * out for width, out in SHAPES)
    return {name: flops / min(seconds) / 1e9 for name, seconds in rounds(kernels, count).items()}


if __name__ == "__main__":
    main()
