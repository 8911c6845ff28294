"""Finds a model by its name and tells the format of its folder."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any, Literal

from embedwright.errors import InputError
from embedwright.files import sha256_of, write_json
from embedwright.locate import Place, find
from embedwright.model.formats.families import Family, family_of, split_family
from embedwright.model.formats.folder import (
    ADAPTER,
    check_folder,
    is_adapter,
    read_object,
    weights_digest,
    weights_in,
)
from embedwright.model.network import EmbedwrightConfig
from embedwright.model.quantized import QUANTIZED

log = logging.getLogger(__name__)

Format = Literal["adapter", "nvembed", "ours", "stock"]

STOCK_SETTINGS = "embedwright.json"  # contract and pooling, in a folder of the stock format
ONNX_GRAPH = "onnx/model.onnx"  # of a folder that `export --format onnx` wrote
# The step of a history that ends an alignment with a teacher
CHANGED = {"step": "changed", "weights": "not known to be those that were aligned"}
GGUF_CONTRACT = "embedwright.contract"  # key of the metadata of a GGUF file that `export` wrote
_GGUF_HEAD = 2**16  # bytes: `export` writes the key before the vocabulary, which takes seconds to read
_ALIGNED = "aligned_weights"  # digest of the weights that were aligned, in the step that says so
_EXPORTED = "{name} is an export of an embedder for llama.cpp (docs/export.md): give the folder that it was made from"
_CONTENT = (".json", ".safetensors", ".model")  # suffixes of the files that a model is made of


def detect(name: str, revision: str | None = None) -> tuple[Place, Format | Family | None]:
    """Finds a model's folder, checks its settings and tells its format; None if `Embedder` cannot open it.

    The weights of a hub id are not fetched. Raises InputError for a file.
    """
    family, where = split_family(name)
    place = find(where, revision)
    if is_gguf_export(place.path):
        raise InputError(_EXPORTED.format(name=name))
    if not place.path.is_dir():
        raise InputError(f"{name} is a file of weights, not an embedder: use Embedder.from_decoder")
    check_folder(place.path)
    if is_onnx(place.path):
        raise InputError(
            f"{name} is an ONNX export, which onnxruntime runs (docs/export.md): give the model that it was made from"
        )
    return place, family or format_of(place.path, place.hub_id or where)


def is_onnx(folder: Path) -> bool:
    """Returns whether a folder is an ONNX export of ours."""
    file = folder / STOCK_SETTINGS
    return file.is_file() and "onnx" in read_object(file)


def is_gguf_export(path: Path) -> bool:
    """Returns whether a path is a GGUF file that `export` wrote of an embedder."""
    if path.suffix != ".gguf" or not path.is_file():
        return False
    with path.open("rb") as file:
        return GGUF_CONTRACT.encode() in file.read(_GGUF_HEAD)


def format_of(folder: Path, name: str) -> Format | Family | None:
    """Returns the format of a folder that is called `name`; None if `Embedder` cannot open it."""
    if is_adapter(folder):
        return "adapter"
    config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    kind = config.get("model_type")
    if kind in ("nvembed", EmbedwrightConfig.model_type):
        return "nvembed" if kind == "nvembed" else "ours"
    if (folder / STOCK_SETTINGS).is_file():
        return "stock"
    return family_of(folder, name, config)


def history_of(folder: Path) -> list[dict[str, Any]] | None:
    """Reads what `embedwright compress` has done to the model in a folder of ours or of the stock format, step by step.

    None if there is no history. If the last step claims an alignment that was recorded for other weights than those in
    the folder, the step `changed` is appended. Raises InputError for anything but objects of texts and numbers.
    """
    file = history_file(folder)
    history: list[dict[str, Any]] | None = read_object(file).get("history")
    steps = [] if history is None else history
    if not isinstance(steps, list) or not all(
        isinstance(step, dict) and all(isinstance(said, str | int | float) for said in step.values()) for step in steps
    ):
        raise InputError(f"{file}: history must be a list of objects, whose values are texts and numbers")
    # the digest is not kept: whoever saves the same weights again, in another type perhaps, writes theirs
    if steps and "aligned_with" in steps[-1] and steps[-1].pop(_ALIGNED, None) != weights_digest(weights_in(folder)):
        return [*steps, CHANGED]
    return history


def history_file(folder: Path) -> Path:
    """Returns the file that holds the history of a model in our own format or the stock one."""
    return folder / (STOCK_SETTINGS if (folder / STOCK_SETTINGS).is_file() else "config.json")


def seal_history(folder: Path) -> None:
    """Writes the digest of a new folder's weights into its last step, if that says that the model is aligned."""
    stored = read_object(history_file(folder))
    last = (stored.get("history") or [{}])[-1]
    if "aligned_with" in last and _ALIGNED not in last:
        last[_ALIGNED] = weights_digest(weights_in(folder))
        write_json(history_file(folder), stored)


