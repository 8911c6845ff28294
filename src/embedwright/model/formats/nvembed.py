"""Reads released NV-Embed folders (v1, v2) natively: no remote code, no hub, the reference's vectors.

Which settings are ignored, and what replaces a missing one, follows the reference: see design, section 7. The model is
built without memory and filled tensor by tensor, so that there is never a second copy of it. The names and sizes that
`nvembed_export` writes are here too, since this module must be able to read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModel, MistralConfig, PreTrainedTokenizerFast

from embedwright.errors import InputError, as_input_error
from embedwright.model.attention import PACKED
from embedwright.model.backbone import set_attention
from embedwright.model.formats.base import Outline, build_network
from embedwright.model.formats.folder import Stored, check_layers, check_places, read_json, read_tensors, weights_in
from embedwright.model.network import EmbedwrightModel
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

# Kept in our config, so that an export has them: settings that we do not follow, but the reference and others read.
LENGTHS = "sentence_bert_config.json"
SMALL_FILES = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "modules.json",
    "1_Pooling/config.json",
    "config_sentence_transformers.json",
    LENGTHS,
)
_STORED_AS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in _STORED_AS.values())

Shapes = dict[str, tuple[int, ...]]


class Released(NamedTuple):
    """What a released folder says, without its weights."""

    outline: Outline
    files: dict[str, Any]  # the small JSON files, by name
    tensors: dict[str, Stored]
    dtype: torch.dtype  # as stored


def load_nvembed(folder: Path, dtype: torch.dtype | None) -> tuple[EmbedwrightModel, Any]:
    """Reads network and tokenizer from a local folder; `dtype` None keeps the stored type (of several, the widest).

    Raises InputError for settings that the reference follows and we do not, for sizes that contradict the tensors, and
    for tensors that are missing, unexpected or of another shape, naming them. NotFoundError without safetensors.
    """
    found = read_nvembed(folder)
    decoder, pooling, contract, tokenizer = found.outline
    asked = dtype or found.dtype
    kept = {"dtype": str(found.dtype).removeprefix("torch."), "files": found.files}
    with torch.device("meta"):
        backbone = AutoModel.from_config(decoder, attn_implementation=PACKED, dtype=asked, trust_remote_code=False)
        network = build_network(backbone, pooling, contract, released=kept)
    _fill(network, folder, found.tensors, asked)
    # computed, not stored: made anew, in float32, where memory is real
    backbone.rotary_emb = type(backbone.rotary_emb)(config=backbone.config)
    return network, tokenizer


def read_nvembed(folder: Path) -> Released:
    """Reads the settings, the tokenizer and the headers of the weights. Errors as in `load_nvembed`."""
    small = {name: read_json(folder / name) for name in SMALL_FILES if (folder / name).is_file()}
    with as_input_error(folder / "config.json"):
        _check_settings(folder, small["config.json"])
    tensors, stored = _headers(folder)
    check_layers(tensors, small["config.json"].get("text_config") or {}, folder / "config.json")
    with as_input_error(folder, "has no tokenizer that can be opened"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: the tokenizer has no EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    with as_input_error(folder / LENGTHS, "says no sound max_seq_length"):
        contract = released_contract(tokenizer, small.get(LENGTHS, {}).get("max_seq_length") or _MAX_TOKENS)
    with as_input_error(folder, "cannot be opened as NV-Embed"):
        try:
            decoder, pooling = sizes(small["config.json"], {name: tensor.shape for name, tensor in tensors.items()})
        except ValueError as error:
            raise InputError(f"{folder}: {error}") from None
    return Released(Outline(decoder, pooling, contract, tokenizer), small, tensors, stored)


def released_contract(tokenizer: Any, max_tokens: int) -> Contract:
    """Returns the text contract of every released NV-Embed."""
    return Contract(
        query_template=INSTRUCTION_TEMPLATE,
        eos_id=tokenizer.eos_token_id,
        bos_ids=leading_ids(tokenizer.backend_tokenizer),
        mask_rule="count",
        max_tokens=max_tokens,
    )


def sizes(released: dict[str, Any], shapes: Shapes) -> tuple[Any, PoolingConfig]:
    """Returns the configs of the decoder and the pooling block, from a released config.json and the shapes of its
    tensors.

    A size that config.json lacks comes from the shapes. Raises InputError if the two contradict each other.
    """
    return (
        _decoder_config(released.get("text_config") or {}, shapes),
        _pooling_config(released.get("latent_attention_config") or {}, shapes),
    )


def check_released(released: dict[str, Any] | None) -> dict[str, Any]:
    """Checks what our config keeps of a release, for its export.

    Raises InputError for other files or types than ours.
    """
    if released is None:
        raise InputError("the model does not come from a released NV-Embed folder: it keeps no files of one to write")
    files = released.get("files")
    if not isinstance(files, dict) or "config.json" not in files or released.get("dtype") not in _DTYPES:
        raise InputError(f"config.json: released needs files with a config.json, and a dtype of {', '.join(_DTYPES)}")
    for name, content in files.items():
        if name not in SMALL_FILES:
            raise InputError(
                f"config.json: released names the file {name!r}, but an export writes only {', '.join(SMALL_FILES)}"
            )
        if not isinstance(content, list if name == "modules.json" else dict):
            raise InputError(f"config.json: released holds no settings for {name}, but a {type(content).__name__}")
    return released


def released_name(ours: str) -> str:
    """Returns the released name of our parameter. Raises StopIteration if a release has no such part."""
    start = next(start for start in _PREFIXES if ours.startswith(start))
    return _PREFIXES[start] + ours.removeprefix(start)


def _check_settings(folder: Path, released: dict[str, Any]) -> None:
    kind = (released.get("text_config") or {}).get("model_type", "mistral")
    if kind not in ("bidir_mistral", "mistral"):
        raise InputError(f"{folder}: text_config is of a {kind!r} model, not a Mistral")
    if not (released.get("latent_attention_config") or {}).get("output_normalize", True):
        raise InputError(f"{folder}: output_normalize is false, but vectors of ours have unit length")
    # the reference masks the instruction only under both of these
    if not released.get("is_mask_instruction", True) or released.get("padding_side", "right") != "right":
        raise InputError(f"{folder}: is_mask_instruction must be true and padding_side 'right', nothing else is known")


def _headers(folder: Path) -> tuple[dict[str, Stored], torch.dtype]:
    """Returns all tensors but rotary positions, and the widest of their types. Reads no weights."""
    # old checkpoints store rotary positions, which are computed
    tensors = {name: found for name, found in weights_in(folder).items() if not name.endswith("rotary_emb.inv_freq")}
    stored: torch.dtype | None = None
    for name, tensor in tensors.items():
        kind = tensor.dtype
        if kind not in _STORED_AS:
            raise InputError(f"{folder}: {name} is stored as {kind}, not as one of {', '.join(_STORED_AS)}")
        stored = torch.promote_types(stored or _STORED_AS[kind], _STORED_AS[kind])
    if stored is None:
        raise InputError(f"{folder}: there are no weights but rotary positions")
    return tensors, stored


def _size(shapes: Shapes, name: str, axis: int) -> int:
    if len(shapes.get(name, ())) != 2:
        raise InputError(f"tensor {name} is missing or not a matrix")
    return shapes[name][axis]


def _decoder_config(text: dict[str, Any], shapes: Shapes) -> Any:
    """Returns a stock Mistral config from known fields of text_config and the shapes: no window, bidirectional."""
    layer = "embedding_model.layers.0."
    queries, keys = (_size(shapes, f"{layer}self_attn.{name}_proj.weight", 0) for name in ("q", "k"))
    default = MistralConfig()
    if text.get("head_dim"):
        head_dim = text["head_dim"]
    elif text.get("num_key_value_heads") and not text.get("num_attention_heads"):
        head_dim = keys // text["num_key_value_heads"]
    else:
        head_dim = queries // (text.get("num_attention_heads") or default.num_attention_heads)
    found = {
        "vocab_size": _size(shapes, _EMBEDDING, 0),
        "hidden_size": _size(shapes, _EMBEDDING, 1),
        "intermediate_size": _size(shapes, f"{layer}mlp.gate_proj.weight", 0),
        "num_attention_heads": queries // max(head_dim, 1),
        "num_key_value_heads": keys // max(head_dim, 1),
    }
    _agree("text_config", text, found)
    known = ("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout")
    layers = {name.split(".")[2] for name in shapes if name.startswith("embedding_model.layers.")}
    theta = float(text.get("rope_theta") or 10000.0)
    config = MistralConfig(
        **{key: text[key] for key in (*known, "bos_token_id", "eos_token_id") if text.get(key) is not None},
        **found,
        head_dim=head_dim,
        num_hidden_layers=text.get("num_hidden_layers") or len(layers),
        rope_parameters={"rope_type": "default", "rope_theta": theta, **(text.get("rope_parameters") or {})},
    )
    set_attention(config, "bidirectional")
    return config


def _pooling_config(latent: dict[str, Any], shapes: Shapes) -> PoolingConfig:
    latents, queries, narrow = (
        released_name(f"head.{name}") for name in ("latents", "attention.to_q.weight", "feed_forward.narrow.weight")
    )
    rows, hidden = (_size(shapes, latents, axis) for axis in (0, 1))
    inner = _size(shapes, queries, 0)
    head_dim = latent.get("cross_dim_head")
    heads = latent.get("num_cross_heads") or (inner // head_dim if head_dim else 8)
    _agree("latent_attention_config", latent, {"num_latents_value": rows, "hidden_dim": hidden, "latent_dim": hidden})
    return PoolingConfig(
        latents=rows, heads=heads, head_dim=head_dim or inner // heads, multiple=_size(shapes, narrow, 1) // hidden
    )


def _agree(where: str, given: dict[str, Any], found: dict[str, int]) -> None:
    for key, size in found.items():
        if given.get(key) not in (None, size):
            raise InputError(f"{where} says {key}={given[key]}, but by the tensors' shapes it is {size}")


def _fill(network: nn.Module, folder: Path, tensors: dict[str, Stored], dtype: torch.dtype) -> None:
    """Sets every parameter from its released tensor. Raises InputError if names or shapes do not match one to one."""
    names = {released_name(name): name for name, _ in network.named_parameters()}
    check_places(folder, {name: network.get_parameter(ours) for name, ours in names.items()}, tensors)
    for name, tensor in read_tensors(tensors):
        module, _, leaf = names[name].rpartition(".")
        setattr(network.get_submodule(module), leaf, nn.Parameter(tensor.to(dtype)))
