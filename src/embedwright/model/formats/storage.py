"""Models on disk: safetensors and JSON only, written whole or not at all.

`mean` and `last`: a stock Hugging Face backbone with sentence-transformers' own modules, which opens without this
package. Others: one `EmbedwrightModel` folder, which sentence-transformers and AutoModel open once this package is
imported (design, section 7). `embedwright.json` holds the contract in the first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import processors

from embedwright.config import Model, validate
from embedwright.errors import InputError, NotFoundError, blaming
from embedwright.files import check_new_folder, whole_folder, write_json
from embedwright.locate import Place, fetch_weights, find
from embedwright.model.adapters.fourbit import ONLY_TRAINED, in_four_bits
from embedwright.model.adapters.lora import has_lora
from embedwright.model.backbone import READ_BY_FLAG, load_backbone, origin_of, set_attention, stock_config
from embedwright.model.formats import adapter as adapter_folder
from embedwright.model.formats.base import check_weights
from embedwright.model.formats.families import FAMILIES, Family, load_family, recognised, said
from embedwright.model.formats.folder import ADAPTER, check_floats, check_folder, check_layers, read_object, weights_in
from embedwright.model.formats.nvembed import is_nvembed, load_nvembed
from embedwright.model.interop import tokenizer as door
from embedwright.model.network import EmbedwrightConfig, EmbedwrightModel
from embedwright.model.pooling import PoolingConfig
from embedwright.model.verify import probe, selftest
from embedwright.text import Contract, TextTokenizer, load_tokenizer, private_copy, tokenize

_BOUNDARY_PROBES = ("word", "Word", "2 words", "(x)", "été", "漢字", "_name", "-1", "a\nb")

STOCK_SETTINGS = "embedwright.json"  # contract and pooling, in a folder of the stock form

Form = Literal["adapter", "nvembed", "ours", "stock"]


def save(network: EmbedwrightModel, tokenizer: Any, path: Path) -> None:
    """See `Embedder.save`."""
    check_new_folder(path)
    if in_four_bits(network.backbone):
        raise InputError(f"cannot save: {ONLY_TRAINED}")
    probe.check(network)
    text_tokenizer = TextTokenizer(tokenizer.backend_tokenizer)
    with whole_folder(path) as temp:
        if has_lora(network.backbone):
            adapter_folder.write(network, temp)
        elif opens_as_stock(network, text_tokenizer):
            _save_stock(network, tokenizer, temp)
        else:
            _save_ours(network, tokenizer, temp)
        selftest.write(network, text_tokenizer, temp)


def load(path: str | Path, *, dtype: torch.dtype | None, revision: str | None = None) -> tuple[EmbedwrightModel, Any]:
    """See `Embedder.load`; the network's `config.name_or_path` is the local folder that was read.

    InputError where the folder is not an embedder, lacks weights, or holds what does not belong together.
    """
    place, form = look(str(path), revision)
    if form is not None and place.hub_id is not None:
        check_folder(fetch_weights(place))
    network, tokenizer = _open(place.path, form, dtype)
    network.config.name_or_path = str(place.path)
    if network.origin is None:  # an adapter says itself where its base is
        base = str(path).removesuffix(said(str(path))[1]) + (place.hub_id or str(place.path.resolve()))
        kind: Any = "whole" if form in ("ours", "nvembed") else "stock"
        network.origin = origin_of(base, network.backbone, kind, place.revision)
    return network, tokenizer


def look(name: str, revision: str | None = None) -> tuple[Place, Form | Family | None]:
    """Where the model of this name lies, its settings checked, and its form; None for what is no `Embedder`.

    Of a hub id the weights are still to be fetched. InputError for a file.
    """
    family, where = said(name)
    place = find(where, revision)
    if not place.path.is_dir():
        raise InputError(f"{name} is a file of weights, not an embedder: use Embedder.from_decoder")
    check_folder(place.path)
    return place, family or form_of(place.path, place.hub_id or where)


def _open(folder: Path, form: Form | Family | None, dtype: torch.dtype | None) -> tuple[EmbedwrightModel, Any]:
    if form == "adapter":
        return adapter_folder.read(folder, dtype, load)
    if form == "nvembed":
        return load_nvembed(folder, dtype)
    if isinstance(form, Family):
        return load_family(folder, form, dtype)
    if form == "stock":
        return _load_stock(folder, dtype), load_tokenizer(folder)
    if form == "ours":
        return _load_ours(folder, dtype), load_tokenizer(folder)
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"{folder} has no config.json: not a model folder")
    raise InputError(
        f"{folder} is not an embedder that we know: use Embedder.from_decoder for a base model, and write one of "
        f"{', '.join(f'{family}:' for family in FAMILIES)} in front of the name of an embedder of that family"
    )


def form_of(folder: Path, name: str) -> Form | Family | None:
    """What lies in a folder that is called `name`; None for what is no `Embedder`."""
    if (folder / ADAPTER).is_file():
        return "adapter"
    config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    if is_nvembed(config):
        return "nvembed"
    if config.get("model_type") == EmbedwrightConfig.model_type:
        return "ours"
    if (folder / STOCK_SETTINGS).is_file():
        return "stock"
    return recognised(folder, name, config)


def opens_as_stock(network: EmbedwrightModel, tokenizer: TextTokenizer) -> bool:
    """Whether sentence-transformers' own modules would give this model's vectors.

    They pool every token, or leave out a count of prompt tokens: then the prefix must end where a token ends, and there
    may be no BOS.
    """
    contract = network.contract
    if contract.mask_rule == "all":
        return network.pooling.kind in ("mean", "last")
    if contract.mask_rule != "boundary":
        return False
    prefix = contract.prefix("a task")
    count = len(tokenizer.plain.encode(prefix, add_special_tokens=False).ids)
    texts = tokenize(tokenizer, contract, _BOUNDARY_PROBES, prefix)
    return all(int((~t.pool).sum()) == count for t in texts)


def _save_stock(network: EmbedwrightModel, tokenizer: Any, folder: Path) -> None:
    contract, kind = network.contract, network.pooling.kind
    network.backbone.save_pretrained(folder)
    config = network.backbone.config
    if config.model_type in READ_BY_FLAG and not config.is_causal:
        _edit_json(folder / "config.json", {"use_bidirectional_attention": True})
    tokenizer = private_copy(tokenizer)
    tokenizer.chat_template = None
    # BOS and EOS come from the tokenizer's own pipeline here, which keeps EOS after a text that is cut
    ids = [*contract.bos_ids, contract.eos_id]
    *bos, eos = names = tokenizer.convert_ids_to_tokens(ids)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", eos], pair=[*bos, "$A", eos, "$B", eos], special_tokens=list(zip(names, ids, strict=True))
    )
    tokenizer.save_pretrained(folder)
    _edit_json(
        folder / "tokenizer_config.json",
        # special tokens written inside a user's text are plain text
        {"split_special_tokens": True, "padding_side": "right", "model_max_length": contract.max_tokens},
    )
    files = door.sentence_transformers_files(
        contract,
        {"mean": "mean", "last": "lasttoken"}[kind],
        network.backbone.config.hidden_size,
        door.STOCK_TRANSFORMER,
    )
    files[STOCK_SETTINGS] = {"contract": contract.model_dump(), "pooling": network.pooling.model_dump()}
    _write_json(folder, files)


def _save_ours(network: EmbedwrightModel, tokenizer: Any, folder: Path) -> None:
    config, backbone = network.config, network.backbone
    # where the base lay is nobody's business
    config.backbone = {key: value for key, value in backbone.config.to_dict().items() if key != "_name_or_path"}
    types = {parameter.dtype for parameter in network.head.parameters()}
    config.head_dtype = "float32" if types == {torch.float32} and backbone.dtype != torch.float32 else None
    network.save_pretrained(folder)
    door.tokenizer_for(tokenizer, network.contract).save_pretrained(folder)
    # the network's token outputs are scaled so that their mean is its own pooling, whichever that is
    hidden = backbone.config.hidden_size
    _write_json(folder, door.sentence_transformers_files(network.contract, "mean", hidden, door.OUR_TRANSFORMER))


def _write_json(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        write_json(folder / name, content)


def _load_ours(folder: Path, dtype: torch.dtype | None) -> EmbedwrightModel:
    settings = read_object(folder / "config.json")
    for part, kind in (("contract", Contract), ("pooling", PoolingConfig)):
        setting(folder / "config.json", settings, part, kind)
    check_floats(stored := weights_in(folder))
    backbone = settings.get("backbone")
    check_layers(stored, backbone if isinstance(backbone, dict) else {}, folder / "config.json")
    with blaming(folder):
        network: EmbedwrightModel = EmbedwrightModel.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False
        )
    return network


def _load_stock(folder: Path, dtype: torch.dtype | None) -> EmbedwrightModel:
    file = folder / STOCK_SETTINGS
    stored = read_object(file)
    contract = setting(file, stored, "contract", Contract)
    pooling = setting(file, stored, "pooling", PoolingConfig)
    check_weights(folder)
    decoder = stock_config(folder)
    set_attention(decoder, "causal" if getattr(decoder, "is_causal", True) else "bidirectional")
    backbone = load_backbone(str(folder), decoder, dtype or decoder.dtype or torch.float32)
    config = EmbedwrightConfig(
        backbone=backbone.config.to_dict(), pooling=pooling.model_dump(), contract=contract.model_dump()
    )
    return EmbedwrightModel(config, backbone=backbone)


def setting(file: Path, settings: dict[str, Any], part: str, kind: type[Model]) -> Model:
    """One of our parts of a settings file, as `kind` has it."""
    if not isinstance(settings.get(part), dict):
        raise InputError(f"{file}: {part} is missing")
    return validate(kind, settings[part], f"{file}: {part}")


def _edit_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}, indent=2) + "\n")
