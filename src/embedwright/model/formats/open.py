"""Opens an embedder of any format that we read: its outline from the settings, or all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from embedwright.config import Model, validate
from embedwright.errors import InputError, NotFoundError, as_input_error
from embedwright.locate import fetch_weights
from embedwright.model.adapters.lora import has_lora, merge_lora
from embedwright.model.backbone import decoder_config, load_backbone, origin_of, set_attention, stock_config
from embedwright.model.formats.adapter import read_adapter, read_settings
from embedwright.model.formats.base import Outline, build_network, check_weights, resolve_base
from embedwright.model.formats.detect import STOCK_SETTINGS, Format, detect, history_of, is_quantized
from embedwright.model.formats.families import FAMILIES, Family, read_family, split_family
from embedwright.model.formats.folder import check_folder, read_object
from embedwright.model.formats.nvembed import load_nvembed, read_nvembed
from embedwright.model.network import EmbedwrightModel, scheme_of
from embedwright.model.pooling import LatentPooling, PoolingConfig, fold_by_config
from embedwright.model.quantized import compute_in_float32, quantize_layers
from embedwright.model.verify import selftest
from embedwright.packing import pack
from embedwright.text import Contract, TextTokenizer, load_tokenizer, tokenize


def outline(name: str, revision: str | None = None) -> Outline:
    """Reads the settings of an embedder, and of an adapter's base, without weights."""
    place, form = detect(name, revision)
    if form == "nvembed":
        return read_nvembed(fetch_weights(place)).outline
    if form == "adapter":
        return _outline_of_adapter(place.path)
    return _outline(place.path, form)


def open_embedder(
    path: str | Path, *, dtype: torch.dtype | None, revision: str | None = None
) -> tuple[EmbedwrightModel, Any]:
    """Reads the network and the tokenizer of an embedder; `dtype` None keeps the stored type. See `Embedder.load`.

    The network's `config.name_or_path` is the local folder that was read. Raises InputError if the folder is not an
    embedder, lacks weights, or holds files that do not belong together.
    """
    place, form = detect(str(path), revision)
    folder = place.path
    if form is not None and place.hub_id is not None:
        check_folder(fetch_weights(place))
    if form == "adapter":
        network, tokenizer = read_adapter(folder, dtype, open_embedder)
    elif form == "nvembed":
        network, tokenizer = load_nvembed(folder, dtype)
    else:
        decoder, pooling, contract, tokenizer = _outline(folder, form)
        check_weights(folder)
        if dtype is not None and form == "ours" and is_quantized(folder):
            raise InputError(f"{folder} holds quantised weights, which are opened as they are: leave dtype out")
        if form == "ours":
            with as_input_error(folder):
                network = EmbedwrightModel.from_pretrained(
                    folder, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False
                )
        else:
            backbone = load_backbone(str(folder), decoder, dtype or decoder.dtype or torch.float32)
            network = build_network(backbone, pooling, contract)
    if form in ("ours", "stock") and (history := history_of(folder)) is not None:
        network.config.history = history
    network.config.name_or_path = str(folder)
    if network.origin is None:  # that of an adapter is its base's
        kind: Any = "whole" if form in ("ours", "nvembed") else "stock"
        origin = origin_of(place.hub_id or folder, network.backbone, kind, place.revision, network.head)
        prefix = str(path).removesuffix(split_family(str(path))[1])
        network.origin = replace(origin, name=f"{prefix}{origin.name}")
    return network, tokenizer


def check_record(network: EmbedwrightModel, tokenizer: TextTokenizer, path: str | Path, revision: str | None) -> None:
    """Raises ProbeError if a network that was read from `path` does not give the vectors on record there."""
    reload = lambda kept: open_embedder(path, dtype=kept, revision=revision)[0]  # noqa: E731
    selftest.check(network, tokenizer, Path(network.config.name_or_path), reload)


