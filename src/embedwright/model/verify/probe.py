"""Proves that a model attends as its config says and that texts of a batch do not see each other, by running it.

Cheap enough for every time that a model is made, loaded, merged or exported: it runs four texts of a few tokens, and
reads each layer's attention mask out of the attention function itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedwright.model.attention import packed_attention
from embedwright.model.backbone import KEEPS_WINDOWS, positions
from embedwright.model.network import EmbedwrightModel
from embedwright.model.verify.modes import evaluating
from embedwright.packing import PackedTexts, pack
from embedwright.text import TokenizedText

LENGTH = 24
# A mask is read at this length, or just beyond the widest window that a layer names, up to the bound.
_MASK_LENGTH, _WIDEST = 64, 8192
_MATE = 3  # tokens of the text beside the one whose mask is read


class ProbeError(RuntimeError):
    """The model does not do what its config says, so none of its vectors can be trusted."""


@dataclass(frozen=True)
class Probe:
    """What the probe has measured: relative changes of hidden states, and masks that are not as configured."""

    later_token: float  # largest of an earlier token, when the last token changes: 0 if causal
    # Mean over a text's tokens, when other texts stand beside it: 0 up to rounding, which in 16 bits can move a single
    # token with an outsized state by a seventh of its length.
    batch_mates: float
    tolerance: float
    # The same, beside a text that is said to stand at the last positions that the model reads: frequencies that go by
    # the longest text of a batch show here.
    far_mates: float
    wrong_masks: tuple[str, ...]  # one line for each layer that sees too little or too much


@torch.no_grad()
def probe(network: EmbedwrightModel, mask_length: int = _MASK_LENGTH) -> Probe:
    """Runs the network, adapters included, on random tokens, and restores the mode of each module.

    Every layer's mask is read at `mask_length` tokens: a wider window that is named nowhere stays unseen.
    """
    with evaluating(network):
        vocabulary, length = network.backbone.config.vocab_size, min(LENGTH, network.longest)
        random = np.random.default_rng(0)
        text = random.integers(0, vocabulary, length)
        changed = text.copy()
        changed[-1] = (changed[-1] + 1 + random.integers(0, vocabulary - 1)) % vocabulary
        mates = [random.integers(0, vocabulary, n) for n in (length, 7)]
        calls: list[Call] = []
        alone_LD = _states(network, [text], calls)
        later_L = _changes(_states(network, [changed])[:-1], alone_LD[:-1])
        mixed_LD = _states(network, [mates[0], text, mates[1]])[length : 2 * length]
        mates_L = _changes(mixed_LD, alone_LD)
        reach = min(network.contract.max_tokens, positions(network.backbone.config), network.longest)
        far_LD = _states(network, [text, text[:_MATE]], further=max(reach - _MATE, 0))[:length]
        far_L = _changes(far_LD, alone_LD)
        tolerance = 1e-4 if alone_LD.dtype == torch.float32 else 0.1
        wrong = tuple(_wrong_masks(network, calls, mask_length))
        return Probe(float(later_L.max()), float(mates_L.mean()), tolerance, float(far_L.mean()), wrong)


def check(network: EmbedwrightModel) -> Probe:
    """Runs the probe. Raises ProbeError if the network is not what its config says, or has adapters that are not
    active.
    """
    if faults := lora_faults(network.backbone):
        raise ProbeError(faults[0])
    seen, causal = probe(network), network.backbone.config.is_causal
    if not causal and not seen.later_token > seen.tolerance:
        raise ProbeError(
            "attention is causal, or training has collapsed (try a lower rate): a changed last token moves earlier "
            f"states by only {seen.later_token:.1e}"
        )
    if causal and seen.later_token > seen.tolerance:
        raise ProbeError(f"attention is not causal: a later token changes earlier states ({seen.later_token:.1e})")
    if not seen.batch_mates <= seen.tolerance:
        raise ProbeError(f"texts in one batch leak into each other: states change by {seen.batch_mates:.1e}")
    if not seen.far_mates <= seen.tolerance:
        raise ProbeError(f"a long text changes the states of others in its batch, by {seen.far_mates:.1e}")
    if seen.wrong_masks:
        raise ProbeError(f"attention masks are not as configured: {'; '.join(seen.wrong_masks[:3])}")
    return seen


def lora_faults(backbone: nn.Module) -> list[str]:
    """Names each LoRA adapter that is not active: switched off, not chosen, or merged and still there."""
    if not any("lora_" in name for name, _ in backbone.named_parameters()):
        return []
    from peft.tuners.lora import LoraLayer

    faults = []
    for name, layer in backbone.named_modules():
        if isinstance(layer, LoraLayer):
            idle = layer.r.keys() - set(layer.active_adapters)
            if layer.merged:
                faults.append(f"the LoRA adapter of {name} is merged into the weights already, and still there")
            elif layer.disable_adapters:
                faults.append(f"the LoRA adapter of {name} is switched off")
            elif idle:
                faults.append(f"the LoRA adapter of {name} is not chosen ({', '.join(sorted(idle))})")
    return faults


def _states(network: EmbedwrightModel, texts: list[Any], calls: list[Call] | None = None, further: int = 0) -> Tensor:
    """Returns the hidden states of texts in one batch. Positions after the first text are shifted by `further`."""
    packed = replace(_packed(texts), calls=calls)
    packed.position_T[len(texts[0]) :] += further
    return network.hidden(packed.to(next(network.parameters()).device))


def _packed(texts: list[Any]) -> PackedTexts:
    return pack([TokenizedText(ids, np.ones(len(ids), dtype=bool)) for ids in texts])


def _changes(a_LD: Tensor, b_LD: Tensor) -> Tensor:
    """Returns (L,): how far each token's state moved, relative to the mean length of the states."""
    moved_L, length_L = (torch.linalg.vector_norm(x_LD.float(), dim=-1) for x_LD in (a_LD - b_LD, b_LD))
    in_units_L: Tensor = moved_L / length_L.mean()
    return in_units_L


