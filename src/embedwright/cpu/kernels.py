"""Runs our C kernels for CPUs (`csrc/`). Without a C compiler, stock torch does the work.

The kernels run on the threads of torch's own OpenMP runtime. A second runtime would start its own threads, which would
spin against torch's on the same cores. `EMBEDWRIGHT_KERNELS=off` switches the kernels off.

T packed tokens, H query heads, K key heads, d head dim, D width.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from embedwright.cpu import library
from embedwright.cpu.guards import usable
from embedwright.errors import InputError
from embedwright.model.quantized import rotated

logger = logging.getLogger(__name__)

_TYPES = (torch.float32, torch.bfloat16)
_LANES = 16  # numbers in the widest vector; sizes must be multiples of it
_ALL = 2**30  # keys: a window without an end
_ALIGNED = 64  # bytes


# ---- the kernels


def can_attend(q_HTd: Tensor, k_KTd: Tensor, v_KTd: Tensor) -> bool:
    """Returns whether `attention` accepts these: `usable` tensors of one head dim, a multiple of 16."""
    parts, dim = (q_HTd, k_KTd, v_KTd), q_HTd.shape[-1]
    aligned = usable(*parts) and dim % _LANES == 0 and all(x.shape[-1] == dim and x.stride(-1) == 1 for x in parts)
    return aligned and available()


def attention(
    q_HTd: Tensor, k_KTd: Tensor, v_KTd: Tensor, ends: Tensor, scale: float, window: tuple[int, int]
) -> Tensor:
    """Computes softmax attention within each text, (T, H, d) in the type of q. Call it only if `can_attend` is true.

    q is (H, T, d), k and v are (K, T, d), with any strides of heads and tokens. `ends`, int32 (texts + 1,), holds the
    boundaries of the texts. `window` is the number of keys that a query sees before and after its own, -1 for all.
    Sums are in float32; the weights of bfloat16 values are bfloat16, as in torch. There is no gradient. Scratch memory
    has a fixed size for each thread, whatever the lengths.
    """
    heads, tokens, dim = q_HTd.shape
    out_THd = q_HTd.new_empty(tokens, heads, dim)  # on its device, whatever the default is: see `_examples`
    floats = library.load().attention_scratch(dim) * torch.get_num_threads()
    scratch = q_HTd.new_empty(floats + _ALIGNED // 4, dtype=torch.float32)
    _run(
        "attention",
        *(q_HTd, k_KTd, v_KTd, out_THd, ends),
        *(x.stride(i) for x in (q_HTd, k_KTd, v_KTd) for i in (0, 1)),
        *(len(ends) - 1, len(k_KTd), heads // len(k_KTd), dim),
        *(_ALL if n < 0 else n for n in window),
        *(q_HTd.dtype == torch.bfloat16, float(scale), scratch[-scratch.data_ptr() % _ALIGNED // 4 :]),
    )
    return out_THd


def norm(x: Tensor, weight_D: Tensor, eps: float, plus_one: bool) -> Tensor:
    """Computes the RMS norm of x (..., D), times `weight_D`, or times 1 + `weight_D` with `plus_one` (Gemma).

    It rounds as transformers does: Gemma's norm once, the others before the weight too. x is contiguous and not empty,
    float32 or bfloat16, D is a multiple of 16, the weight has the same type. There is no gradient. Call it only if
    `available()` is true; this holds for all functions below.
    """
    out, dim = torch.empty_like(x), x.shape[-1]
    _run("norm", x, weight_D, out, x.numel() // dim, dim, x.dtype == torch.bfloat16, plus_one, float(eps))
    return out


def rotate(q_HTd: Tensor, k_KTd: Tensor, cosine_Td: Tensor, sine_Td: Tensor) -> None:
    """Applies rotary positions to q and k, in place: x cos + (-x2, x1) sin, with the halves x1, x2 of d, rounded once.

    All are float32 or all bfloat16. q and k have any strides of heads and tokens, cosine and sine are contiguous. d is
    a multiple of 32. There is no gradient.
    """
    heads, tokens, dim = q_HTd.shape
    strides = (x.stride(i) for x in (q_HTd, k_KTd) for i in (0, 1))
    sizes = tokens, heads, len(k_KTd), dim
    _run("rotary", q_HTd, k_KTd, cosine_Td, sine_Td, *strides, *sizes, q_HTd.dtype == torch.bfloat16)


def quantised(vectors_NE: Tensor, mean_E: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rounds vectors less their mean to int8 (N, E).

    Also returns, float32 (N,) each: the scale of a row, the length of the row less the mean, and the length of the
    rounding error. Squares are summed in float32. Vectors are float32 and contiguous.
    """
    out_NE = vectors_NE.new_empty(vectors_NE.shape, dtype=torch.int8)
    scale_N, *squares = vectors_NE.new_empty(3, len(vectors_NE)).unbind()
    _run("quantise", vectors_NE, mean_E, out_NE, scale_N, *squares, *vectors_NE.shape)
    moved_N, lost_N = (square_N.sqrt_() for square_N in squares)
    return out_NE, scale_N, moved_N, lost_N


