"""Released NV-Embed folders (v1, v2), read natively: no remote code, no hub, the reference's vectors.

What is dead in its config, and what stands in for a missing field, follows the reference: see design, section 7.
Tensors go one by one from safetensors into a model made without memory, so there is never a second copy of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModel, MistralConfig, PreTrainedTokenizerFast

from embedwright.model.attention import PACKED
from embedwright.model.backbone import set_attention
from embedwright.model.network import EmbedwrightConfig, EmbedwrightModel
from embedwright.model.pooling import PoolingConfig
from embedwright.text import INSTRUCTION_TEMPLATE, Contract, leading_ids

_MAX_TOKENS = 4096  # of the reference's `encode`

# Ours -> released. Halves agree: to_kv is keys, values in both; widen is value, gate in both.
_PREFIXES = {
    "backbone.": "embedding_model.",
    "head.latents": "latent_attention_model.latents",
    "head.attention.norm.": "latent_attention_model.cross_attend_blocks.0.norm.",
    "head.attention.norm_context.": "latent_attention_model.cross_attend_blocks.0.norm_context.",
    "head.attention.to_": "latent_attention_model.cross_attend_blocks.0.fn.to_",
    "head.feed_forward.norm.": "latent_attention_model.cross_attend_blocks.1.norm.",
    "head.feed_forward.widen.": "latent_attention_model.cross_attend_blocks.1.fn.net.0.",
    "head.feed_forward.narrow.": "latent_attention_model.cross_attend_blocks.1.fn.net.2.",
}
_EMBEDDING = "embedding_model.embed_tokens.weight"

Shapes = dict[str, tuple[int, ...]]


def is_nvembed(config: dict[str, Any]) -> bool:
    """Whether this config.json is a released NV-Embed's."""
    return config.get("model_type") == "nvembed"


def load_nvembed(folder: Path, dtype: torch.dtype | None) -> tuple[EmbedwrightModel, Any]:
    """Model and tokenizer of a local folder; `dtype` None keeps the stored one.

    ValueError for settings that the reference reads and we do not follow, and for tensors that are missing, unexpected
    or of another shape, naming them; FileNotFoundError where there are no safetensors.
    """
    released = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    latent = released.get("latent_attention_config") or {}
    _check_settings(folder, released, latent)
    files = _weight_files(folder)
    shapes, stored = _headers(folder, files)
    lengths = folder / "sentence_bert_config.json"
    max_tokens = json.loads(lengths.read_text(encoding="utf-8")).get("max_seq_length") if lengths.is_file() else None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer has no EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    contract = Contract(
        query_template=INSTRUCTION_TEMPLATE,
        eos_id=tokenizer.eos_token_id,
        bos_ids=leading_ids(tokenizer.backend_tokenizer),
        mask_rule="count",
        max_tokens=max_tokens or _MAX_TOKENS,
    )
    decoder = _decoder_config(released.get("text_config") or {}, shapes)
    pooling = _pooling_config(latent, shapes)
    with torch.device("meta"):
        backbone = AutoModel.from_config(decoder, attn_implementation=PACKED, dtype=dtype or stored)
        config = EmbedwrightConfig(
            backbone=backbone.config.to_dict(), pooling=pooling.model_dump(), contract=contract.model_dump()
        )
        network = EmbedwrightModel(config, backbone=backbone)
    _fill(network, folder, files, shapes, dtype or stored)
    # computed, not stored: made anew, in float32, where memory is real
    backbone.rotary_emb = type(backbone.rotary_emb)(config=backbone.config)
    return network, tokenizer


def _check_settings(folder: Path, released: dict[str, Any], latent: dict[str, Any]) -> None:
    kind = (released.get("text_config") or {}).get("model_type", "mistral")
    if kind not in ("bidir_mistral", "mistral"):
        raise ValueError(f"{folder}: text_config is of a {kind!r} model, not a Mistral")
    if not latent.get("output_normalize", True):
        raise ValueError(f"{folder}: output_normalize is false, but vectors of ours have unit length")
    # the reference masks the instruction only under both of these
    if not released.get("is_mask_instruction", True) or released.get("padding_side", "right") != "right":
        raise ValueError(f"{folder}: is_mask_instruction must be true and padding_side 'right', nothing else is known")


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files, each directly in `folder`."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors and no {index.name}")
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    for name in names:
        # the folder may come from anyone: what it names must lie in it
        if not isinstance(name, str) or "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not the name of a .safetensors file in this folder")
    files = sorted(set(names))
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
    return files


