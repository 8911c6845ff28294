"""The model of a run: made before the first step, loaded from a checkpoint, and finished after the last step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from embedwright.errors import InputError, error_prefix
from embedwright.locate import local, packaged
from embedwright.model.adapters.lora import has_lora, idle_adapters, train_on
from embedwright.model.backbone import decoder_config
from embedwright.model.embedder import Embedder
from embedwright.model.formats.adapter import read_settings
from embedwright.model.formats.base import new_contract, resolve_base
from embedwright.model.formats.detect import check_decoder, check_embedder, content_fingerprint, detect
from embedwright.model.formats.families import split_family
from embedwright.model.formats.open import outline
from embedwright.model.pooling import WEIGHTLESS, LatentPooling, PoolingConfig, PoolingHead
from embedwright.model.verify import probe
from embedwright.processes import ALONE, Processes
from embedwright.text import Contract, load_tokenizer
from embedwright.training.engine.parallel import full_tensor, shard_like, trainable_parameters
from embedwright.training.parts import ModelPart
from embedwright.training.recipe import Recipe


def start_model(recipe: Recipe, processes: Processes = ALONE) -> Embedder:
    """Makes the model as it is before the first step, adds adapters, and probes it.

    It is a decoder with an identity head, or the embedder of `model.from` with its vectors unchanged. The adapters that
    it came with train on, or they are merged in float32 and those of the recipe start at zero. InputError names the
    recipe's key.
    """
    tune, bf16 = recipe.tune, recipe.run.precision == "bf16"
    device = None if processes.device is None else str(processes.device)
    with model_error_prefix(recipe):
        open_model = _continued if recipe.model.from_ else _from_decoder
        model = open_model(recipe, torch.bfloat16 if bf16 and tune.method != "full" else torch.float32, device)
    network = model.network
    network.mixed = bf16
    if tune.method != "full" and tune.adapters == "fresh":
        torch.manual_seed(recipe.seed)
        model.add_lora(tune.rank, tune.alpha, tune.dropout)
    if tune.freeze:
        with error_prefix(f"recipe {recipe.name}: tune.freeze"):
            _freeze_latents(network.head)
    if tune.gradient_checkpointing:
        network.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    probe.check(network)
    network.train()
    return model


def model_error_prefix(recipe: Recipe) -> AbstractContextManager[None]:
    """Puts the recipe's key in front of an error about its model."""
    return error_prefix(f"recipe {recipe.name}: model.{'from' if recipe.model.from_ else 'base'}")


def _freeze_latents(head: PoolingHead) -> None:
    if not isinstance(head, LatentPooling):
        raise InputError("this embedder pools without latents: leave it out")
    head.latents.requires_grad_(False)


def _from_decoder(recipe: Recipe, dtype: torch.dtype, device: str | None) -> Embedder:
    spec = recipe.model
    model = Embedder.from_decoder(
        _decoder(spec),
        pooling=spec.pooling,
        attention=spec.attention,
        layers=spec.layers,
        max_tokens=spec.max_tokens,
        pool_prompt=spec.pool_prompt,
        default_task=spec.default_task,
        dtype=str(dtype).removeprefix("torch."),
        four_bit=recipe.tune.method == "qlora",
        device=device,
        seed=recipe.seed,
        **({} if spec.pooling in WEIGHTLESS else _sizes(spec)),
    )
    if spec.mask_rule is None:
        return model
    with error_prefix("mask_rule"):
        return _with_contract(model, _new_contract(spec, model.own_tokenizer))


def _new_contract(spec: ModelPart, tokenizer: Any) -> Contract:
    return new_contract(tokenizer, spec.pooling, spec.max_tokens, spec.pool_prompt, spec.default_task, spec.mask_rule)


def _with_contract(model: Embedder, contract: Contract) -> Embedder:
    """Returns an embedder of this network that reads texts by `contract`."""
    model.network.contract = contract
    model.network.config.contract = contract.model_dump()
    return Embedder(model.network, model.own_tokenizer)


