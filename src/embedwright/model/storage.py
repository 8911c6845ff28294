"""Models on disk: safetensors and JSON only, written aside and renamed.

`mean` and `last`: a stock Hugging Face backbone with sentence-transformers' own modules, which opens without this
package. Others: one `EmbedwrightModel` folder, which sentence-transformers and AutoModel open once this package is
imported (design, section 7). `embedwright.json` holds the contract in the first.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from tokenizers import processors
from transformers import AutoConfig

from embedwright.errors import InputError, NotFoundError, OutputExistsError
from embedwright.model import adapter_folder, door, probe, selftest
from embedwright.model.adapter import has_lora
from embedwright.model.backbone import load_backbone, origin_of, set_attention
from embedwright.model.families import FAMILIES, Family, load_family, recognised, said
from embedwright.model.fourbit import ONLY_TRAINED, in_four_bits
from embedwright.model.locate import local, text_of
from embedwright.model.network import EmbedwrightConfig, EmbedwrightModel
from embedwright.model.nvembed import is_nvembed, load_nvembed
from embedwright.text import Contract, load_tokenizer, tokenize

FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]  # of a hub id
_BOUNDARY_PROBES = ("word", "Word", "2 words", "(x)", "été", "漢字", "_name", "-1", "a\nb")

Form = Literal["adapter", "nvembed", "ours", "stock"]


def save(network: EmbedwrightModel, tokenizer: Any, path: Path) -> None:
    """See `Embedder.save`."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputExistsError(f"{path} exists and is not an empty folder")
    if in_four_bits(network.backbone):
        raise InputError(f"cannot save: {ONLY_TRAINED}")
    probe.check(network)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    if has_lora(network.backbone):
        adapter_folder.write(network, aside)
    elif opens_as_stock(network, tokenizer):
        _save_stock(network, tokenizer, aside)
    else:
        _save_ours(network, tokenizer, aside)
    selftest.write(network, tokenizer, aside)
    if path.is_dir():
        path.rmdir()
    aside.rename(path)


def load(path: str | Path, *, dtype: torch.dtype | None) -> tuple[EmbedwrightModel, Any]:
    """See `Embedder.load`; the network's `config.name_or_path` is the local folder that was read.

    ValueError where the folder is not an embedder, or lacks weights.
    """
    family, name = said(str(path))
    here = local(name)
    folder = here or Path(snapshot_download(name, allow_patterns=FILES))
    form = family or form_of(folder, name)
    network, tokenizer = _open(folder, form, dtype)
    network.config.name_or_path = str(folder)
    if network.origin is None:  # an adapter says itself where its base is
        base = str(path).removesuffix(name) + (str(here.resolve()) if here else name)
        network.origin = origin_of(base, network.backbone, "whole" if form in ("ours", "nvembed") else "stock")
    return network, tokenizer


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
        network, info = EmbedwrightModel.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
        if info["missing_keys"] or info["unexpected_keys"]:
            wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
            raise InputError(f"{folder}: weights do not fit the config, e.g. {wrong[:3]}")
        return network, load_tokenizer(folder)
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"{folder} has no config.json: not a model folder")
    raise InputError(
        f"{folder} is not an embedder that we know: use Embedder.from_decoder for a base model, and write one of "
        f"{', '.join(f'{family}:' for family in FAMILIES)} in front of the name of an embedder of that family"
    )


def form_of(where: str | Path, name: str) -> Form | Family | None:
    """What lies in a folder, or under a hub id, that is called `name`; None for what is no `Embedder`."""
    if text_of(where, adapter_folder.CONFIG) is not None:
        return "adapter"
    config = json.loads(text_of(where, "config.json") or "{}")
    if is_nvembed(config):
        return "nvembed"
    if config.get("model_type") == EmbedwrightConfig.model_type:
        return "ours"
    if text_of(where, "embedwright.json") is not None:
        return "stock"
    return recognised(where, name, config)


def opens_as_stock(network: EmbedwrightModel, tokenizer: Any) -> bool:
    """Whether sentence-transformers' own modules would give this model's vectors.

    They leave out a count of prompt tokens, so the prefix must end where a token ends, and there may be no BOS.
    """
    contract = network.contract
    if contract.mask_rule != "boundary":
        return False
    prefix = contract.prefix("a task")
    backend = tokenizer.backend_tokenizer
    count = len(backend.encode(prefix, add_special_tokens=False).ids)
    texts = tokenize(backend, contract, _BOUNDARY_PROBES, prefix)
    return all(int((~t.pool).sum()) == count for t in texts)


def _save_stock(network: EmbedwrightModel, tokenizer: Any, folder: Path) -> None:
    contract, kind = network.contract, network.pooling.kind
    network.backbone.save_pretrained(folder)
    backend, eos = tokenizer.backend_tokenizer, tokenizer.convert_ids_to_tokens(contract.eos_id)
    before = backend.post_processor, tokenizer.chat_template
    tokenizer.chat_template = None
    # EOS comes from the tokenizer's own pipeline here, which keeps it behind a text that is cut
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, contract.eos_id)]
    )
    try:
        tokenizer.save_pretrained(folder)
    finally:
        backend.post_processor, tokenizer.chat_template = before
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
    files["embedwright.json"] = {"contract": contract.model_dump(), "pooling": network.pooling.model_dump()}
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
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _load_stock(folder: Path, dtype: torch.dtype | None) -> EmbedwrightModel:
    stored = json.loads((folder / "embedwright.json").read_text())
    decoder = AutoConfig.from_pretrained(folder)
    set_attention(decoder, "causal" if decoder.is_causal else "bidirectional")
    backbone = load_backbone(str(folder), decoder, dtype or decoder.dtype or torch.float32)
    contract = Contract.model_validate(stored["contract"])
    config = EmbedwrightConfig(
        backbone=backbone.config.to_dict(), pooling=stored["pooling"], contract=contract.model_dump()
    )
    return EmbedwrightModel(config, backbone=backbone)


def _edit_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}, indent=2) + "\n")
