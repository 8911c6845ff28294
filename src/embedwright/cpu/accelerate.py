"""The seam between stock and fast: `accelerate(network)` puts the faster forms in, `stock(network)` is without them."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from embedwright.cpu import kernels, onednn, proof
from embedwright.cpu.attention import FAST, attention, norm
from embedwright.cpu.guards import originals
from embedwright.cpu.linears import OneDnnLinear, gated
from embedwright.model.attention import PACKED
from embedwright.model.backbone import text_hidden
from embedwright.model.network import EmbedwrightModel
from embedwright.model.verify.modes import evaluating
from embedwright.model.verify.probe import ProbeError

logger = logging.getLogger(__name__)

N = TypeVar("N", bound=nn.Module)

# transformers' families whose blocks we know: the names of their classes begin so; whether one is added to the weights
# of their norms; whether their attention and gated blocks are known, and where an attention block has its window.
_FAMILIES: dict[str, tuple[str, bool, bool, str | None]] = {
    "llama": ("Llama", False, True, None),
    "mistral": ("Mistral", False, True, "config"),
    "qwen2": ("Qwen2", False, True, "self"),
    "qwen3": ("Qwen3", False, True, "self"),
    "phi3": ("Phi3", False, False, None),
    "gemma": ("Gemma", True, True, None),
    "gemma3": ("Gemma3", True, True, "self"),
}


def accelerate(network: EmbedwrightModel) -> None:
    """Gives a network on a CPU its faster forms, in place, where they are proven to give what the stock blocks give.

    Every block that would change, and every packed attention block, gets the stock run's own input and is held to the
    stock block's output (`proof`). Where one differs the network stays stock, with a warning; `network.cpu_fault` says
    why, for the doctor. ProbeError where packed attention differs without any faster form.
    """
    with stock(network) as reference, evaluating(network):
        change(network)
        blocks = proof.recorded(reference, changed(network))
        network.cpu_fault = proof.first_fault(blocks, network)
        if network.cpu_fault is None:
            return
        restore(network)
        if found := proof.first_fault(blocks, network):
            raise ProbeError(f"packed attention is not the stock model's: {found}")
    logger.warning("the fast path on this CPU is off for this model: %s", network.cpu_fault)


def fault(network: EmbedwrightModel, lengths: Sequence[int] = proof.LONGER) -> str | None:
    """What `accelerate` found, or what a proof of the network as it stands finds now; None where all is right."""
    if network.cpu_fault is not None:
        return f"off: {network.cpu_fault}"
    with stock(network) as reference, evaluating(network):
        return proof.first_fault(proof.recorded(reference, changed(network), lengths), network)


def changed(network: nn.Module) -> list[str]:
    """The names of the modules that have a faster form."""
    return [name for name, module in network.named_modules() if "stock_class" in vars(type(module))]


@contextmanager
def stock(network: N, implementation: str = "sdpa") -> Iterator[N]:
    """The network as transformers' own code runs it: a twin of the same weights, which is what to call.

    Every module is of its stock class, attention is transformers' own (`sdpa`, `eager`), one text at a time. The twin
    has a config, modes (evaluation) and hooks of its own, so that the network itself may go on encoding in other
    threads. References run on it, and exports: nothing in it is a step that a tracer cannot see.
    """
    twin = _twin(network).eval()
    _stock_classes(twin)
    if isinstance(twin, EmbedwrightModel):
        twin.attend_by(implementation)
    elif isinstance(twin, PreTrainedModel):
        twin.set_attn_implementation(implementation)
    yield twin


def stock_hidden(backbone: Any, ids_T: Tensor, implementation: str) -> Tensor:
    """(L, D) of one text through the stock code and mask of `sdpa` or `eager`: the reference for packed attention."""
    with stock(backbone, implementation) as twin:
        return text_hidden(twin, ids_T)


def change(network: nn.Module) -> None:
    """Gives the modules that have a faster form on this machine that form, in place and unproven. A module whose own
    `forward` somebody set stays as it is."""
    forms = _forms()
    for module in network.modules():
        form = forms.get(type(module))
        if form is not None and "forward" not in vars(module):
            module.__class__ = form
    if isinstance(network, EmbedwrightModel) and kernels.available():
        network.backbone.set_attn_implementation(FAST)


def restore(network: nn.Module) -> None:
    """Takes the faster forms out again, in place."""
    _stock_classes(network)
    for module in network.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == FAST:
            config._attn_implementation = PACKED


def _stock_classes(network: nn.Module) -> None:
    for module in network.modules():
        if "stock_class" in vars(type(module)):
            module.__class__ = vars(type(module))["stock_class"]


def _twin(network: N) -> N:
    """A copy of all modules and configs, with the same weights and buffers."""
    shared: list[Any] = [*network.parameters(), *network.buffers(), getattr(network, "origin", None)]
    memo = {id(thing): thing for thing in shared}
    for module in network.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                memo[id(value)] = value
            elif "_hooks" in name and isinstance(value, dict):  # whose they are is not copied
                memo[id(value)] = copy.copy(value)
    return copy.deepcopy(network, memo)


def _forms() -> dict[Any, Any]:
    """Stock class -> its faster form on this machine. A class that somebody patched has none."""
    found: dict[Any, Any] = {}
    if onednn.available() and originals((nn.Linear, "forward")):
        found[nn.Linear] = OneDnnLinear
    for family, (prefix, plus_one, known, window) in _FAMILIES.items():
        home = sys.modules.get(f"transformers.models.{family}.modeling_{family}")
        if home is None:  # no model of this family was made
            continue
        makers: list[tuple[bool, str, Any, tuple[Any, ...]]] = [
            (kernels.available(), "RMSNorm", norm, (plus_one,)),
            (kernels.available() and known, "Attention", attention, (window,)),
            (onednn.available() and known, "MLP", gated, ()),
        ]
        for there, part, make, how in makers:
            kind = getattr(home, prefix + part, None)
            if there and kind is not None and kind.__module__ == home.__name__:
                found[kind] = make(kind, *how)
    return found
