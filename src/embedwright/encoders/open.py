"""Open by name anything that encodes: our models, packaged MiniLM, embedders of others. Teachers and baselines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
from embedwright.endpoint import shown
from embedwright.errors import InputError, as_input_error
from embedwright.locate import local, packaged, split_revision, text_of
from embedwright.model.backbone import check_report, dtype_named
from embedwright.model.embedder import Embedder
from embedwright.model.encode import prefix_and_limit
from embedwright.model.formats.base import check_weights
from embedwright.model.formats.detect import detect
from embedwright.model.formats.families import FAMILIES, split_family
from embedwright.model.formats.folder import INDEX, SINGLE, weights_in
from embedwright.model.verify.probe import ProbeError


def open_encoder(
    name: str,
    revision: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    max_tokens: int | None = None,
) -> Embedder | SentenceTransformerEncoder:
    """Opens a model as `open_model` does, for inference only: a latent block is folded.

    It cuts texts after `max_tokens`, where given. That and `dtype` count as parts of the model: vectors of it as it was
    saved are those of another one. Raises ValueError for more tokens than it reads.
    """
    model = open_model(name, revision, device, dtype)
    if isinstance(model, Embedder):
        model.fold()
        if max_tokens is not None:
            _, limit = prefix_and_limit(model.contract, model.longest, None, None, max_tokens)
            model.contract = model.contract.model_copy(update={"max_tokens": limit})
    elif max_tokens is not None:
        shorten(model, name, max_tokens)
    return model


def shorten(encoder: SentenceTransformerEncoder, name: str, max_tokens: int) -> None:
    """Has a model of sentence-transformers cut texts after `max_tokens`. Raises InputError for more than it reads."""
    known = encoder.model
    if known.max_seq_length == math.inf:
        raise InputError(f"max_tokens={max_tokens}: {name} is static and reads all of a text: leave it out")
    if not known.tokenizer.num_special_tokens_to_add() < max_tokens <= (known.max_seq_length or max_tokens):
        raise InputError(f"max_tokens={max_tokens}: {name} reads up to {known.max_seq_length}, special ones included")
    known.max_seq_length = max_tokens


def open_model(
    name: str, revision: str | None = None, device: str | None = None, dtype: str | None = None
) -> Embedder | SentenceTransformerEncoder:
    """Opens `minilm`, a folder or a hub id as an object with `encode(texts, task=None)`.

    Models of ours, released NV-Embed and the families of `model.formats.families` (a name may say the family, as in
    `e5-mistral:folder`) open as an `Embedder`. Everything else opens through sentence-transformers, with its own
    prompts.

    `device` and `dtype` are those of `Embedder.load`.

    Raises FileNotFoundError if the packaged weights or the folder are missing, ValueError for a file and for a device
    that is not here, ProbeError for a model that is not what it says, such as one whose tokenizer leaves out the EOS
    that it asks for.
    """
    device = _checked_device(device)
    if "://" in name:
        raise InputError(f"{shown(name)} is a server: `embedwright mine --teacher` asks those, here give a model")
    if name == "bm25" and local(name) is None:
        raise InputError("bm25 ranks words and has no vectors: `eval`, `compare --suite` and `mine` take it by name")
    _, where = split_family(name)
    if "/" not in where and local(where) is None and packaged(where) is None:
        # a hub id without an owner is a name that only sentence-transformers knows
        how = _options(name, device, dtype)
        return SentenceTransformerEncoder(_sentence_transformer(*split_revision(where, revision), how))
    place, form = detect(name, revision)
    if form is not None:
        return Embedder.load(name, revision=revision, device=device, dtype=dtype)
    how = _options(name, device, dtype)
    if place.hub_id is None:
        return SentenceTransformerEncoder(_sentence_transformer(str(place.path), None, how, place.path))
    return SentenceTransformerEncoder(_sentence_transformer(place.hub_id, place.path.name, how, place.path))


def _options(name: str, device: str | None, dtype: str | None) -> dict[str, Any]:
    """Returns the options with which sentence-transformers opens a model. Raises InputError for int8."""
    if dtype == "int8":
        raise InputError(f"dtype=int8 is for models that open as an Embedder; sentence-transformers opens {name}")
    return {"device": device, "model_kwargs": {"dtype": dtype_named(dtype)} if dtype else None}


def _checked_device(device: str | None) -> str | None:
    """Returns the name of a device. Raises InputError if there is none of this name here."""
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device}: {str(error).splitlines()[0]}") from None
    return device


def _sentence_transformer(where: str, revision: str | None, how: dict[str, Any], folder: Path | None = None) -> Any:
    """Opens a folder or a hub id. `folder` is that folder, or the snapshot of the commit `revision`."""
    from sentence_transformers import SentenceTransformer

    part = None if folder is None else _weights_folder(folder)
    if part is not None:
        check_weights(part)
    with as_input_error(where, "cannot be opened by sentence-transformers"):
        model = SentenceTransformer(where, revision=revision, trust_remote_code=False, **how)
    if how["model_kwargs"] and model.max_seq_length == math.inf and model.dtype != how["model_kwargs"]["dtype"]:
        raise InputError(f"dtype: {where} is static and stays in {str(model.dtype)[6:]}: leave it out")
    if folder is None:
        return model
    if part is not None:
        _check_complete(part, model)
    wants_eos = json.loads(text_of(folder, "tokenizer_config.json") or "{}").get("add_eos_token")
    if wants_eos and model.tokenizer("a")["input_ids"][-1] != model.tokenizer.eos_token_id:
        raise ProbeError(
            f"{where}: its tokenizer_config.json asks for EOS after every text, its tokenizer adds none: its vectors "
            f"would be wrong. Say whose format it has, one of {', '.join(f'{family}:{where}' for family in FAMILIES)}"
        )
    return model


def _weights_folder(folder: Path) -> Path | None:
    """Returns the folder with the safetensors of the first module; None if there are none, or for a static model."""
    modules = json.loads(text_of(folder, "modules.json") or "[]")
    if modules and modules[0]["type"].endswith(".StaticEmbedding"):  # one matrix, and perhaps no config
        return None
    part = folder / (modules[0]["path"] if modules else "")
    return part if any((part / name).exists() for name in (SINGLE, INDEX)) else None


def _check_complete(part: Path, model: Any) -> None:
    """Raises InputError if sentence-transformers made up weights that the folder lacks, which it only logs."""
    network = getattr(model[0], "auto_model", None)
    if network is None:
        return
    stored = {known for name in weights_in(part) for known in (name, name.partition(".")[2])}
    own = {name for name, _ in network.named_parameters()}
    if all(name in stored or name.partition(".")[2] in stored for name in own):
        return
    # transformers renames some weights on the way: its own report decides, which costs a second look at the files
    _, info = type(network).from_pretrained(
        part, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True, trust_remote_code=False
    )
    # BERT's pooler is in few checkpoints, and sentence-transformers does not use it
    info["missing_keys"] = {name for name in info["missing_keys"] if not name.startswith("pooler.")}
    check_report(part, info)
