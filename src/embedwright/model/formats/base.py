"""What a new embedder is made from: a decoder on disk, whatever it is called and however it is stored."""

from __future__ import annotations

from pathlib import Path

from embedwright.errors import InputError, NotFoundError
from embedwright.locate import fetch_weights, find
from embedwright.model.formats.folder import ADAPTER, check_floats, check_folder, check_layers, read_object, weights_in
from embedwright.model.formats.gguf import convert_gguf


def resolve_base(base: str | Path, revision: str | None = None, *, weights: bool = True) -> str:
    """A folder on disk, a .gguf file, a packaged name or a hub id, in this order -> a folder in Hugging Face format.

    A .gguf file is converted once and cached; a hub id is read from the snapshot of one commit. What the folder holds
    is checked. `weights` False: config and tokenizer are enough. NotFoundError where there is none, InputError where it
    holds something else.
    """
    place = find(base, revision)
    if place.path.suffix == ".gguf" and place.path.is_file():
        return str(convert_gguf(place.path))
    folder = place.path
    if (folder / ADAPTER).exists():
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
    """InputError where the weights of a stock folder are not whole, or its matrices and norms are no real numbers."""
    stored = weights_in(folder)
    check_layers(stored, read_object(folder / "config.json"), folder / "config.json")
    check_floats(stored, [name for name in stored if name.endswith(".weight")])
