"""A stock decoder as a bidirectional backbone.

There is no modelling code here: transformers >= 5.2 honours `config.is_causal = False`. Windows are cleared too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from embedwright.errors import InputError, as_input_error, check_choice
from embedwright.locate import split_revision
from embedwright.model.attention import PACKED

AttentionKind = Literal["bidirectional", "causal"]
# A decoder; or an embedder that AutoModel opens as its backbone alone, or as backbone and pooling block
OriginKind = Literal["decoder", "stock", "whole"]

# Families whose local layers were trained with their windows and keep them, seen in both directions.
KEEPS_WINDOWS = {"gemma3_text"}

# For these families text-embeddings-inference reads `use_bidirectional_attention`, not `is_causal`. It reads it for
# Gemma 3 too, but there transformers halves the windows when it is set, so it cannot be written.
READ_BY_FLAG = {"llama", "mistral", "qwen3"}

NEEDS_CODE = (
    "its config.json (auto_map) wants Python code of this folder to be run, and Embedwright never runs code of a "
    "model: only models whose architecture transformers itself knows can be opened"
)

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_OPEN_WINDOW = _ANY_LENGTH = 2**30  # more than any text has


def dtype_named(name: str) -> torch.dtype:
    """Returns the dtype of weights with this name. Raises InputError for a name that is none."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    check_choice("dtype", name, dtypes)
    return dtypes[name]


def decoder_config(base: str, *, attention: AttentionKind, layers: int | None = None) -> Any:
    """Reads the config of the decoder in a local folder, sets its attention, and cuts it to its first `layers`.

    Raises:
        InputError: The model is not a decoder, or has fewer layers; or the kind of attention is unknown.
    """
    config = stock_config(base)
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


def stock_config(folder: str | Path) -> Any:
    """Reads transformers' config of a local folder. Raises InputError if it needs code of the folder."""
    file = Path(folder) / "config.json"
    with as_input_error(file, "is not a config that transformers can open"):
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except ValueError:
            if "auto_map" in json.loads(file.read_text(encoding="utf-8")):
                raise InputError(f"{folder}: {NEEDS_CODE}") from None
            raise


def positions(config: Any) -> int:
    """Returns the number of tokens for which a decoder has positions."""
    return getattr(config, "max_position_embeddings", None) or _ANY_LENGTH


def batch_independent_length(config: Any) -> int:
    """Returns the text length up to which rotary frequencies do not depend on the other texts of a batch.

    Beyond it, `dynamic` and `longrope` choose them by the largest position of the batch.
    """
    kinds = getattr(config, "rope_parameters", None) or {}
    each = kinds.values() if all(isinstance(kind, dict) for kind in kinds.values()) else [kinds]
    limits = [_ANY_LENGTH]
    for kind in each:
        name = kind.get("rope_type", "default")
        if name == "longrope":
            limits.append(kind["original_max_position_embeddings"])
        elif "dynamic" in name:
            limits.append(positions(config))
    return min(limits)


def set_attention(config: Any, attention: AttentionKind) -> None:
    """Sets mask and windows on a config, in place. Call it before the model is built: modules copy them then.

    Raises InputError for an unknown kind of attention, and for layers that cannot be bidirectional.
    """
    check_choice("attention", attention, get_args(AttentionKind))
    if config.model_type in READ_BY_FLAG and hasattr(config, "use_bidirectional_attention"):
        del config.use_bidirectional_attention  # for other readers: saving writes it again
    config.is_causal = attention == "causal"
    config.use_cache = False
    if attention == "bidirectional" and config.model_type not in KEEPS_WINDOWS:
        # a window would apply in both directions, and tokens farther apart would never meet
        types = getattr(config, "layer_types", None)
        others = sorted(set(types or ()) - _ATTENTION_LAYERS)
        if others:
            raise InputError(f"{config.model_type!r} models have {others[0]!r} layers, which cannot be bidirectional")
        if types and getattr(config, "sliding_window", None) is not None and not hasattr(config, "use_sliding_window"):
            # Cohere 2, EXAONE 4, OLMo 3: a layer's type also says whether it has rotary positions, so it keeps its type
            config.sliding_window = _OPEN_WINDOW
            return
        config.sliding_window = None
        if hasattr(config, "use_sliding_window"):
            config.use_sliding_window = False
        if types:
            config.layer_types = ["full_attention"] * config.num_hidden_layers


