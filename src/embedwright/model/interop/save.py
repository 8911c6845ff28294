"""Saves a model so that other libraries open it too: safetensors and JSON only, written whole or not at all.

`mean` and `last`, without BOS or with every token pooled: a stock Hugging Face backbone with sentence-transformers' own
modules, which opens without this package. Others: one `EmbedwrightModel` folder, which sentence-transformers and
AutoModel open once this package is imported (design, section 7). `embedwright.json` holds the contract in the first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors

from embedwright.errors import InputError
from embedwright.files import check_new_folder, whole_folder, write_json
from embedwright.model.adapters.fourbit import ONLY_TRAINED, in_four_bits
from embedwright.model.adapters.lora import has_lora
from embedwright.model.backbone import READ_BY_FLAG
from embedwright.model.formats.adapter import write_adapter
from embedwright.model.formats.detect import CHANGED, STOCK_SETTINGS, seal_history
from embedwright.model.interop.tokenizer import (
    OUR_TRANSFORMER,
    STOCK_TRANSFORMER,
    sentence_transformers_files,
    tokenizer_for,
)
from embedwright.model.network import EmbedwrightModel, scheme_of
from embedwright.model.pooling import WEIGHTLESS
from embedwright.model.quantized import has_quantized_layers
from embedwright.model.verify import probe, selftest
from embedwright.text import Contract, TextTokenizer, tokenize, with_backend, without_backend

_BOUNDARY_PROBES = ("word", "Word", "2 words", "(x)", "été", "漢字", "_name", "-1", "a\nb")


def save_network(network: EmbedwrightModel, tokenizer: Any, path: Path, dtype: torch.dtype | None = None) -> None:
    """See `Embedder.save`."""
    check_new_folder(path)
    if in_four_bits(network.backbone):
        raise InputError(f"cannot save: {ONLY_TRAINED}")
    if dtype is not None and has_quantized_layers(network):
        raise InputError("cannot save in another type: quantised weights are saved as they are; leave dtype out")
    probe.check(network)
    end_alignment(network)
    text_tokenizer = TextTokenizer(tokenizer.backend_tokenizer)
    with whole_folder(path) as temp, rounded(network, dtype):  # so that the vectors on record are of what is stored
        if has_lora(network.backbone):
            write_adapter(network, temp, dtype)
        else:
            if opens_as_stock(network, text_tokenizer):
                _save_stock(network, tokenizer, temp)
            else:
                write_ours(network, temp)
                write_interop_files(network, tokenizer, temp)
            seal_history(temp)
        selftest.write(network, text_tokenizer, temp)


def end_alignment(network: EmbedwrightModel) -> None:
    """Notes in the history of an aligned student that it is aligned no more, if its weights have changed since."""
    steps = network.config.history
    if steps and "aligned_with" in steps[-1] and network.changed():
        network.config.history = [*steps, CHANGED]


@contextmanager
def rounded(network: EmbedwrightModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Within the block the weights that `save_network` writes have the values that they have in `dtype`.

    Those of a whole model are in `dtype`, embeddings and norms included. Adapters and the pooling block above them stay
    in float32, as they are when their folder is loaded. Raises InputError for a weight that is not finite in `dtype`.
    """
    adapters = has_lora(network.backbone)
    kept = {
        name: (parameter, parameter.data)
        for name, parameter in network.named_parameters()
        if dtype is not None and (not adapters or "lora_" in name or name.startswith("head."))
    }
    try:
        for name, (parameter, exact) in kept.items():
            low = exact.to(dtype)
            if not low.isfinite().all():
                raise InputError(f"{name} has values that {dtype} cannot hold: save in bfloat16 or float32")
            parameter.data = low.float() if adapters else low
        yield
    finally:
        for parameter, exact in kept.values():
            parameter.data = exact


