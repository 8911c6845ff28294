"""From token states to one vector: latent attention, self-attention, a token-wise control, mean, last.

T packed tokens, N texts, D hidden, R latents, H heads, d head dim, M width of a gated block.

`latent` is the block as released (NV-Embed's modelling code; paper, section 3.2, writes it shorter): pre-norm
cross attention from the tokens to R trainable latents, residual, pre-norm GEGLU, residual, mean over the pooled tokens.
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

FOLDED = "the pooling head is folded for inference: load the model again to save, export or train it"


class PoolingConfig(BaseModel):
    """Sizes of a pooling block; `head_dim` None means hidden/heads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind = "latent"
    latents: int = Field(default=512, ge=1)
    heads: int = Field(default=8, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    multiple: int = Field(default=4, ge=1)  # width of the gated block, in units of D


class GatedBlock(nn.Module):
    """LayerNorm, Linear to 2M, value * GELU(gate), Linear back, residual. Starts as the identity."""

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
    """Pre-norm attention of the tokens to a context, residual: H heads, no biases. Starts as the identity."""

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
        # Behind LayerNorm the inputs have unit variance: with these deviations q, k and so the scores q.k/sqrt(d)
        # have it too. At the default scale attention over the latents is uniform and the head learns a constant.
        for linear in (self.to_q, self.to_kv):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(self.to_out.weight)

    def split(self, x: Tensor) -> Tensor:
        """(rows, H*d) -> (H, rows, d)."""
        return x.view(len(x), self.heads, self.head_dim).transpose(0, 1)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Both (H, rows, d)."""
        keys, values = self.to_kv(self.norm_context(context)).chunk(2, dim=-1)
        return self.split(keys), self.split(values)

    def queries(self, x_TD: Tensor) -> Tensor:
        return self.split(self.to_q(self.norm(x_TD)))


class LatentPooling(nn.Module):
    """Tokens query R trainable latents. Mixes no tokens."""

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
        """(H, T, R), rows sum to 1."""
        keys, _ = self.attention.keys_values(self.latents)
        scores_HTR: Tensor = self.attention.queries(x_TD) @ keys.transpose(1, 2)
        weights_HTR: Tensor = (scores_HTR * self.attention.head_dim**-0.5).softmax(-1)
        return weights_HTR

    def forward(self, x_TD: Tensor, packed: PackedTexts) -> Tensor:
        keys, values = self.attention.keys_values(self.latents)
        mixed_HTd = F.scaled_dot_product_attention(self.attention.queries(x_TD), keys, values)
        x_TD = x_TD + self.attention.to_out(mixed_HTd.transpose(0, 1).flatten(1))
        out: Tensor = self.feed_forward(x_TD)
        return out


class FoldedLatent(nn.Module):
    """A latent block for inference alone: what its tokens meet does not depend on them, so it is two matrices.

    Per head, normed tokens x have the scores x (Wq K^T / sqrt(d)) and the output softmax(scores) (V Wo), so that a
    (D, R) and an (R, D) matrix stand in place of all projections. They are computed in float64, a head at a time, which
    bounds memory, and kept in the block's own type; ValueError where they overflow it. The rest is taken over.
    """

    token_wise: ClassVar[bool] = True

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
        if not all(linear.weight.isfinite().all() for linear in (self.to_scores, self.to_out)):
            raise InputError(f"the folded latent block overflows {like['dtype']}: load the model in another dtype")
        self.requires_grad_(False)
        for new in (self, self.to_scores, self.to_out):  # what is taken over keeps its mode
            new.training = latent.training

    def reset(self) -> None:
        raise InputError(FOLDED)

    def _save_to_state_dict(self, *_: Any) -> None:
        """Whatever saves weights comes by here."""
        raise InputError(FOLDED)

    def forward(self, x_TD: Tensor, packed: PackedTexts) -> Tensor:
        if torch.is_grad_enabled() and (x_TD.requires_grad or any(p.requires_grad for p in self.parameters())):
            raise InputError(FOLDED)
        scores_THR = self.to_scores(self.norm(x_TD)).view(len(x_TD), self.heads, -1)
        x_TD = x_TD + self.to_out(scores_THR.softmax(-1).flatten(1))
        out: Tensor = self.feed_forward(x_TD)
        return out


class SelfPooling(nn.Module):
    """The same block with the text's own tokens as context (the paper's self-attention baseline)."""

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
    """Two token-wise gated blocks with the parameters of the latent block: the honest control for it."""

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


class TokensAsTheyAre(nn.Module):
    """`mean` and `last` have no weights: what they do is in `reduce`."""

    token_wise: ClassVar[bool] = False  # nothing to run

    def reset(self) -> None:
        pass

    def forward(self, x_TD: Tensor, packed: PackedTexts) -> Tensor:
        return x_TD


PoolingHead = LatentPooling | FoldedLatent | SelfPooling | MlpPooling | TokensAsTheyAre


def make_head(config: PoolingConfig, hidden: int) -> PoolingHead:
    """The block of this kind; call `reset()` on a new one. ValueError where heads do not divide D."""
    if config.kind in ("mean", "last"):
        return TokensAsTheyAre()
    if config.head_dim is None and hidden % config.heads:
        raise InputError(f"pooling heads={config.heads} do not divide hidden size {hidden}: set head_dim")
    kinds: dict[str, type[LatentPooling | SelfPooling | MlpPooling]] = {
        "latent": LatentPooling,
        "self": SelfPooling,
        "mlp": MlpPooling,
    }
    return kinds[config.kind](config, hidden)


def reduce(x_TD: Tensor, packed: PackedTexts, kind: Kind) -> Tensor:
    """Float32 (N, D), not yet normalised: each text's last token (its EOS), or the mean over its pooled tokens."""
    if kind == "last":
        return x_TD[packed.cu_seqlens[1:].long() - 1].float()
    weight_T1 = packed.pool_mask_T[:, None].float()
    text_T = torch.repeat_interleave(packed.lengths_N, output_size=len(x_TD))
    sum_ND = x_TD.new_zeros(len(packed), x_TD.shape[1], dtype=torch.float32).index_add(0, text_T, x_TD * weight_T1)
    count_N1 = weight_T1.new_zeros(len(packed), 1).index_add(0, text_T, weight_T1)
    return sum_ND / count_N1
