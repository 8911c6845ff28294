"""What an embedder on disk is, told without its weights: its decoder's config, pooling, contract and tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import AutoConfig

from embedwright.errors import InputError, blaming
from embedwright.locate import fetch_weights, find
from embedwright.model.backbone import decoder_config, set_attention, stock_config
from embedwright.model.formats.adapter import read_settings
from embedwright.model.formats.base import resolve_base
from embedwright.model.formats.families import Family, contract_of, said
from embedwright.model.formats.folder import ADAPTER, read_object
from embedwright.model.formats.nvembed import read_nvembed
from embedwright.model.formats.storage import STOCK_SETTINGS, look, setting
from embedwright.model.pooling import PoolingConfig
from embedwright.text import Contract, load_tokenizer

_CONTENT = (".json", ".safetensors", ".model")  # suffixes of what a model is made of


class Outline(NamedTuple):
    decoder: Any
    pooling: PoolingConfig
    contract: Contract
    tokenizer: Any


def outline(name: str, revision: str | None = None) -> Outline:
    """Of a folder or hub id that `Embedder.load` opens. Of an adapter folder, the base is looked at too."""
    place, form = look(name, revision)
    folder = place.path
    if isinstance(form, Family):
        tokenizer = load_tokenizer(folder)
        decoder = decoder_config(str(folder), attention=form.attention)
        contract = contract_of(folder, form, tokenizer.backend_tokenizer)
        return Outline(decoder, PoolingConfig(kind=form.pooling), contract, tokenizer)
    if form == "nvembed":
        found = read_nvembed(fetch_weights(place))
        return Outline(found.decoder, found.pooling, found.contract, found.tokenizer)
    if form == "adapter":
        return _of_adapter(folder)
    tokenizer = load_tokenizer(folder)
    file = folder / ("config.json" if form == "ours" else STOCK_SETTINGS)
    stored = read_object(file)
    if form == "ours":
        with blaming(f"{file}: backbone", "is no config of a decoder"):
            decoder = AutoConfig.for_model(**stored["backbone"])
    else:
        decoder = stock_config(folder)
        set_attention(decoder, "causal" if getattr(decoder, "is_causal", True) else "bidirectional")
    return Outline(
        decoder,
        setting(file, stored, "pooling", PoolingConfig),
        setting(file, stored, "contract", Contract),
        tokenizer,
    )


def _of_adapter(folder: Path) -> Outline:
    stored, ours = read_settings(folder)
    base, revision = stored["base_model_name_or_path"], stored.get("revision")
    if ours is None or ours["decoder"] is None:
        return outline(base, revision)
    decoder = resolve_base(base, revision, weights=False)
    return Outline(
        decoder_config(decoder, **ours["decoder"]),
        PoolingConfig.model_validate(ours["pooling"]),
        Contract.model_validate(ours["contract"]),
        load_tokenizer(decoder),
    )


def content_fingerprint(name: str, revision: str | None = None) -> str:
    """Of the files of a model, and of an adapter's base: another one where what it reads or computes may differ.

    The files are hashed before anything is loaded, so neither device nor version of a library plays a part. A hub id is
    known by its commit.
    """
    place = find(said(name)[1], revision)
    path, found = place.path, hashlib.sha256()
    if place.hub_id is not None:
        found.update(path.name.encode())
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in _CONTENT)
    for file in [] if place.hub_id is not None else files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        found.update(f"{file.relative_to(path)} {digest}\n".encode())
    if (path / ADAPTER).is_file():
        stored = read_object(path / ADAPTER)
        found.update(content_fingerprint(str(stored.get("base_model_name_or_path")), stored.get("revision")).encode())
    return found.hexdigest()[:16]


def check_decoder(name: str) -> None:
    """InputError where `name` is an embedder: read as a bare decoder it would lose its contract and pooling."""
    kind = _embedder_kind(name)
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


def check_embedder(name: str) -> None:
    """InputError where `name` is nothing that `Embedder.load` opens."""
    kind = _embedder_kind(name)
    if kind == "other":
        raise InputError(f"{name} has modules that only sentence-transformers runs: train it there")
    if kind is None:
        raise InputError(f"{name} is no embedder: to make one from a decoder, write model: {{base: {name}}}")


def _embedder_kind(name: str) -> Literal["known", "other"] | None:
    """`known` opens as an `Embedder`, `other` in sentence-transformers alone; None is no embedder."""
    if find(said(name)[1]).path.is_file():
        return None
    place, form = look(name)
    if form is not None:
        return "known"
    return "other" if (place.path / "modules.json").is_file() else None
