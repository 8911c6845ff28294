"""The C kernels against torch in float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from embedwright.cpu import kernels
from embedwright.model.verify import doctor

RAGGED = [1, 33, 511, 600, 1500]
SHAPES = [(3, 3, 64), (9, 3, 64), (4, 1, 128), (9, 1, 32), (2, 1, 256), (2, 2, 48)]  # query heads, key heads, dim
WINDOWS = [(-1, -1), (-1, 0), (40, 40), (40, 0), (0, 0)]  # keys behind and ahead; -1: all


@pytest.fixture
def needs_kernels() -> None:
    if not kernels.available():
        pytest.skip(f"kernels {kernels.described()}")


def heads(shape: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """As transformers hands them over: (heads, tokens, dim) views of (tokens, heads, dim)."""
    random = torch.Generator().manual_seed(tokens)
    query_heads, kv_heads, dim = shape
    return [
        torch.randn(tokens, n, dim, generator=random).to(dtype).transpose(0, 1)
        for n in (query_heads, kv_heads, kv_heads)
    ]


def exact(qkv: list[Tensor], lengths: list[int], scale: float, window: tuple[int, int]) -> Tensor:
    """(T, H, d) float64, text by text and with the whole matrix of scores."""
    behind, ahead = (n if n >= 0 else 10**6 for n in window)
    outputs = []
    for q, k, v in zip(*(x.double().split(lengths, 1) for x in qkv), strict=True):
        shared, position = len(q) // len(k), torch.arange(q.shape[1])
        off = position[:, None] - position
        scores = q @ k.repeat_interleave(shared, 0).mT * scale
        weights = scores.masked_fill((off > behind) | (-off > ahead), float("-inf")).softmax(-1)
        outputs.append((weights @ v.repeat_interleave(shared, 0)).transpose(0, 1))
    return torch.cat(outputs)


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


# ---- attention


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_in_float32_is_exact_to_rounding(
    needs_kernels: None, shape: tuple[int, int, int], window: tuple[int, int]
) -> None:
    qkv = heads(shape, sum(RAGGED), torch.float32)
    assert kernels.can_attend(*qkv)
    found = kernels.attention(*qkv, ends(RAGGED), shape[2] ** -0.5, window)
    expected = exact(qkv, RAGGED, shape[2] ** -0.5, window)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_in_bfloat16_is_no_further_from_exact_than_torchs(
    needs_kernels: None, shape: tuple[int, int, int]
) -> None:
    qkv, scale = heads(shape, sum(RAGGED), torch.bfloat16), shape[2] ** -0.5
    expected = exact(qkv, RAGGED, scale, (-1, -1))
    found = kernels.attention(*qkv, ends(RAGGED), scale, (-1, -1))
    texts = zip(*(x[None].split(RAGGED, 2) for x in qkv), strict=True)
    torchs = [F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)[0] for q, k, v in texts]
    assert found.dtype == torch.bfloat16
    ours, theirs = ((x.double() - expected).norm() for x in (found, torch.cat(torchs, 1).transpose(0, 1)))
    assert ours <= 1.01 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_and_any_strides(needs_kernels: None, dtype: torch.dtype) -> None:
    lengths = [70, 200, 1]
    whole = torch.randn(6, sum(lengths), 3 * 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = whole[:, :, :64] * 5, whole[::3, :, 64:128] * 5, whole[1::3, :, 128:]
    found = kernels.attention(q, k, v, ends(lengths), 1.0, (-1, -1))  # scores of hundreds: softmax is near one-hot
    near = 3e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found.double(), exact([q, k, v], lengths, 1.0, (-1, -1)), rtol=0, atol=near)


def test_a_text_does_not_depend_on_its_neighbours_or_on_threads(needs_kernels: None) -> None:
    lengths, threads = [300, 7, 120], torch.get_num_threads()
    qkv = heads((9, 3, 64), sum(lengths), torch.bfloat16)
    together = kernels.attention(*qkv, ends(lengths), 0.125, (-1, -1))
    texts = zip(*(x.split(lengths, 1) for x in qkv), strict=True)
    alone = [kernels.attention(q, k, v, ends([q.shape[1]]), 0.125, (-1, -1)) for q, k, v in texts]
    assert torch.equal(together, torch.cat(alone))
    try:
        torch.set_num_threads(1)
        assert torch.equal(together, kernels.attention(*qkv, ends(lengths), 0.125, (-1, -1)))
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_a_number_stays_so(needs_kernels: None) -> None:
    q, k, v = heads((2, 2, 32), 20, torch.float32)
    q[1, 4, 7] = float("nan")
    found = kernels.attention(q, k, v, ends([12, 8]), 0.2, (-1, -1))
    assert found[4, 1].isnan().all() and int(found.isnan().sum()) == 32


@pytest.mark.parametrize("case", ["float16", "mixed", "dim", "stride", "values", "empty"])
def test_what_attention_does_not_take(needs_kernels: None, case: str) -> None:
    q, k, v = heads((4, 2, 32), 10, torch.float32)
    assert kernels.can_attend(q, k, v)
    cases = {
        "float16": (q.half(), k.half(), v.half()),
        "mixed": (q, k, v.bfloat16()),
        "dim": (q[..., :24], k[..., :24], v[..., :24]),
        "stride": (q.mT.contiguous().mT, k, v),
        "values": (q, k, v[..., :16]),
        "empty": (q[:, :0], k[:, :0], v[:, :0]),
    }
    assert not kernels.can_attend(*cases[case])


# ---- norms and rotary positions


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("shape", [(16,), (1, 576), (2, 300, 640)], ids=str)
def test_the_norm(needs_kernels: None, shape: tuple[int, ...], plus_one: bool) -> None:
    x, weight = torch.randn(*shape) * 3, torch.randn(shape[-1])
    expected = F.rms_norm(x.double(), shape[-1:], eps=1e-3) * (weight.double() + plus_one)
    torch.testing.assert_close(kernels.norm(x, weight, 1e-3, plus_one).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_positions(needs_kernels: None, dtype: torch.dtype) -> None:
    q, k, _ = heads((6, 2, 64), 77, dtype)
    cosine, sine = (torch.randn(77, 64).to(dtype) for _ in range(2))

    def turned(x: Tensor) -> Tensor:
        first, second = x.double().chunk(2, -1)
        return x.double() * cosine.double() + torch.cat((-second, first), -1) * sine.double()

    expected = [turned(q), turned(k)]
    kernels.rotate(q, k, cosine, sine)
    for found, right in zip((q, k), expected, strict=True):
        near = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(found.double(), right, rtol=near, atol=near)


# ---- search


@pytest.mark.parametrize("width", [1, 15, 16, 37, 768])
def test_whole_numbers_are_the_nearest_and_what_they_lose_is_known(needs_kernels: None, width: int) -> None:
    random = torch.Generator().manual_seed(0)
    vectors, mean = torch.randn(50, width, generator=random), torch.randn(width, generator=random)
    vectors[3], vectors[4, 0], vectors[5] = mean, 1e4, 1e-35
    found, scale, moved, lost = kernels.quantised(vectors, mean)
    less = vectors.double() - mean
    torch.testing.assert_close(scale.double(), less.abs().amax(1) / 127, rtol=1e-5, atol=1e-30)
    off = less - scale.double()[:, None] * found
    assert (off.abs() <= 0.5001 * scale[:, None] + 1e-6 * less.abs()).all() and found.abs().max() == 127
    for given, right in ((moved, less), (lost, off)):
        rounding = 2.0**-21 * less.norm(dim=1) + 1e-18
        assert ((given - right.norm(dim=1)).abs() <= 1e-5 * right.norm(dim=1) + rounding).all()


def test_what_is_not_finite_has_no_finite_length(needs_kernels: None) -> None:
    vectors = torch.ones(4, 20)
    vectors[1, 7], vectors[2, 19], vectors[3, 0] = float("nan"), float("-inf"), 3e38
    assert kernels.quantised(vectors, torch.zeros(20))[2].isfinite().tolist() == [True, False, False, False]


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 1024, 2500])
def test_what_may_reach_a_limit_is_told(needs_kernels: None, columns: int) -> None:
    """Whole numbers, so that many reach it exactly; what is not a number may reach anything."""
    random = torch.Generator().manual_seed(0)
    product = torch.randint(-9, 9, (7, columns), generator=random, dtype=torch.int32)
    scale, length, lost = of_column = torch.randint(4, (3, columns), generator=random).float().unbind()
    factor, off, size, limit = bounds = torch.randint(4, (4, 7), generator=random).float().unbind()
    most = product * factor[:, None] * scale + off[:, None] * length + size[:, None] * lost
    assert torch.equal(kernels.reaches(product, of_column, bounds), most >= limit[:, None])
    scale[0] = float("nan")
    assert kernels.reaches(product, of_column, bounds)[:, 0].all()


@pytest.mark.parametrize("width", [1, 16, 37, 768])
def test_inner_products_are_summed_in_float64(needs_kernels: None, width: int) -> None:
    random = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(n, width, generator=random) * 1e3 for n in (5, 40))
    documents[30] = documents[3]
    query, document = torch.randint(5, (200,), generator=random), torch.randint(40, (200,), generator=random)
    found = kernels.dots(queries, documents, query, document)
    expected = (queries[query].double() * documents[document].double()).sum(1).float()
    torch.testing.assert_close(found, expected, rtol=1.2e-7, atol=0)
    twice = kernels.dots(queries, documents, torch.zeros(2, dtype=torch.int64), torch.tensor([3, 30]))
    assert twice[0] == twice[1]


def test_lacking_products_of_int8_are_told_once_where_a_model_needs_them(
    needs_kernels: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels.library, "load", object)  # a library without `product`
    fresh = cache(kernels.int8_available.__wrapped__)
    assert "VNNI" in doctor.environment()["int8"] and not caplog.records
    assert not fresh() and not fresh()
    assert caplog.text.count("VNNI") == 1