def reaches(product_QN: Tensor, columns: tuple[Tensor, ...], bounds: tuple[Tensor, ...]) -> Tensor:
    """Marks, bool (Q, N), where product x factor x scale + off x length + size x lost reaches `limit` or is NaN.

    `columns` are scale, length and lost of the documents; `bounds` are factor, off, size and limit of the queries, all
    float32. Products are int32. All are contiguous.
    """
    out_QN = product_QN.new_empty(product_QN.shape, dtype=torch.bool)
    _run("reach", product_QN, *columns, *bounds, out_QN, *product_QN.shape)
    return out_QN


def dots(query_QE: Tensor, document_NE: Tensor, query_F: Tensor, document_F: Tensor) -> Tensor:
    """Computes the inner products, float32 (F,), of the given pairs of query and document, summed in float64.

    Queries and documents are float32 and contiguous; the indices are int64.
    """
    out_F = document_NE.new_empty(len(query_F))
    _run("dots", query_QE, document_NE, query_F, document_F, out_F, len(query_F), query_QE.shape[1])
    return out_F


# ---- linear layers in int8


class QuantizedRows(NamedTuple):
    """Rows rounded to int8: a row is about `codes_TD`, int8, times its `scale_T`. `total_T`, int32, sums its codes."""

    codes_TD: Tensor
    scale_T: Tensor
    total_T: Tensor


def quantize_rows(x_TD: Tensor, rotation: int) -> QuantizedRows:
    """Rotates rows in blocks, as `model.quantized.rotated`, and rounds each to int8: its largest size becomes 127.

    x is contiguous, float32 or bfloat16, D is a multiple of 16. `rotation` is 1, for none, 16, 32 or 64, and divides D.
    A row with a number that is not finite has a scale that is not finite. Call it only if `int8_available()` is true;
    this holds for `int8_product` and `int8_gated` too.
    """
    rows, dim = x_TD.shape
    codes_TD = x_TD.new_empty(rows, dim, dtype=torch.int8)
    scale_T, total_T = x_TD.new_empty(rows, dtype=torch.float32), x_TD.new_empty(rows, dtype=torch.int32)
    made = QuantizedRows(codes_TD, scale_T, total_T)
    _run("rounding", x_TD, *made, rows, dim, x_TD.dtype == torch.bfloat16, rotation)
    return made


