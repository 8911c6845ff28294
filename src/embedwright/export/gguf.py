"""Writes a model as one GGUF file, for llama.cpp and the programs around it.

llama.cpp pools every token that it reads: the mean of all, or the last one. Names, metadata and the order of rows are
those of its own converter. Attention, pooling and the end of a text are those of the embedder.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedwright.errors import InputError, MissingPackageError, OutputExistsError, check_choice
from embedwright.export.gguf_vocabulary import vocabulary
from embedwright.files import check_file, whole_file
from embedwright.model.backbone import positions
from embedwright.model.embedder import Embedder
from embedwright.model.formats.detect import GGUF_CONTRACT
from embedwright.model.interop.hub import merged_weights
from embedwright.model.interop.readers import sides
from embedwright.model.pooling import WEIGHTLESS
from embedwright.model.verify import probe

Type = Literal["f32", "f16", "q8_0"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
_FILE_TYPES: dict[Type, int] = {"f32": 0, "f16": 1, "q8_0": 7}  # gguf.LlamaFileType
_ROPES = ("default", "linear", "llama3")  # whose frequencies are the same for texts of any length


def check_gguf(path: str | Path) -> None:
    """Checks that a GGUF file can be written to `path`. Call it before a model is loaded; `export_gguf` does so too."""
    if Path(path).suffix != ".gguf":
        raise InputError(f"{path}: give the file a name that ends in .gguf")
    if check_file(path).exists():
        raise OutputExistsError(f"{path} exists: choose a new name")
    if find_spec("gguf") is None:
        raise MissingPackageError("a GGUF export needs gguf: pip install 'embedwright[gguf]'")


def export_gguf(model: Embedder, path: str | Path, type: Type = "f16") -> str:
    """Writes a new .gguf file, and returns the texts for which llama.cpp gives the vectors of `model`.

    These are `queries and documents`, or `documents alone` where the model leaves the prompt of a query out of its
    mean. Adapters are merged on the way. `type` is that of the matrices; norms and biases stay in float32.

    Raises:
        InputError: llama.cpp cannot run the model, or would give other vectors for documents too.
        MissingPackageError: The package gguf is missing.
        OutputExistsError: There is such a file.
    """
    check_choice("type", type, get_args(Type))
    check_gguf(path)
    import gguf

    backbone, contract, pooling = model.network.backbone, model.contract, model.network.pooling.kind
    served = _served(model)
    arch, facts = _facts(backbone.config, contract.max_tokens)
    pieces = _pieces(model, arch) | _rope(backbone, arch, facts)
    facts |= vocabulary(model.text_tokenizer.plain, contract, backbone.config.vocab_size)
    probe.check(model.network)
    with whole_file(path) as temp:
        writer = gguf.GGUFWriter(temp, arch)
        writer.add_type("model")
        writer.add_name(Path(path).stem)
        writer.add_description(_description(model, served))
        writer.add_string(GGUF_CONTRACT, contract.model_dump_json())
        writer.add_file_type(_FILE_TYPES[type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_causal_attention(backbone.config.is_causal)
        writer.add_pooling_type(gguf.PoolingType[pooling.upper()])
        for name, value in facts.items():
            getattr(writer, f"add_{name}")(value)
        _write_tensors(writer, pieces, type)
        writer.close()
    return served


def _served(model: Embedder) -> str:
    """Says for which texts llama.cpp is right. Raises InputError if for none."""
    contract, pooling = model.contract, model.network.pooling.kind
    if pooling not in WEIGHTLESS:
        raise InputError(
            f"pooling is {pooling!r}, and llama.cpp knows 'mean' and 'last': distil it into a model with mean "
            "pooling (embedwright compress --student NAME --distil RECIPE, with model: {pooling: mean} in the recipe), "
            "or export it with --format onnx"
        )
    if contract.query_suffix or contract.template_specials or len(contract.bos_ids) > 1:
        raise InputError("llama.cpp cannot read texts so: this model has a suffix or special tokens in its prompt")
    served = sides(contract, pooling)
    if served is None:
        raise InputError(
            "llama.cpp pools BOS and every prompt, and this model leaves them out of the mean, so that vectors of "
            "documents too would differ: train with pool_prompt: true or pooling: last"
        )
    return served


def _description(model: Embedder, served: str) -> str:
    contract = model.contract
    return (
        f"Text embeddings, right for {served}. Put {contract.query_template!r}, with the task filled in, in front of a "
        f"query and {contract.document_template!r} in front of a document: llama.cpp adds neither. Cut a text to "
        f"{contract.max_tokens} tokens."
    )


def _facts(config: Any, max_tokens: int) -> tuple[str, dict[str, Any]]:
    """Returns llama.cpp's name of the architecture, and its sizes by the names of `GGUFWriter`'s methods."""
    family, heads = config.model_type, config.num_attention_heads
    if family not in ARCHITECTURES:
        raise InputError(f"the decoder is a {family!r} model: GGUF files are written of {', '.join(ARCHITECTURES)}")
    arch = ARCHITECTURES[family]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    facts: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": positions(config),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": head_dim,
        "value_length": head_dim,
        "rope_dimension_count": head_dim,
        "layer_norm_rms_eps": config.rms_norm_eps,
    }
    window: Any = getattr(config, "sliding_window", None)
    layers: Any = getattr(config, "layer_types", None)
    if arch != "gemma3":
        _same(config, arch, hidden_act="silu")
        if window is not None and window < max_tokens and "sliding_attention" in (layers or ["sliding_attention"]):
            raise InputError(f"sliding_window={window}: llama.cpp has no windows in {arch!r}: give max_tokens={window}")
        return arch, facts
    _same(config, arch, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=head_dim)
    if len(set(layers)) < 2:  # it would abort
        raise InputError(
            f"all layers have {layers[0]}: llama.cpp runs a {family!r} model with both kinds, keep more layers"
        )
    period = next((n for n, layer in enumerate(layers) if layer == "full_attention"), len(layers)) + 1
    _same(
        config,
        arch,
        layer_types=["full_attention" if n % period == period - 1 else "sliding_attention" for n in range(len(layers))],
    )
    # in both directions, a window is the distance to either side here and the whole width there
    facts |= {"sliding_window": window if config.is_causal else 2 * window, "sliding_window_pattern": period}
    return arch if config.is_causal else "gemma-embedding", facts


def _same(config: Any, arch: str, **fixed: Any) -> None:
    """Raises InputError for a setting that llama.cpp does not read, and that has another value there."""
    for key, value in fixed.items():
        if getattr(config, key) != value:
            raise InputError(f"{key} is {getattr(config, key)!r}: llama.cpp runs {arch!r} with {value!r}")


class _Piece(NamedTuple):
    """A tensor of the file: the weight, its heads if its rows are rotated, and whether 1 is added to it."""

    weight: Tensor
    heads: int | None = None
    shift: bool = False

    @torch.no_grad()
    def values(self) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self.weight.float().cpu().numpy()
        if self.heads:  # llama.cpp rotates neighbouring rows, transformers the two halves of a head
            halves = values.reshape(self.heads, 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        return values + np.float32(1) if self.shift else values


def _rope(backbone: Any, arch: str, facts: dict[str, Any]) -> dict[str, _Piece]:
    """Adds the rotary frequencies to `facts`. Returns the divisors of Llama 3's, which are a tensor.

    The frequencies are those of the model itself, whatever its config says. Raises InputError if llama.cpp has others.
    """
    import gguf

    given, dim = backbone.config.rope_parameters, facts["rope_dimension_count"]
    layers = [
        layer for layer in ("sliding_attention", "full_attention") if hasattr(backbone.rotary_emb, f"{layer}_inv_freq")
    ]
    divisors = np.ones(dim // 2)
    for layer in layers or [""]:
        rope = given[layer] if layer else given
        frequencies = getattr(backbone.rotary_emb, f"{layer}_inv_freq".lstrip("_")).double().cpu().numpy()
        if rope["rope_type"] not in _ROPES or len(frequencies) != len(divisors) or not np.allclose(divisors, 1):
            raise InputError(f"rope_parameters: llama.cpp cannot be told of {given} in a {arch!r} model")
        facts["rope_freq_base_swa" if layer == "sliding_attention" else "rope_freq_base"] = rope["rope_theta"]
        divisors = rope["rope_theta"] ** -(np.arange(0, dim, 2) / dim) / frequencies
    if np.allclose(divisors, 1, rtol=1e-5):
        return {}
    if np.allclose(divisors, divisors[0], rtol=1e-5):
        facts |= {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": float(divisors[0])}
        return {}
    _same(backbone.config, arch, model_type="llama")
    return {"rope_freqs.weight": _Piece(torch.from_numpy(divisors))}


def _pieces(model: Embedder, arch: str) -> dict[str, _Piece]:
    """Returns the tensors by their names in the file."""
    import gguf

    config = model.network.backbone.config
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if arch == "llama" else {}
    pieces = {}
    for name, weight in merged_weights(model.network).items():
        place = names.get_name(name.replace("backbone.", "model.", 1), try_suffixes=(".weight", ".bias"))
        if place is None:
            raise InputError(f"{name} has no place in a GGUF file of a {arch!r} model, which holds float weights")
        shift = arch.startswith("gemma") and name.endswith("norm.weight")  # Gemma's norms multiply by 1 + weight
        pieces[place] = _Piece(weight, heads.get(name.split(".")[-2]), shift)
    return pieces


def _write_tensors(writer: Any, pieces: dict[str, _Piece], type: Type) -> None:
    """Writes metadata and tensors. One tensor is in memory at a time, beside the model."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    stored_as = {kinds.F32: np.float32, kinds.F16: np.float16, kinds.Q8_0: np.uint8}

    def kind_of(weight: Tensor) -> Any:
        if weight.ndim == 1 or type == "f32":
            return kinds.F32
        return kinds.Q8_0 if type == "q8_0" and weight.shape[-1] % 32 == 0 else kinds.F16  # blocks of 32

    for name, piece in pieces.items():
        kind, shape = kind_of(piece.weight), tuple(piece.weight.shape)
        item = np.dtype(stored_as[kind])
        shape = gguf.quant_shape_to_byte_shape(shape, kind) if kind == kinds.Q8_0 else shape
        writer.add_tensor_info(name, shape, item, int(np.prod(shape)) * item.itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, piece in pieces.items():
        with np.errstate(over="ignore"):
            stored = gguf.quantize(piece.values(), kind_of(piece.weight))
        if stored.dtype == np.float16 and not np.isfinite(stored).all():
            raise InputError(f"{name} has values that float16 cannot hold: write the file with --weights f32")
        writer.write_tensor_data(stored)
