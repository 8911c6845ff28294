"""Models on disk: safetensors and JSON only, written aside and renamed.

`mean` and `last`: a stock Hugging Face backbone with sentence-transformers' own modules, which opens without this
package. Others: one `EmbedwrightModel` folder (design, section 7). `embedwright.json` holds the contract in the first.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tokenizers import processors
from transformers import AutoConfig

from embedwright.model import probe
from embedwright.model.backbone import has_lora, load_backbone, set_attention
from embedwright.model.network import EmbedwrightConfig, EmbedwrightModel
from embedwright.model.nvembed import is_nvembed, load_nvembed
from embedwright.text import Contract, load_tokenizer, tokenize

_BOUNDARY_PROBES = ("word", "Word", "2 words", "(x)", "été", "漢字", "_name", "-1", "a\nb")


def save(network: EmbedwrightModel, tokenizer: Any, path: Path) -> None:
    """See `Embedder.save`."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder")
    if has_lora(network.backbone):
        raise ValueError("LoRA adapters are not merged: call embedwright.model.backbone.merge_lora first")
    probe.check(network)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    if opens_as_stock(network, tokenizer):
        _save_stock(network, tokenizer, aside)
    else:
        network.config.backbone = network.backbone.config.to_dict()
        network.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    if path.is_dir():
        path.rmdir()
    aside.rename(path)


def load(path: str | Path, *, dtype: torch.dtype | None) -> tuple[EmbedwrightModel, Any]:
    """See `Embedder.load`. ValueError where the folder is not an embedder of ours, or lacks weights."""
    folder = Path(path)
    if not folder.is_dir():
        if str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
            raise FileNotFoundError(f"model folder {path} does not exist")
        folder = Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: not a model folder")
    config = json.loads(file.read_text())
    if is_nvembed(config):
        return load_nvembed(folder, dtype)
    if config.get("model_type") == EmbedwrightConfig.model_type:
        network, info = EmbedwrightModel.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
        if info["missing_keys"] or info["unexpected_keys"]:
            wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
            raise ValueError(f"{folder}: weights do not fit the config, e.g. {wrong[:3]}")
    elif (folder / "embedwright.json").is_file():
        network = _load_stock(folder, dtype)
    else:
        raise ValueError(
            f"{folder} ({config.get('model_type')!r}) is not an embedder: use Embedder.from_decoder for a base model"
        )
    return network, load_tokenizer(folder)


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
    mode = {"mean": "mean", "last": "lasttoken"}[kind]
    files: dict[str, Any] = {
        "embedwright.json": {"contract": contract.model_dump(), "pooling": network.pooling.model_dump()},
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
            {
                "idx": 1,
                "name": "1",
                "path": "1_Pooling",
                "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
            },
            {
                "idx": 2,
                "name": "2",
                "path": "2_Normalize",
                "type": "sentence_transformers.base.modules.normalize.Normalize",
            },
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            # pinned, since a tokenizer with a chat template would be opened in message form
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
            "max_seq_length": contract.max_tokens,
            "unpad_inputs": False,  # unpadded rows of a bidirectional stock model would leak into each other
        },
        "config_sentence_transformers.json": {
            "prompts": {"query": "", "document": contract.document_template},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {
            "embedding_dimension": network.backbone.config.hidden_size,
            "pooling_mode": mode,
            "include_prompt": False,
        },
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "2_Normalize").mkdir()
    (folder / "2_Normalize" / "config.json").write_text("{}\n")


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