def _headers(folder: Path, files: list[str]) -> tuple[Shapes, torch.dtype]:
    """Shapes of all tensors, and the type of the token table; reads no weights but one row."""
    shapes: Shapes = {}
    stored = torch.float32
    for file in files:
        with _open(folder / file) as weights:
            for name in weights.keys():  # noqa: SIM118  (not a dict)
                piece = weights.get_slice(name)
                if name in shapes:
                    raise ValueError(f"{folder}: {name} is in more than one file")
                shapes[name] = tuple(piece.get_shape())
                if name == _EMBEDDING:
                    stored = piece[:1].dtype
    return shapes, stored


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None


def _size(shapes: Shapes, name: str, axis: int) -> int:
    if len(shapes.get(name, ())) != 2:
        raise ValueError(f"tensor {name} is missing or not a matrix")
    return shapes[name][axis]


def _decoder_config(text: dict[str, Any], shapes: Shapes) -> Any:
    """A stock Mistral config: known fields of text_config, sizes from the weights, no window, full attention."""
    layer = "embedding_model.layers.0."
    known = ("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout")
    fields = {key: text[key] for key in (*known, "bos_token_id", "eos_token_id") if text.get(key) is not None}
    heads = text.get("num_attention_heads") or MistralConfig().num_attention_heads
    head_dim = text.get("head_dim") or _size(shapes, f"{layer}self_attn.q_proj.weight", 0) // heads
    layers = {name.split(".")[2] for name in shapes if name.startswith("embedding_model.layers.")}
    config = MistralConfig(
        **fields,
        vocab_size=_size(shapes, _EMBEDDING, 0),
        hidden_size=_size(shapes, _EMBEDDING, 1),
        intermediate_size=_size(shapes, f"{layer}mlp.gate_proj.weight", 0),
        num_hidden_layers=text.get("num_hidden_layers") or len(layers),
        num_attention_heads=heads,
        num_key_value_heads=_size(shapes, f"{layer}self_attn.k_proj.weight", 0) // head_dim,
        head_dim=head_dim,
        rope_parameters=text.get("rope_parameters")
        or {"rope_type": "default", "rope_theta": float(text.get("rope_theta") or 10000.0)},
    )
    set_attention(config, "bidirectional")
    return config


def _pooling_config(latent: dict[str, Any], shapes: Shapes) -> PoolingConfig:
    latents, queries, narrow = (
        _released_name(f"head.{name}") for name in ("latents", "attention.to_q.weight", "feed_forward.narrow.weight")
    )
    heads = latent.get("num_cross_heads") or 8
    head_dim = latent.get("cross_dim_head") or _size(shapes, queries, 0) // heads
    multiple = _size(shapes, narrow, 1) // _size(shapes, latents, 1)
    return PoolingConfig(latents=_size(shapes, latents, 0), heads=heads, head_dim=head_dim, multiple=multiple)


def _fill(network: nn.Module, folder: Path, files: list[str], shapes: Shapes, dtype: torch.dtype) -> None:
    """Every parameter from its released tensor, exactly one each."""
    ours = {_released_name(name): (name, tuple(p.shape)) for name, p in network.named_parameters()}
    found = {name for name in shapes if not name.endswith("rotary_emb.inv_freq")}  # old checkpoints store buffers
    for what, names in (
        ("missing", ours.keys() - found),
        ("unexpected", found - ours.keys()),
        ("not of the shape that the config says", {n for n in ours.keys() & found if ours[n][1] != shapes[n]}),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{folder}: tensors {what}: {', '.join(sorted(names)[:5])}{more}")
    for file in files:
        with _open(folder / file) as weights:
            for name in sorted(found.intersection(weights.keys())):
                module, _, leaf = ours[name][0].rpartition(".")
                setattr(network.get_submodule(module), leaf, nn.Parameter(weights.get_tensor(name).to(dtype)))


def _released_name(ours: str) -> str:
    start = next(start for start in _PREFIXES if ours.startswith(start))
    return _PREFIXES[start] + ours.removeprefix(start)
