"""Writes a model in the layout of the released NV-Embed folders, for programs that read this layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedwright.errors import InputError
from embedwright.files import check_new_folder, whole_folder, write_json
from embedwright.model.adapters.lora import has_lora
from embedwright.model.embedder import Embedder
from embedwright.model.formats.folder import write_weights
from embedwright.model.formats.nvembed import LENGTHS, check_released, released_contract, released_name, sizes
from embedwright.model.pooling import FOLDED, FoldedLatent
from embedwright.model.verify import probe

_SHARD = "5GB"
# What transformers writes into every config, or sets itself: no property of the weights.
_NOT_COMPARED = {"_name_or_path", "architectures", "dtype", "transformers_version"}


def export_nvembed(model: Embedder, path: str | Path) -> None:
    """Writes a new folder in the released layout, with the weights in the type of the release.

    `model` was opened from such a folder, and may have been tuned. The small JSON files are those of the release. Its
    two Python files are not written: copy them if remote code is to open the folder. Needs memory for one shard (5 GB)
    beside the model. Raises OutputExistsError if the folder is not empty. Raises InputError for what the layout cannot
    express, and for a weight that overflows the stored type, naming it. Raises ProbeError for a model that is not
    sound.
    """
    check_new_folder(path)
    released = _check_expressible(model)
    probe.check(model.network)
    with whole_folder(path) as temp:
        _write_weights(model, getattr(torch, released["dtype"]), temp)
        _write_tokenizer(model.own_tokenizer, temp)
        lengths = {**released["files"].get(LENGTHS, {}), "max_seq_length": model.max_tokens}
        for name, content in {**released["files"], LENGTHS: lengths}.items():
            write_json(temp / name, content)


def _check_expressible(model: Embedder) -> dict[str, Any]:
    """Returns the `released` part of the config.

    Raises InputError if a reader of the layout would build another model.
    """
    network = model.network
    if isinstance(network.head, FoldedLatent):
        raise InputError(FOLDED)
    if has_lora(network.backbone):
        raise InputError("LoRA adapters are not merged, and the layout has no place for them: merge them first")
    if network.pooling.kind != "latent":
        raise InputError(f"pooling is {network.pooling.kind!r}: the layout knows 'latent' alone")
    if network.backbone.config.model_type != "mistral":
        raise InputError(
            f"the decoder is a {network.backbone.config.model_type!r} model: the layout knows Mistral alone"
        )
    _same(
        "the text contract",
        model.contract.model_dump(),
        released_contract(model.own_tokenizer, model.max_tokens).model_dump(),
    )
    released = check_released(network.config.released)
    shapes = {released_name(name): tuple(p.shape) for name, p in network.named_parameters()}
    decoder, pooling = sizes(released["files"]["config.json"], shapes)
    _same("the decoder", network.backbone.config.to_dict(), decoder.to_dict())
    _same("the pooling block", network.pooling.model_dump(), pooling.model_dump())
    return released


def _same(what: str, own: dict[str, Any], read: dict[str, Any]) -> None:
    for key in sorted((own.keys() | read.keys()) - _NOT_COMPARED):
        if own.get(key) != read.get(key):
            raise InputError(
                f"the layout cannot express {what}: {key} is {own.get(key)!r}, but would be read as {read.get(key)!r}"
            )


def _write_weights(model: Embedder, dtype: torch.dtype, folder: Path) -> None:
    weights = {released_name(name): parameter.detach() for name, parameter in model.network.named_parameters()}
    planned = {name: torch.empty_like(weight, dtype=dtype, device="meta") for name, weight in weights.items()}
    write_weights(folder, planned, lambda name: _cast(name, weights[name], dtype), _SHARD)


def _cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    cast = weight.to("cpu", dtype).contiguous()
    if not cast.isfinite().all():
        largest = float(weight.abs().max())
        raise InputError(f"{name} does not fit {dtype}: its largest value is {largest:.4g}")
    return cast


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes tokenizer.json with merges as strings, as in the release: tokenizers before 0.20 read nothing else."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = content["model"].get("merges", [])
    if not any(" " in piece for pair in merges for piece in pair):
        content["model"]["merges"] = [" ".join(pair) for pair in merges]
    write_json(folder / "tokenizer.json", content)
