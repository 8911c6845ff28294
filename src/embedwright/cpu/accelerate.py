"""Switches between stock and fast: `accelerate(network)` puts faster forms in, `stock(network)` runs without them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from embedwright.cpu import kernels, onednn, proof
from embedwright.cpu.attention import FAST, attention, norm
from embedwright.cpu.guards import stock_functions
from embedwright.cpu.int8 import Int8Linear
from embedwright.cpu.linears import OneDnnLinear, gated
from embedwright.model.attention import PACKED
from embedwright.model.network import EmbedwrightModel
from embedwright.model.quantized import QuantizedLinear
from embedwright.model.verify.modes import evaluating
from embedwright.model.verify.probe import ProbeError

logger = logging.getLogger(__name__)

# The families of transformers whose blocks we know: which of them, whether one is added to the weights of the norms,
# and where an attention block has its window.
_FAMILIES: dict[str, tuple[tuple[str, ...], bool, str | None]] = {
    "llama": (("RMSNorm", "Attention", "MLP"), False, None),
    "mistral": (("RMSNorm", "Attention", "MLP"), False, "config"),
    "qwen2": (("RMSNorm", "Attention", "MLP"), False, "self"),
    "qwen3": (("RMSNorm", "Attention", "MLP"), False, "self"),
    "phi3": (("RMSNorm",), False, None),
    "gemma": (("RMSNorm", "Attention", "MLP"), True, None),
    "gemma3": (("RMSNorm", "Attention", "MLP"), True, "self"),
}


def accelerate(network: EmbedwrightModel) -> None:
    """Puts the faster forms into a network on a CPU, in place, after proving that they give the stock results.

    Every block that changes, and every packed attention block, gets the input of the stock run and must give the stock
    output (`proof`). If one differs, the whole network stays stock and a warning is logged. `network.cpu_fault` keeps
    the reason for the doctor. Raises ProbeError if packed attention differs even without faster forms.
    """
    with stock(network) as reference, evaluating(network):
        accelerate_unproven(network)
        blocks = proof.recorded(reference, accelerated(network))
        network.cpu_fault = proof.first_fault(blocks, network)
        if network.cpu_fault is None:
            return
        restore(network)
        if found := proof.first_fault(blocks, network):
            raise ProbeError(f"packed attention is not the stock model's: {found}")
    logger.warning("the fast path on this CPU is off for this model: %s", network.cpu_fault)


def fault(network: EmbedwrightModel, lengths: Sequence[int] = proof.LONGER) -> str | None:
    """Returns the fault that `accelerate` found, or that a new proof finds now. None if all is right."""
    if network.cpu_fault is not None:
        return f"off: {network.cpu_fault}"
    with stock(network) as reference, evaluating(network):
        return proof.first_fault(proof.recorded(reference, accelerated(network), lengths), network)


def accelerated(network: nn.Module) -> list[str]:
    """Lists the names of the modules that run in a faster form."""
    return [name for name, module in network.named_modules() if "stock_class" in vars(type(module))]


@contextmanager
def stock(network: EmbedwrightModel) -> Iterator[EmbedwrightModel]:
    """Yields a twin of the network that runs transformers' own code on the same weights.

    Every module of the twin has its stock class, and attention is `sdpa`, one text at a time. The twin has its own
    config, modes (evaluation) and hooks, so the network itself may go on encoding in other threads. References and
    exports run on the twin, because a tracer sees every step of it.
    """
    memo: dict[int, Any] = {id(thing): thing for thing in (*network.parameters(), *network.buffers(), network.origin)}
    for module in network.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                memo[id(value)] = value
            elif "_hooks" in name and isinstance(value, dict):  # the twin gets its own dict of the same hooks
                memo[id(value)] = copy.copy(value)
    twin = copy.deepcopy(network, memo).eval()
    restore(twin)
    twin.attend_by("sdpa")
    yield twin


def accelerate_unproven(network: nn.Module) -> None:
    """Puts in every faster form that this machine has, in place, without a proof. A module with a `forward` of its own
    stays as it is."""
    for module in network.modules():
        form = _form(type(module))
        if form is not None and "forward" not in vars(module):
            module.__class__ = form
    if isinstance(network, EmbedwrightModel) and kernels.available():
        network.backbone.set_attn_implementation(FAST)


def restore(network: nn.Module) -> None:
    """Takes the faster forms out, in place."""
    for module in network.modules():
        if "stock_class" in vars(type(module)):
            module.__class__ = vars(type(module))["stock_class"]
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == FAST:
            config._attn_implementation = PACKED


def _form(stock_class: Any) -> Any:
    """Returns the faster form of a stock class on this machine, or None. A patched class has none."""
    if stock_class is nn.Linear:
        return OneDnnLinear if onednn.available() and stock_functions((nn.Linear, "forward")) else None
    if stock_class is QuantizedLinear:
        return Int8Linear if kernels.int8_available() else None
    family = stock_class.__module__.rpartition(".modeling_")[2]
    parts, plus_one, window = _FAMILIES.get(family, ((), False, None))
    part = stock_class.__name__.removeprefix(family.capitalize())
    if stock_class.__module__ != f"transformers.models.{family}.modeling_{family}" or part not in parts:
        return None
    if part == "MLP":
        return gated(stock_class) if onednn.available() else None
    if not kernels.available():
        return None
    return norm(stock_class, plus_one) if part == "RMSNorm" else attention(stock_class, window)
