"""Proves that each faster block, and packed attention, gives the results of transformers' own code on the same input.

A few short texts go through the stock model, one at a time. Each faster block then gets the inputs of its stock block,
in one packed row, and must give the same output within a few units in the last place. Whole vectors could not tell a
fault from rounding. Gradients are compared for the first block of each kind and size.

T packed tokens, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedwright.cpu import int8
from embedwright.model.network import EmbedwrightModel
from embedwright.model.quantized import QuantizedLinear, has_quantized_layers, rotated
from embedwright.packing import PackedTexts, pack
from embedwright.text import TokenizedText

LENGTHS = (1, 7, 20)  # lengths of the texts at load, in tokens
LONGER = (1, 40, 150)  # for the doctor: more than a block of keys
# A weight's gradient is a sum over tokens, of which most may cancel: of adapters on keys in bfloat16, the stock one was
# seen 6.9 off the gradient in float32, and ours 0.8. So a row of such a gradient has this many times the room.
_CANCELS = 4.0
# How far an element may be off, in units in the last place of the largest of its row; and a row, in those of its
# length. Seen on a real model of thirty layers: 67 and 41 in float32, where sums come in another order; 5.1 and 2.2 in
# 16 bits, where a gated block rounds less often than the stock one.
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
        attends = attends or (name in names and hasattr(module, "self_attn"))  # a whole decoder layer
        if attends or name in names:
            blocks.append(Block(name, module, attends, [], [], packed))
    hooks = [block.module.register_forward_hook(_recorder(block), with_kwargs=True) for block in blocks]
    try:
        reference.token_states(packed)
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
            # a model that is quantised, or made in inference mode, can never be trained
            trains = not (torch.is_inference_mode_enabled() or has_quantized_layers(module))
            if fault is None and kind not in proven and trains:
                fault = _gradient_fault(block, module)
        except Exception as error:  # whatever a private operator of torch, or a kernel, does on this machine
            fault = f"fails: {type(error).__name__}: {error}"
        if fault is not None:
            return f"{block.name} ({type(block.module).__name__}) {fault}"
        proven.add(kind)
    return None


@torch.no_grad()
def _forward_fault(block: Block, module: nn.Module) -> str | None:
    faults: list[str] = []
    with int8.watched() as seen:
        found = _run(block, module, _states(block))
    with _rounded_alike(block, module, seen, faults):
        outputs = [_run(block, block.module, _states(block))] if seen else [_rows(x) for x in block.outputs]
    off = _off(found, torch.cat(outputs), _coarsest(block))
    faults += [] if off is None else [f"is {off:.0f} units in the last place off transformers' own"]
    return faults[0] if faults else None


@contextmanager
def _rounded_alike(block: Block, module: nn.Module, seen: int8.Seen, faults: list[str]) -> Iterator[None]:
    """Runs the block with each quantised stock layer fed the int8-rounded inputs that its fast form multiplied.

    So both forms are compared on equal inputs. `faults` collects what is wrong: the fast form rounded an input by more
    than half a step of int8; its input before rounding is not the stock block's, up to rounding (after attention, up to
    bfloat16's limits); or its product is not the stock layer's output, up to rounding.
    """

    def hooked(name: str, layer: QuantizedLinear) -> Iterator[Any]:
        made, out_TO = seen[module.get_submodule(name)]
        exact_TD, held_TD, at = _rows(made.exact), made.rows.codes_TD * made.rows.scale_T[:, None], slice(0, 0)
        off_TD = (held_TD - rotated(exact_TD.float(), layer.rotation)).abs()
        if not (off_TD <= 0.501 * made.rows.scale_T[:, None]).all():
            faults.append(f"rounds the inputs of {name or 'it'} by more than half a step of int8")
        back_TD = rotated(held_TD, layer.rotation)

        def before(_: nn.Module, args: tuple[Tensor]) -> Tensor:
            nonlocal at
            own_TD = _rows(args[0])
            at = slice(at.stop, at.stop + len(own_TD))
            if name.endswith("o_proj"):  # attention is in bfloat16
                wrong = _off(exact_TD[at], own_TD.to(exact_TD.dtype), exact_TD.dtype) is not None
            else:
                wrong = _differs(exact_TD[at], own_TD)
            if wrong:
                faults.append(f"has other inputs for {name or 'it'} than transformers' own")
            return back_TD[at].to(args[0].dtype).view_as(args[0])

        def after(_: nn.Module, __: Any, output: Tensor) -> None:
            if out_TO is not None and _differs(out_TO[at], _rows(output)):
                faults.append(f"has a product of int8, {name or 'itself'}, that is not that of the dequantised weights")

        yield layer.register_forward_pre_hook(before)
        yield layer.register_forward_hook(after)

    named = [(n, m) for n, m in block.module.named_modules() if isinstance(m, QuantizedLinear)]
    hooks = [hook for n, m in named if module.get_submodule(n) in seen for hook in hooked(n, m)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _differs(found: Tensor, expected: Tensor) -> bool:
    """Returns whether a number is further off than one rounding to the type of `found`, and float32's sums, allow."""
    expected = expected.float()
    sums = _LIMITS[torch.float32][0] * torch.finfo(torch.float32).eps * expected.abs().amax(-1, keepdim=True)
    room = torch.finfo(found.dtype).eps * expected.abs() + sums
    return not bool(((found - expected).abs() <= room).all())


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
