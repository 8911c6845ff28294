"""Packed attention against one dense softmax over the whole row with a mask that knows which text a token is of."""

from __future__ import annotations

import inspect
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from embedwright.model import attention
from embedwright.model.attention import attend, build_mask, flash_window, packed_attention, visible_keys
from embedwright.packing import PackedTexts, pack
from embedwright.text import TokenizedText

ROWS = [[5], [4, 4, 4], [3, 9, 9, 1, 1, 20], [31, 7, 31]]


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
        with torch.no_grad():
            inferred = attend(*qkv, packed, causal, 0.5, window, training=False)
        torch.testing.assert_close(inferred, outputs[1], rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad((output * weight).sum(), qkv) for output in outputs]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_values_may_be_of_another_size() -> None:
    lengths = [4, 4, 7]
    q, k, _ = random_heads(4, 2, 15, dim=6)
    _, _, v = random_heads(4, 2, 15, dim=3)
    out = attend(q, k, v, row_of(lengths), False, 0.4, None)
    torch.testing.assert_close(out, dense(q, k, v, lengths, False, 0.4, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_gradients_in_bfloat16_are_those_of_float32_rounded_once(causal: bool, window: int | None) -> None:
    """Of the same inputs: nearer than by torch's own backward in bfloat16."""
    lengths = [33, 33, 7, 1]
    low = [x.detach().bfloat16().requires_grad_() for x in random_heads(4, 2, sum(lengths))]
    exact = [x.detach().float().requires_grad_() for x in low]
    wanted = torch.randn(sum(lengths), 4, low[2].shape[-1], generator=torch.Generator().manual_seed(1)).bfloat16()
    found = torch.autograd.grad(attend(*low, row_of(lengths), causal, 0.3, window), low, wanted)
    right = torch.autograd.grad(dense(*exact, lengths, causal, 0.3, window), exact, wanted.float())
    for got, expected in zip(found, right, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), expected, rtol=2**-7, atol=1e-3)


def test_in_training_attention_keeps_its_inputs_alone() -> None:
    qkv = [x.detach().bfloat16().requires_grad_() for x in random_heads(4, 2, 20)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        attend(*qkv, row_of([20]), False, 0.3, None)
    assert sorted(kept) == sorted(x.numel() for x in qkv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type_and_its_texts_apart(dtype: torch.dtype) -> None:
    lengths = [6, 6, 3]
    qkv = random_heads(4, 2, sum(lengths))
    halved = attend(*[x.to(dtype) for x in qkv], row_of(lengths), False, 0.35, None)
    assert halved.dtype == dtype
    torch.testing.assert_close(halved.float(), dense(*qkv, lengths, False, 0.35, None), rtol=0.05, atol=0.05)


def sees(i: int, j: int, causal: bool, window: int | None) -> bool:
    if causal:
        return j <= i and (window is None or i - j < window)
    return window is None or abs(i - j) <= window


def test_the_window_is_that_of_the_stock_masks() -> None:
    assert build_mask(range(9), range(9), causal=False, window=None, device=torch.device("cpu")) is None
    for length, causal, window in product([1, 4, 9], [False, True], [None, 1, 3, 8]):
        for rows in (range(length), range(length // 2, length), range(1)):
            keys = visible_keys(rows, length, causal, window)
            mask = build_mask(rows, keys, causal, window, torch.device("cpu"))
            for i, j in product(rows, range(length)):
                seen = j in keys and (mask is None or bool(mask[i - rows.start, j - keys.start]))
                assert seen == sees(i, j, causal, window), (length, causal, window, i, j)
            assert all(any(sees(i, j, causal, window) for i in rows) for j in keys)  # and not a key too many


def test_flash_attention_counts_the_same_window() -> None:
    for causal, window in product([False, True], [None, 1, 3, 8]):
        behind, ahead = flash_window(causal, window)
        for i, j in product(range(9), range(9)):
            seen = (behind < 0 or i - j <= behind) and (ahead < 0 or j - i <= ahead)
            assert seen == sees(i, j, causal, window), (causal, window, i, j)


def test_a_long_text_under_a_mask_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def measured(q: Tensor, *rest: Any, attn_mask: Tensor | None, **named: Any) -> Tensor:
        sizes.append(0 if attn_mask is None else attn_mask.numel())
        return fused(q, *rest, attn_mask=attn_mask, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", measured)
    lengths = [1700, 40]
    qkv = [x.detach() for x in random_heads(2, 1, sum(lengths))]
    for causal, window in ((False, 64), (True, 64), (True, None)):
        out = attend(*qkv, row_of(lengths), causal, 0.5, window)
        torch.testing.assert_close(out, dense(*qkv, lengths, causal, 0.5, window), rtol=1e-5, atol=1e-5)
        widest = 2 * 512 * (1700 if window is None else 512 + 128)
        assert max(sizes) <= widest
        sizes.clear()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_on_a_gpu_flash_attention_gets_the_right_arguments(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its contract, from torch's documentation, carried out densely; `make gpu-smoke` runs the kernel itself."""
    lengths = [9, 4, 4]
    packed, qkv = row_of(lengths), random_heads(*heads, sum(lengths))

    def documented(
        q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int, **named: Any
    ) -> Tensor:
        assert longest_q == longest_k == 9
        known = inspect.signature(varlen_attn).parameters  # torch 2.11 has neither
        assert {n: named[n] for n in known.keys() & {"num_splits", "enable_gqa"}} == attention._VARLEN
        assert named.get("num_splits", 1) == 1 and named.get("enable_gqa", True)
        assert ends_q.dtype == torch.int32 and q.shape[0] == k.shape[0] == ends_k[-1] == 17
        behind, ahead = named["window_size"]
        outputs = []
        for start, stop in zip(ends_q.tolist(), ends_k.tolist()[1:], strict=False):
            one_q, one_k, one_v = (x[start:stop].transpose(0, 1) for x in (q, k, v))
            shared = len(one_q) // len(one_k)
            scores = one_q @ one_k.repeat_interleave(shared, 0).mT * named["scale"]
            i, j = torch.arange(stop - start)[:, None], torch.arange(stop - start)[None, :]
            seen = ((i - j <= behind) | (behind < 0)) & ((j - i <= ahead) | (ahead < 0))
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            outputs.append((weights @ one_v.repeat_interleave(shared, 0)).transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(attention, "varlen_attn", documented)
    for causal, window in product([False, True], [None, 1, 3]):
        out = attention._any_lengths(*qkv, packed, causal, 0.4, window)
        torch.testing.assert_close(out, dense(*qkv, lengths, causal, 0.4, window), rtol=1e-5, atol=1e-5)


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


UNKNOWN = [
    "softcap",
    "s_aux",
    "position_bias",
    "sinks",
    "indices",
    "block_indices",
    "cu_seq_lens_q",
    "not_yet_known",
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_it_does_not_know_it_refuses(name: str) -> None:
    q, k, v = (x[None] for x in random_heads(2, 2, 5))
    module: Any = SimpleNamespace(config=SimpleNamespace(is_causal=False, model_type="other"))
    for value in (torch.ones(2), 0.5, True):
        with pytest.raises(ValueError, match=f"'other' models need '{name}'"):
            packed_attention(module, q, k, v, None, packed=row_of([5]), **{name: value})
    for value in (None, False):
        packed_attention(module, q, k, v, None, packed=row_of([5]), **{name: value})


def test_what_has_no_effect_is_let_pass_and_a_mask_is_not() -> None:
    q, k, v = (x[None] for x in random_heads(2, 2, 5))
    module: Any = SimpleNamespace(config=SimpleNamespace(is_causal=True, model_type="other"))
    packed_attention(module, q, k, v, None, packed=row_of([5]), position_ids=torch.arange(5)[None], is_causal=True)
    with pytest.raises(ValueError, match="takes no mask"):
        packed_attention(module, q, k, v, torch.ones(1, 1, 5, 5).bool(), packed=row_of([5]))


def test_it_refuses_dropout_which_a_decoder_would_train_without() -> None:
    q, k, v = (x[None] for x in random_heads(2, 2, 5))
    module: Any = SimpleNamespace(config=SimpleNamespace(is_causal=False))
    with pytest.raises(ValueError, match="set attention_dropout to 0"):
        packed_attention(module, q, k, v, None, packed=row_of([5]), dropout=0.1)
    packed_attention(module, q, k, v, None, packed=row_of([5]), dropout=0.0)


def test_without_boundaries_it_refuses() -> None:
    q, k, v = (x[None] for x in random_heads(2, 2, 5))
    module: Any = SimpleNamespace(config=SimpleNamespace(is_causal=False))
    with pytest.raises(ValueError, match="needs the boundaries"):
        packed_attention(module, q, k, v, None)
