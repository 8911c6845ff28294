"""A stock decoder as a bidirectional backbone: finding it and opening it.

No modelling code of our own: transformers >= 5.2 honours `config.is_causal = False`; windows must be cleared beside it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from embedwright.cache import cache_folder
from embedwright.errors import InputError, NotFoundError
from embedwright.model import fourbit
from embedwright.model.attention import PACKED
from embedwright.model.locate import local, packaged
from embedwright.text import load_tokenizer

logger = logging.getLogger(__name__)

AttentionKind = Literal["bidirectional", "causal"]
# A decoder; or an embedder that AutoModel opens as its backbone alone, or as backbone and pooling block
OriginKind = Literal["decoder", "stock", "whole"]

# Families whose local layers were trained with their windows and keep them, seen in both directions.
KEEPS_WINDOWS = {"gemma3_text"}

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_OPEN_WINDOW = 2**30  # wider than any text


def resolve_base(base: str | Path) -> str:
    """A packaged name, a .gguf file, a folder or a hub id -> a folder or hub id in Hugging Face format.

    A .gguf file is converted once and cached. FileNotFoundError where it looks like a path and is none.
    """
    name = str(base)
    path = packaged(name) or local(name)
    if path is None:
        return name  # a hub id
    if path.suffix == ".gguf" and path.is_file():
        return str(convert_gguf(path))
    if not (path / "config.json").is_file():
        raise NotFoundError(f"base model folder {name} has no config.json")
    return str(path)


def convert_gguf(file: Path) -> Path:
    """The GGUF file as a Hugging Face folder in the cache, float32, made on first use."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    out = cache_folder("models", f"{file.stem}-{digest}")
    if (out / "config.json").is_file():
        return out
    logger.info("converting %s to %s (once)", file.name, out)
    folder, name = str(file.parent), file.name
    loaded = AutoModel.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # transformers refuses to save what it loaded from GGUF: the weights go into a fresh model of the same config
    del loaded.config.quantization_config
    fresh = AutoModel.from_config(loaded.config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    fresh.save_pretrained(aside)
    load_tokenizer(folder, gguf_file=name).save_pretrained(aside)
    try:
        aside.rename(out)
    except OSError:  # another process was first
        shutil.rmtree(aside)
    return out


def decoder_config(base: str, *, attention: AttentionKind, layers: int | None = None) -> Any:
    """The config of a decoder, set for this attention and cut to its first `layers`.

    ValueError where the model is no decoder, or has fewer layers.
    """
    config = AutoConfig.from_pretrained(base)
    kind = config.model_type
    is_decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.is_encoder_decoder or not (is_decoder or kind == "gemma3_text"):
        raise InputError(f"base {base} is a {kind!r} model, not a decoder-only language model")
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise InputError(f"layers={layers}: {base} has {config.num_hidden_layers} layers")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    set_attention(config, attention)
    return config


def set_attention(config: Any, attention: AttentionKind) -> None:
    """Set mask and windows on a config, before the model is made: modules copy their window when they are built."""
    config.is_causal = attention == "causal"
    config.use_cache = False
    if attention == "bidirectional" and config.model_type not in KEEPS_WINDOWS:
        # a window left on would apply in both directions: tokens beyond it would never meet
        types = getattr(config, "layer_types", None)
        others = sorted(set(types or ()) - _ATTENTION_LAYERS)
        if others:
            raise InputError(f"{config.model_type!r} models have {others[0]!r} layers, which cannot be bidirectional")
        if types and getattr(config, "sliding_window", None) is not None and not hasattr(config, "use_sliding_window"):
            # Cohere 2, EXAONE 4, OLMo 3: by its type a layer has rotary positions or not, so it keeps its type
            config.sliding_window = _OPEN_WINDOW
            return
        config.sliding_window = None
        if hasattr(config, "use_sliding_window"):
            config.use_sliding_window = False
        if types:
            config.layer_types = ["full_attention"] * config.num_hidden_layers


def load_backbone(base: str, config: Any, dtype: torch.dtype, four_bit: bool = False) -> Any:
    """The stock base model (no LM head) with packed attention; `four_bit`: its linear layers in 4 bits, for adapters.

    ValueError where the checkpoint lacks weights, or where the model's code takes no other attention function.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # layers cut off and the LM head are left out on purpose
    try:
        model, info = AutoModel.from_pretrained(
            base,
            config=config,
            dtype=dtype,
            attn_implementation=PACKED,
            output_loading_info=True,
            use_safetensors=True,
            quantization_config=fourbit.config(dtype) if four_bit else None,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise InputError(f"base {base} lacks the weights {sorted(info['missing_keys'])[:3]} ...: they would be random")
    if not model._supports_attention_backend:
        raise InputError(f"{config.model_type!r} models take no other attention function, so cannot run packed")
    if four_bit:
        fourbit.keep_trainable(model)
    return model


@dataclass(frozen=True)
class Origin:
    """Where a backbone's weights were read from: what an adapter finds and knows its base by."""

    name: str  # a folder, absolute, or a hub id, packaged name or .gguf file
    kind: OriginKind
    samples: dict[str, Tensor]


def origin_of(base: str | Path, backbone: nn.Module, kind: OriginKind) -> Origin:
    """The origin of a backbone that was just read from `base`, or written there."""
    path = Path(base).expanduser()
    name = str(path.resolve()) if path.exists() else str(base)
    return Origin(name, kind, weight_samples(backbone))


@torch.no_grad()
def weight_samples(backbone: nn.Module) -> dict[str, Tensor]:
    """Eight values of every weight, evenly spaced, by the weight's name; adapters do not count."""
    samples = {}
    for name, parameter in backbone.named_parameters():
        if "lora_" not in name:
            places = torch.arange(8, device=parameter.device) * (parameter.numel() - 1) // 7
            samples[name.replace(".base_layer.", ".")] = parameter.detach().reshape(-1)[places].cpu()
    return samples


def same_samples(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether both may be of the same weights, each rounded to its own type."""
    return a.keys() == b.keys() and all(_equal_but_for_type(a[name], b[name]) for name in a)


def _equal_but_for_type(a: Tensor, b: Tensor) -> bool:
    if a.dtype == b.dtype:
        return torch.equal(a, b)
    relative = (torch.finfo(a.dtype).eps + torch.finfo(b.dtype).eps) / 2
    smallest = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps  # float16's finest step
    return bool(torch.allclose(a.double(), b.double(), rtol=relative, atol=smallest))


def stock_hidden(backbone: Any, ids_T: Tensor, implementation: str) -> Tensor:
    """(L, D) of one text through the stock mask of `sdpa` or `eager`: the reference for packed attention."""
    backbone.set_attn_implementation(implementation)
    try:
        ones = torch.ones_like(ids_T)[None]
        hidden: Tensor = backbone(input_ids=ids_T[None], attention_mask=ones, use_cache=False).last_hidden_state[0]
    finally:
        backbone.set_attn_implementation(PACKED)
    return hidden
