"""Packed attention against one dense softmax over the whole row with a mask that knows which text a token is of."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from embedwright.model.attention import _EXPLICIT_BELOW, allowed, attend, packed_attention
from embedwright.packing import PackedTexts, pack
from embedwright.text import TokenizedText

ROWS = [[5], [4, 4, 4], [3, 9, 9, 1, 1, 20], [_EXPLICIT_BELOW, 2], [_EXPLICIT_BELOW + 1, 7, _EXPLICIT_BELOW + 1]]


def row_of(lengths: list[int]) -> PackedTexts:
    ids = [torch.zeros(n, dtype=torch.int64).numpy() for n in lengths]
    return pack([TokenizedText(i, i == 0) for i in ids])


def random_heads(heads: int, kv_heads: int, tokens: int, dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + heads)
    return [torch.randn(h, tokens, dim, generator=generator).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def dense(
    q_HTd: Tensor, k_KTd: Tensor, v_KTd: Tensor, lengths: list[int], causal: bool, scale: float, window: int | None
) -> Tensor:
    shared = len(q_HTd) // len(k_KTd)
    k_HTd, v_HTd = k_KTd.repeat_interleave(shared, 0), v_KTd.repeat_interleave(shared, 0)
    text_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ahead_TT = torch.arange(len(text_T))[:, None] - torch.arange(len(text_T))[None, :]
    seen_TT = text_T[:, None] == text_T[None, :]
    if causal:
        seen_TT &= (ahead_TT >= 0) & (ahead_TT < (window or len(text_T)))
    elif window is not None:
        seen_TT &= ahead_TT.abs() <= window
    scores_HTT = (q_HTd @ k_HTd.mT * scale).masked_fill(~seen_TT, float("-inf"))
    return (scores_HTT.softmax(-1) @ v_HTd).transpose(0, 1)


@pytest.mark.parametrize("lengths", ROWS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
def test_forward_and_gradients_are_those_of_dense_attention(lengths: list[int], heads: tuple[int, int]) -> None:
    packed, qkv = row_of(lengths), random_heads(*heads, sum(lengths))
    weight = torch.randn(sum(lengths), heads[0], 8, generator=torch.Generator().manual_seed(1))
    for causal, window in product([False, True], [None, 1, 6]):
        outputs = [
            attend(*qkv, packed, causal, 0.5, window),
            dense(*qkv, lengths, causal, 0.5, window),
        ]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad((output * weight).sum(), qkv) for output in outputs]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_values_may_be_of_another_size() -> None:
    lengths = [4, 4, 7]
    q, k, _ = random_heads(4, 2, 15, dim=6)
    _, _, v = random_heads(4, 2, 15, dim=3)
    out = attend(q, k, v, row_of(lengths), False, 0.4, None)
    torch.testing.assert_close(out, dense(q, k, v, lengths, False, 0.4, None), rtol=1e-5, atol=1e-5)


def test_both_ways_to_compute_are_tried_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [40, 40, 12]
    qkv = random_heads(4, 2, sum(lengths))
    fused_calls = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        fused_calls.append(args)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    results = {}
    for below in (0, 1000):
        monkeypatch.setattr("embedwright.model.attention._EXPLICIT_BELOW", below)
        for causal, window in product([False, True], [None, 5]):
            results[below, causal, window] = attend(*qkv, row_of(lengths), causal, 0.3, window)
        assert len(fused_calls) == 8  # two runs, four settings, all of them at 0
    for causal, window in product([False, True], [None, 5]):
        torch.testing.assert_close(results[0, causal, window], results[1000, causal, window], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type_and_its_texts_apart(dtype: torch.dtype) -> None:
    lengths = [6, 6, 3]
    qkv = random_heads(4, 2, sum(lengths))
    halved = attend(*[x.to(dtype) for x in qkv], row_of(lengths), False, 0.35, None)
    assert halved.dtype == dtype
    torch.testing.assert_close(halved.float(), dense(*qkv, lengths, False, 0.35, None), rtol=0.05, atol=0.05)


def test_the_window_is_that_of_the_stock_masks() -> None:
    assert allowed(9, causal=False, window=None, device=torch.device("cpu")) is None
    for length, causal, window in product([1, 4, 9], [False, True], [None, 1, 3, 8]):
        mask = allowed(length, causal, window, torch.device("cpu"))
        for i, j in product(range(length), range(length)):
            if causal:
                expected = j <= i and (window is None or i - j < window)
            else:
                expected = window is None or abs(i - j) <= window
            assert expected == (mask is None or bool(mask[i, j])), (length, causal, window, i, j)


def test_the_interface_reads_config_scale_and_window() -> None:
    lengths = [9, 4]
    qkv = random_heads(4, 2, 13)
    q, k, v = (x[None] for x in qkv)
    for is_causal, scaling, window in product([False, True], [None, 0.1], [None, 2]):
        module: Any = SimpleNamespace(config=SimpleNamespace(is_causal=is_causal))
        out, weights = packed_attention(
            module, q, k, v, None, scaling=scaling, sliding_window=window, packed=row_of(lengths)
        )
        expected = dense(*qkv, lengths, is_causal, scaling or 8**-0.5, window)
        assert out.shape == (1, 13, 4, 8) and weights is None
        torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-5)


def test_a_config_that_says_nothing_is_causal() -> None:
    q, k, v = (x[None] for x in random_heads(2, 2, 5))
    silent: Any = SimpleNamespace(config=SimpleNamespace())
    said: Any = SimpleNamespace(config=SimpleNamespace(is_causal=True))
    assert torch.equal(*(packed_attention(m, q, k, v, None, packed=row_of([5]))[0] for m in (silent, said)))


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_it_cannot_do_it_refuses(name: str) -> None:
    q, k, v = (x[None] for x in random_heads(2, 2, 5))
    module: Any = SimpleNamespace(config=SimpleNamespace(is_causal=False, model_type="other"))
    with pytest.raises(ValueError, match=f"'other' models need '{name}'"):
        packed_attention(module, q, k, v, None, packed=row_of([5]), **{name: torch.ones(2)})
    packed_attention(module, q, k, v, None, packed=row_of([5]), **{name: None})


def test_without_boundaries_it_refuses() -> None:
    q, k, v = (x[None] for x in random_heads(2, 2, 5))
    module: Any = SimpleNamespace(config=SimpleNamespace(is_causal=False))
    with pytest.raises(ValueError, match="needs the boundaries"):
        packed_attention(module, q, k, v, None)
