"""Runs the norms, rotary positions and attention of stock blocks through our kernels, for inference on CPUs.

Modules change their class, as in `linears`. transformers finds the attention function by its name.

T packed tokens, H query heads, K key heads, d head dim, D hidden.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from embedwright.cpu import int8, kernels
from embedwright.cpu.guards import has_hooks, is_eager, is_inference, is_unpatched, stock_functions, subclass
from embedwright.model.attention import packed_attention

FAST = "embedwright_packed_cpu"  # packed attention, through our kernel if that accepts the inputs


def fast_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Runs `packed_attention` with our kernel for inference."""
    return packed_attention(*args, **{**kwargs, "kernel": _kernel})


def _kernel(
    q_HTd: Tensor, k_KTd: Tensor, v_KTd: Tensor, ends: Tensor, scale: float, window: tuple[int, int]
) -> Tensor | None:
    """Returns (T, H, d), or None if our kernel does not accept the inputs."""
    if not is_eager(ends) or not kernels.can_attend(q_HTd, k_KTd, v_KTd):
        return None
    return kernels.attention(q_HTd, k_KTd, v_KTd, ends, scale, window)


AttentionInterface.register(FAST, fast_attention)


@cache
def norm(stock: Any, plus_one: bool) -> Any:
    """Makes a subclass of the RMS norm `stock` that reads its input once. Returns None if its code was replaced.

    `plus_one` marks Gemma's norm: it adds 1 to the stored weight and has another name for epsilon.
    """
    known = stock_functions(*((stock, name) for name in ("forward", "_norm") if hasattr(stock, name)))
    if known is None:
        return None

    def forward(self: Any, x: Tensor) -> Tensor:
        fits = is_inference(self, known, x, self.weight) and x.is_contiguous() and kernels.available()
        if not fits or x.shape[-1] % 16 or x.shape[-1:] != self.weight.shape:
            return cast(Tensor, stock.forward(self, x))
        return kernels.norm(x, self.weight, self.eps if plus_one else self.variance_epsilon, plus_one)

    return subclass(norm, stock, forward, known, plus_one)


@cache
def attention(stock: Any, windowed: str | None) -> Any:
    """Makes the class of an attention block: q, k and v products, norms if there are any, then full rotary positions.

    Returns None for a patched block. `windowed` names the object that holds the window: the block, its config or none.
    """
    home = sys.modules[stock.__module__]
    known = stock_functions((stock, "forward"), (home, "apply_rotary_pos_emb"), (home, "rotate_half"))
    if known is None:
        return None

    def forward(
        self: Any, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None, **others: Any
    ) -> Any:
        named = {"position_embeddings": position_embeddings, "attention_mask": attention_mask, **others}
        as_stock = partial(stock.forward, self, hidden_states=hidden_states, **named)
        if not _fits(self, known, hidden_states, position_embeddings, others):
            return as_stock()
        products, dtype = (self.q_proj, self.k_proj, self.v_proj), hidden_states.dtype
        inputs: Tensor | int8.QuantizedInput = hidden_states
        in_int8 = int8.can_run_int8(*products, self.o_proj) and not has_hooks(self.o_proj)
        if in_int8:  # rounded once for all three; what is between the products is in bfloat16
            output_dtype = dtype if hasattr(self, "q_norm") else torch.bfloat16
            inputs = int8.quantized_input(hidden_states, self.q_proj, output_dtype)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (product(inputs).view(shape) for product in products)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        cosine, sine = position_embeddings
        if in_int8:
            q, k, v, cosine, sine = (x.to(torch.bfloat16) for x in (q, k, v, cosine, sine))
        if not q.dtype == k.dtype == cosine.dtype:
            return as_stock()
        kernels.rotate(q[0], k[0], cosine[0], sine[0])
        owner = {"self": self, "config": self.config, None: None}[windowed]
        window = getattr(owner, "sliding_window", None)
        attend = ALL_ATTENTION_FUNCTIONS[FAST]
        mixed, _ = attend(self, q, k, v, attention_mask, scaling=self.scaling, sliding_window=window, **others)
        mixed = mixed.flatten(2)
        return self.o_proj(int8.quantized_input(mixed, self.o_proj, dtype) if in_int8 else mixed), None

    return subclass(attention, stock, forward, known, windowed)


def _fits(self: Any, known: Any, hidden_states: Tensor, position_embeddings: Any, others: dict[str, Any]) -> bool:
    """Returns whether the kernels may run this call of an attention block."""
    if position_embeddings is None:
        return False
    cosine, sine = position_embeddings
    normed = (self.q_norm, self.k_norm) if hasattr(self, "q_norm") else ()
    products = self.q_proj, self.k_proj, self.v_proj
    return (
        is_inference(self, known, hidden_states, cosine, sine)
        and kernels.available()
        and self.config._attn_implementation == FAST
        and others.get("packed") is not None
        and others.get("past_key_values") is None
        and self.head_dim % 32 == 0
        and cosine.shape[-1] == self.head_dim
        and len(hidden_states) == len(cosine) == 1
        and cosine.is_contiguous()
        and sine.is_contiguous()
        # `rotate` overwrites the outputs of these parts, and a module of another kind may have kept its output
        and all(type(part) is nn.Linear or "stock_class" in vars(type(part)) for part in products)
        and all("known" in vars(type(part)) and is_unpatched(vars(type(part))["known"]) for part in normed)
        and not has_hooks(*products, *normed)
    )
