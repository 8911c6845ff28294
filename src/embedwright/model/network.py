"""Backbone and pooling head as one transformers model: our own `model_type`, registered with the Auto classes.

N texts, L longest, T packed tokens, D hidden, E embedding (= D).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from embedwright.errors import InputError, as_input_error, check_choice
from embedwright.fingerprint import Facts, config_facts, dtypes, facts
from embedwright.model.attention import PACKED
from embedwright.model.backbone import (
    Origin,
    batch_independent_length,
    check_report,
    same_samples,
    text_hidden,
    weight_samples,
)
from embedwright.model.pooling import (
    FoldedLatent,
    Kind,
    LatentPooling,
    PoolingConfig,
    fold_by_config,
    make_head,
    pool_tokens,
)
from embedwright.model.quantized import (
    QuantizedLinear,
    Scheme,
    compute_in_float32,
    has_quantized_layers,
    replace_with_empty,
)
from embedwright.model.verify.modes import evaluating
from embedwright.packing import PackedTexts, pack
from embedwright.text import Contract, TokenizedText

_FOLDED_FLOAT32, _FOLDED_16_BITS = 1e-4, 0.1  # how far folding may move a unit vector
# Tokens at a time: the widest intermediates of a head are eight times as wide as the states, or more.
HEAD_SLICE = 1024


class EmbedwrightConfig(PretrainedConfig):
    """The config of an embedder.

    `backbone` is the decoder's own config, `pooling` and `contract` are ours, all as dicts. `released` is set for a
    model from a released NV-Embed folder: the stored dtype and the small JSON files by name, for its export.
    `head_dtype` is "float32" where the head is stored in float32 beside a 16-bit backbone, and stays so. `history` says
    what `embedwright compress` has done to the model, one object a step. `quantization` is the scheme of quantised
    weights (`Scheme`).
    """

    model_type = "embedwright"
    # class attributes, so that a model without them is saved as before
    history: list[dict[str, Any]] | None = None
    quantization: dict[str, Any] | None = None

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        pooling: dict[str, Any] | None = None,
        contract: dict[str, Any] | None = None,
        released: dict[str, Any] | None = None,
        head_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone or {}
        self.pooling = pooling or {}
        self.contract = contract or {}
        self.released = released
        self.head_dtype = head_dtype
        self.hidden_size = self.backbone.get("hidden_size")
        super().__init__(**kwargs)


class EmbedwrightModel(PreTrainedModel):
    """Backbone and head. `embed(packed)` is the forward path; `forward` wraps it for libraries that pad."""

    config_class = EmbedwrightConfig
    base_model_prefix = "network"
    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, config: EmbedwrightConfig, backbone: Any = None) -> None:
        super().__init__(config)
        self.pooling = PoolingConfig.model_validate(config.pooling)
        self.contract = Contract.model_validate(config.contract)
        if backbone is None:
            with as_input_error("config.json: backbone", "is not a decoder config"):
                decoder = AutoConfig.for_model(**config.backbone)
            # in the dtype that from_pretrained was asked for; the config holds the stored one
            backbone = AutoModel.from_config(
                decoder, attn_implementation=PACKED, dtype=torch.get_default_dtype(), trust_remote_code=False
            )
        self.backbone = backbone
        self.origin: Origin | None = None  # of the backbone's weights; adapters are saved with it
        self.head = make_head(self.pooling, backbone.config.hidden_size)
        if config.quantization is not None:
            scheme = Scheme.model_validate(config.quantization)
            replace_with_empty(backbone, scheme)
            compute_in_float32(self)
            if scheme.folded:
                self.head = fold_by_config(self.head)
        self.implementation = PACKED  # see attend_by
        self.cpu_fault: str | None = None  # why `cpu.accelerate` left the fast path off
        if config.head_dtype == "float32":
            self._keep_in_fp32_modules_strict = {"head"}  # whatever dtype is asked for
        self.mixed = False  # training in bf16: products are in bf16, whatever the dtype of adapters and head
        self.sharded = False  # by FSDP, which cannot use tensors that a forward in inference mode made
        self.longest = batch_independent_length(backbone.config)  # tokens of a text
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: whoever makes a head resets it, and weights that a checkpoint lacks are an error."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Loads as transformers does, for every library that opens our folders, but never invents weights.

        Raises:
            InputError: Weights are missing, have another shape, or have no place in the model.
        """
        kwargs["ignore_mismatched_sizes"] = True  # reported, then refused by name
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        where = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        check_report(str(where), info)
        if odd := sorted(info["unexpected_keys"]):
            raise InputError(f"{where}: weights do not fit the config: there is no place for {', '.join(odd[:3])}")
        if model.config.quantization is not None:
            model.requires_grad_(False)  # codes do not train
        return (model, info) if output_loading_info else model

    def attend_by(self, implementation: str) -> None:
        """Switches to transformers' own attention, `sdpa` or `eager`, one text at a time. Serves as a reference."""
        check_choice("backend", implementation, ("sdpa", "eager"))
        self.backbone.set_attn_implementation(implementation)
        self.implementation = implementation

    def changed(self) -> bool:
        """Returns whether there are adapters, or other weights than were read or saved, by their samples.

        Quantised weights and a folded block do not train.
        """
        if self.origin is None or has_quantized_layers(self):
            return False
        adapted = any("lora_" in name for name, _ in self.backbone.named_parameters())
        then, now = self.origin.samples, weight_samples(self.backbone)
        if self.origin.head is not None and not isinstance(self.head, FoldedLatent):
            then, now = then | self.origin.head, now | weight_samples(self.head)
        return adapted or not same_samples(then, now)

    def hidden(self, packed: PackedTexts) -> Tensor:
        """Returns the decoder's last hidden states (T, D), after its final norm.

        Raises:
            InputError: A text is longer than `longest`.
        """
        if packed.longest > self.longest:
            raise InputError(
                f"a text of {packed.longest} tokens: beyond {self.longest}, this model's rotary frequencies are of "
                "the longest text in a batch"
            )
        if self.implementation != PACKED:
            lengths = [length for count, length in packed.runs for _ in range(count)]
            return torch.cat([text_hidden(self.backbone, ids) for ids in packed.ids_T.split(lengths)])
        with torch.autocast(packed.ids_T.device.type, torch.bfloat16, enabled=self.mixed):
            output = self.backbone(
                input_ids=packed.ids_T[None], position_ids=packed.position_T[None], packed=packed, use_cache=False
            )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def token_states(self, packed: PackedTexts) -> Tensor:
        """Returns the token states just before pooling (T, D), in the head's dtype.

        In training in bf16 the head multiplies in bf16 too; its norms, its softmax and its sums stay in float32.
        """
        hidden_TD = self.hidden(packed)
        hidden_TD = hidden_TD.to(next(self.head.parameters(), hidden_TD).dtype)
        with torch.autocast(hidden_TD.device.type, torch.bfloat16) if self.mixed else nullcontext():
            # Slices bound the memory of a long text. In training `batch_tokens` does, and processes that share a head
            # must call it equally often.
            if self.head.token_wise and not (torch.is_grad_enabled() or self.training):
                return torch.cat([self.head(slice_SD, packed) for slice_SD in hidden_TD.split(HEAD_SLICE)])
            outputs: Tensor = self.head(hidden_TD, packed)
            return outputs

    def embed(self, packed: PackedTexts) -> Tensor:
        """Embeds the texts: (N, E) float32 of unit length, in the order of `packed`. Keeps the gradient."""
        return F.normalize(pool_tokens(self.token_states(packed), packed, self.pooling.kind), dim=-1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pool_mask: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """Takes padded texts (N, L), padded on either side, unpads them, runs packed, and pads the result.

        Without a pool_mask every attended token is pooled, except BOS under the `offsets` rule.

        Returns:
            `pooler_output` (N, E) float32 has unit length, as `Embedder.encode` gives it. `last_hidden_state`
            (N, L, D) float32 holds the pooled token states, scaled so that their plain mean over the attended tokens
            is the embedding before normalisation. So libraries that pool by attention_mask alone, as
            sentence-transformers does, are right. Tokens that are not pooled are zero there.

        Raises:
            InputError: A row has no token to attend to or to pool; or, in evaluation without gradients, no finite
                vector.
        """
        attended_NL = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        pool_NL = self.default_pool(input_ids, attended_NL) if pool_mask is None else pool_mask.bool() & attended_NL
        _refuse_empty_rows(attended_NL, pool_NL)
        rows = (rows_NL.cpu().numpy() for rows_NL in (input_ids, pool_NL, attended_NL))
        texts = [TokenizedText(ids[attended], pool[attended]) for ids, pool, attended in zip(*rows, strict=True)]
        packed = pack(texts).to(input_ids.device)
        tokens_TD = self.token_states(packed)
        padded_NLD = tokens_TD.new_zeros(*input_ids.shape, tokens_TD.shape[-1], dtype=torch.float32)
        padded_NLD[attended_NL] = tokens_TD * _counts_for(packed, self.pooling.kind)[:, None]
        embedding_NE = F.normalize(pool_tokens(tokens_TD, packed, self.pooling.kind), dim=-1)
        if not (self.training or torch.is_grad_enabled()):
            _refuse_overflow(embedding_NE)
        return BaseModelOutputWithPooling(last_hidden_state=padded_NLD, pooler_output=embedding_NE)

    def default_pool(self, input_ids: Tensor, attended_NL: Tensor) -> Tensor:
        """Returns the tokens that are pooled where nobody says which: all attended ones, but BOS by rule."""
        if self.contract.mask_rule in ("count", "all") or not self.contract.bos_ids:
            return attended_NL
        in_front_NL = attended_NL.cumsum(1) <= len(self.contract.bos_ids)
        bos_NL = torch.zeros_like(attended_NL)
        for id in self.contract.bos_ids:  # torch.isin takes a form by sizes, which graphs leave open
            bos_NL = bos_NL | (input_ids == id)
        return attended_NL & ~(in_front_NL & bos_NL)


def fold(network: EmbedwrightModel, packed: PackedTexts) -> bool:
    """Replaces a latent block by its folded form, in place. Returns False for other heads, which stay as they are.

    Raises:
        RuntimeError: The vectors of `packed` moved by more than rounding. The network stays as it was.
    """
    head = network.head
    if not isinstance(head, LatentPooling):
        return False
    folded = FoldedLatent(head)  # it copies the block's mode, so before `evaluating` switches it
    with evaluating(network), torch.no_grad():
        before_NE = network.embed(packed)
    network.head = folded
    with evaluating(network), torch.no_grad():
        moved = float((network.embed(packed) - before_NE).norm(dim=-1).max())
    if not moved <= (_FOLDED_FLOAT32 if head.latents.dtype == torch.float32 else _FOLDED_16_BITS):
        network.head = head
        raise RuntimeError(f"folding the latent block moved vectors by {moved:.1e}: the model stays unfolded")
    network.requires_grad_(False)
    return True


def network_facts(network: EmbedwrightModel, contract: Contract) -> Facts:
    """Returns what decides a model's vectors besides its weights and tokenizer: configs and dtypes."""
    backbone, head = network.backbone.state_dict(keep_vars=True), dict(network.head.named_parameters())
    return {
        "kind": "embedwright",
        "dtype": dtypes(backbone) + (", mixed" if network.mixed else ""),
        **config_facts(network.backbone.config),
        **facts("contract", contract.model_dump(mode="json")),
        **facts("pooling", network.pooling.model_dump(mode="json", include=None if head else {"kind"})),
        "pooling.dtype": dtypes(head),
    }


def scheme_of(network: EmbedwrightModel) -> Scheme | None:
    """Returns the scheme of a network with quantised layers, None for any other."""
    layers = [layer for layer in network.backbone.modules() if isinstance(layer, QuantizedLinear)]
    if not layers:
        return None
    rotation, folded = max(layer.rotation for layer in layers), isinstance(network.head, FoldedLatent)
    return Scheme(bits=layers[0].bits, rotation=rotation, folded=folded)


def check_fit(network: EmbedwrightModel, tokenizer: Any) -> None:
    """Raises InputError if the tokenizer has more tokens than the model, or the contract allows too long texts."""
    rows = network.backbone.get_input_embeddings().weight.shape[0]
    largest = {"tokens": max(tokenizer.get_vocab().values(), default=-1), "pad token": tokenizer.pad_token_id}
    for what, id in largest.items():
        if id is not None and id >= rows:
            raise InputError(
                f"the tokenizer's {what} go up to id {id}, the model has embeddings for {rows}: {id + 1 - rows} are "
                "missing. Take the model's own tokenizer, or resize the model's embeddings and train them"
            )
    if network.contract.max_tokens > network.longest:
        raise InputError(
            f"max_tokens={network.contract.max_tokens}: beyond {network.longest} tokens the rotary frequencies of this "
            "model go by the longest text of a batch, so that a text's vector would depend on others. Give "
            f"max_tokens={network.longest} or less"
        )


def _refuse_overflow(embedding_NE: Tensor) -> None:
    finite_N = embedding_NE.isfinite().all(1)
    if not finite_N.all():
        row = int(finite_N.logical_not().nonzero()[0])
        raise InputError(f"row {row} has no finite vector: in float16 states overflow, load in float32 or bfloat16")


def _refuse_empty_rows(attended_NL: Tensor, pool_NL: Tensor) -> None:
    for mask_NL, name, verb in ((attended_NL, "attention_mask", "attend to"), (pool_NL, "pool_mask", "pool")):
        if not mask_NL.any(1).all():
            row = int(mask_NL.any(1).logical_not().nonzero()[0])
            raise InputError(f"{name}: row {row} has no token to {verb}")


def _counts_for(packed: PackedTexts, kind: Kind) -> Tensor:
    """Returns float32 (T,): each token's weight in `pool_tokens` times its text's length, by which a mean divides."""
    lengths_N = packed.lengths_N.long()
    if kind == "last":
        return torch.zeros_like(packed.ids_T, dtype=torch.float32).index_put(
            (packed.cu_seqlens[1:].long() - 1,), lengths_N.float()
        )
    pool_T = packed.pool_mask_T.float()
    text_T = torch.repeat_interleave(lengths_N, output_size=len(pool_T))
    pooled_N = torch.zeros_like(lengths_N, dtype=torch.float32).index_add(0, text_T, pool_T)
    return pool_T * (lengths_N / pooled_N)[text_T]


AutoConfig.register("embedwright", EmbedwrightConfig)
AutoModel.register(EmbedwrightConfig, EmbedwrightModel)