def open_in_int8(path: str | Path, revision: str | None) -> tuple[EmbedwrightModel, Any]:
    """Reads an embedder as it is stored, proves it (`selftest`), and quantises the linear layers of its blocks to int8.

    Adapters are merged before, in float32, and a latent block is folded after, as in a folder that `compress` writes.
    A folder in int8 is opened as it is, and one in 4 bits refused. Raises as `open_embedder` and `check_record`.
    """
    network, tokenizer = open_embedder(path, dtype=None, revision=revision)
    if (scheme := scheme_of(network)) is not None and scheme.bits != 8:
        raise InputError(f"{path} holds weights in {scheme.bits} bits, which are opened as they are: leave dtype out")
    texts = TextTokenizer(tokenizer.backend_tokenizer)
    check_record(network, texts, path, revision)
    if scheme is not None:
        return network, tokenizer
    if has_lora(network.backbone):
        network.backbone.float()
        merge_lora(network, pack(tokenize(texts, network.contract, [text for text, _ in selftest.TEXTS])))
    quantize_layers(network)
    compute_in_float32(network)
    if {parameter.dtype for parameter in network.head.parameters()} == {torch.float16}:
        network.head.bfloat16()
    if isinstance(network.head, LatentPooling):
        network.head = fold_by_config(network.head)
    for parameter in network.parameters():  # what still lies in the file would keep all of it in memory
        parameter.data = parameter.data.clone()
    return network, tokenizer


def _outline(folder: Path, form: Format | Family | None) -> Outline:
    """Reads a folder in our own format, the stock format or that of a family. None, no embedder, is an error."""
    if isinstance(form, Family):
        return read_family(folder, form)
    if form is None:
        if not (folder / "config.json").is_file():
            raise NotFoundError(f"{folder} has no config.json: not a model folder")
        raise InputError(
            f"{folder} is not an embedder that we know: use Embedder.from_decoder for a base model, and write one of "
            f"{', '.join(f'{family}:' for family in FAMILIES)} in front of the name of an embedder of that family"
        )
    file = folder / ("config.json" if form == "ours" else STOCK_SETTINGS)
    stored = read_object(file)
    pooling = _setting(file, stored, "pooling", PoolingConfig)
    contract = _setting(file, stored, "contract", Contract)
    if form == "ours":
        with as_input_error(f"{file}: backbone", "is not a decoder config"):
            decoder = AutoConfig.for_model(**stored["backbone"])
        _check_one_length(file, contract)
    else:
        decoder = stock_config(folder)
        set_attention(decoder, "causal" if getattr(decoder, "is_causal", True) else "bidirectional")
    _check_prompts(file, contract)
    return Outline(decoder, pooling, contract, load_tokenizer(folder))


def _check_one_length(file: Path, contract: Contract) -> None:
    """Raises InputError if the tokenizer cuts texts elsewhere: other programs know of no contract.

    sentence-transformers writes a `max_seq_length` that was set there into the tokenizer's settings alone.
    """
    beside = file.with_name("tokenizer_config.json")
    length = (read_object(beside) if beside.is_file() else {}).get("model_max_length", contract.max_tokens)
    if length != contract.max_tokens:
        raise InputError(
            f"{file}: contract.max_tokens is {contract.max_tokens}, and model_max_length in {beside.name} {length}: a "
            "text would have two vectors. Write the length that is meant into both"
        )


def _check_prompts(file: Path, contract: Contract) -> None:
    """Raises InputError if sentence-transformers puts another string in front of a text: a user may set one there.

    A model without an instruction of its own has no query prompt that one could contradict.
    """
    beside = file.with_name("config_sentence_transformers.json")
    said = read_object(beside) if beside.is_file() else {}
    prompts = said.get("prompts") or {}
    theirs = {f"prompts.{side}": prompt or "" for side, prompt in prompts.items()}
    if "default_prompt_name" in said:
        theirs["default_prompt_name"] = prompts.get(said["default_prompt_name"]) or ""
    own = dict.fromkeys(("prompts.document", "default_prompt_name"), contract.document_template)
    if contract.default_task or "{task}" not in contract.query_template:
        own["prompts.query"] = contract.prefix(contract.default_task)
    for key, prompt in own.items():
        if theirs.get(key, prompt) != prompt:
            raise InputError(
                f"{beside}: {key} puts {theirs[key]!r} in front of a text, and the contract in {file.name} {prompt!r}: "
                "a text would have two vectors. Write the prompt that is meant into both"
            )


def _outline_of_adapter(folder: Path) -> Outline:
    settings = read_settings(folder)
    ours = settings.ours
    if ours is None or ours.decoder is None:
        return outline(settings.base, settings.revision)
    base = resolve_base(settings.base, settings.revision, weights=False)
    return Outline(decoder_config(base, **ours.decoder), ours.pooling, ours.contract, load_tokenizer(base))


def _setting(file: Path, settings: dict[str, Any], part: str, kind: type[Model]) -> Model:
    if not isinstance(settings.get(part), dict):
        raise InputError(f"{file}: {part} is missing")
    return validate(kind, settings[part], f"{file}: {part}")
