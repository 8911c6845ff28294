"""The computation of a model as one ONNX graph: padded ids and masks in, unit vectors out.

N texts, L longest, D hidden, E embedding (= D), H heads, d head dim.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from embedwright.cpu.accelerate import stock
from embedwright.errors import as_input_error
from embedwright.host import unwarned
from embedwright.model.network import EmbedwrightModel
from embedwright.model.pooling import FoldedLatent, LatentPooling, SelfPooling

INPUTS = ("input_ids", "attention_mask", "pool_mask")
VECTORS = "sentence_embedding"
OUTPUTS = (VECTORS, "last_hidden_state")  # FastEmbed reads the first, optimum the second by its name
BY_RULE = -1  # in the pool mask: pooled if the contract's rule for texts without a prefix pools it
INLINE = 2**30  # bytes of weights in the graph's own file: protobuf ends at two of these


class Graph(nn.Module):
    """Decoder and head of a stock network, on padded texts. What it returns is what `EmbedwrightModel.forward` does."""

    def __init__(self, twin: EmbedwrightModel) -> None:
        super().__init__()
        self.network = twin

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor) -> tuple[Tensor, Tensor]:
        attended_NL = attention_mask > 0
        place_NL = attended_NL.cumsum(1)  # positions of a text's tokens, from 1: pads may stand on either side
        count_N1 = attended_NL.sum(1, keepdim=True)
        hidden_NLD = self.network.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(place_NL - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        states_NLD = self._states(hidden_NLD, attended_NL)
        if self.network.pooling.kind == "last":
            pooled_NL = attended_NL & (place_NL == count_N1)
        else:
            by_rule_NL = self.network.default_pool(input_ids, attended_NL)
            pooled_NL = attended_NL & ((pool_mask > 0) | ((pool_mask < 0) & by_rule_NL))
        # scaled so that their mean over the attended tokens is the vector before normalisation
        scale_N1 = count_N1.float() / pooled_NL.sum(1, keepdim=True)
        states_NLD = torch.where(pooled_NL[..., None], states_NLD * scale_N1[..., None], 0.0)
        return F.normalize(states_NLD.sum(1), dim=-1), states_NLD

    def _states(self, hidden_NLD: Tensor, attended_NL: Tensor) -> Tensor:
        head: Any = self.network.head
        if not isinstance(head, SelfPooling):
            states_NLD: Tensor = head(hidden_NLD, None)  # token by token
            return states_NLD
        keys_NHLd, values_NHLd = head.attention.keys_values(hidden_NLD)
        mixed_NHLd = F.scaled_dot_product_attention(
            head.attention.queries(hidden_NLD), keys_NHLd, values_NHLd, attn_mask=attended_NL[:, None, None, :]
        )
        states_NLD = hidden_NLD + head.attention.to_out(mixed_NHLd.transpose(1, 2).flatten(2))
        out: Tensor = head.feed_forward(states_NLD)
        return out


def trace(network: EmbedwrightModel) -> Any:
    """Returns the graph as an `onnx_ir` model: any number of texts of any length, in float32.

    Its pool mask need not be given: by default the contract's rule for texts without a prefix decides. The latent block
    is in its folded form. Raises InputError if torch cannot trace the decoder.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # no size is 0 or 1, which torch would take for constants
    ids_NL = torch.arange(14).reshape(2, 7)
    attended_NL = torch.ones_like(ids_NL).tril(4)
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    # it warns of its own parts, and of torchvision's operators where that is not installed
    with stock(network) as twin, torch.no_grad(), unwarned("torch.onnx"):
        if isinstance(twin.head, LatentPooling):
            twin.head = FoldedLatent(copy.deepcopy(twin.head))  # a folded block freezes the weights that it shares
        with as_input_error(f"a {twin.backbone.config.model_type!r} decoder", "cannot be traced as an ONNX graph"):
            program = torch.onnx.export(
                Graph(twin).eval(),
                (ids_NL, attended_NL, attended_NL.clone()),  # one tensor given twice would become one input
                input_names=INPUTS,
                output_names=OUTPUTS,
                dynamic_shapes=({0: "batch", 1: "sequence"}, free, free),
                dynamo=True,
                verbose=False,
            )
    assert program is not None
    model = program.model
    ClearMetadataAndDocStringPass()(model)  # it names the files of this machine
    _make_optional(model.graph)
    model.producer_name = "embedwright"
    return model


def _make_optional(graph: Any) -> None:
    """Gives the pool mask a value of its own, which makes an input optional: one number, spread over all tokens."""
    import onnx_ir

    ids, _, old = graph.inputs
    mask = onnx_ir.val(INPUTS[2], old.dtype, ["pool_batch", "pool_sequence"])
    mask.const_value = onnx_ir.tensor(np.full((1, 1), BY_RULE, np.int64), name=mask.name)
    shape = onnx_ir.node("Shape", [ids])
    spread = onnx_ir.node("Expand", [mask, *shape.outputs])
    old.replace_all_uses_with(spread.outputs[0])
    spread.outputs[0].type, spread.outputs[0].shape = old.type, old.shape
    graph.inputs[2] = mask
    graph.register_initializer(mask)
    graph.insert_before(graph[0], [shape, spread])


def write(model: Any, file: Path) -> None:
    """Writes an `onnx_ir` model; large weights go into `model.onnx_data` beside it, where optimum looks for them."""
    import onnx_ir

    bytes_ = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    onnx_ir.save(model, file, external_data=f"{file.name}_data" if bytes_ > INLINE else None)
