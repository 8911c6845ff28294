"""Open by name anything that encodes: our models, packaged MiniLM, embedders of others. Teachers and baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedwright.endpoint import shown
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.model.families import FAMILIES, said
from embedwright.model.locate import local, packaged, text_of
from embedwright.model.probe import ProbeError
from embedwright.model.storage import form_of
from embedwright.sentence_transformer import SentenceTransformerEncoder


def open_encoder(name: str) -> Embedder | SentenceTransformerEncoder:
    """What `open_model` opens, for inference alone: a latent block is folded."""
    model = open_model(name)
    return model.fold() if isinstance(model, Embedder) else model


def open_model(name: str) -> Embedder | SentenceTransformerEncoder:
    """`minilm`, a folder or a hub id, as an object with `encode(texts, task=None)`.

    Models of ours, released NV-Embed and the families of `embedwright.model.families` (also said: `e5-mistral:folder`)
    open as an `Embedder`; everything else through sentence-transformers, under its own prompts. FileNotFoundError where
    the packaged weights or the folder are not there, ValueError for a file, ProbeError for a model that is not what it
    says, such as one whose tokenizer leaves out the EOS that it asks for.
    """
    if "://" in name:
        raise InputError(f"{shown(name)} is a server: `embedwright mine --teacher` asks those, here give a model")
    family, where = said(name)
    folder = packaged(name) or local(where) or where
    if isinstance(folder, Path) and not folder.is_dir():
        raise InputError(f"{name} is a file of weights, not an embedder: use Embedder.from_decoder")
    # a hub id without an owner is a name that only sentence-transformers knows
    if family or ((isinstance(folder, Path) or "/" in folder) and form_of(folder, where)):
        return Embedder.load(name)
    return SentenceTransformerEncoder(_sentence_transformer(str(folder)))


class RawMean:
    """A decoder as released: causal, mean over all its tokens, instructions ignored. The baseline of the demo."""

    def __init__(self, base: str, max_tokens: int, dtype: str = "float32") -> None:
        self.model = Embedder.from_decoder(base, pooling="mean", attention="causal", max_tokens=max_tokens, dtype=dtype)

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = self.model.encode(texts)
        return vectors


def _sentence_transformer(where: str) -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(where)
    wants_eos = json.loads(text_of(where, "tokenizer_config.json") or "{}").get("add_eos_token")
    if wants_eos and model.tokenizer("a")["input_ids"][-1] != model.tokenizer.eos_token_id:
        raise ProbeError(
            f"{where}: its tokenizer_config.json asks for EOS behind every text, its tokenizer adds none: its vectors "
            f"would be wrong. Say whose format it has, one of {', '.join(f'{family}:{where}' for family in FAMILIES)}"
        )
    return model