def content_fingerprint(name: str, revision: str | None = None) -> str:
    """Hashes a model's files, and those of an adapter's base. The hash changes whenever the vectors may change.

    Nothing is loaded, so neither the device nor the version of a library plays a part. A hub id is known by its commit.
    """
    place = find(split_family(name)[1], revision)
    path, found = place.path, hashlib.sha256()
    if place.hub_id is not None:
        found.update(path.name.encode())
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in _CONTENT)
    for file in [] if place.hub_id is not None else files:
        found.update(f"{file.relative_to(path)} {sha256_of(file)}\n".encode())
    if is_adapter(path):
        stored = read_object(path / ADAPTER)
        found.update(content_fingerprint(str(stored.get("base_model_name_or_path")), stored.get("revision")).encode())
    return found.hexdigest()[:16]


def check_decoder(name: str) -> None:
    """Raises InputError if `name` is an embedder: read as a bare decoder it would lose its contract and pooling."""
    kind = _embedder_kind(name)
    if kind == "export":
        raise InputError(_EXPORTED.format(name=name))
    if kind == "known":
        raise InputError(
            f"{name} is an embedder, and as a bare decoder it would lose its text contract and pooling: "
            f"to train it on, write model: {{from: {name}}}"
        )
    if kind == "other":
        raise InputError(
            f"{name} is an embedder of sentence-transformers (modules.json), whose prompts and modules would be lost, "
            "and none that model: {from: ...} can train on: name the decoder that it was made from"
        )


def warn_of_embedder(name: str, revision: str | None = None) -> None:
    """Warns if `name`, asked for as a decoder, is an embedder. That may be meant: its weights are a decoder's too."""
    if kind := _embedder_kind(name, revision):
        keeps = "the folder that it was made from" if kind == "export" else "Embedder.load"
        log.warning("%s is an embedder: its text contract and pooling are left out; %s keeps them", name, keeps)


def check_embedder(name: str) -> None:
    """Raises InputError if `name` cannot be trained on: it is not an `Embedder`, or its weights are quantised."""
    kind = _embedder_kind(name)
    if kind == "export":
        raise InputError(_EXPORTED.format(name=name))
    if kind == "known" and is_quantized(detect(name)[0].path):
        raise InputError(f"{name}: {QUANTIZED}")
    if kind == "other":
        raise InputError(f"{name} has modules that only sentence-transformers runs: train it there")
    if kind is None:
        raise InputError(f"{name} is not an embedder: to make one from a decoder, write model: {{base: {name}}}")


def check_float(name: str, what: str) -> None:
    """Raises InputError, which says to `what` another model, if the weights of a model are quantised."""
    if is_quantized(detect(name)[0].path):
        raise InputError(f"{name} holds quantised weights: {what} the model that they were made from")


def is_quantized(folder: Path) -> bool:
    """Returns whether the weights of a model folder are quantised."""
    config = folder / "config.json"
    return config.is_file() and bool(read_object(config).get("quantization"))


def _embedder_kind(name: str, revision: str | None = None) -> Literal["known", "other", "export"] | None:
    """Returns `known` if it opens as an `Embedder`, `other` if only in sentence-transformers, None if it is none.

    A GGUF file of an embedder is an `export`, whose contract and pooling we do not read back.
    """
    path = find(split_family(name)[1], revision).path
    if path.is_file():
        return "export" if is_gguf_export(path) else None
    place, form = detect(name, revision)
    if form is not None:
        return "known"
    return "other" if (place.path / "modules.json").is_file() else None
