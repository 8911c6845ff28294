"""Proves that each faster block, and packed attention, gives the results of transformers' own code on the same input.

A few short texts go through the stock model, one at a time. Each faster block then gets the inputs of its stock block,
in one packed row, and must give the same output within a few units in the last place. Whole vectors could not tell a
fault from rounding. Gradients are compared for the first block of each kind and size.

T packed tokens, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedwright.model.network import EmbedwrightModel
from embedwright.packing import PackedTexts, pack
from embedwright.text import TokenizedText

LENGTHS = (1, 7, 20)  # lengths of the texts at load, in tokens
LONGER = (1, 40, 150)  # for the doctor: more than a block of keys
# How far an element may be off, in units in the last place of the largest of its row; and a row, in those of its
# length. Seen on a real model of thirty layers: 67 and 41 in float32, where sums come in another order; 5.1 and 2.2 in
# 16 bits, where a gated block rounds less often than the stock one.
# A weight's gradient is a sum over tokens, of which most may cancel: of adapters on keys in bfloat16, the stock one was
# seen 6.9 off the gradient in float32, and ours 0.8. So a row of such a gradient has this many times the room.
_CANCELS = 4.0
_LIMITS = {torch.float32: (256.0, 128.0), torch.bfloat16: (16.0, 6.0), torch.float16: (16.0, 6.0)}


@dataclass(frozen=True)
class Block:
    """A stock block with its inputs and outputs, one for each text. `attends`: the tokens of a text see each other."""

    name: str
    module: nn.Module
    attends: bool
    inputs: list[dict[str, Any]]
    outputs: list[Tensor]
    packed: PackedTexts


@torch.no_grad()
def recorded(reference: EmbedwrightModel, names: Collection[str], lengths: Sequence[int] = LENGTHS) -> list[Block]:
    """Runs the stock twin on random texts of these lengths. Returns its attention blocks, and the named blocks that are
    no part of another one."""
    random = np.random.default_rng(0)
    vocabulary, longest = reference.backbone.config.vocab_size, reference.longest
    ids = [random.integers(0, vocabulary, min(n, longest)) for n in lengths]
    packed = pack([TokenizedText(one, np.ones(len(one), dtype=bool)) for one in ids])
    packed = packed.to(next(reference.parameters()).device)
    blocks: list[Block] = []
    for name, module in reference.named_modules():
        if blocks and name.startswith(f"{blocks[-1].name}."):
            continue
        attends = hasattr(module, "layer_idx") and hasattr(module, "is_causal")
        if attends or name in names:
            blocks.append(Block(name, module, attends, [], [], packed))
    hooks = [block.module.register_forward_hook(_recorder(block), with_kwargs=True) for block in blocks]
    try:
        reference.tokens(packed)
    finally:
        for hook in hooks:
            hook.remove()
    return [block for block in blocks if block.inputs]


def _recorder(block: Block) -> Any:
    names = list(inspect.signature(block.module.forward).parameters)

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        block.inputs.append({**dict(zip(names, args, strict=False)), **kwargs})
        block.outputs.append(output[0] if isinstance(output, tuple) else output)

    return record


def first_fault(blocks: Sequence[Block], network: EmbedwrightModel) -> str | None:
    """Describes the first block of `network` that differs from its stock block; None if all agree."""
    layers = network.backbone.config.num_hidden_layers
    if (found := sum(block.attends for block in blocks)) != layers:
        return f"{found} attention blocks are known, of {layers} layers"
    proven = set()
    for block in blocks:
        module = network.get_submodule(block.name)
        kind = (type(block.module), *(p.shape for p in module.parameters()), *(p.dtype for p in module.parameters()))
        try:
            fault = _forward_fault(block, module)
            # a model that is made in inference mode can never be trained
            if fault is None and kind not in proven and not torch.is_inference_mode_enabled():
                fault = _gradient_fault(block, module)
        except Exception as error:  # whatever a private operator of torch, or a kernel, does on this machine
            fault = f"fails: {type(error).__name__}: {error}"
        if fault is not None:
            return f"{block.name} ({type(block.module).__name__}) {fault}"
        proven.add(kind)
    return None


@torch.no_grad()
def _forward_fault(block: Block, module: nn.Module) -> str | None:
    found, expected = _run(block, module, _states(block)), torch.cat([_rows(x) for x in block.outputs])
    off = _off(found, expected, _coarsest(block))
    return None if off is None else f"is {off:.0f} units in the last place off transformers' own"


def _gradient_fault(block: Block, module: nn.Module) -> str | None:
    """Compares the gradients of inputs and trainable weights, in the block's type and, for float32, under autocast."""
    trains = [p for p in module.parameters() if p.requires_grad and p.is_floating_point()]
    states = [x.detach() for x in _states(block)]
    mixed = [True] if block.attends and states[0].dtype == torch.float32 else []
    for autocast in (False, *mixed):
        gradients = []
        for one in (module, block.module):
            leaves = [x.clone().requires_grad_() for x in states]
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = _run(block, one, leaves)
                random = torch.Generator().manual_seed(0)
                upstream = torch.randn(out.shape, generator=random).to(out)
                gradients.append(torch.autograd.grad(out, [*leaves, *trains], upstream))
        for place, (found, expected) in enumerate(zip(*gradients, strict=True)):
            # as one row, because some rows hold nothing but rounding
            dtype, room = torch.bfloat16 if autocast else _coarsest(block), _CANCELS if place >= len(states) else 1.0
            off = _off(found.flatten(), expected.flatten(), dtype, room)
            if off is not None:
                return f"has a gradient that is {off:.0f} units in the last place off transformers' own"
    return None