def int8_product(
    rows: QuantizedRows, weight_OD: Tensor, scale_O: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiplies rows by an int8 weight, whose outputs have a float32 scale each, and adds a float32 bias or None.

    -> (T, O) in `dtype`, float32 or bfloat16. Products are summed exactly, in int32. There is a row at least, D is a
    multiple of 16 up to 2^16, O a multiple of 16.
    """
    return _multiplied(rows, weight_OD, scale_O, 0, 0, 0 if bias_O is None else bias_O, dtype, False)


def int8_gated(rows: QuantizedRows, gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor], gelu: bool) -> Tensor:
    """Computes silu(rows gate^T) * (rows up^T), or gelu in its form with tanh -> (T, O) bfloat16, rounded once.

    `gate` and `up` are an int8 weight (O, D) and the float32 scales (O,) of its outputs. There is a row at least.
    """
    return _multiplied(rows, *gate, *up, 0, torch.bfloat16, gelu)


def _multiplied(
    rows: QuantizedRows,
    weight_OD: Tensor,
    scale_O: Tensor,
    other: Any,
    other_scale: Any,
    bias: Any,
    dtype: torch.dtype,
    gelu: bool,
) -> Tensor:
    (tokens, inputs), outputs = rows.codes_TD.shape, len(weight_OD)
    out_TO = scale_O.new_empty(tokens, outputs, dtype=dtype)
    scratch = scale_O.new_empty(64 * inputs * torch.get_num_threads() + _ALIGNED, dtype=torch.uint8)
    weights = weight_OD, other, scale_O, other_scale, bias
    sizes = tokens, inputs, outputs, dtype == torch.bfloat16, gelu
    _run("product", *rows, *weights, out_TO, scratch[-scratch.data_ptr() % _ALIGNED :], *sizes)
    return out_TO


def _run(name: str, *members: Tensor | int | float) -> None:
    """Runs a kernel on torch's threads. The members fill its C struct in order, a tensor by its address. The counters
    at the end of the struct start at 0."""
    kinds = "".join("P" if isinstance(x, Tensor) else "f" if isinstance(x, float) else "l" for x in members)
    values = (x.data_ptr() if isinstance(x, Tensor) else x for x in members)
    job = ctypes.create_string_buffer(struct.pack(f"@{kinds}ll", *values, 0, 0))
    work, threads = getattr(library.load(), name), torch.get_num_threads()
    if threads > 1:
        library.gomp_parallel()(work, job, threads, 0)
    else:
        work(job)


# ---- availability


def available() -> bool:
    """Returns whether the kernels are compiled and right on this machine. Logs a warning once if they are not."""
    return _fault() is None


def described() -> str:
    """Describes for the doctor whether this process uses the kernels, and why not."""
    fault = _fault()
    return f"compiled by {' '.join(library.compiler())}" if fault is None else f"not used: {fault}"


@cache
def int8_available() -> bool:
    """Returns whether products of int8 run here and are right. Logs a warning once if not."""
    if (fault := int8_fault()) is not None:
        logger.warning("products of int8 are not used (%s): weights are dequantised for each batch, slower", fault)
    return fault is None


def int8_fault() -> str | None:
    """Returns why products of int8 cannot be used here, None if they can."""
    if (fault := _fault()) is None:
        if not hasattr(library.load(), "product"):
            fault = "the processor, or the C compiler, has no AVX-512 VNNI"
        else:
            near = ((name, torch.allclose(found, exact, rtol=1e-2)) for name, found, exact in _int8_examples())
            fault = next((f"{name} gives other numbers here" for name, right in near if not right), None)
    return fault


@cache
def _fault() -> str | None:
    """Returns why the kernels are not used here, None if they are."""
    if os.environ.get("EMBEDWRIGHT_KERNELS", "").lower() == "off":
        return "EMBEDWRIGHT_KERNELS=off"
    try:
        fault = _wrong()
    except (OSError, AttributeError, RuntimeError, InputError) as error:  # Runtime: no home folder
        fault = str(error)
    if fault is not None:
        logger.warning("kernels for this processor are not used (%s): stock torch, slower", fault)
    return fault


def _wrong() -> str | None:
    """Runs a small example of each kernel and names the first that is wrong; None if all are right."""
    for dtype in _TYPES:
        near = 1e-5 if dtype == torch.float32 else 2e-2
        for name, found, exact in _examples(dtype):
            if found.shape != exact.shape or not torch.allclose(found.float(), exact.float(), rtol=near, atol=near):
                return f"{name} gives other numbers here"
    return None


def _examples(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields name, result and expected result of each kernel in this type."""
    random = torch.Generator().manual_seed(0)
    lengths, dim = [1, 37, 150], 32

    # explicit device and dtype: the first model may be made on `meta` or under another default type
    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device="cpu", dtype=torch.float32).to(dtype)

    q, k, v, cosine, sine = (made(n, sum(lengths), dim) for n in (4, 2, 2, 1, 1))
    ends = torch.tensor([0, *lengths], device="cpu").cumsum(0).int()
    position = torch.arange(sum(lengths), device="cpu")
    text, off = torch.bucketize(position, ends[1:], right=True), position[:, None] - position
    same, (exact_q, exact_k, exact_v) = text[:, None] == text, (x.float() for x in (q, k, v))
    for window, seen in (((-1, -1), same), ((20, 0), same & (off <= 20) & (off >= 0))):
        expected = F.scaled_dot_product_attention(exact_q, exact_k, exact_v, seen, scale=0.25, enable_gqa=True)
        yield f"attention {window}", attention(q, k, v, ends, 0.25, window), expected.transpose(0, 1)
    for plus_one in (False, True):
        weight = cosine[0, 0]
        expected = F.rms_norm(q.float(), (dim,), eps=1e-3) * (weight.float() + plus_one)
        yield "norm", norm(q, weight, 1e-3, plus_one), expected
    first, second = q.float().chunk(2, -1)
    expected = q.float() * cosine.float() + torch.cat((-second, first), -1) * sine.float()
    rotate(q, k, cosine[0], sine[0])
    yield "rotary", q, expected
    if dtype == torch.float32:
        yield from _search_examples(made(5, 64), made(2000, 64).repeat_interleave(2, 0))


