"""What matrix products reach on this processor, for the layers' shapes of the measured models, by type.

float32 and bfloat16: torch's own product, oneDNN on the plain weight, oneDNN on a reordered one;
`embedwright.cpu.onednn` rests on the plain weight being nearly as fast. int8: `torch._int_mm`, oneDNN's quantised
linear, which takes uint8, and our kernel. Sums are in int32 or float32. oneDNN takes AMX by itself where there is some:
the record's `extensions` name it. Kernels take turns; a rate is that of the best round.

    python benchmarks/peaks.py
"""

from __future__ import annotations

from common import bind_main_thread, bind_threads, record, rounds

bind_threads()

import argparse  # noqa: E402
from collections.abc import Callable, Iterable, Mapping  # noqa: E402
from typing import Any  # noqa: E402

import models  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from embedwright.cpu import kernels as ours  # noqa: E402
from embedwright.cpu import onednn  # noqa: E402

TYPES = (torch.float32, torch.bfloat16, torch.int8)
ROWS = (32, 128, 256, 512, 1024, 2048)
LARGE = ROWS[3:]  # what packed texts give a layer by default, and more
Shape = tuple[int, int]  # in, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    bind_main_thread()
    shapes_of = {name: models.layer_shapes(name) for name in models.NAMES if models.installed(name)}
    distinct = list(dict.fromkeys(shape for shapes in shapes_of.values() for shape in shapes))
    figures: dict[str, Any] = {"gflops": {}, "models": {}}
    for name, shapes in shapes_of.items():
        per_token = flops(shapes)
        figures["models"][models.described(name)] = {"linear_flops_per_token": per_token, "peak_flops": {}}
    for dtype in TYPES:
        seconds = {rows: product_seconds(dtype, distinct, rows, options.rounds) for rows in ROWS}
        if not all(seconds[ROWS[0]].values()):
            print(f"{dtype}: this processor has no product that we use")
            continue
        rates = {str(rows): over_all_shapes(seconds[rows], rows) for rows in ROWS}
        figures["gflops"][named(dtype)] = rates
        for rows, by_kernel in rates.items():
            print(
                named(dtype),
                f"{rows:>5} rows",
                "  ".join(f"{kernel} {rate:5.0f}" for kernel, rate in by_kernel.items()),
            )
        for name, shapes in shapes_of.items():
            peak = peak_of(shapes, {rows: seconds[rows] for rows in LARGE})
            figures["models"][models.described(name)]["peak_flops"][named(dtype)] = peak
            print(named(dtype), name, f"{peak / 1e9:.0f} GFLOP/s, {peak / flops(shapes):,.0f} tokens/s at most")
    record("peaks", figures, {})


def peak_flops(dtype: torch.dtype, shapes: Mapping[Shape, int], count: int = 3) -> float:
    """Returns FLOP/s of all products of a model's layers, each by the kernel and the number of rows that are best."""
    return peak_of(shapes, {rows: product_seconds(dtype, shapes, rows, count) for rows in LARGE})


def flops(shapes: Mapping[Shape, int]) -> int:
    """Returns the FLOPs of one token in linear layers of these shapes, so many of each."""
    return sum(2 * width * out * number for (width, out), number in shapes.items())


def peak_of(shapes: Mapping[Shape, int], seconds: Mapping[int, Mapping[Shape, Mapping[str, float]]]) -> float:
    """As `peak_flops`, from the seconds of each product by rows, shape and kernel."""
    fastest = {shape: min(min(seconds[rows][shape].values()) / rows for rows in seconds) for shape in shapes}
    return flops(shapes) / sum(fastest[shape] * number for shape, number in shapes.items())


def over_all_shapes(seconds: Mapping[Shape, Mapping[str, float]], rows: int) -> dict[str, float]:
    """Returns GFLOP/s by kernel over one product of each shape."""
    work = rows * flops(dict.fromkeys(seconds, 1))
    kernels = next(iter(seconds.values()))
    return {kernel: work / sum(found[kernel] for found in seconds.values()) / 1e9 for kernel in kernels}


@torch.inference_mode()
def product_seconds(
    dtype: torch.dtype, shapes: Iterable[Shape], rows: int, count: int
) -> dict[Shape, dict[str, float]]:
    """Returns the seconds of the best round by shape and kernel. No kernels where the processor has not the type."""
    found = {}
    for shape in shapes:
        runs = kernels(dtype, shape, rows)
        rounds(runs, 2)
        found[shape] = {name: min(seconds) for name, seconds in rounds(runs, count).items()}
    return found


def kernels(dtype: torch.dtype, shape: Shape, rows: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Returns every product of this type and shape, on random numbers."""
    width, out = shape
    if dtype == torch.int8:
        return int8_kernels(width, out, rows)
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(out, width).to(dtype)
    found: dict[str, Callable[[], torch.Tensor]] = {"torch": lambda: F.linear(x, weight)}
    if onednn.available() if dtype == torch.float32 else onednn.gated_available():
        pointwise = torch.ops.mkldnn._linear_pointwise
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        found["onednn"] = lambda: pointwise(x, weight, None, "none", [], "")
        found["onednn_reordered"] = lambda: pointwise(x, reordered, None, "none", [], "")
    return found


def int8_kernels(width: int, out: int, rows: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The same in int8: to int32 sums, and to bfloat16 with the scales of the outputs, by oneDNN and by our kernel."""
    if not onednn.int8_matmul_available():
        return {}
    x, codes = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((rows, width), (out, width)))
    unsigned = (x.short() + 128).to(torch.uint8)  # int8 input is slow in oneDNN where AMX is missing
    packed = torch.ops.onednn.qlinear_prepack(codes, [rows, width])
    scales, zeros = torch.full((out,), 0.01), torch.zeros(out, dtype=torch.int64)
    last = (scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], "")
    found = {
        "int_mm": lambda: torch._int_mm(x, codes.t()),
        "qlinear": lambda: torch.ops.onednn.qlinear_pointwise(unsigned, 0.01, 128, packed, *last),
    }
    if ours.int8_available():
        scaled = ours.QuantizedRows(x, torch.full((rows,), 0.01), x.sum(1, dtype=torch.int32))
        found["ours"] = lambda: ours.int8_product(scaled, codes, scales, None, torch.bfloat16)
    return found


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
