"""Reads and writes adapter folders: LoRA and the pooling block in peft's own format, without the base.

`adapter_config.json` and `adapter_model.safetensors` are peft's. Beside them lie `embedwright.json` (contract, pooling,
how to open a decoder) and `base_samples.safetensors` (values of the base's weights, which prove the base). A folder of
peft alone has neither: its base is an embedder, and is not proved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from embedwright.config import validate
from embedwright.errors import InputError, NotFoundError, as_input_error
from embedwright.files import write_json
from embedwright.model.adapters.lora import has_lora, inject_lora, warn_of_idle
from embedwright.model.backbone import decoder_config, load_backbone, origin_of, same_samples, weight_samples
from embedwright.model.formats.base import build_network, resolve_base
from embedwright.model.formats.families import split_family
from embedwright.model.formats.folder import (
    ADAPTER,
    check_floats,
    check_places,
    is_adapter,
    read_object,
    read_tensors,
    tensors_of,
)
from embedwright.model.network import EmbedwrightModel
from embedwright.model.pooling import PoolingConfig
from embedwright.text import Contract, load_tokenizer

_WEIGHTS, _OURS, _SAMPLES = "adapter_model.safetensors", "embedwright.json", "base_samples.safetensors"
_PREFIX = "base_model.model."  # of every name in peft's format

# The keys of a LoraConfig that are followed; any other must have its default value.
_FOLLOWED = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora"}
_FOLLOWED |= {"rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"}
_NOTES = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"}
_NOTES |= {"task_type"}
_HARMLESS = {"modules_to_save": ["head"], "init_lora_weights": "gaussian"}  # allowed besides the defaults

OpenEmbedder = Callable[..., tuple[EmbedwrightModel, Any]]


def write_adapter(network: EmbedwrightModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the adapters and the pooling block of `network` into an empty folder, in `dtype` (None: as they are).

    Raises InputError if the weights below the adapters have changed since they were read from disk.
    """
    backbone, origin = network.backbone, network.origin
    samples = weight_samples(backbone)  # in the type of the weights, in which the base is opened again
    if origin is None or not same_samples(origin.samples, samples):
        where = "are on no disk" if origin is None else f"are not those of {origin.name} any more"
        raise InputError(
            f"the weights below the adapters {where}, so the adapters alone would be of no use: "
            "save the model without adapters, load that and add them to it, or merge them"
        )
    if not hasattr(backbone, "peft_config"):
        raise InputError("the adapters are not ours: save them with peft, and open that folder with Embedder.load")
    warn_of_idle(backbone)
    head = {f"{_PREFIX}head.{name}": tensor for name, tensor in network.head.state_dict().items()}
    within = "" if origin.kind != "whole" and not head else "backbone."
    lora = {f"{_PREFIX}{within}{_stored(n)}": p.detach() for n, p in backbone.named_parameters() if "lora_" in n}
    config = copy.copy(backbone.peft_config["default"])
    config.base_model_name_or_path, config.revision = origin.name, origin.revision
    config.modules_to_save = ["head"] if head else None
    config.task_type, config.inference_mode = "FEATURE_EXTRACTION", True
    config.save_pretrained(folder)
    trained = {name: tensor.to(dtype or tensor.dtype) for name, tensor in (lora | head).items()}
    for file, tensors in ((_WEIGHTS, trained), (_SAMPLES, samples)):
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, folder / file, metadata={"format": "pt"})
    decoder = {
        "layers": backbone.config.num_hidden_layers,
        "attention": "causal" if backbone.config.is_causal else "bidirectional",
    }
    ours = {
        "contract": network.contract.model_dump(mode="json"),
        "pooling": network.pooling.model_dump(mode="json"),
        "decoder": decoder if origin.kind == "decoder" else None,
    }
    write_json(folder / _OURS, ours)


class Ours(NamedTuple):
    """What `write_adapter` adds to peft's settings. `decoder`: layers and attention, where the base is a decoder."""

    contract: Contract
    pooling: PoolingConfig
    decoder: dict[str, Any] | None


class Settings(NamedTuple):
    """`lora` is peft's adapter_config.json. `ours` is None for an adapter of peft alone, whose base is an embedder."""

    base: str
    revision: str | None
    lora: dict[str, Any]
    ours: Ours | None


def read_adapter(folder: Path, dtype: torch.dtype | None, open_embedder: OpenEmbedder) -> tuple[EmbedwrightModel, Any]:
    """Opens the base with its adapters, and its tokenizer. `dtype` is the base's; the adapters are float32.

    Raises NotFoundError if the base or a file is missing. Raises InputError if the base is another one, the adapter is
    of a kind that is not supported, or its tensors do not fit.
    """
    from peft import LoraConfig

    settings = read_settings(folder)
    tensors = _read_tensors(folder / _WEIGHTS)
    network, tokenizer = _open_base(folder, settings, dtype, open_embedder)
    backbone: Any = network.backbone
    bare = not any(name.startswith(f"{_PREFIX}backbone.") for name in tensors)  # names as in AutoModel's stock model
    root = backbone if bare else network
    with as_input_error(folder / ADAPTER, "asks for adapters that its base cannot have"):
        inject_lora(root, LoraConfig(**{key: settings.lora[key] for key in _FOLLOWED & settings.lora.keys()}))
    backbone.peft_config = root.peft_config
    network.head.float().requires_grad_(True)
    whole_head = settings.ours is not None and settings.ours.decoder is not None
    _fill(folder / _WEIGHTS, network, tensors, bare=bare, whole_head=whole_head)
    warn_of_idle(backbone)
    if network.config.history:  # it gives other vectors than the model of these steps
        network.config.history = [*network.config.history, {"step": "adapters", "folder": folder.name}]
    return network, tokenizer


