"""Removes channels of the gated blocks. All layers keep equally many, so that the config stays a stock one.

`wanda` scores a channel by the sum of |weight| times the channel's norm over the tokens, for the weights that read it
(Sun et al., arXiv 2306.11695; summed over a channel as in FLAP's Wanda-sp, arXiv 2312.11983). `magnitude` sums |weight|
over all weights that write or read it, without any text. T packed tokens, D hidden, I channels, K kept ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from embedwright.compress.chain import Step, save_step
from embedwright.compress.states import Texts, inputs_of, layers_of, runs
from embedwright.errors import InputError, check_choice
from embedwright.model.embedder import Embedder
from embedwright.model.network import EmbedwrightModel
from embedwright.model.verify import selftest
from embedwright.model.verify.modes import evaluating

By = Literal["magnitude", "wanda"]
MULTIPLE = 32  # of channels: kernels and groups of 4-bit weights want it

# How far a unit vector may move when channels are removed that were set to zero before: by rounding alone.
_FLOAT32, _16_BITS = 1e-4, 0.1


class Gated(NamedTuple):
    """A gated block. `up` has the linear layers that write the channels: gate and up, or one that holds both."""

    block: Any
    up: tuple[nn.Linear, ...]
    down: nn.Linear


def width_step(share: float, by: By, texts: Texts) -> Step:
    """Returns the step that keeps a share of the channels. It measures in float32 and cuts weights as stored."""
    check_choice("by", by, get_args(By))
    described = {"texts": texts.described} if by == "wanda" else {}

    def make(source: str, out: Path) -> None:
        kept = choose(Embedder.load(source, dtype="float32"), texts.read() if described else (), share, by)
        model = Embedder.load(source)
        before = model.network.backbone.config.intermediate_size
        cut_channels(model, kept)
        save_step(model, source, out, "width", kept=f"{len(kept[0])} of {before} channels a layer", by=by, **described)

    return Step("width", {"share": share, "by": by, **described}, make)


def gated_blocks(network: EmbedwrightModel) -> list[Gated]:
    """Finds the gated block of each layer. Raises InputError, with the layer, where there is none or no plain one."""
    backbone: Any = network.backbone
    width: Any = getattr(backbone.config, "intermediate_size", None)
    found = []
    for number, layer in enumerate(layers_of(backbone), start=1):
        blocks = [module for module in layer.modules() if hasattr(module, "down_proj")]
        block: Any = blocks[0] if len(blocks) == 1 else None
        names = ("gate_up_proj",) if hasattr(block, "gate_up_proj") else ("gate_proj", "up_proj")
        up: Any = tuple(getattr(block, name, None) for name in names)
        down = getattr(block, "down_proj", None)
        sizes = [part.out_features * len(up) for part in up if isinstance(part, nn.Linear)]
        if not width or sizes != [2 * width] * len(up) or not isinstance(down, nn.Linear) or down.in_features != width:
            raise InputError(
                f"layer {number} of this {backbone.config.model_type!r} model has no gated block of linear layers "
                f"(gate_proj, up_proj, down_proj) with {width} channels: its width cannot be pruned"
            )
        found.append(Gated(block, up, down))
    return found


def channels(width: int, share: float) -> int:
    """Returns how many of `width` channels a share leaves, in whole groups of 32. InputError if that is none or all."""
    keep = round(share * width / MULTIPLE) * MULTIPLE if 0 < share < 1 else 0
    if not 0 < keep < width:
        raise InputError(
            f"--width {share}: that is {keep} of {width} channels, in groups of {MULTIPLE}: give a share of 0 to 1 "
            "that leaves some, and not all"
        )
    return keep


def choose(model: Embedder, texts: Sequence[str], share: float, by: By) -> list[Tensor]:
    """Chooses the channels that each layer keeps, in their order: those with the highest scores."""
    keep = channels(model.network.backbone.config.intermediate_size, share)
    return [score.topk(keep).indices.sort().values for score in scores(model, texts, by)]


@torch.no_grad()
def scores(model: Embedder, texts: Sequence[str], by: By) -> list[Tensor]:
    """Returns the score of each channel (I,) for each layer. `magnitude` reads no texts."""
    check_choice("by", by, get_args(By))
    blocks = gated_blocks(model.network)
    if by == "magnitude":
        parts = [[*(_rows(part, len(block.up)) for part in block.up), block.down.weight.t()] for block in blocks]
        return [torch.stack([rows.abs().double().sum(1) for rows in part]).sum(0) for part in parts]
    squares = [torch.zeros(block.down.in_features, dtype=torch.float64, device=model.device) for block in blocks]
    with inputs_of([block.down for block in blocks]) as seen:
        for packed in runs(model, texts):
            for square, states_TI in zip(squares, seen, strict=True):
                square += states_TI[packed.pool_mask_T].double().square().sum(0)
    return [
        block.down.weight.abs().double().sum(0) * square.sqrt() for block, square in zip(blocks, squares, strict=True)
    ]


def _rows(up: nn.Linear, parts: int) -> Tensor:
    """Returns the weights of `up` with one row a channel: where it holds both, a channel's two rows side by side."""
    weight = up.weight
    return weight if parts == 2 else torch.cat(weight.chunk(2), dim=1)


@torch.no_grad()
def cut_channels(model: Embedder, kept: Sequence[Tensor]) -> None:
    """Removes all channels but those of `kept`, in place.

    First the channels that go are set to zero: their removal must then change no vector. Raises RuntimeError if it
    does, which an unknown layout of a block would; that model is lost.
    """
    network, backbone = model.network, model.network.backbone
    blocks = gated_blocks(network)
    texts = model.tokenize([text for text, _ in selftest.TEXTS]).to(model.device)
    for block, kept_K in zip(blocks, kept, strict=True):
        gone = torch.ones(block.down.in_features, dtype=torch.bool, device=model.device)
        gone[kept_K] = False
        block.down.weight[:, gone] = 0
    with evaluating(network):
        before_NE = network.embed(texts)
        for block, kept_K in zip(blocks, kept, strict=True):
            _narrow(block, kept_K.to(model.device))
        backbone.config.intermediate_size = len(kept[0])
        moved = float((network.embed(texts) - before_NE).norm(dim=-1).max())
    if not moved <= (_FLOAT32 if backbone.dtype == torch.float32 else _16_BITS):
        raise RuntimeError(f"removing channels of zeros moved vectors by {moved:.1e}: this model is lost")


def _narrow(block: Gated, kept_K: Tensor) -> None:
    width = block.down.in_features
    both = kept_K if len(block.up) == 2 else torch.cat([kept_K, kept_K + width])
    for part in block.up:
        part.weight = _only(part.weight, both)
        part.bias = None if part.bias is None else _only(part.bias, both)
        part.out_features = len(both)
    block.down.weight = _only(block.down.weight, kept_K, dim=1)
    block.down.in_features = len(kept_K)
    if hasattr(block.block, "intermediate_size"):
        block.block.intermediate_size = len(kept_K)


def _only(weight: Tensor, kept: Tensor, dim: int = 0) -> nn.Parameter:
    return nn.Parameter(weight.data.index_select(dim, kept).contiguous(), requires_grad=weight.requires_grad)
