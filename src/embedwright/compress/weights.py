"""Writes a model with quantised weights: codes and scales in safetensors, the scheme in config.json.

The folder is written tensor by tensor: memory holds one file of the result, and never the float model. It is in our own
format (`EmbedwrightModel`) whatever the format of the source, so that no other library takes codes for weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel

from embedwright.compress.chain import Step, with_step
from embedwright.errors import InputError, error_prefix
from embedwright.files import whole_folder, write_json
from embedwright.locate import fetch_weights
from embedwright.model.attention import PACKED
from embedwright.model.embedder import Embedder
from embedwright.model.formats.base import build_network, check_weights
from embedwright.model.formats.detect import check_float, detect, history_of, seal_history
from embedwright.model.formats.folder import (
    Stored,
    check_folder,
    check_places,
    read_object,
    weights_in,
    write_weights,
)
from embedwright.model.formats.nvembed import released_name
from embedwright.model.formats.open import outline
from embedwright.model.interop.save import update_config, write_interop_files
from embedwright.model.network import EmbedwrightModel
from embedwright.model.pooling import LatentPooling, fold_by_config
from embedwright.model.quantized import (
    QuantizedLinear,
    Scheme,
    compute_in_float32,
    quantized,
    replace_with_empty,
    slices,
)
from embedwright.model.verify import selftest

Sources = dict[str, Stored]  # by the name of our parameter

_SHARD = "1GB"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weights_step(scheme: Scheme) -> Step:
    """Returns the step that quantises the decoder's linear layers."""
    return Step("weights", scheme.model_dump(), lambda source, out: compress_weights(source, out, scheme))


def compress_weights(model: str | Path, out: str | Path, scheme: Scheme) -> None:
    """Writes a new folder of a model whose decoder holds its linear layers in 8 or 4 bits.

    Each output channel has a scale; in 4 bits, each 32 neighbouring weights of a channel also have a step. The
    embedding is held in bfloat16 and the norms in float32. The pooling head keeps its type, except that float16 becomes
    bfloat16, and a latent head is folded. The result is opened, probed and given its own selftest record. Its history
    records `error`, the distance of the weights from the original ones relative to their length, and `cosine`, the
    lowest cosine of the selftest vectors before and after, if the source has a record.

    Raises ValueError for an adapter, for weights that are quantised already or not finite, and where a layer cannot be
    cut into groups. FileExistsError if `out` is not empty.
    """
    folder, network, tokenizer, sources = _plan(str(model))
    made = _Tensors(network, sources, scheme)
    with whole_folder(out) as temp:
        write_weights(temp, made.planned, made.tensor, _SHARD)
        update_config(network)
        network.config.architectures, network.config.dtype = [type(network).__name__], network.backbone.dtype
        network.config.save_pretrained(temp)
        write_interop_files(network, tokenizer, temp)
        opened = Embedder.load(temp, device="cpu")
        selftest.write(opened.network, opened.text_tokenizer, temp)
        did = {"bits": scheme.bits, "error": made.error, **_cosine(folder / selftest.FILE, temp / selftest.FILE)}
        known = history_of(folder)
        did |= {key: said for key, said in (known or [{}])[-1].items() if key == "aligned_with"}  # the same student
        history = with_step(known, str(model), "weights", did)
        write_json(temp / "config.json", read_object(temp / "config.json") | {"history": history})
        seal_history(temp)


