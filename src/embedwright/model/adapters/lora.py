"""LoRA on a backbone: added, checked for being active, merged into the weights. On disk: `formats.adapter`.

peft builds the layers. An adapter that is switched off, or merged and still there, gives other vectors than its
weights say, without a word: `probe.check` refuses it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from embedwright.errors import InputError
from embedwright.model.adapters.fourbit import ONLY_TRAINED, in_four_bits
from embedwright.model.network import EmbedwrightModel
from embedwright.model.quantized import QUANTIZED, has_quantized_layers
from embedwright.model.verify.modes import evaluating
from embedwright.model.verify.probe import lora_faults
from embedwright.packing import PackedTexts

logger = logging.getLogger(__name__)

# Largest distance between the unit vectors of merged and unmerged weights, by their type. Rounding alone moves those of
# a deep model by a tenth of this in 32 bits, by a quarter in 16. So each layer is proved in float32 as well, to a
# relative 1e-4.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
_LAYER_TOLERANCE = 1e-4
_LOST = "this model is lost, load it again"


def add_lora(backbone: nn.Module, *, rank: int, alpha: int, dropout: float, mixed: bool = False) -> None:
    """Adds LoRA to every linear layer of the backbone, in place: adapters in float32, everything else frozen.

    `mixed`: it will run under autocast, which casts the small adapters; else peft casts every input up to them. Raises
    ValueError if there are adapters already, or a size makes no adapter.
    """
    from peft import LoraConfig

    if has_lora(backbone):
        raise InputError("the model has LoRA adapters already: train them on, or merge them first")
    if has_quantized_layers(backbone):
        raise InputError(QUANTIZED)
    if rank < 1 or alpha <= 0:
        raise InputError(f"rank={rank}, alpha={alpha}: both must be positive")
    linear_names = {
        name.rsplit(".", 1)[-1] for name, module in backbone.named_modules() if isinstance(module, nn.Linear)
    }
    if not linear_names:
        raise InputError("the backbone has no linear layer to put LoRA on")
    if left_out := _not_linear(backbone):
        logger.warning(
            "LoRA goes on linear layers alone: %d weights get no adapter and stay as they are, e.g. %s",
            len(left_out),
            left_out[0],
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=sorted(linear_names))
    inject_lora(backbone, config, mixed=mixed)


def _not_linear(backbone: nn.Module) -> list[str]:
    """Returns the names of matrices outside of linear layers and embeddings, such as the experts of a mixture."""
    return [
        f"{name}.{leaf}"
        for name, module in backbone.named_modules()
        if not isinstance(module, (nn.Linear, nn.Embedding))
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    ]


def inject_lora(root: Any, config: Any, *, mixed: bool = False) -> None:
    """Puts the layers of a LoraConfig into `root`, in place. Adapters are trainable float32, the rest is frozen."""
    from peft import inject_adapter_in_model

    from embedwright.cpu.lean_lora import make_lean

    if has_quantized_layers(root):
        raise InputError(QUANTIZED)

    inject_adapter_in_model(config, root)
    make_lean(root)
    for _, layer in _lora_layers(root):
        layer.train(layer.get_base_layer().training)  # peft makes its dropout in training
        layer.cast_input_dtype_enabled = not mixed
    for name, parameter in root.named_parameters():
        parameter.requires_grad = "lora_" in name
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def train_on(backbone: Any, *, dropout: float, mixed: bool) -> None:
    """Prepares adapters that were loaded for more training, in place, as `add_lora` prepares fresh ones."""
    for _, layer in _lora_layers(backbone):
        layer.lora_dropout["default"] = nn.Dropout(dropout) if dropout else nn.Identity()
        layer.cast_input_dtype_enabled = not mixed
    backbone.peft_config["default"].lora_dropout = dropout


def has_lora(backbone: nn.Module) -> bool:
    return any("lora_" in name for name, _ in backbone.named_parameters())


def idle_adapters(backbone: nn.Module) -> list[str]:
    """Returns the names of LoRA matrices B that are still all zero: training did not reach them."""
    return [n for n, p in backbone.named_parameters() if "lora_B" in n and not torch.count_nonzero(p)]


def warn_of_idle(backbone: nn.Module) -> None:
    """Logs how many adapters change nothing, and names one."""
    if idle := idle_adapters(backbone):
        total = sum("lora_B" in name for name, _ in backbone.named_parameters())
        logger.warning("%d of %d LoRA adapters are zero and change nothing, e.g. %s", len(idle), total, idle[0])


@torch.no_grad()
def merge_lora(network: EmbedwrightModel, texts: PackedTexts) -> float:
    """Merges the adapters into the weights and removes them, in place. Returns the largest distance that `texts` moved.

    The sums are made in float32 and rounded once, to the type of the weights; a warning where that takes most of what
    the adapters add. ValueError, and nothing changed, where there is nothing to merge, the weights are in 4 bits, or an
    adapter is not active or not finite. Raises RuntimeError if a layer or the vectors change by more than rounding:
    that model is lost, and refused from then on.
    """
    backbone = network.backbone
    if not has_lora(backbone):
        raise InputError("the model has no LoRA adapters to merge; a model that is merged already stays as it is")
    if in_four_bits(backbone):
        raise InputError(f"cannot merge: {ONLY_TRAINED}")
    if faults := lora_faults(backbone):
        raise InputError(f"cannot merge: {faults[0]}")
    if broken := [n for n, p in backbone.named_parameters() if "lora_" in n and not p.isfinite().all()]:
        raise InputError(f"cannot merge: {broken[0]} is not finite")
    warn_of_idle(backbone)
    dtype: torch.dtype = backbone.dtype
    with evaluating(network):
        before_NE = network.embed(texts)
        lost = _fold_in(backbone)
        moved = float((network.embed(texts) - before_NE).norm(dim=-1).max())
    if not moved <= _TOLERANCE[dtype]:
        raise RuntimeError(
            f"merging moved vectors by {moved:.1e}, where {dtype} allows {_TOLERANCE[dtype]:.0e}: {_LOST}"
        )
    if lost > 0.5:
        logger.warning(
            "rounding to %s takes %.0f%% of what the adapters add: load with dtype='float32' to merge",
            dtype,
            100 * lost,
        )
    for name, layer in list(_lora_layers(backbone)):
        parent, _, leaf = name.rpartition(".")
        setattr(backbone.get_submodule(parent), leaf, layer.get_base_layer())
    vars(backbone).pop("peft_config", None)
    return moved


def _fold_in(backbone: nn.Module) -> float:
    """Adds each adapter to its weights, and returns the share of all (by norm) that rounding took."""
    lost = added = 0.0
    for name, layer in _lora_layers(backbone):
        base = layer.get_base_layer()
        before, dtype = base.weight.data, base.weight.dtype
        base.float()
        inputs = torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(0)).to(before.device)
        expected = layer(inputs)
        layer.merge(safe_merge=True)
        exact = base.weight.data
        changed = float((layer(inputs) - expected).norm() / expected.norm())
        base.to(dtype)
        if not changed <= _LAYER_TOLERANCE:
            raise RuntimeError(f"merging changed what {name} computes by {changed:.1e} of its size: {_LOST}")
        lost += float((base.weight.data - exact).square().sum())
        added += float((exact - before).square().sum())
    return (lost / added) ** 0.5 if added else 0.0


def _lora_layers(root: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in root.named_modules() if isinstance(module, LoraLayer))