def opens_as_stock(network: EmbedwrightModel, tokenizer: TextTokenizer) -> bool:
    """Returns whether sentence-transformers' own modules would give this model's vectors.

    They pool every token, or leave out a count of prompt tokens: then the prefix must end where a token ends, and there
    may be no BOS.
    """
    if has_quantized_layers(network):  # to them, codes are not weights
        return False
    contract = network.contract
    if network.pooling.kind not in WEIGHTLESS or contract.mask_rule not in ("all", "boundary"):
        return False
    if contract.mask_rule == "all":
        return True
    prefix = contract.prefix("a task")
    count = len(tokenizer.plain.encode(prefix, add_special_tokens=False).ids)
    texts = tokenize(tokenizer, contract, _BOUNDARY_PROBES, prefix, selftest.proof_max_tokens(network))
    return all(int((~t.pool).sum()) == count for t in texts)


def write_ours(network: EmbedwrightModel, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Writes config and weights in our own format; `weights` None stands for the network's."""
    update_config(network)
    network.save_pretrained(folder, state_dict=weights)


def update_config(network: EmbedwrightModel) -> None:
    """Brings the config of a network up to date with its parts, as our own format stores it."""
    config, backbone = network.config, network.backbone
    # the local path of the base is not published
    config.backbone = {key: value for key, value in backbone.config.to_dict().items() if key != "_name_or_path"}
    config.contract = network.contract.model_dump()
    types = {parameter.dtype for parameter in network.head.parameters()}
    config.head_dtype = "float32" if types == {torch.float32} and backbone.dtype != torch.float32 else None
    if (scheme := scheme_of(network)) is not None:
        config.quantization = scheme.model_dump()


def write_interop_files(network: EmbedwrightModel, tokenizer: Any, folder: Path) -> None:
    """Writes the tokenizer of our own format, and the files by which sentence-transformers opens it."""
    tokenizer_for(tokenizer, network.contract).save_pretrained(folder)
    # the network's token outputs are scaled so that their mean is its own pooling, whichever that is
    hidden = network.backbone.config.hidden_size
    write_files(folder, sentence_transformers_files(network.contract, "mean", hidden, OUR_TRANSFORMER))


def _save_stock(network: EmbedwrightModel, tokenizer: Any, folder: Path) -> None:
    contract, kind = network.contract, network.pooling.kind
    network.backbone.save_pretrained(folder)
    config = network.backbone.config
    if config.model_type in READ_BY_FLAG and not config.is_causal:
        _edit_json(folder / "config.json", {"use_bidirectional_attention": True})
    write_tokenizer(tokenizer, contract, folder)
    files = sentence_transformers_files(contract, WEIGHTLESS[kind], config.hidden_size, STOCK_TRANSFORMER)
    files[STOCK_SETTINGS] = {"contract": contract.model_dump(), "pooling": network.pooling.model_dump()}
    if network.config.history:
        files[STOCK_SETTINGS]["history"] = network.config.history
    write_files(folder, files)


def write_tokenizer(tokenizer: Any, contract: Contract, folder: Path) -> None:
    """Writes a tokenizer for programs that know no contract: its own pipeline puts BOS and EOS around every text.

    It keeps EOS after a text that is cut, and reads special tokens written in a text as plain text. Under the rule
    `count` it stays as it is.
    """
    tokenizer = with_backend(without_backend(tokenizer), tokenizer.backend_tokenizer)
    tokenizer.chat_template = None
    settings: dict[str, Any] = {"padding_side": "right", "model_max_length": contract.max_tokens}
    if contract.mask_rule != "count":
        front, back = list(contract.bos_ids), [] if contract.eos_id is None else [contract.eos_id]
        bos, eos = (tokenizer.convert_ids_to_tokens(ids) for ids in (front, back))
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, "$B", *eos],
            special_tokens=[*zip([*bos, *eos], [*front, *back], strict=True)],
        )
        settings["split_special_tokens"] = True
    tokenizer.save_pretrained(folder)
    _edit_json(folder / "tokenizer_config.json", settings)


def write_files(folder: Path, files: dict[str, Any]) -> None:
    """Writes JSON files, by their paths in the folder."""
    for name, content in files.items():
        write_json(folder / name, content)


def _edit_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}, indent=2) + "\n")
