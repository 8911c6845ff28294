"""The loss of masked next-token prediction: LLM2Vec, arXiv 2404.05961, section 2.2.

The token masked at position i is predicted from the state at position i - 1, as the decoder was trained to predict the
next token. The head is the stock one of the decoder's language model, applied at these positions alone.

T packed tokens, M masked ones, D hidden, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from embedwright.config import ConfigError
from embedwright.cpu.accelerate import accelerate_unproven
from embedwright.model.formats.base import resolve_base
from embedwright.model.formats.folder import weights_in
from embedwright.model.network import EmbedwrightModel
from embedwright.model.verify.modes import evaluating
from embedwright.packing import batches, moved, pack
from embedwright.processes import Processes
from embedwright.training.masked.batch import MaskedBatch, MaskedText
from embedwright.training.parts import ModelPart


class _Given(nn.Module):
    """Stands in for the decoder below a head: it returns the states that it is given."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


def language_head(network: EmbedwrightModel, spec: ModelPart) -> Any:
    """Returns the stock language model of this decoder without the decoder: states in, logits out.

    Its weight is the decoder's embedding where the two are tied, and trains with it. Else it is read from the folder of
    `model.base`, and stays as it is. Raises ConfigError where that folder has none, as for an embedder of `model.from`.
    """
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(network.backbone.config, trust_remote_code=False)
    output, embedding = whole.get_output_embeddings(), network.backbone.get_input_embeddings().weight
    tied = output.weight is whole.get_input_embeddings().weight
    setattr(whole, whole.base_model_prefix, _Given())
    if tied:
        output.weight = embedding
    needed = [name for name, parameter in whole.named_parameters() if parameter.device.type == "meta"]
    stored = weights_in(Path(resolve_base(spec.base))) if needed and spec.base else {}
    if lacking := [name for name in needed if name not in stored]:
        raise ConfigError(
            f"a stage of kind: mntp needs the language-model head of {spec.name}, and {lacking[0]} is not stored there"
            + ("" if spec.base else ": embedders keep none, so run this phase on the decoder itself (model.base)")
        )
    read = {name: stored[name].read().to(embedding.device, embedding.dtype) for name in needed}
    whole.load_state_dict(read, assign=True, strict=False)
    for name, parameter in whole.named_parameters():
        if name in read:
            parameter.requires_grad_(False)
    if network.mixed and embedding.device.type == "cpu":
        accelerate_unproven(whole)  # processors that cannot multiply bfloat16 would take ten times as long for it
    return whole.eval()


def accumulate(
    network: EmbedwrightModel,
    head: Any,
    batch: MaskedBatch,
    processes: Processes,
    *,
    batch_tokens: int,
    seed: int,
) -> tuple[float, int]:
    """Adds the gradient of the batch's loss, the mean over its masked tokens. Returns the loss and the tokens read.

    Micro-batches have at most `batch_tokens`; a longer text is one of its own. Each process takes its own texts, and
    the gradients of all are added up.
    """
    sizes = [len(text.tokens.ids) for text in batch.texts]
    masked = max(processes.all_sum(sum(len(text.positions) for text in batch.texts)), 1)
    sums = list[Tensor]()
    for i, group in enumerate(batches(sizes, batch_tokens)):
        torch.manual_seed(seed + 1_000_003 * processes.rank + i)
        summed, _ = masked_loss(network, head, [batch.texts[j] for j in group])
        (summed / masked).backward()
        sums.append(summed.detach())
    loss = sum(summed / masked for summed in torch.stack(sums).tolist()) if sums else 0.0  # a GPU waits once
    processes.all_reduce_gradients(parameter for parameter in network.backbone.parameters() if parameter.requires_grad)
    return processes.all_sum(loss), int(processes.all_sum(sum(sizes)))


def measure(
    network: EmbedwrightModel, head: Any, texts: Sequence[MaskedText], processes: Processes, batch_tokens: int
) -> dict[str, float]:
    """Returns the number of masked tokens of all processes, their mean loss, and the accuracy on them."""
    loss = correct = 0.0
    with evaluating(network), torch.no_grad():
        for group in batches([len(text.tokens.ids) for text in texts], batch_tokens):
            summed, hits = masked_loss(network, head, [texts[i] for i in group])
            loss, correct = loss + float(summed), correct + float(hits)
    count = processes.all_sum(sum(len(text.positions) for text in texts))
    return {
        "masked": int(count),
        "loss": processes.all_sum(loss) / max(count, 1),
        "accuracy": processes.all_sum(correct) / max(count, 1),
    }


def masked_loss(network: EmbedwrightModel, head: Any, texts: Sequence[MaskedText]) -> tuple[Tensor, Tensor]:
    """Returns the summed cross-entropy of the masked tokens of these texts, in float32, and how many are predicted
    correctly.
    """
    device = network.backbone.device
    packed = pack([text.tokens for text in texts]).to(device)
    starts = np.cumsum([0, *(len(text.tokens.ids) for text in texts)])
    before = [text.positions + start - 1 for text, start in zip(texts, starts, strict=False)]
    before_M, target_M = (
        moved(torch.from_numpy(np.concatenate(parts)), device) for parts in (before, [text.targets for text in texts])
    )
    hidden_MD = network.hidden(packed)[before_M]
    with torch.autocast(device.type, torch.bfloat16, enabled=network.mixed):
        logits_MV = head(inputs_embeds=hidden_MD[None]).logits[0].float()
    return F.cross_entropy(logits_MV, target_M, reduction="sum"), (logits_MV.argmax(-1) == target_M).sum()