def _continued(recipe: Recipe, dtype: torch.dtype, device: str | None) -> Embedder:
    spec, trains_on, keeps = recipe.model, recipe.tune.adapters == "continue", "adapter" in recipe.run.save
    check_embedder(spec.name)
    if trains_on:
        _check_sizes(recipe)
    # adapters that train on stay on their base, which is opened in the type in which it is trained on
    model = Embedder.load(spec.name, device=device, dtype=str(dtype).removeprefix("torch.") if trains_on else None)
    network = model.network
    contract = _changed(spec, network.contract)
    if keeps and contract != network.contract and network.origin is not None and network.origin.kind != "decoder":
        overrides = ", ".join(f"{key}={value}" for key, value in _contract_overrides(spec).items())
        raise InputError(
            f"{overrides}: an adapter keeps the text contract of the embedder that it is saved without (run.save): "
            "leave that out, or save merged alone"
        )
    if trains_on:
        train_on(network.backbone, dropout=recipe.tune.dropout, mixed=recipe.run.precision == "bf16")
    elif has_lora(network.backbone):
        if keeps:
            raise InputError(
                f"{spec.name} has adapters, and fresh ones on top of them would have a base that is on no disk: write "
                "tune: {adapters: continue}, or leave adapter out of run.save"
            )
        network.float()  # so that merged weights are rounded once, if at all
        model.merge()
    if not trains_on:
        for parameter in network.backbone.parameters():  # not the buffers: rotary frequencies stay in float32
            parameter.data = parameter.data.to(dtype)
        network.head.float()
        network.requires_grad_(True)
    if network.config.history:  # which says of a student that it is aligned: no more
        network.config.history = [*network.config.history, {"step": "train", "recipe": recipe.name}]
    return _with_contract(model, contract)


def _check_sizes(recipe: Recipe) -> None:
    """Raises InputError if the recipe names another rank or alpha than that of the adapters that train on."""
    stored, tune = lora_of(recipe.model.name), recipe.tune
    for key, name in (("rank", "r"), ("alpha", "lora_alpha")):
        if key in tune.model_fields_set and getattr(tune, key) != stored.get(name):
            raise InputError(
                f"tune.{key}={getattr(tune, key)}: the adapters of {recipe.model.name} have {stored.get(name)}, and "
                "they train on as they are: leave it out"
            )


def _changed(spec: ModelPart, contract: Contract) -> Contract:
    """Returns the contract of an embedder of `from`, with what the recipe changes in it."""
    if spec.shortened is not None and spec.shortened > contract.max_tokens:
        raise InputError(
            f"max_tokens={spec.shortened}: {spec.name} reads {contract.max_tokens} tokens, but can only be shortened"
        )
    return contract.model_copy(update=_contract_overrides(spec))


def _contract_overrides(spec: ModelPart) -> dict[str, Any]:
    """Returns what the recipe changes in the text contract of an embedder of `from`."""
    overrides = {"max_tokens": spec.shortened, "default_task": spec.default_task}
    return {key: value for key, value in overrides.items() if value is not None}


# ---- what is known without weights


def origin_fingerprint(spec: ModelPart) -> str:
    """Fingerprints the files of the decoder or embedder that the run begins with."""
    (check_embedder if spec.from_ else check_decoder)(spec.name)
    return content_fingerprint(spec.name)


def contents_of(names: Iterable[str]) -> dict[str, str]:
    """Fingerprints the models that lie here, by name. A hub id is left out: it is known by its name alone."""
    here = (name for name in names if packaged(place := split_family(name)[1]) or local(place))
    return {name: content_fingerprint(name) for name in here}


def shape_of(spec: ModelPart) -> tuple[Any, PoolingConfig]:
    """Reads the decoder's config and the pooling of the model that this part describes. OSError without config."""
    if spec.from_:
        check_embedder(spec.name)
        found = outline(spec.name)
        return found.decoder, found.pooling
    decoder = decoder_config(resolve_base(_decoder(spec), weights=False), attention=spec.attention, layers=spec.layers)
    return decoder, PoolingConfig(kind=spec.pooling, **_sizes(spec))


