"""Pooling: from token states to one vector, by latent attention, self-attention, a token-wise control, mean or last.

T packed tokens, N texts, D hidden, R latents, H heads, d head dim, M width of a gated block.

`latent` is NV-Embed's block as its released code has it (the paper, section 3.2, writes it shorter): pre-norm cross
attention from the tokens to R trainable latents, residual, pre-norm GEGLU, residual, mean over the pooled tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from embedwright.errors import InputError
from embedwright.model.attention import attend
from embedwright.packing import PackedTexts

Kind = Literal["latent", "mean", "last", "self", "mlp"]
WEIGHTLESS: dict[Kind, str] = {"mean": "mean", "last": "lasttoken"}  # and how sentence-transformers calls them

FOLDED = (
    "the pooling head is folded for inference: load the model again to save, export or train it; for a compressed "
    "folder, load the model that it was made from"
)


class PoolingConfig(BaseModel):
    """Sizes of a pooling block; `head_dim` None means hidden/heads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind = "latent"
    latents: int = Field(default=512, ge=1)
    heads: int = Field(default=8, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    multiple: int = Field(default=4, ge=1)  # width of the gated block, in units of D


class GatedBlock(nn.Module):
    """Computes LayerNorm, Linear to 2M, value * GELU(gate), Linear back, residual. A new block is the identity."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.widen = nn.Linear(hidden, 2 * width)
        self.narrow = nn.Linear(width, hidden)

    def reset(self) -> None:
        self.norm.reset_parameters()
        self.widen.reset_parameters()
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        value, gate = self.widen(self.norm(x_TD)).chunk(2, dim=-1)
        narrowed: Tensor = self.narrow(value * F.gelu(gate))
        return x_TD + narrowed


class CrossAttention(nn.Module):
    """The projections of pre-norm attention from tokens to a context: H heads, no biases. `to_out` starts at zero."""

    def __init__(self, hidden: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norm = nn.LayerNorm(hidden)
        self.norm_context = nn.LayerNorm(hidden)
        self.to_q = nn.Linear(hidden, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(hidden, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, hidden, bias=False)

    def reset(self) -> None:
        self.norm.reset_parameters()
        self.norm_context.reset_parameters()
        # After LayerNorm the inputs have unit variance. These deviations give q, k and the scores q.k/sqrt(d) unit
        # variance too. At torch's default scale attention over the latents is uniform and the head learns a constant.
        for linear in (self.to_q, self.to_kv):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(self.to_out.weight)

    def split(self, x: Tensor) -> Tensor:
        """Splits heads: (..., rows, H*d) -> (..., H, rows, d)."""
        heads: Tensor = x.unflatten(-1, (self.heads, self.head_dim))
        return heads.transpose(-3, -2)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the context's keys and values, both (H, rows, d)."""
        keys, values = self.to_kv(self.norm_context(context)).chunk(2, dim=-1)
        return self.split(keys), self.split(values)

    def queries(self, x_TD: Tensor) -> Tensor:
        return self.split(self.to_q(self.norm(x_TD)))


class LatentPooling(nn.Module):
    """Latent attention: each token attends to R trainable latents. Tokens do not see each other."""

    token_wise: ClassVar[bool] = True

    def __init__(self, config: PoolingConfig, hidden: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.latents, hidden))
        self.attention = CrossAttention(hidden, config.heads, config.head_dim or hidden // config.heads)
        self.feed_forward = GatedBlock(hidden, config.multiple * hidden)

    def reset(self) -> None:
        nn.init.normal_(self.latents)
        self.attention.reset()
        self.feed_forward.reset()

    def attention_weights(self, x_TD: Tensor) -> Tensor:
        """Returns the attention of each token over the latents: (H, T, R), summing to 1 over R."""
        keys, _ = self.attention.keys_values(self.latents)
        return self._weights(self.attention.queries(x_TD), keys)

    def _weights(self, queries: Tensor, keys: Tensor) -> Tensor:
        scores_HTR: Tensor = queries @ keys.transpose(1, 2)
        weights_HTR: Tensor = (scores_HTR * self.attention.head_dim**-0.5).softmax(-1, dtype=torch.float32)
        return weights_HTR

    def forward(self, x_TD: Tensor, packed: PackedTexts) -> Tensor:
        keys, values = self.attention.keys_values(self.latents)
        queries = self.attention.queries(x_TD)
        if torch.is_autocast_enabled(x_TD.device.type):
            # Fused kernels want a dimension of texts, and torch's other form multiplies bfloat16 in float32.
            mixed_HTd = self._weights(queries, keys) @ values
        else:
            mixed_HTd = F.scaled_dot_product_attention(queries, keys, values)
        x_TD = x_TD + self.attention.to_out(mixed_HTd.transpose(0, 1).flatten(1))
        out: Tensor = self.feed_forward(x_TD)
        return out


class FoldedLatent(nn.Module):
    """A latent block for inference alone, with two matrices in place of its projections.

    Keys and values come from the latents, so they are constants. Per head, normed tokens x have the scores
    x (Wq K^T / sqrt(d)) and the output softmax(scores) (V Wo): a (D, R) and an (R, D) matrix replace all projections.
    They are computed in float64, one head at a time to bound memory, and stored in the block's own dtype. Norm and
    feed-forward are shared with the block. For a block on the meta device, only shapes are made. `can_be_saved` is True
    if the model's config says that the head is folded, so that it can be loaded again.

    Raises:
        InputError: A product overflows the block's dtype.
    """

    token_wise: ClassVar[bool] = True
    can_be_saved = False

    @torch.no_grad()
    def __init__(self, latent: LatentPooling) -> None:
        super().__init__()
        attention = latent.attention
        rows, hidden = latent.latents.shape
        self.heads, self.norm, self.feed_forward = attention.heads, attention.norm, latent.feed_forward
        like: dict[str, Any] = {"bias": False, "device": latent.latents.device, "dtype": latent.latents.dtype}
        self.to_scores = nn.utils.skip_init(nn.Linear, hidden, self.heads * rows, **like)
        self.to_out = nn.utils.skip_init(nn.Linear, self.heads * rows, hidden, **like)
        norm, d = attention.norm_context, attention.head_dim
        context_RD = F.layer_norm(
            latent.latents.double(), norm.normalized_shape, norm.weight.double(), norm.bias.double(), norm.eps
        )
        to_keys, to_values = attention.to_kv.weight.chunk(2)
        for head in range(self.heads):
            inner, outer = slice(head * d, (head + 1) * d), slice(head * rows, (head + 1) * rows)
            keys_Rd, values_Rd = (context_RD @ weight[inner].double().T for weight in (to_keys, to_values))
            self.to_scores.weight[outer] = d**-0.5 * keys_Rd @ attention.to_q.weight[inner].double()
            self.to_out.weight[:, outer] = attention.to_out.weight[:, inner].double() @ values_Rd.T
        products = () if latent.latents.is_meta else (self.to_scores, self.to_out)
        if not all(linear.weight.isfinite().all() for linear in products):
            raise InputError(f"the folded latent block overflows {like['dtype']}: load the model in another dtype")
        self.requires_grad_(False)
        for new in (self, self.to_scores, self.to_out):  # shared modules keep their mode
            new.training = latent.training

    def reset(self) -> None:
        raise InputError(FOLDED)

    def _save_to_state_dict(self, *args: Any) -> None:
        """Refuses to save what could not be read again: every way of saving weights calls this."""
        if not self.can_be_saved:
            raise InputError(FOLDED)
        super()._save_to_state_dict(*args)

    def forward(self, x_TD: Tensor, packed: PackedTexts) -> Tensor:
        if torch.is_grad_enabled() and (x_TD.requires_grad or any(p.requires_grad for p in self.parameters())):
            raise InputError(FOLDED)
        scores_THR = self.to_scores(self.norm(x_TD)).unflatten(-1, (self.heads, -1))
        x_TD = x_TD + self.to_out(scores_THR.softmax(-1).flatten(-2))
        out: Tensor = self.feed_forward(x_TD)
        return out


def check_unfolded(head: nn.Module) -> None:
    """Raises InputError for a block that was folded here, whose weights a folder cannot hold."""
    if isinstance(head, FoldedLatent) and not head.can_be_saved:
        raise InputError(FOLDED)


def fold_by_config(head: nn.Module) -> FoldedLatent:
    """Folds a latent block whose model's config says that it is folded. Raises InputError for another head."""
    if not isinstance(head, LatentPooling):
        raise InputError("only a latent pooling block can be folded")
    folded = FoldedLatent(head)
    folded.can_be_saved = True
    return folded


class SelfPooling(nn.Module):
    """The latent block with the text's own tokens in place of latents: the paper's self-attention baseline."""

    token_wise: ClassVar[bool] = False

    def __init__(self, config: PoolingConfig, hidden: int) -> None:
        super().__init__()
        self.attention = CrossAttention(hidden, config.heads, config.head_dim or hidden // config.heads)
        self.feed_forward = GatedBlock(hidden, config.multiple * hidden)

    def reset(self) -> None:
        self.attention.reset()
        self.feed_forward.reset()

    def forward(self, x_TD: Tensor, packed: PackedTexts) -> Tensor:
        keys, values = self.attention.keys_values(x_TD)
        scale = self.attention.head_dim**-0.5
        mixed_THd = attend(self.attention.queries(x_TD), keys, values, packed, causal=False, scale=scale, window=None)
        x_TD = x_TD + self.attention.to_out(mixed_THd.flatten(1))
        out: Tensor = self.feed_forward(x_TD)
        return out


class MlpPooling(nn.Module):
    """A control for the latent block: two token-wise gated blocks with as many parameters."""

    token_wise: ClassVar[bool] = True

    def __init__(self, config: PoolingConfig, hidden: int) -> None:
        super().__init__()
        inner = config.heads * (config.head_dim or hidden // config.heads)
        # latent attention has 4*inner*D + R*D weights, a gated block of width M has 3*M*D
        self.first = GatedBlock(hidden, round((4 * inner + config.latents) / 3))
        self.second = GatedBlock(hidden, config.multiple * hidden)

    def reset(self) -> None:
        self.first.reset()
        self.second.reset()

    def forward(self, x_TD: Tensor, packed: PackedTexts) -> Tensor:
        out: Tensor = self.second(self.first(x_TD))
        return out


class IdentityHead(nn.Module):
    """The head of `mean` and `last`, which have no weights. `pool_tokens` does their work."""

    token_wise: ClassVar[bool] = False  # nothing to run

    def reset(self) -> None:
        pass

    def forward(self, x_TD: Tensor, packed: PackedTexts) -> Tensor:
        return x_TD


PoolingHead = LatentPooling | FoldedLatent | SelfPooling | MlpPooling | IdentityHead


def make_head(config: PoolingConfig, hidden: int) -> PoolingHead:
    """Builds the head of a pooling kind, with uninitialised weights: call `reset()` on a new one.

    Raises:
        InputError: The heads do not divide D.
    """
    if config.kind in WEIGHTLESS:
        return IdentityHead()
    if config.head_dim is None and hidden % config.heads:
        raise InputError(f"pooling heads={config.heads} do not divide hidden size {hidden}: set head_dim")
    kinds: dict[str, type[LatentPooling | SelfPooling | MlpPooling]] = {
        "latent": LatentPooling,
        "self": SelfPooling,
        "mlp": MlpPooling,
    }
    return kinds[config.kind](config, hidden)


def pool_tokens(x_TD: Tensor, packed: PackedTexts, kind: Kind) -> Tensor:
    """Reduces each text's tokens to one vector: its last token (EOS), or the mean over its pooled tokens.

    Returns float32 (N, D), not normalised.
    """
    if kind == "last":
        return x_TD[packed.cu_seqlens[1:].long() - 1].float()
    weight_T = packed.pool_mask_T.float()
    # the sum of a bag is in the order of its tokens; `index_add` adds on a GPU in any order
    bags: dict[str, Any] = {"mode": "sum", "per_sample_weights": weight_T, "include_last_offset": True}
    token_T = torch.arange(len(x_TD), dtype=torch.int32, device=x_TD.device)
    sum_ND, count_N1 = (
        F.embedding_bag(token_T, values, packed.cu_seqlens, **bags)
        for values in (x_TD.float(), torch.ones_like(weight_T)[:, None])
    )
    return sum_ND / count_N1