def load_backbone(base: str, config: Any, dtype: torch.dtype, quantization: Any = None) -> Any:
    """Loads the stock base model (no LM head) of a local folder, with packed attention.

    `quantization` is a quantization config of transformers. The LM head and the layers that `config` cuts off are left
    out.

    Raises:
        InputError: Other weights are missing, have another shape or no place in the model; or the architecture takes
            no other attention function.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report is read below, as a whole
    try:
        with as_input_error(base, "cannot be opened as a decoder"):
            model, info = AutoModel.from_pretrained(
                base,
                config=config,
                dtype=dtype,
                attn_implementation=PACKED,
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported, then refused by name
                local_files_only=True,
                trust_remote_code=False,
                quantization_config=quantization,
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
    check_report(base, info)
    if info["unexpected_keys"]:
        _check_unexpected(base, config, info["unexpected_keys"])
    if not model._supports_attention_backend:
        raise InputError(f"{config.model_type!r} models take no other attention function, so cannot run packed")
    return model


def check_report(where: str | Path, info: dict[str, Any]) -> None:
    """Raises InputError if transformers' loading report names weights that did not come from the files."""
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{where} lacks {len(missing)} weights, e.g. {', '.join(missing[:3])}: they would be random")
    if other := sorted(info["mismatched_keys"]):
        name, stored, expected = other[0]
        raise InputError(f"{where}: {name} has the shape {list(stored)}, but the config says {list(expected)}")
    if info["error_msgs"]:
        raise InputError(f"{where}: {info['error_msgs'][0]}")


def _check_unexpected(base: str, config: Any, names: set[str]) -> None:
    """Raises InputError for weights that belong neither to the LM head nor to a layer that was cut off on purpose."""
    cut = range(config.num_hidden_layers, stock_config(base).num_hidden_layers)
    layers = tuple(f"{front}layers.{n}." for n in cut for front in ("", "model."))
    with torch.device("meta"):
        known = AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict().keys()
    if odd := sorted(name for name in names if name not in known and not name.startswith(layers)):
        raise InputError(
            f"{base}: {len(odd)} weights have no place in a {config.model_type!r} model of {config.num_hidden_layers} "
            f"layers, e.g. {', '.join(odd[:3])}: the weights are not of this config.json"
        )


@dataclass(frozen=True)
class Origin:
    """Where a backbone's weights came from. An adapter finds its base by the name, and recognises it by the samples."""

    name: str  # a folder, absolute, or a hub id, packaged name or .gguf file
    kind: OriginKind
    samples: dict[str, Tensor]
    revision: str | None = None  # of a hub id, as it was asked for
    head: dict[str, Tensor] | None = None  # samples of the pooling block that lay there too


def origin_of(
    base: str | Path, backbone: nn.Module, kind: OriginKind, revision: str | None = None, head: nn.Module | None = None
) -> Origin:
    """Returns the origin of a backbone, and of a pooling block, that were just read from `base`, or written there."""
    path = Path(base).expanduser()
    name, revision = (str(path.resolve()), None) if path.exists() else split_revision(str(base), revision)
    return Origin(name, kind, weight_samples(backbone), revision, None if head is None else weight_samples(head))


@torch.no_grad()
def weight_samples(backbone: nn.Module) -> dict[str, Tensor]:
    """Returns eight evenly spaced values of every weight, by its name. Adapters are left out."""
    samples = {}
    for name, parameter in backbone.named_parameters():
        if "lora_" not in name:
            places = torch.arange(8, device=parameter.device) * (parameter.numel() - 1) // 7
            samples[name.replace(".base_layer.", ".")] = parameter.detach().reshape(-1)[places].cpu()
    return samples


def same_samples(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Returns whether both samples can come from the same weights, each rounded to its own dtype."""
    return a.keys() == b.keys() and all(equal_but_for_type(a[name], b[name]) for name in a)


def equal_but_for_type(a: Tensor, b: Tensor) -> bool:
    if a.dtype == b.dtype:
        return torch.equal(a, b)
    relative = (torch.finfo(a.dtype).eps + torch.finfo(b.dtype).eps) / 2
    smallest = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps  # float16's finest step
    return bool(torch.allclose(a.double(), b.double(), rtol=relative, atol=smallest))


def text_hidden(backbone: Any, ids_T: Tensor) -> Tensor:
    """Returns the hidden states (L, D) of one text, from a backbone with transformers' own attention."""
    ones = torch.ones_like(ids_T)[None]
    hidden: Tensor = backbone(input_ids=ids_T[None], attention_mask=ones, use_cache=False).last_hidden_state[0]
    return hidden
