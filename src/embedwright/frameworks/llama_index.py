"""A model as LlamaIndex's `BaseEmbedding`."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from typing import Any
from uuid import uuid4

from embedwright.encoders.open import open_encoder
from embedwright.encoders.protocol import Encoder, as_encoder, encode_finite, encode_queries
from embedwright.errors import MissingPackageError
from embedwright.fingerprint import fingerprint_of

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from pydantic import PrivateAttr
except ImportError as error:
    raise MissingPackageError("needs llama-index-core: pip install 'embedwright[llamaindex]'") from error


class EmbedwrightEmbedding(BaseEmbedding):
    """LlamaIndex's embedding of any model that encodes.

    `model` is a name, as every command opens it, or an object with `encode`. Queries get the instruction `task`, or the
    model's own. Raises ValueError at once if there is neither; `task=""` has queries read as documents. `settings` are
    those of LlamaIndex's own class; it hands over up to 512 texts at a time here, which the model packs.

    `model_digest` is that of the model's fingerprint. LlamaIndex's caches tell models apart by it, not by a name.
    """

    task: str | None = None
    model_digest: str = ""
    _encoder: Encoder = PrivateAttr()

    def __init__(self, model: Any, task: str | None = None, **settings: Any) -> None:
        name = model if isinstance(model, str) else type(model).__name__
        super().__init__(**{"model_name": name, "embed_batch_size": 512, "task": task, **settings})
        self._encoder = as_encoder(open_encoder(model) if isinstance(model, str) else model)
        known = fingerprint_of(self._encoder)  # an object without one is only itself
        self.model_digest = uuid4().hex if known is None else sha256(repr(sorted(known.items())).encode()).hexdigest()
        self._get_query_embedding("a query")  # a missing instruction shows now, not after all documents are encoded

    @classmethod
    def class_name(cls) -> str:
        return "EmbedwrightEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        vector: list[float] = encode_queries(self._encoder, [query], self.task)[0].tolist()
        return vector

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = encode_finite(self._encoder, texts).tolist()
        return vectors

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