def read_settings(folder: Path) -> Settings:
    """Reads and checks the settings of an adapter folder. InputError as in `read_adapter`."""
    from peft import LoraConfig

    file = folder / ADAPTER
    stored = read_object(file)
    base, revision = stored.get("base_model_name_or_path"), stored.get("revision")
    if stored.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type is {stored.get('peft_type')!r}, but only LORA is supported")
    if not isinstance(base, str):
        raise InputError(f"{file}: base_model_name_or_path does not say where the base is")
    if not isinstance(revision, str | None):
        raise InputError(f"{file}: revision={revision!r} is not a revision of a base")
    default = vars(LoraConfig())
    for key in sorted(stored.keys() - _FOLLOWED - _NOTES):
        if stored[key] and stored[key] not in (default.get(key), _HARMLESS.get(key)):
            raise InputError(f"{file}: {key}={stored[key]!r} is not supported")
    where = Path(split_family(base)[1]).expanduser()
    if is_adapter(where):  # which may be this folder itself
        raise InputError(f"{folder}: its base, {where}, is an adapter itself: merge that first")
    return Settings(base, revision, stored, _read_ours(folder / _OURS) if (folder / _OURS).is_file() else None)


def _read_ours(file: Path) -> Ours:
    """Reads our embedwright.json. Raises InputError for that of another kind of folder."""
    ours = read_object(file)
    if ours.keys() != {"contract", "pooling", "decoder"}:
        raise InputError(f"{file} does not belong to this adapter: it has the keys {sorted(ours)}; move it away")
    decoder = ours["decoder"]
    if decoder is not None and (not isinstance(decoder, dict) or decoder.keys() != {"layers", "attention"}):
        raise InputError(f"{file}: decoder must say layers and attention, not {decoder!r}")
    contract = validate(Contract, ours["contract"], f"{file}: contract")
    return Ours(contract, validate(PoolingConfig, ours["pooling"], f"{file}: pooling"), decoder)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    check_floats(stored := tensors_of(file))
    if not stored:
        raise InputError(f"{file} holds no tensors")
    return dict(read_tensors(stored))


def _open_base(
    folder: Path, settings: Settings, dtype: torch.dtype | None, open_embedder: OpenEmbedder
) -> tuple[EmbedwrightModel, Any]:
    """Opens the base. Raises InputError if our files say that the adapters were trained on other weights."""
    name, revision, _, ours = settings
    samples = _read_tensors(folder / _SAMPLES) if ours else {}
    if ours and dtype is None:
        dtype = next(iter(samples.values())).dtype
    try:
        if ours and ours.decoder:
            network, tokenizer = _open_decoder(name, revision, ours, dtype)
        else:
            network, tokenizer = open_embedder(name, dtype=dtype, revision=revision)
    except NotFoundError as error:
        raise NotFoundError(
            f"{folder}: the base of this adapter, {name}, cannot be opened ({error}): "
            f"write where it is as base_model_name_or_path into {folder / ADAPTER}"
        ) from None
    if has_lora(network.backbone):
        raise InputError(f"{folder}: its base, {name}, is an adapter itself: merge that first")
    if ours:
        if not same_samples(samples, weight_samples(network.backbone)):
            raise InputError(f"{folder}: {name} has other weights than the base that this adapter was trained on")
        for part in ("contract", "pooling"):
            if getattr(network, part) != getattr(ours, part):
                raise InputError(f"{folder}: {name} has another {part} than the base that this adapter was trained on")
    return network, tokenizer


def _open_decoder(
    name: str, revision: str | None, ours: Ours, dtype: torch.dtype | None
) -> tuple[EmbedwrightModel, Any]:
    """Opens a decoder under the adapter's own contract, with a pooling block that is still to be filled."""
    base = resolve_base(name, revision)
    backbone = load_backbone(base, decoder_config(base, **(ours.decoder or {})), dtype or torch.float32)
    network = build_network(backbone, ours.pooling, ours.contract)
    network.origin = origin_of(name, backbone, "decoder", revision)
    return network, load_tokenizer(base)


@torch.no_grad()
def _fill(file: Path, network: EmbedwrightModel, tensors: dict[str, Tensor], *, bare: bool, whole_head: bool) -> None:
    """Sets every adapter from its tensor, and the pooling block: all of it or, if not `whole_head`, none of it."""
    if on_head := [name for name, _ in network.head.named_parameters() if "lora_" in name]:
        raise InputError(f"{file}: LoRA on the pooling block ({on_head[0]}) is not supported: it trains in full")
    left_out = "backbone." if bare else ""
    own = {
        f"{_PREFIX}{_stored(name).removeprefix(left_out)}": parameter
        for name, parameter in network.named_parameters()
        if "lora_" in name
    }
    head = {f"{_PREFIX}head.{name}": parameter for name, parameter in network.head.named_parameters()}
    if whole_head or head.keys() & tensors.keys():
        own |= head
    check_places(file, own, tensors)
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


def _stored(name: str) -> str:
    """Returns the name under which peft stores a parameter, without the name of the adapter."""
    return name.replace(".default", "")
