"""Runs a model on calibration texts and collects what its modules read. T packed tokens, D hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.model.encode import prefix_and_limit
from embedwright.model.verify.modes import evaluating
from embedwright.packing import PackedTexts, batches, pack
from embedwright.text import check_texts, tokenize_checked

BATCH_TOKENS = 2048  # the states of all layers are held at once


class Texts(NamedTuple):
    """Calibration texts. `described` says which, for the history of a model; `read` gives them."""

    described: str
    read: Callable[[], Sequence[str]]


def layers_of(backbone: Any) -> nn.ModuleList:
    """Returns the decoder layers. Raises InputError for a backbone that keeps them in another way than most do."""
    layers: Any = getattr(backbone, "layers", None)
    whole = isinstance(layers, nn.ModuleList) and len(layers) == backbone.config.num_hidden_layers
    if not whole or not hasattr(backbone, "norm"):
        kind = backbone.config.model_type
        raise InputError(
            f"cannot prune a {kind!r} model: it must keep its layers in `layers` and its final norm in `norm`"
        )
    found: nn.ModuleList = layers
    return found


def runs(model: Embedder, texts: Sequence[str]) -> Iterator[PackedTexts]:
    """Reads texts as documents and runs the decoder on them. Yields each batch after its run."""
    prefix, limit = prefix_and_limit(model.contract, model.longest, None, None, None)
    tokens = tokenize_checked(model.text_tokenizer, model.contract, check_texts(texts), prefix, limit)
    if not tokens:
        raise InputError("there are no calibration texts")
    with evaluating(model.network), torch.no_grad():
        for batch in batches([len(text.ids) for text in tokens], BATCH_TOKENS):
            packed = pack([tokens[i] for i in batch]).to(model.device)
            model.network.hidden(packed)
            yield packed


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects the input (T, ...) of each module within the block. A later run replaces that of an earlier one."""
    seen = [torch.empty(0)] * len(modules)

    def keep(number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[number] = (args[0] if args else named["hidden_states"])[0]

        return hook

    hooks = [module.register_forward_pre_hook(keep(n), with_kwargs=True) for n, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def layer_states(model: Embedder, texts: Sequence[str]) -> Iterator[list[Tensor]]:
    """Yields for each batch the states (T, D) between the layers: the input of each, then the output of the last.

    Only tokens that the pooling reads are among them. BOS is not: its states are so large that they decide any mean.
    """
    backbone: Any = model.network.backbone
    with inputs_of([*layers_of(backbone), backbone.norm]) as seen:
        for packed in runs(model, texts):
            last = model.network.pooling.kind == "last"
            at = packed.cu_seqlens[1:].long() - 1 if last else packed.pool_mask_T.nonzero()[:, 0]
            yield [states_TD[at] for states_TD in seen]