def _search_examples(query_QE: Tensor, document_NE: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    mean_E = document_NE.mean(0)
    whole_NE, scale_N, *found = quantised(document_NE, mean_E)
    moved_NE = document_NE - mean_E
    lost_NE = moved_NE - scale_N[:, None] * whole_NE
    yield "quantise", torch.stack(found), torch.stack([x.norm(dim=1) for x in (moved_NE, lost_NE)])
    yield "quantise", (lost_NE.abs().amax(1) > 0.51 * moved_NE.abs().amax(1) / 127).sum(), scale_N.new_zeros(())
    exact_QN = query_QE.double() @ document_NE.double().t()
    pair = torch.tensor([[3, 0, 3], [1, 2, 4]], device="cpu")
    yield "dots", dots(query_QE, document_NE, *pair), exact_QN[tuple(pair)]
    bounds = query_QE.new_tensor([2.0**-10, 0, 0, 1.5])[:, None].repeat(1, 5).unbind()
    columns = query_QE.new_ones(3, len(document_NE)).unbind()
    product_QN = (exact_QN * 2**10).round().int()
    yield "reach", reaches(product_QN, columns, bounds), product_QN >= 1.5 * 2**10


def _int8_examples() -> Iterator[tuple[str, Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(7, 80, generator=random, device="cpu", dtype=torch.float32)
    codes = torch.randint(-127, 128, (2, 112, 80), generator=random, device="cpu").to(torch.int8)
    scales = torch.rand(2, 112, generator=random, device="cpu", dtype=torch.float32) * 1e-3
    rows = quantize_rows(x, 16)
    held = rows.codes_TD * rows.scale_T[:, None]
    step = rotated(x, 16).abs().amax(1, keepdim=True) / 127
    yield "rounding", ((held - rotated(x, 16)).abs() / step).clamp_min(0.51), torch.full_like(x, 0.51)
    gate, up = (held @ (one * scale[:, None]).t() for one, scale in zip(codes, scales, strict=True))
    yield "product", int8_product(rows, codes[0], scales[0], scales[1], torch.float32), gate + scales[1]
    for gelu, activated in ((False, F.silu(gate)), (True, F.gelu(gate, approximate="tanh"))):
        found = int8_gated(rows, (codes[0], scales[0]), (codes[1], scales[1]), gelu)
        yield "gated product", found.float(), activated * up
