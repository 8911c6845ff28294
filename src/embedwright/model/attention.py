"""Packed attention: tokens see their own text and nothing else. Registered with transformers, whose models stay stock.

T packed tokens, H query heads, K key/value heads, R = H/K query heads that share one, L tokens of one text, d head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from embedwright.errors import InputError
from embedwright.packing import PackedTexts

PACKED = "embedwright_packed"  # a name that transformers knows as attention but not as mask: no mask is built for it

# (q, k, v, ends of texts, scale, window as flash attention counts it) -> (T, H, d), or None for what it does not take
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, float, tuple[int, int]], Tensor | None]

# Arguments that blocks pass and packed attention ignores. `is_causal` repeats the model's config; the layer's own value
# decides, and the probe holds it to the config.
_WITHOUT_EFFECT = {"is_causal", "position_ids", "cache_position", "output_hidden_states", "return_dict"}
_MASKED_ROWS = 512  # rows of a masked text computed at a time
# The widest head of torch's varlen kernel. A pooling block may have wider ones: then texts of one length are one call,
# which a GPU gives to its memory-efficient kernel, in 16 bits too.
_FLASH_DIM = 256
# Options for torch's varlen kernel, passed where its version has them: 2.11 accepts grouped heads without being told,
# and never splits. A split would depend on the longest text, so a vector would depend on its batch.
_VARLEN_OPTIONS = {"enable_gqa": True, "num_splits": 1}
_VARLEN: dict[str, Any] = {n: w for n, w in _VARLEN_OPTIONS.items() if n in inspect.signature(varlen_attn).parameters}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed: PackedTexts | None = None,
    dropout: float = 0.0,
    kernel: Kernel | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Computes attention within each text of a packed row: the function that transformers calls in every layer.

    query is (1, H, T, d), key and value are (1, K, T, d); returns (1, T, H, d). `config.is_causal` says whether it is
    causal, the layer gives its window (None: the whole text). `kernel` is explained at `attend`.

    Raises:
        InputError: There are no boundaries, or the layer wants dropout, a mask or a score that is not supported.
    """
    causal = bool(getattr(module.config, "is_causal", True))
    if packed is None:
        raise InputError("packed attention needs the boundaries: call the backbone with packed=PackedTexts")
    if dropout:  # what stock blocks pass in training
        raise InputError("packed attention has no dropout: set attention_dropout to 0 in the decoder's config.json")
    if attention_mask is not None:
        raise InputError("packed attention takes no mask: the boundaries say which tokens see each other")
    unknown = [
        n for n, value in others.items() if n not in _WITHOUT_EFFECT and value is not None and value is not False
    ]
    if unknown:  # a soft cap, sinks, chosen keys: without them the scores would be wrong
        kind = getattr(module.config, "model_type", "these")
        raise InputError(f"{kind!r} models need {unknown[0]!r}, which packed attention does not support")
    if packed.calls is not None:
        named = {"scaling": scaling, "sliding_window": sliding_window, "kernel": kernel}
        packed.calls.append((module, named | others))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    training = getattr(module, "training", True)
    q, k, v = query[0], key[0], value[0]
    return attend(q, k, v, packed, causal, scale, sliding_window, training, kernel)[None], None


