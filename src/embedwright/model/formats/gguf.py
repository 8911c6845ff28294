"""Converts GGUF files of llama.cpp, once each, to a Hugging Face folder in the cache.

transformers reads them, but drops a tensor that it cannot place, makes up one that is missing, and may take settings
from files beside it. So the file is opened in a folder of its own, and its numbers are counted.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from embedwright.cache import cache_folder
from embedwright.errors import InputError, MissingPackageError, OutputExistsError, as_input_error
from embedwright.files import locked, sha256_of, whole_folder, write_json
from embedwright.model.backbone import check_report
from embedwright.text import load_tokenizer

logger = logging.getLogger(__name__)

_MADE = "conversion.json"  # in a converted folder: size, time and digest of each of its files
_HEAD = ("output.weight", "output.bias")  # the LM head, which an embedder does not need


def convert_gguf(file: Path) -> Path:
    """Returns the cached Hugging Face folder (float32) of a GGUF file, and converts the file on first use.

    A damaged conversion is made again. Raises InputError if the file lacks weights or holds weights that have no place.
    """
    out = cache_folder("gguf", f"{file.stem}-{sha256_of(file)[:16]}")
    if _is_whole(out):
        return out
    with locked(out.with_name(f".{out.name}.lock")):  # one process converts, the others wait for the folder
        if out.exists():
            if _is_whole(out):
                return out
            logger.warning("%s is damaged: it is made again", out)
            shutil.rmtree(out, ignore_errors=True) if out.is_dir() else out.unlink()
        logger.info("converting %s to %s (once)", file.name, out)
        model, tokenizer = _read(file)
        try:
            with whole_folder(out) as temp:
                model.save_pretrained(temp)
                tokenizer.save_pretrained(temp)
                made = {path.name: _state(path) | {"sha256": sha256_of(path)} for path in temp.iterdir()}
                write_json(temp / _MADE, made)
        except OutputExistsError:  # another process has made it meanwhile
            if not _is_whole(out):
                raise
    return out


def _read(file: Path) -> tuple[Any, Any]:
    """Reads model and tokenizer. InputError unless the file holds every weight of the model and no others."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report is read below
    try:
        with TemporaryDirectory() as alone, as_input_error(file, "is not a GGUF file that can be opened"):
            link = Path(alone) / "model.gguf"
            link.symlink_to(file.resolve())
            held = _tensors(link)
            loaded, info = AutoModel.from_pretrained(
                alone,
                gguf_file=link.name,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, then refused by name
                local_files_only=True,
                trust_remote_code=False,
            )
            tokenizer = load_tokenizer(alone, gguf_file=link.name)
    finally:
        transformers_logging.set_verbosity(verbosity)
    check_report(file, info)
    placed = sum(parameter.numel() for parameter in loaded.parameters())
    body = {name: size for name, size in held.items() if name not in _HEAD}
    if sum(body.values()) != placed:
        raise InputError(
            f"{file} holds {sum(body.values()):,} numbers, and a {loaded.config.model_type!r} model of its settings "
            f"has place for {placed:,}: transformers cannot read all of this file ({_odd(body)})"
        )
    # transformers refuses to save what it loaded from GGUF: the weights go into a fresh model of the same config
    del loaded.config.quantization_config
    fresh = AutoModel.from_config(loaded.config, dtype=torch.float32, trust_remote_code=False)
    fresh.load_state_dict(loaded.state_dict())
    return fresh, tokenizer


def _tensors(file: Path) -> dict[str, int]:
    """Maps the name of each tensor in the file to its number of elements."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingPackageError("a .gguf file needs the package gguf: pip install gguf") from None
    return {tensor.name: int(tensor.n_elements) for tensor in GGUFReader(file).tensors}


def _odd(names: dict[str, int]) -> str:
    """Names up to three tensors outside of the usual layers: as a rule, these have no place."""
    usual = ("blk.", "token_embd.", "output_norm.")
    return ", ".join(sorted(name for name in names if not name.startswith(usual))[:3]) or "more layers than it says"


def _is_whole(folder: Path) -> bool:
    """Returns whether the folder holds exactly the files that were written, by size and time or else by content."""
    try:
        made = json.loads((folder / _MADE).read_text(encoding="utf-8"))
        return {path.name for path in folder.iterdir()} == {_MADE, *made} and all(
            _state(folder / name) == {key: state[key] for key in ("bytes", "changed")}
            or sha256_of(folder / name) == state["sha256"]
            for name, state in made.items()
        )
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False


def _state(file: Path) -> dict[str, int]:
    found = file.stat()
    return {"bytes": found.st_size, "changed": found.st_mtime_ns}
