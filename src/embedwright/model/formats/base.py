"""What all formats share: the decoder below an embedder, the check of its weights, and the network around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from embedwright.errors import InputError, NotFoundError
from embedwright.locate import fetch_weights, find
from embedwright.model.formats.folder import (
    ADAPTER,
    check_floats,
    check_folder,
    check_layers,
    is_adapter,
    read_object,
    weights_in,
)
from embedwright.model.formats.gguf import convert_gguf
from embedwright.model.network import EmbedwrightConfig, EmbedwrightModel
from embedwright.model.pooling import PoolingConfig
from embedwright.text import Contract


class Outline(NamedTuple):
    """What an embedder is, without its weights."""

    decoder: Any  # its config, attention included
    pooling: PoolingConfig
    contract: Contract
    tokenizer: Any


def resolve_base(base: str | Path, revision: str | None = None, *, weights: bool = True) -> str:
    """Finds a decoder by its name and returns its folder, in Hugging Face format and checked.

    `base` is a folder on disk, a .gguf file, a packaged name or a hub id, looked for in this order. A .gguf file is
    converted once and cached; a hub id is read from the snapshot of one commit. Without `weights`, config and tokenizer
    are enough. NotFoundError where nothing is there, InputError where the folder holds something else.
    """
    place = find(base, revision)
    folder = place.path
    if folder.suffix == ".gguf" and folder.is_file():
        return str(convert_gguf(folder))
    if is_adapter(folder):
        raise InputError(f"{base} holds {ADAPTER}, so it is an adapter, not a decoder: merge it into its base first")
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"base model folder {base} has no config.json")
    if weights:
        fetch_weights(place)
    check_folder(folder)
    if weights:
        check_weights(folder)
    return str(folder)


def check_weights(folder: Path) -> None:
    """InputError where a folder's weights are not whole, or not of its config, or its matrices are no real numbers."""
    stored, config = weights_in(folder), read_object(folder / "config.json")
    ours = isinstance(config.get("backbone"), dict)
    check_layers(stored, config["backbone"] if ours else config, folder / "config.json")
    check_floats(stored, [name for name in stored if ours or name.endswith(".weight")])


def build_network(backbone: Any, pooling: PoolingConfig, contract: Contract, **kept: Any) -> EmbedwrightModel:
    """The network of a backbone that is loaded; the weights of its pooling block are still to be set."""
    config = EmbedwrightConfig(
        backbone=backbone.config.to_dict(), pooling=pooling.model_dump(), contract=contract.model_dump(), **kept
    )
    return EmbedwrightModel(config, backbone=backbone)