def attend(
    q_HTd: Tensor,
    k_KTd: Tensor,
    v_KTd: Tensor,
    packed: PackedTexts,
    causal: bool,
    scale: float,
    window: int | None,
    training: bool = True,
    kernel: Kernel | None = None,
) -> Tensor:
    """Computes attention within each text (T, H, d), and is the one place where a kernel is chosen.

    A GPU in 16 bits takes torch's kernel for texts of any length, up to the widest head that it knows. Inference
    elsewhere takes the caller's `kernel` if it accepts the inputs. Otherwise each run of equally long texts is one
    batch. `training` is also true in GradCache's first pass, which has no gradient but must give the numbers of the
    second.
    """
    training = training or torch.is_grad_enabled()
    in_16_bits = q_HTd.dtype in (torch.float16, torch.bfloat16) and q_HTd.shape[-1] <= _FLASH_DIM
    if in_16_bits and _has_flash(q_HTd.device):
        return _any_lengths(q_HTd, k_KTd, v_KTd, packed, causal, scale, window)
    if not training and kernel is not None:
        out_THd = kernel(q_HTd, k_KTd, v_KTd, packed.cu_seqlens, scale, flash_window(causal, window))
        if out_THd is not None:
            return out_THd
    sizes = [n * length for n, length in packed.runs]
    outputs = []
    # One split and one concatenation: slicing inside the loop would make backward fill a full-size tensor per run.
    for (n, length), q, k, v in zip(
        packed.runs, q_HTd.split(sizes, 1), k_KTd.split(sizes, 1), v_KTd.split(sizes, 1), strict=True
    ):
        heads, kv_heads = q.shape[0], k.shape[0]
        q_nKRLd = q.reshape(kv_heads, heads // kv_heads, n, length, -1).permute(2, 0, 1, 3, 4)
        k_nKLd = k.reshape(kv_heads, n, length, -1).transpose(0, 1)
        v_nKLd = v.reshape(kv_heads, n, length, -1).transpose(0, 1)
        out_nKRLd = _equal_lengths(q_nKRLd, k_nKLd, v_nKLd, causal, scale, window)
        outputs.append(out_nKRLd.permute(0, 3, 1, 2, 4).reshape(n * length, heads, -1))
    return torch.cat(outputs)


def _any_lengths(
    q_HTd: Tensor, k_KTd: Tensor, v_KTd: Tensor, packed: PackedTexts, causal: bool, scale: float, window: int | None
) -> Tensor:
    """Computes flash attention with boundaries, by torch's varlen kernel."""
    q_THd, k_TKd, v_TKd = (x.transpose(0, 1) for x in (q_HTd, k_KTd, v_KTd))
    ends, longest = packed.cu_seqlens, packed.longest
    out_THd = varlen_attn(
        q_THd,
        k_TKd,
        v_TKd,
        ends,
        ends,
        longest,
        longest,
        scale=scale,
        window_size=flash_window(causal, window),
        **_VARLEN,
    )
    assert isinstance(out_THd, Tensor)  # it is a pair only when more is asked for
    return out_THd


@cache
def _has_flash(device: torch.device) -> bool:
    """Returns whether torch's varlen kernel runs on the device: NVIDIA GPUs from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_window(causal: bool, window: int | None) -> tuple[int, int]:
    """Returns how many tokens to the left and to the right are seen, as flash attention counts them. -1 means all."""
    left = -1 if window is None else window - 1 if causal else window
    return left, 0 if causal else left


def _equal_lengths(
    q_nKRLd: Tensor, k_nKLd: Tensor, v_nKLd: Tensor, causal: bool, scale: float, window: int | None
) -> Tensor:
    """Computes attention of n texts of equal length: (n, K, R, L, d).

    The R query heads that share a key head become rows, so that keys are never repeated. A long text under a mask is
    computed in blocks of rows, each with the keys that it can see, so that no mask is L x L.
    """
    n, kv_heads, shared, length, dim = q_nKRLd.shape
    step = length if not causal and window is None else _MASKED_ROWS
    blocks = []
    for start in range(0, length, step):
        rows = range(start, min(start + step, length))
        keys = visible_keys(rows, length, causal, window)
        mask = build_mask(rows, keys, causal, window, q_nKRLd.device)
        q = q_nKRLd[..., rows.start : rows.stop, :].reshape(n, kv_heads, shared * len(rows), dim)
        k, v = (x[..., keys.start : keys.stop, :] for x in (k_nKLd, v_nKLd))
        out = _softmax_attention(q, k, v, None if mask is None else mask.repeat(shared, 1), scale)
        blocks.append(out.reshape(n, kv_heads, shared, len(rows), -1))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=3)


def visible_keys(rows: range, length: int, causal: bool, window: int | None) -> range:
    """Returns the range of keys that some query in `rows` may see."""
    left, right = flash_window(causal, window)
    first = 0 if left < 0 else max(rows.start - left, 0)
    return range(first, length if right < 0 else min(rows.stop + right, length))


def build_mask(rows: range, keys: range, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Builds the mask, bool (rows, keys), True where query i sees key j. Returns None if all see all.

    The window is that of transformers' sdpa masks: |i-j| <= w in both directions, i-j < w when causal.
    """
    if not causal and (window is None or max(rows.stop - keys.start, keys.stop - rows.start) <= window + 1):
        return None
    row, key = (torch.arange(r.start, r.stop, device=device) for r in (rows, keys))
    distance = row[:, None] - key[None, :]  # how many tokens the query is after the key
    if causal:
        return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    assert window is not None
    return distance.abs() <= window


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    function: Any = _Recomputed  # torch leaves `apply` untyped
    out: Tensor = function.apply(q, k, v, mask, scale)
    return out


class _Recomputed(torch.autograd.Function):
    """torch's fused attention, whose backward runs the forward again in float32. It keeps only its inputs.

    On a CPU the fused backward in bfloat16 takes 3.7 times as long as in float32, a third of a training step.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        *qkv, mask = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            q, k, v = exact = [x.float().requires_grad_() for x in qkv]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=ctx.scale)
            grads = torch.autograd.grad(out, exact, gradient.float())
        return *(grad.to(x.dtype) for grad, x in zip(grads, qkv, strict=True)), None, None


AttentionInterface.register(PACKED, packed_attention)
