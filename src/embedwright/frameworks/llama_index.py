"""A model as LlamaIndex's `BaseEmbedding`."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from typing import Any
from uuid import uuid4

from embedwright.encoders.open import open_encoder
from embedwright.encoders.protocol import Encoder, as_encoder, encode_finite, encode_queries
from embedwright.errors import InputError, MissingPackageError
from embedwright.fingerprint import fingerprint_of

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from pydantic import PrivateAttr
except ImportError as error:
    raise MissingPackageError("needs llama-index-core: pip install 'embedwright[llamaindex]'") from error


class EmbedwrightEmbedding(BaseEmbedding):
    """LlamaIndex's embedding of any model that encodes.

    `model` is a name, as every command opens it, or an object with `encode`. Queries get the instruction `task`, or the
    model's own; `task=""` means none. Raises ValueError at once if the model has none and none is given. `settings` are
    those of LlamaIndex's own class; it hands over up to 512 texts at a time here, which the model packs.

    `model_digest` is that of the model's fingerprint: the IngestionCache of pipelines tells models apart by it. Raises
    ValueError for an `embeddings_cache`, which cannot, and for a given digest that is another model's.
    """

    task: str | None = None
    model_digest: str = ""
    _encoder: Encoder = PrivateAttr()

    def __init__(self, model: Any, task: str | None = None, **settings: Any) -> None:
        if settings.get("embeddings_cache") is not None:
            raise InputError(
                "embeddings_cache knows a vector by its text alone, and gives a query the vector of a document: take "
                "the IngestionCache of a pipeline"
            )
        encoder = as_encoder(open_encoder(model) if isinstance(model, str) else model)
        name, facts = model if isinstance(model, str) else type(model).__name__, fingerprint_of(encoder)
        # an object without a fingerprint is only itself: no cache knows it again
        digest = uuid4().hex if facts is None else sha256(repr(sorted(facts.items())).encode()).hexdigest()
        then = settings.pop("model_digest", digest)
        if facts is not None and then != digest:
            raise InputError(f"{name} is another model than the one that was written down ({digest}, not {then})")
        given = {"model_name": name, "embed_batch_size": 512, "task": task, **settings}
        super().__init__(**given, model_digest=digest)
        self._encoder = encoder
        self._get_query_embedding("a query")  # a missing instruction shows now, not after all documents are encoded

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> EmbedwrightEmbedding:
        """Makes it anew from `to_dict`. The model is opened by its name, or handed over again as `model`.

        Raises ValueError if it is another model than it was.
        """
        embedding: EmbedwrightEmbedding = super().from_dict({"model": data["model_name"], **data}, **kwargs)
        return embedding

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
