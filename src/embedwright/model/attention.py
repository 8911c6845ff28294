"""Packed attention: tokens see their own text and nothing else. Registered with transformers, whose models stay stock.

T packed tokens, H query heads, K key/value heads, R = H/K query heads that share one, L tokens of one text, d head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from embedwright.packing import PackedTexts

PACKED = "embedwright_packed"  # a name that transformers knows as attention but not as mask: no mask is built for it

# On a CPU, two matrix products and a softmax over a batch of equal lengths beat the fused kernel up to about here.
_EXPLICIT_BELOW = 256


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed: PackedTexts | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention within each text of a packed row; query (1, H, T, d), key and value (1, K, T, d) -> (1, T, H, d).

    Causal or not is the config's word (`config.is_causal`), the window is the layer's (None: whole text).
    """
    if packed is None:
        raise ValueError("packed attention needs the boundaries: call the backbone with packed=PackedTexts")
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if unknown:  # Gemma 2, GPT-OSS: left out, the scores would be other ones
        kind = getattr(module.config, "model_type", "these")
        raise ValueError(f"{kind!r} models need {unknown[0]!r}, which packed attention has not")
    causal = bool(getattr(module.config, "is_causal", True))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query[0], key[0], value[0], packed, causal, scale, sliding_window)[None], None


def attend(
    q_HTd: Tensor, k_KTd: Tensor, v_KTd: Tensor, packed: PackedTexts, causal: bool, scale: float, window: int | None
) -> Tensor:
    """(T, H, d): each run of equally long texts as one batch, in the layout (texts, K, R*L, d).

    Query heads that share a key head are folded into rows, so that keys are never repeated.
    """
    sizes = [n * length for n, length in packed.runs]
    outputs = []
    # One split and one concatenation: slicing inside the loop would make backward fill a full-size tensor per run.
    for (n, length), q, k, v in zip(
        packed.runs, q_HTd.split(sizes, 1), k_KTd.split(sizes, 1), v_KTd.split(sizes, 1), strict=True
    ):
        heads, kv_heads, dim = q.shape[0], k.shape[0], q.shape[-1]
        shared = heads // kv_heads
        q_rows = q.reshape(kv_heads, shared, n, length, dim).permute(2, 0, 1, 3, 4)
        q_rows = q_rows.reshape(n, kv_heads, shared * length, dim)
        k_rows = k.reshape(kv_heads, n, length, dim).transpose(0, 1)
        v_rows = v.reshape(kv_heads, n, length, v.shape[-1]).transpose(0, 1)
        mask = allowed(length, causal, window, q.device)
        if mask is not None:
            mask = mask.repeat(shared, 1)
        out = _softmax_attention(q_rows, k_rows, v_rows, mask, scale)
        out = out.reshape(n, kv_heads, shared, length, v.shape[-1]).permute(0, 3, 1, 2, 4)
        outputs.append(out.reshape(n * length, heads, v.shape[-1]))
    return torch.cat(outputs)


def allowed(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Bool (L, L), True where query i sees key j; None where all see all.

    The window is that of transformers' own sdpa masks: |i-j| <= w in both directions, i-j < w when causal.
    """
    if not causal and (window is None or length <= window + 1):
        return None
    position = torch.arange(length, device=device)
    ahead = position[:, None] - position[None, :]
    if causal:
        return (ahead >= 0) if window is None else (ahead >= 0) & (ahead < window)
    assert window is not None
    return ahead.abs() <= window


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if q.device.type != "cpu" or k.shape[2] > _EXPLICIT_BELOW:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)


AttentionInterface.register(PACKED, packed_attention)
