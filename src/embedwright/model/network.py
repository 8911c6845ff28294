"""Backbone and pooling head as one transformers model: our own `model_type`, registered with the Auto classes.

N texts, L longest, T packed tokens, D hidden, E embedding (= D).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from embedwright.model.attention import PACKED
from embedwright.model.backbone import stock_hidden
from embedwright.model.pooling import PoolingConfig, make_head, reduce
from embedwright.packing import PackedTexts, pack
from embedwright.text import Contract, TokenizedText


class EmbedwrightConfig(PretrainedConfig):
    """`backbone`: the decoder's own config as a dict. `pooling`, `contract`: ours as dicts."""

    model_type = "embedwright"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        pooling: dict[str, Any] | None = None,
        contract: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone or {}
        self.pooling = pooling or {}
        self.contract = contract or {}
        self.hidden_size = self.backbone.get("hidden_size")
        super().__init__(**kwargs)


class EmbedwrightModel(PreTrainedModel):
    """`embed(packed)` is the one forward path; `forward` is the same behind a padded door, for other libraries."""

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
            decoder = AutoConfig.for_model(**config.backbone)
            # in the type that from_pretrained was asked for; the stored one is in the config
            backbone = AutoModel.from_config(decoder, attn_implementation=PACKED, dtype=torch.get_default_dtype())
        self.backbone = backbone
        self.head = make_head(self.pooling, backbone.config.hidden_size)
        self.implementation = PACKED  # "sdpa" and "eager" exist for tests alone
        self.mixed = False  # training in bf16: the backbone's products in bf16, whatever its adapters are stored in
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: a new head is reset by its maker, and weights that a checkpoint lacks are an error."""

    def hidden(self, packed: PackedTexts) -> Tensor:
        """(T, D): the decoder's last hidden states, behind its final norm."""
        if self.implementation != PACKED:
            texts = packed.ids_T.split(packed.lengths_N.tolist())
            return torch.cat([stock_hidden(self.backbone, ids, self.implementation) for ids in texts])
        with torch.autocast(packed.ids_T.device.type, torch.bfloat16, enabled=self.mixed):
            output = self.backbone(
                input_ids=packed.ids_T[None], position_ids=packed.position_T[None], packed=packed, use_cache=False
            )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def tokens(self, packed: PackedTexts) -> Tensor:
        """(T, D): what is pooled, in the head's own precision."""
        hidden_TD = self.hidden(packed)
        weight = next(self.head.parameters(), hidden_TD)
        outputs: Tensor = self.head(hidden_TD.to(weight.dtype), packed)
        return outputs

    def embed(self, packed: PackedTexts) -> Tensor:
        """(N, E) float32, unit length, in the order of `packed`."""
        return F.normalize(reduce(self.tokens(packed), packed, self.pooling.kind), dim=-1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pool_mask: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """Padded (N, L) in and out: unpads, runs packed, pads again; `pooler_output` (N, E) has unit length.

        Without a pool_mask every attended token is pooled, except BOS under the `offsets` rule.
        """
        attended_NL = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        pool_NL = self._default_pool(input_ids, attended_NL) if pool_mask is None else pool_mask.bool()
        rows = zip(input_ids, pool_NL, attended_NL, strict=True)
        texts = [TokenizedText(i[a].cpu().numpy(), p[a].cpu().numpy()) for i, p, a in rows]
        packed = pack(texts).to(input_ids.device)
        tokens_TD = self.tokens(packed)
        padded_NLD = tokens_TD.new_zeros(*input_ids.shape, tokens_TD.shape[-1])
        padded_NLD[attended_NL] = tokens_TD
        embedding_NE = F.normalize(reduce(tokens_TD, packed, self.pooling.kind), dim=-1)
        return BaseModelOutputWithPooling(last_hidden_state=padded_NLD, pooler_output=embedding_NE)

    def _default_pool(self, input_ids: Tensor, attended_NL: Tensor) -> Tensor:
        if self.contract.mask_rule == "count" or not self.contract.bos_ids:
            return attended_NL
        in_front_NL = attended_NL.cumsum(1) <= len(self.contract.bos_ids)
        return attended_NL & ~(in_front_NL & torch.isin(input_ids, input_ids.new_tensor(self.contract.bos_ids)))


AutoConfig.register("embedwright", EmbedwrightConfig)
AutoModel.register(EmbedwrightConfig, EmbedwrightModel)
