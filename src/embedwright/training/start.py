"""The model of a run: before its first step, with a checkpoint's weights, and after its last step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from embedwright.errors import InputError
from embedwright.model import probe
from embedwright.model.adapter import has_lora, idle_adapters
from embedwright.model.embedder import Embedder
from embedwright.training import processes as many
from embedwright.training.processes import Processes
from embedwright.training.recipe import Recipe


def start_model(recipe: Recipe, processes: Processes = many.ALONE) -> Embedder:
    """The model before its first step: decoder, identity head, fresh adapters; probed."""
    spec, tune = recipe.model, recipe.tune
    frozen_in_bf16 = recipe.run.precision == "bf16" and tune.method != "full"
    sizes = (
        {}
        if spec.pooling in ("mean", "last")
        else spec.model_dump(include={"latents", "heads", "head_dim", "multiple"})
    )
    model = Embedder.from_decoder(
        spec.base,
        pooling=spec.pooling,
        attention=spec.attention,
        layers=spec.layers,
        max_tokens=spec.max_tokens,
        dtype="bfloat16" if frozen_in_bf16 else "float32",
        four_bit=tune.method == "qlora",
        device=None if processes.device is None else str(processes.device),
        seed=recipe.seed,
        **sizes,
    )
    network = model.network
    network.mixed = recipe.run.precision == "bf16"
    if tune.method != "full":
        torch.manual_seed(recipe.seed)
        model.add_lora(tune.rank, tune.alpha, tune.dropout)
    if tune.gradient_checkpointing:
        network.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    probe.check(network)
    network.train()
    return model


def finish(model: Embedder) -> Embedder:
    """Merge the adapters in float32, prove that the merge changed nothing, and probe. RuntimeError if it did."""
    network = model.network
    network.float().eval()
    network.mixed = False
    if has_lora(network.backbone):
        if idle := idle_adapters(network.backbone):
            raise RuntimeError(f"{len(idle)} LoRA adapters are still zero after training, e.g. {idle[0]}")
        model.merge()
    network.requires_grad_(False)
    probe.check(network)
    return model


def load_trained(model: Embedder, weights: dict[str, Tensor]) -> None:
    """Put whole weights into what trains, also where it is cut. ValueError where the names differ."""
    own = many.trained(model.network)
    if own.keys() != weights.keys():
        raise InputError(f"checkpoint and model differ in {sorted(own.keys() ^ weights.keys())[:3]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(many.like(weights[name], parameter))


def whole_model(recipe: Recipe, model: Embedder, processes: Processes) -> Embedder:
    """The model as one that was never cut, nor read in 4 bits: neither can be merged or saved.

    What trained on 4 bits goes onto the base in float32, on the CPU: the GPU may have room for the 4 bits alone.
    """
    four_bit = recipe.tune.method == "qlora"
    if not four_bit and (processes.count == 1 or recipe.run.parallel == "ddp"):
        return model
    trained = many.whole(model.network)
    if four_bit:
        plain = {"tune": recipe.tune.model_copy(update={"method": "lora"})}
        recipe = recipe.model_copy(update=plain | {"run": recipe.run.model_copy(update={"precision": "fp32"})})
        processes = replace(processes, device=torch.device("cpu"))
    whole = start_model(recipe, processes)
    load_trained(whole, trained)
    return whole