def _plan(model: str) -> tuple[Path, EmbedwrightModel, Any, Sources]:
    """Returns the folder of a model, its network on the meta device, its tokenizer, and where each weight is stored."""
    place, form = detect(model)
    folder = place.path
    if form == "adapter":
        raise InputError(f"{model} is an adapter: merge it into its base first (embedwright merge {model} OUT)")
    check_float(model, "compress")
    decoder, pooling, contract, tokenizer = outline(model)
    if place.hub_id is not None:
        check_folder(fetch_weights(place))
    if form != "nvembed":
        check_weights(folder)
    stored = weights_in(folder)
    with torch.device("meta"):
        backbone = AutoModel.from_config(decoder, attn_implementation=PACKED, trust_remote_code=False)
        network = build_network(backbone, pooling, contract)
    own = dict(network.named_parameters())
    sources = {name: found for name in own if (found := _source(stored, name, form == "nvembed")) is not None}
    if missing := sorted(own.keys() - sources.keys()):
        raise InputError(
            f"{folder} stores no tensor of its own for {missing[0]}: open it with Embedder.load, save that model, and "
            "compress the saved folder"
        )
    check_places(folder, own, sources)
    used = {found.name for found in sources.values()}
    if odd := sorted(n for n in stored.keys() - used if "lm_head" not in n and not n.endswith("rotary_emb.inv_freq")):
        raise InputError(f"{folder}: weights do not fit the config: there is no place for {', '.join(odd[:3])}")
    # as `head_dtype` of our format has it: the head alone may be in a wider type than the rest
    apart = form == "ours" and read_object(folder / "config.json").get("head_dtype") == "float32"
    dtype = _widest([found for name, found in sources.items() if not (apart and name.startswith("head."))])
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype  # in which states of 16 bits do not overflow
    network.to(dtype)
    network.head.to(torch.float32 if apart else dtype)
    network.backbone.config.dtype = dtype
    return folder, network, tokenizer, sources


def _source(stored: dict[str, Stored], name: str, released: bool) -> Stored | None:
    """Returns the stored tensor of our parameter: by our name, a decoder's with or without LM head, or NV-Embed's."""
    if released:
        return stored.get(released_name(name))
    bare = name.removeprefix("backbone.")
    return next((stored[known] for known in (name, bare, f"model.{bare}") if known in stored), None)


def _widest(sources: Sequence[Stored]) -> torch.dtype:
    """Returns the widest type in which one of these tensors is stored."""
    return reduce(torch.promote_types, (_DTYPES[found.dtype] for found in sources))


class _Tensors:
    """Makes each tensor of the new folder when its file is written. Keeps the last layer, which has several."""

    def __init__(self, network: EmbedwrightModel, sources: Sources, scheme: Scheme) -> None:
        """Quantises and folds the network on the meta device, in place. `planned` are the tensors that are stored."""
        folded = isinstance(network.head, LatentPooling)
        if folded:
            stored = {name: sources[f"head.{name}"].read().to(p.dtype) for name, p in network.head.named_parameters()}
            network.head.load_state_dict(stored, assign=True)
            network.head = fold_by_config(network.head)
        with torch.device("meta"):
            replace_with_empty(network.backbone, scheme)
            compute_in_float32(network)
        self._sources, self._scheme = sources, scheme
        self._state: dict[str, Tensor] = network.state_dict()
        self._layers = {name for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
        self._last: tuple[str, dict[str, Tensor]] = "", {}
        self._lost = self._whole = 0.0
        self.planned = {name: tensor.to("meta") for name, tensor in self._state.items()}

    @property
    def error(self) -> float:
        return round(math.sqrt(self._lost / self._whole), 4)

    def tensor(self, name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        if layer in self._layers and leaf != "bias":
            if self._last[0] != layer:
                self._last = layer, self._quantized(layer)
            return self._last[1][leaf]
        if not self._state[name].is_meta:
            return self._state[name]
        return self._sources[name].read().to(self._state[name].dtype)

    def _quantized(self, layer: str) -> dict[str, Tensor]:
        source = self._sources[f"{layer}.weight"]
        weight_OI = source.read()
        linear = nn.utils.skip_init(nn.Linear, *weight_OI.T.shape, bias=False, device="meta")
        linear.weight = nn.Parameter(weight_OI, requires_grad=False)
        with error_prefix(f"{source.file}: {source.name}"):
            made = quantized(linear, self._scheme)
        for rows in slices(weight_OI.shape):
            exact_OI = weight_OI[rows].float()
            self._lost += float((made.dequantized(torch.float32, rows) - exact_OI).square().sum())
            self._whole += float(exact_OI.square().sum())
        return made.state_dict()


def _cosine(before: Path, after: Path) -> dict[str, float]:
    """Returns the lowest cosine of the vectors in two records of `selftest`; nothing without a record from before."""
    if not before.is_file():
        return {}
    a, b = (np.array([text["vector"] for text in read_object(file)["texts"]]) for file in (before, after))
    return {"cosine": round(float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()), 4)}
