"""Reads and writes the files of model folders, checked: a folder may come from anyone.

Every format goes through `check_folder` and `weights_in` before a model is built. They read only the headers of
safetensors files, which hold names, shapes and types. Weights are read and written one file at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from embedwright.errors import InputError, NotFoundError
from embedwright.files import write_json
from embedwright.fingerprint import tensor_digest

SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"

# All that `Embedder.save` may write, in any form and with the tokenizer of any class: patterns of paths in the folder.
SAVED = (
    *(SINGLE, INDEX, "model-*-of-*.safetensors", "config.json", "generation_config.json", "embedwright.json"),
    *(ADAPTER, "adapter_model.safetensors", "base_samples.safetensors", "selftest.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("1_Pooling/config.json", "2_Normalize/config.json"),
)

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d{1,9})\.")
# Suffixes of the files that a model is read from
_READ = {".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken"}
_OBJECTS = (  # JSON files that must hold an object, wherever they are
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "embedwright.json",
    ADAPTER,
)
_FLOATS = {"F64", "F32", "F16", "BF16"}


class Stored(NamedTuple):
    """One tensor of a safetensors file; `dtype` as safetensors writes it, such as `BF16`."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, rows: int | None = None) -> Tensor:
        """Reads the tensor, or only its first rows."""
        with safe_open(self.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(self.name) if rows is None else opened.get_slice(self.name)[:rows]
        return tensor


def read_json(file: Path) -> Any:
    """Reads a JSON file. Raises InputError if it is broken, NotFoundError if it is missing."""
    if not file.is_file():
        raise NotFoundError(f"{file} does not exist")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {error}") from None


def read_object(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file. Raises InputError if the file holds something else."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content


def is_adapter(folder: Path) -> bool:
    """Returns whether the folder holds adapters in peft's format, not a whole model."""
    return (folder / ADAPTER).is_file()


def check_folder(folder: Path) -> None:
    """Checks all files from which a model is read, but no weights.

    Raises InputError if a file is a link out of the folder, no regular file or broken JSON, where a setting names files
    elsewhere, and where an adapter lies beside a whole model. Links of the hub's cache into its `blobs` are allowed.
    """
    for part in [folder, *_modules(folder / "modules.json")]:
        for file in sorted(part.iterdir()) if part.is_dir() else ():
            if file.suffix in _READ and not file.name.startswith("."):
                _check_file(folder, file)
                if file.name in _OBJECTS:
                    read_object(file)
    config = folder / "config.json"
    if config.is_file() and "transformers_weights" in (settings := read_object(config)):
        raise InputError(
            f"{config}: transformers_weights={settings['transformers_weights']!r} is not supported: "
            f"weights are read from {SINGLE} or from the files of {INDEX}"
        )
    whole = [name for name in (SINGLE, INDEX) if (folder / name).exists()]
    if (folder / ADAPTER).exists() and whole:
        raise InputError(
            f"{folder} holds {ADAPTER} beside {whole[0]}, so it is not clear whether it is an adapter or a whole "
            "model: move one of them away"
        )


def weights_in(folder: Path) -> dict[str, Stored]:
    """Maps the name of each tensor in a model folder to its file, shape and type.

    The weights are `model.safetensors`, or the files that `model.safetensors.index.json` names: exactly one of the two.
    Raises InputError if the index names files outside of the folder, where shards and index disagree, and where a file
    is not whole. Raises NotFoundError if a file is missing. Safetensors files of other names are ignored.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise InputError(
            f"{folder} holds both {SINGLE} and {INDEX}, so two models: move the one away that is not meant"
        )
    places = _weight_map(index) if index.exists() else None
    files = [SINGLE] if places is None else sorted(set(places.values()))
    if missing := [name for name in files if not (folder / name).is_file()]:
        hint = f"which {INDEX} names" if places is not None else f"and no {INDEX}"
        raise NotFoundError(f"{folder} has no {', '.join(missing)}, {hint}")
    stray = sorted(file.name for file in folder.iterdir() if _SHARD.fullmatch(file.name) and file.name not in files)
    if stray:
        told = INDEX if places is not None else SINGLE
        raise InputError(f"{folder} holds {stray[0]}, which is not part of the model in {told}: move it away")
    found: dict[str, Stored] = {}
    for name in files:
        for tensor, stored in tensors_of(folder / name).items():
            if places is not None and places.get(tensor) != name:
                other = f"puts it into {places[tensor]}" if tensor in places else "does not name it"
                raise InputError(f"{folder}: {tensor} is in {name}, but {INDEX} {other}")
            found[tensor] = stored
    if lost := sorted((places or {}).keys() - found.keys()):
        raise InputError(f"{folder}: {INDEX} puts {lost[0]} into {(places or {})[lost[0]]}, which does not hold it")
    if not found:
        raise InputError(f"{folder}: there are no tensors in {', '.join(files)}")
    return found


def weights_digest(stored: Mapping[str, Stored]) -> str:
    """Digests names, shapes, types and bytes, however they are split into files, in our own format or the stock one."""

    def part(tensor: Stored) -> tuple[str, list[int], str, str]:
        return tensor.name.removeprefix("backbone."), list(tensor.shape), tensor.dtype, tensor_digest(tensor.read())

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = sorted(pool.map(part, stored.values()))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def read_tensors(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) for each of these tensors. Opens each file once."""
    for file in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(name for name in stored if stored[name].file == file):
                yield name, opened.get_tensor(name)


def write_weights(folder: Path, planned: dict[str, Tensor], make: Callable[[str], Tensor], shard_size: str) -> None:
    """Writes `model.safetensors`, or shards of at most `shard_size` such as "5GB" with their index.

    `planned` holds each tensor's shape and type on the meta device. `make(name)` computes a tensor when its file is
    written, so that memory holds one file at a time.
    """
    plan = split_torch_state_dict_into_shards(
        planned, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        save_file({name: make(name) for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def check_places(where: Path, own: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises InputError if `found` has other names or shapes than `own`, the parameters of the model."""
    for what, names in (
        ("missing", own.keys() - found.keys()),
        ("unexpected", found.keys() - own.keys()),
        (
            "of another shape than the model's",
            {name for name in own.keys() & found.keys() if tuple(own[name].shape) != tuple(found[name].shape)},
        ),
    ):
        if names:
            raise InputError(f"{where}: {len(names)} tensors are {what}, e.g. {', '.join(sorted(names)[:3])}")


def check_floats(stored: dict[str, Stored], names: Iterable[str] | None = None) -> None:
    """Raises InputError if one of these tensors (None: any) is not stored as floating-point numbers."""
    for name in stored if names is None else names:
        if stored[name].dtype not in _FLOATS:
            kinds = ", ".join(sorted(_FLOATS))
            raise InputError(f"{stored[name].file}: {name} is stored as {stored[name].dtype}, not as one of {kinds}")


def check_layers(stored: dict[str, Stored], config: dict[str, Any], where: Path) -> None:
    """Raises InputError, before a model is built, if its config asks for more layers than the tensors have."""
    asked = config.get("num_hidden_layers")
    held = {int(found[1]) for name in stored if (found := _LAYER.search(name))}
    if isinstance(asked, int) and held and asked > max(held) + 1:
        raise InputError(f"{where} says num_hidden_layers={asked}, but has weights for only {max(held) + 1} layers")


def tensors_of(file: Path) -> dict[str, Stored]:
    """Does what `weights_in` does for one safetensors file.

    Raises InputError if it is not whole, or a link out of its folder.
    """
    if not file.exists():
        raise NotFoundError(f"{file} does not exist")
    _check_file(file.parent, file)
    try:
        with safe_open(file, framework="pt") as opened:
            pieces = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
            return {name: Stored(file, name, tuple(p.get_shape()), str(p.get_dtype())) for name, p in pieces.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file: {error}") from None


def _weight_map(index: Path) -> dict[str, str]:
    """Maps each tensor to the name of a file beside the index."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index}: weight_map must name the file of every tensor")
    for tensor, name in places.items():
        plain = isinstance(name, str) and not re.search(r"[/\\:\0]", name) and not name.startswith(".")
        if not plain or not name.endswith(".safetensors"):
            raise InputError(f"{index}: {tensor} is in {name!r}, which is not a .safetensors file of this folder")
    return places


def _check_file(folder: Path, file: Path) -> None:
    real = Path(os.path.realpath(file))
    home = Path(os.path.realpath(folder))
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(place) for place in allowed):
        raise InputError(f"{file} is a link to {real}, outside of its folder: copy the file into the folder")
    if not real.exists():
        raise NotFoundError(f"{file} is a link to {real}, which does not exist")
    if not stat.S_ISREG(real.stat().st_mode):
        raise InputError(f"{file} is not a regular file")


def _modules(file: Path) -> list[Path]:
    """Returns the folders that sentence-transformers' modules.json names. Raises InputError if one of them lies
    elsewhere.
    """
    if not file.exists():
        return []
    _check_file(file.parent, file)
    modules = read_json(file)
    if not isinstance(modules, list):
        raise InputError(f"{file} must hold a list of modules")
    folders = []
    for module in modules:
        path, kind = (module.get(key) if isinstance(module, dict) else None for key in ("path", "type"))
        if not isinstance(path, str) or not isinstance(kind, str):
            raise InputError(f"{file}: every module needs a path and a type, not {module!r}")
        if Path(path).is_absolute() or ".." in Path(path).parts or "\\" in path:
            raise InputError(f"{file}: the module path {path!r} leaves the folder")
        if path not in ("", "."):
            folders.append(file.parent / path)
    return folders
