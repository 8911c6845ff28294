"""Kernels of our own for CPUs (`csrc/`): compiled once by the machine's C compiler, else stock torch does it all.

They run on the threads of the OpenMP runtime that torch itself runs on. A second runtime would bring its own threads,
which, bound to the same cores, would spin against torch's. `EMBEDWRIGHT_KERNELS=off` leaves the kernels out.

T packed tokens, H query heads, K key heads, d head dim, D width.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from embedwright.cpu import library
from embedwright.cpu.guards import usable
from embedwright.errors import InputError

logger = logging.getLogger(__name__)

_TYPES = (torch.float32, torch.bfloat16)
_LANES = 16  # numbers in the widest vector: what sizes must be multiples of
_ALL = 2**30  # keys: a window that ends nowhere
_ALIGNED = 64  # bytes


# ---- what is asked of them


def can_attend(q_HTd: Tensor, k_KTd: Tensor, v_KTd: Tensor) -> bool:
    """Whether `attention` takes these: `usable`, of one head dim, which is a multiple of 16."""
    parts, dim = (q_HTd, k_KTd, v_KTd), q_HTd.shape[-1]
    aligned = usable(*parts) and dim % _LANES == 0 and all(x.shape[-1] == dim and x.stride(-1) == 1 for x in parts)
    return aligned and available()


def attention(
    q_HTd: Tensor, k_KTd: Tensor, v_KTd: Tensor, ends: Tensor, scale: float, window: tuple[int, int]
) -> Tensor:
    """(T, H, d) in the type of q: softmax attention within each text. Only where `can_attend`.

    q (H, T, d), k and v (K, T, d), with any strides of heads and tokens; `ends` int32 (texts + 1,), where texts begin
    and end. `window`: how many keys behind and ahead a query sees beside its own, -1 for all. Sums are in float32; the
    weights of bfloat16 values are bfloat16, as torch's. No gradient. Beside the result it takes a fixed scratch for
    each thread, whatever the lengths.
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
    """RMS norm over the last dimension: x (..., D) times `weight_D`, or one more than it, where `plus_one`, as Gemma's.

    Rounded as transformers' modules round: Gemma's once, the others' before the weight too. x contiguous and not empty,
    float32 or bfloat16, D a multiple of 16, the weight of the same type. No gradient. Only where `available()`.
    """
    out, dim = torch.empty_like(x), x.shape[-1]
    _run("norm", x, weight_D, out, x.numel() // dim, dim, x.dtype == torch.bfloat16, plus_one, float(eps))
    return out


def rotate(q_HTd: Tensor, k_KTd: Tensor, cosine_Td: Tensor, sine_Td: Tensor) -> None:
    """Rotary positions on q and k, in place: x cos + (-x2, x1) sin with the halves x1, x2 of d, rounded once.

    All float32 or all bfloat16; q and k with any strides of heads and tokens, cosine and sine contiguous; d a multiple
    of 32. No gradient. Only where `available()`.
    """
    heads, tokens, dim = q_HTd.shape
    strides = (x.stride(i) for x in (q_HTd, k_KTd) for i in (0, 1))
    sizes = tokens, heads, len(k_KTd), dim
    _run("rotary", q_HTd, k_KTd, cosine_Td, sine_Td, *strides, *sizes, q_HTd.dtype == torch.bfloat16)


def quantised(vectors_NE: Tensor, mean_E: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rounds vectors less their mean to int8 (N, E).

    Also returns, float32 (N,) each: the scale of a row, the length of the row less the mean, and the length of what
    rounding took from it. Squares are summed in float32. Vectors are float32 and contiguous. Only where `available()`.
    """
    out_NE = vectors_NE.new_empty(vectors_NE.shape, dtype=torch.int8)
    scale_N, *squares = vectors_NE.new_empty(3, len(vectors_NE)).unbind()
    _run("quantise", vectors_NE, mean_E, out_NE, scale_N, *squares, *vectors_NE.shape)
    moved_N, lost_N = (square_N.sqrt_() for square_N in squares)
    return out_NE, scale_N, moved_N, lost_N


def reaches(product_QN: Tensor, columns: tuple[Tensor, ...], bounds: tuple[Tensor, ...]) -> Tensor:
    """Bool (Q, N): where product x factor x scale + off x length + size x lost reaches `limit`, or is not a number.

    `columns` are scale, length and lost of the documents; `bounds` are factor, off, size and limit of the queries, all
    float32. Products are int32. All are contiguous. Only where `available()`.
    """
    out_QN = product_QN.new_empty(product_QN.shape, dtype=torch.bool)
    _run("reach", product_QN, *columns, *bounds, out_QN, *product_QN.shape)
    return out_QN


def dots(query_QE: Tensor, document_NE: Tensor, query_F: Tensor, document_F: Tensor) -> Tensor:
    """Float32 (F,): the inner product of each query and document named, summed in float64.

    Queries are float64, documents float32, both contiguous, the indices int64. Only where `available()`.
    """
    out_F = document_NE.new_empty(len(query_F))
    _run("dots", query_QE, document_NE, query_F, document_F, out_F, len(query_F), query_QE.shape[1])
    return out_F


def _run(name: str, *members: Tensor | int | float) -> None:
    """Runs a kernel on torch's threads. The members fill its C struct in order: of a tensor, its address. The counts
    that end the struct start at 0."""
    kinds = "".join("P" if isinstance(x, Tensor) else "f" if isinstance(x, float) else "l" for x in members)
    values = (x.data_ptr() if isinstance(x, Tensor) else x for x in members)
    job = ctypes.create_string_buffer(struct.pack(f"@{kinds}ll", *values, 0, 0))
    work, threads = getattr(library.load(), name), torch.get_num_threads()
    if threads > 1:
        library.gomp_parallel()(work, job, threads, 0)
    else:
        work(job)


# ---- whether they are there


def available() -> bool:
    """Whether the kernels are compiled and right on this machine; a message once where they are not."""
    return _fault() is None


def described() -> str:
    """Whether the kernels are used in this process and why not, for `doctor`."""
    fault = _fault()
    return f"compiled by {' '.join(library.compiler())}" if fault is None else f"not used: {fault}"


@cache
def _fault() -> str | None:
    """Why the kernels are not used here, None where they are."""
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
    """What the kernels get wrong in a small example of each kind; None where all is right."""
    for dtype in _TYPES:
        near = 1e-5 if dtype == torch.float32 else 2e-2
        for name, found, exact in _examples(dtype):
            if found.shape != exact.shape or not torch.allclose(found.float(), exact.float(), rtol=near, atol=near):
                return f"{name} gives other numbers here"
    return None


def _examples(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What a kernel gives and what is right, in this type."""
    random = torch.Generator().manual_seed(0)
    lengths, dim = [1, 37, 150], 32

    def made(*shape: int) -> Tensor:  # said in full: the first model may be made without memory, or under another type
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
    yield "dots", dots(query_QE.double(), document_NE, *pair), exact_QN[tuple(pair)]
    bounds = query_QE.new_tensor([2.0**-10, 0, 0, 1.5])[:, None].repeat(1, 5).unbind()
    columns = query_QE.new_ones(3, len(document_NE)).unbind()
    product_QN = (exact_QN * 2**10).round().int()
    yield "reach", reaches(product_QN, columns, bounds), product_QN >= 1.5 * 2**10