# ---- masks, read out


Call = tuple[Any, dict[str, Any]]  # one call of packed attention: the layer's module, its keyword arguments


def _wrong_masks(network: EmbedwrightModel, calls: list[Call], length: int) -> Iterator[str]:
    """Compares each layer's mask at the first and last token with the config; yields a line for each fault."""
    config = network.backbone.config
    if len(calls) != config.num_hidden_layers:
        yield f"{len(calls)} of {config.num_hidden_layers} layers run through the packed attention"
    for index, (module, kwargs) in enumerate(calls):
        named = [w for w in (kwargs.get("sliding_window"), getattr(config, "sliding_window", None)) if w]
        tokens = max([length, *(w + 2 for w in named if w <= _WIDEST)])
        expected_L2 = expected_mask(config, index, tokens)
        seen_L2, leaks = _read_mask(module, kwargs, tokens, next(network.parameters()))
        if leaks:
            yield f"layer {index} sees another text"
        elif not torch.equal(seen_L2, expected_L2):
            row = int((seen_L2 != expected_L2).any(1).nonzero()[0])
            sees = "does not see" if (expected_L2 & ~seen_L2)[row].any() else "sees"
            end = "first" if seen_L2[row, 0] != expected_L2[row, 0] else "last"
            yield f"layer {index}: token {row} of {tokens} {sees} the {end} token"


def expected_mask(config: Any, layer: int, length: int) -> Tensor:
    """Returns bool (L, 2): whether each token of a text should see the first and the last token, by the config alone.

    Windows are those of transformers' sdpa masks: |i-j| <= w in both directions, i-j < w when causal.
    """
    types = getattr(config, "layer_types", None)
    window = None if types and types[layer] == "full_attention" else getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    if not config.is_causal and config.model_type not in KEEPS_WINDOWS:
        window = None
    position_L = torch.arange(length)
    distance_L2 = position_L[:, None] - torch.tensor([0, length - 1])  # how many tokens the query is after the key
    if config.is_causal:
        return (distance_L2 >= 0) & (distance_L2 < (window or length))
    return distance_L2.abs() <= (window or length)


def _read_mask(module: Any, kwargs: dict[str, Any], length: int, like: Tensor) -> tuple[Tensor, bool]:
    """Returns bool (L, 2), which tokens see the first and the last; and whether they see the text beside theirs.

    With queries of zero every visible token gets the same weight, so values that mark single tokens show the mask.
    """
    width = 16
    packed = _packed([np.zeros(length, dtype=np.int64), np.zeros(_MATE, dtype=np.int64)]).to(like.device)
    query = torch.zeros(1, 1, length + _MATE, width, device=like.device, dtype=like.dtype)
    marks = query.clone()
    marks[..., 0, 0] = marks[..., length - 1, 1] = marks[..., length:, 2] = 1.0
    output, _ = packed_attention(module, query, query, marks, None, packed=packed, **kwargs)
    seen = output[0, :length, 0, :3].cpu() > 0
    return seen[:, :2], bool(seen[:, 2].any())
