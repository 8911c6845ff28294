"""Anything that encodes texts, as one protocol: our Embedder, sentence-transformers, a user's own object.

Mining and evaluation take any object with `encode`, so that any model can be teacher or baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Encoder(Protocol):
    """`encode(texts, task=None)` gives float32 (N, E); `task` is an instruction for these texts, None for documents."""

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]: ...


class _SentenceTransformerEncoder:
    """A sentence-transformers model under its own prompts: it was not trained on ours, `task` only picks the side."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.query_prompt = "query" if (model.prompts or {}).get("query") else None
        self.document_prompt = "document" if (model.prompts or {}).get("document") else None

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        prompt_name = self.query_prompt if task else self.document_prompt
        vectors = self.model.encode(
            list(texts), prompt_name=prompt_name, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(vectors, dtype=np.float32)


def as_encoder(model: Any) -> Encoder:
    """`model` as an `Encoder`. Raises TypeError where it has no `encode`."""
    if not callable(getattr(model, "encode", None)):
        raise TypeError(f"{type(model).__name__} has no encode(texts, task=None)")
    if any(base.__module__.startswith("sentence_transformers.") for base in type(model).__mro__):
        return _SentenceTransformerEncoder(model)
    encoder: Encoder = model
    return encoder