def _coarsest(block: Block) -> torch.dtype:
    """Returns the coarsest type that the block computes in: float32 adapters may stand on 16-bit weights."""
    types = {x.dtype for x in (*block.outputs, *block.module.parameters()) if x.dtype in _LIMITS}
    return max(types, key=lambda dtype: torch.finfo(dtype).eps)


def _states(block: Block) -> list[Tensor]:
    """Returns each text's input: hidden states (1, T, D), or rows (T, D) for a block that mixes no tokens."""
    if block.attends:
        return [inputs["hidden_states"] for inputs in block.inputs]
    return [_rows(next(iter(inputs.values()))) for inputs in block.inputs]


def _run(block: Block, module: nn.Module, states: list[Tensor]) -> Tensor:
    """Runs a module on the inputs -> (T, D). A stock attention block gets one text at a time, others one packed row."""
    if not block.attends:
        return _rows(module(torch.cat(states)))
    if module is block.module:
        calls = [inputs | {"hidden_states": x} for inputs, x in zip(block.inputs, states, strict=True)]
    else:
        together = {name: _together([i.get(name) for i in block.inputs], block.packed) for name in block.inputs[0]}
        calls = [together | {"hidden_states": torch.cat(states, 1), "attention_mask": None, "packed": block.packed}]
    return torch.cat([_rows(module(**call)[0]) for call in calls])


def _together(values: list[Any], packed: PackedTexts) -> Any:
    """Joins one argument of all texts into that of one packed row. Only values with a row per token are joined."""
    if isinstance(values[0], tuple):
        return tuple(_together(list(parts), packed) for parts in zip(*values, strict=True))
    if not isinstance(values[0], Tensor):
        return values[0]
    dim = min(1, values[0].dim() - 1)
    by_token = [x.shape[dim] for x in values] == packed.lengths_N.tolist()
    return torch.cat(values, dim) if by_token else values[0]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _off(found: Tensor, expected: Tensor, dtype: torch.dtype, room: float = 1.0) -> float | None:
    """Returns the largest difference, in units in the last place of its row's largest element; None within limits."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    apart, size = (found.float() - expected.float()), expected.float()
    unit, tiny = torch.finfo(dtype).eps, torch.finfo(torch.float32).tiny
    element = float((apart.abs().amax(-1) / size.abs().amax(-1).clamp_min(tiny)).max() / unit)
    row = float((apart.norm(dim=-1) / size.norm(dim=-1).clamp_min(tiny)).max() / unit)
    most, of_row = _LIMITS[dtype]
    return None if element <= room * most and row <= room * of_row else element  # NaN exceeds every limit
