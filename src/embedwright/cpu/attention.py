"""Norms and rotary positions of stock blocks in one pass, for inference on CPUs: a change of class, as in `linears`.

T packed tokens, H query heads, K key heads, d head dim, D hidden.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from embedwright.cpu import kernels
from embedwright.cpu.linears import change, faster, listened_to
from embedwright.model.attention import PACKED

# transformers' norms: of the second kind the weight is one more than what is stored, and epsilon has another name
_NORMS = dict.fromkeys(("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"), False)
_NORMS |= dict.fromkeys(("GemmaRMSNorm", "Gemma3RMSNorm"), True)
# Attention blocks that are q, k, v = products, then norms where there are any, then rotary positions in full; and where
# they have their window.
_ATTENTION = {
    "LlamaAttention": None,
    "MistralAttention": "config",
    "Qwen2Attention": "self",
    "Qwen3Attention": "self",
    "GemmaAttention": None,
    "Gemma3Attention": "self",
}


def _plain(module: nn.Module, *tensors: Tensor) -> bool:
    """Whether a kernel may take these in place of the stock block: for inference on a CPU, all of one type."""
    return (
        not module.training  # GradCache's first pass has no gradient, and needs the numbers of the second
        and not torch.is_grad_enabled()
        and all(x.device.type == "cpu" and x.dtype == tensors[0].dtype for x in tensors)
        and tensors[0].dtype in (torch.float32, torch.bfloat16)
        and tensors[0].numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and kernels.available()
    )


@cache
def _norm(stock: Any) -> Any:
    plus_one = _NORMS[stock.__name__]

    def forward(self: Any, x: Tensor) -> Tensor:
        if x.shape[-1] % 16 or not x.is_contiguous() or not _plain(self, x, self.weight):
            out: Tensor = stock.forward(self, x)
            return out
        return kernels.norm(x, self.weight, self.eps if plus_one else self.variance_epsilon, plus_one)

    return faster(_norm, stock, forward)


@cache
def _attention(stock: Any) -> Any:
    windowed = _ATTENTION[stock.__name__]

    def forward(
        self: Any, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        def as_stock() -> tuple[Tensor, Tensor | None]:
            out: tuple[Tensor, Tensor | None] = stock.forward(
                self, hidden_states, position_embeddings, attention_mask, **others
            )
            return out

        cosine, sine = position_embeddings
        fits = self.head_dim % 32 == 0 and cosine.shape[-1] == self.head_dim and others.get("packed") is not None
        if not fits or others.get("past_key_values") is not None or not _plain(self, hidden_states, cosine, sine):
            return as_stock()
        normed = (self.q_norm, self.k_norm) if hasattr(self, "q_norm") else ()
        if listened_to(self.q_proj, self.k_proj, *normed):  # `rotate` writes over what they give
            return as_stock()
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (product(hidden_states).view(shape) for product in (self.q_proj, self.k_proj, self.v_proj))
        if normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if not q.dtype == k.dtype == cosine.dtype:
            return as_stock()
        kernels.rotate(q[0], k[0], cosine[0], sine[0])
        owner = {"self": self, "config": self.config, None: None}[windowed]
        window = getattr(owner, "sliding_window", None)
        attention = ALL_ATTENTION_FUNCTIONS[PACKED]  # looked up as the stock block does: the probe listens there
        mixed, _ = attention(self, q, k, v, None, scaling=self.scaling, sliding_window=window, **others)
        return self.o_proj(mixed.flatten(2)), None

    return faster(_attention, stock, forward)


def speed_up(network: nn.Module) -> None:
    """Give the network's stock norms and attention blocks their faster forms, in place, where this machine has them."""
    if not kernels.available():
        return
    for module in network.modules():
        change(module, _NORMS, _norm)
        change(module, _ATTENTION, _attention)
