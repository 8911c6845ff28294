"""Removes the decoder layers that change states least on calibration texts, and their entries in the config.

`angular` removes the block of neighbouring layers whose output is nearest to its input (Gromov et al., arXiv
2403.17887). `influence` removes the layers that change the states least, one by one (ShortGPT, arXiv 2403.03853). Both
compare states of the tokens that the pooling reads, where those papers take the last token and all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import nn

from embedwright.compress.chain import Step, save_step
from embedwright.compress.states import Texts, layer_states, layers_of
from embedwright.errors import InputError, check_choice
from embedwright.model.embedder import Embedder
from embedwright.model.network import EmbedwrightModel

By = Literal["angular", "influence"]


class Choice(NamedTuple):
    """The layers to remove, counted from 0, and their distance: of the block, or the largest of single layers."""

    removed: list[int]
    distance: float


def layers_step(keep: int, by: By, texts: Texts) -> Step:
    """Returns the step that keeps `keep` layers. It measures in float32 and cuts the weights as they are stored."""
    check_choice("by", by, get_args(By))

    def make(source: str, out: Path) -> None:
        removed, distance = choose(Embedder.load(source, dtype="float32"), texts.read(), keep, by)
        model = Embedder.load(source)
        count = len(layers_of(model.network.backbone))
        cut_layers(model.network, removed)
        named = ", ".join(str(layer + 1) for layer in removed)
        did = {"kept": f"{keep} of {count}", "removed": named, "by": by}
        save_step(model, source, out, "layers", **did, distance=round(distance, 6), texts=texts.described)

    return Step("layers", {"keep": keep, "by": by, "texts": texts.described}, make)


def check_kept(option: str, keep: int, count: int) -> None:
    """Raises InputError, which names the option, unless `keep` of `count` layers are some and not all."""
    if not 0 < keep < count:
        raise InputError(f"{option} {keep}: the model has {count} layers; keep at least 1 and at most {count - 1}")


def choose(model: Embedder, texts: Sequence[str], keep: int, by: By) -> Choice:
    """Chooses the layers without which `keep` are left. Raises InputError if that is none or all of them."""
    count = len(layers_of(model.network.backbone))
    check_kept("--layers", keep, count)
    less = count - keep
    if by == "angular":
        found = distances(model, texts, less, by)
        start = found.index(min(found))
        return Choice([*range(start, start + less)], found[start])
    found = distances(model, texts, 1, by)
    removed = sorted(range(count), key=lambda layer: found[layer])[:less]
    return Choice(sorted(removed), max(found[layer] for layer in removed))


def distances(model: Embedder, texts: Sequence[str], span: int, by: By) -> list[float]:
    """Returns how far `span` layers move a token's state, for each first layer, in the mean over tokens.

    `angular` is the angle in units of pi, `influence` is 1 - cosine.
    """
    check_choice("by", by, get_args(By))
    total, tokens = [0.0] * (len(layers_of(model.network.backbone)) - span + 1), 0
    for states in layer_states(model, texts):
        for start in range(len(total)):
            cosine = F.cosine_similarity(states[start].double(), states[start + span].double(), dim=-1).clamp(-1, 1)
            total[start] += float((torch.arccos(cosine) / math.pi if by == "angular" else 1 - cosine).sum())
        tokens += len(states[0])
    return [value / tokens for value in total]


def cut_layers(network: EmbedwrightModel, removed: Sequence[int]) -> None:
    """Removes layers, in place, and what the config says of them. The rest keep their order."""
    backbone: Any = network.backbone
    config, layers = backbone.config, layers_of(backbone)
    kept = [layer for layer in range(len(layers)) if layer not in removed]
    config.num_hidden_layers = len(kept)
    for key, values in list(vars(config).items()):  # lists of one value a layer, such as layer_types
        if "layer" in key and isinstance(values, list) and len(values) == len(layers):
            setattr(config, key, [values[layer] for layer in kept])
    backbone.layers = nn.ModuleList([layers[layer] for layer in kept])
    for number, layer in enumerate(backbone.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