def lora_of(name: str) -> dict[str, Any]:
    """Reads the LoRA settings of an adapter folder, as peft has them. Raises InputError for another embedder."""
    place, form = detect(name)
    if form != "adapter":
        raise InputError(f"{name} has no adapters to train on: leave tune.adapters out")
    return read_settings(place.path).lora


def rank_of(recipe: Recipe) -> int:
    """Returns the rank of the adapters that the recipe trains."""
    return recipe.tune.rank if recipe.tune.adapters == "fresh" else int(lora_of(recipe.model.name)["r"])


def tokenizer_and_contract(spec: ModelPart) -> tuple[Any, Contract]:
    """Reads the tokenizer and the text contract of the model. Raises OSError if the tokenizer cannot be loaded."""
    if spec.from_:
        check_embedder(spec.name)
        found = outline(spec.name)
        return found.tokenizer, _changed(spec, found.contract)
    tokenizer = load_tokenizer(resolve_base(_decoder(spec), weights=False))
    return tokenizer, _new_contract(spec, tokenizer)


def longest_of(spec: ModelPart) -> int:
    """Returns the most tokens that the model reads of a text."""
    return tokenizer_and_contract(spec)[1].max_tokens if spec.from_ else spec.max_tokens


def _sizes(spec: ModelPart) -> dict[str, Any]:
    return {"latents": spec.latents, "heads": spec.heads, "head_dim": spec.head_dim, "multiple": spec.multiple}


def _decoder(spec: ModelPart) -> str:
    """Returns the name of the base. Raises InputError if it is an embedder."""
    check_decoder(spec.name)
    return spec.name


def check_moved(model: Embedder) -> None:
    """Raises RuntimeError if training left an adapter at zero."""
    if has_lora(model.network.backbone) and (idle := idle_adapters(model.network.backbone)):
        raise RuntimeError(f"{len(idle)} LoRA adapters are still zero after training, e.g. {idle[0]}")


def merged(model: Embedder) -> Embedder:
    """Brings a model into the form in which it is saved and evaluated: float32, without adapters. It is probed.

    Raises RuntimeError if merging changes vectors.
    """
    network = model.network
    network.float().eval()
    network.mixed = False
    if has_lora(network.backbone):
        model.merge()
    network.requires_grad_(False)
    probe.check(network)
    return model


def load_trained(model: Embedder, weights: dict[str, Tensor]) -> None:
    """Copies whole weights into the trained tensors, also where these are sharded. Raises ValueError if the names
    differ.
    """
    own = trainable_parameters(model.network)
    if own.keys() != weights.keys():
        raise InputError(f"checkpoint and model differ in {sorted(own.keys() ^ weights.keys())[:3]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(shard_like(weights[name], parameter))


def copied(recipe: Recipe, model: Embedder, processes: Processes) -> Embedder | None:
    """Makes the trained model anew on the CPU of rank 0, neither sharded nor in 4 bits; None in the other processes.

    It takes 4 bytes a parameter there: the base is opened, then each trained tensor is gathered and put in its place.
    All processes must call this.
    """
    if recipe.tune.method == "qlora":
        plain = {"tune": recipe.tune.model_copy(update={"method": "lora"})}
        recipe = recipe.model_copy(update=plain | {"run": recipe.run.model_copy(update={"precision": "fp32"})})
    copy = None
    with processes.together():
        if processes.is_rank_0:
            copy = start_model(recipe, Processes(device=torch.device("cpu")))
    own = {} if copy is None else trainable_parameters(copy.network)
    for name, parameter in trainable_parameters(model.network).items():
        gathered = full_tensor(parameter.detach())
        if copy is not None:
            own[name].data.copy_(gathered)
    return copy
