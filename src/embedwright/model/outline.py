"""What an embedder on disk is, told without its weights: its decoder's config, pooling, contract and tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import snapshot_download
from transformers import AutoConfig

from embedwright.errors import InputError
from embedwright.model import adapter_folder
from embedwright.model.backbone import decoder_config, resolve_base, set_attention
from embedwright.model.families import Family, contract_of, said
from embedwright.model.locate import local, packaged, text_of
from embedwright.model.nvembed import read_nvembed
from embedwright.model.pooling import PoolingConfig
from embedwright.model.storage import FILES, form_of
from embedwright.text import Contract, load_tokenizer


class Outline(NamedTuple):
    decoder: Any
    pooling: PoolingConfig
    contract: Contract
    tokenizer: Any


def outline(name: str) -> Outline:
    """Of a folder or hub id that `Embedder.load` opens. Of an adapter folder, the base is looked at too."""
    family, where = said(name)
    folder = local(where) or Path(snapshot_download(where, allow_patterns=FILES))
    form = family or form_of(folder, where)
    if isinstance(form, Family):
        tokenizer = load_tokenizer(folder)
        decoder = decoder_config(str(folder), attention=form.attention)
        contract = contract_of(folder, form, tokenizer.backend_tokenizer)
        return Outline(decoder, PoolingConfig(kind=form.pooling), contract, tokenizer)
    if form == "nvembed":
        found = read_nvembed(folder)
        return Outline(found.decoder, found.pooling, found.contract, found.tokenizer)
    if form == "adapter":
        return _of_adapter(folder)
    tokenizer = load_tokenizer(folder)
    stored = _json(folder / ("config.json" if form == "ours" else "embedwright.json"))
    if form == "ours":
        decoder = AutoConfig.for_model(**stored["backbone"])
    else:
        decoder = AutoConfig.from_pretrained(folder)
        set_attention(decoder, "causal" if decoder.is_causal else "bidirectional")
    return Outline(
        decoder,
        PoolingConfig.model_validate(stored["pooling"]),
        Contract.model_validate(stored["contract"]),
        tokenizer,
    )


def _of_adapter(folder: Path) -> Outline:
    base = _json(folder / adapter_folder.CONFIG)["base_model_name_or_path"]
    ours = _json(folder / "embedwright.json") if (folder / "embedwright.json").is_file() else None
    if ours is None or ours["decoder"] is None:
        return outline(base)
    decoder = resolve_base(base)
    return Outline(
        decoder_config(decoder, **ours["decoder"]),
        PoolingConfig.model_validate(ours["pooling"]),
        Contract.model_validate(ours["contract"]),
        load_tokenizer(decoder),
    )


def content_fingerprint(name: str) -> str:
    """Of the files of an embedder, and of an adapter's base: another one where what it reads or computes may differ."""
    _, where = said(name)
    folder = local(where) or Path(snapshot_download(where, allow_patterns=FILES))
    found = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".model")):
        with file.open("rb") as stream:
            found.update(f"{file.relative_to(folder)} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    if (folder / adapter_folder.CONFIG).is_file():
        base = str(_json(folder / adapter_folder.CONFIG)["base_model_name_or_path"])
        if (path := local(base)) is not None and path.is_dir():
            found.update(content_fingerprint(base).encode())
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
    family, where = said(name)
    path = packaged(where) or local(where)
    if path is not None and path.is_file():
        return None
    if family or form_of(path or where, where):
        return "known"
    return None if text_of(path or where, "modules.json") is None else "other"


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
