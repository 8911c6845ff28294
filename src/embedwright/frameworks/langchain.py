"""A model as LangChain's `Embeddings`."""

from __future__ import annotations

from typing import Any

from embedwright.encoders.open import open_encoder
from embedwright.encoders.protocol import as_encoder, encode_finite, encode_queries
from embedwright.errors import MissingPackageError

try:
    from langchain_core.embeddings import Embeddings
except ImportError as error:
    raise MissingPackageError("needs langchain-core: pip install 'embedwright[langchain]'") from error


class EmbedwrightEmbeddings(Embeddings):
    """LangChain's embeddings of any model that encodes.

    `model` is a name, as every command opens it, or an object with `encode`. Queries get the instruction `task`, or the
    model's own; `task=""` means none. Raises ValueError at once if the model has none and none is given.
    """

    def __init__(self, model: Any, task: str | None = None) -> None:
        self.model = as_encoder(open_encoder(model) if isinstance(model, str) else model)
        self.task = task
        self.embed_query("a query")  # a missing instruction shows now, not after all documents are encoded

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = encode_finite(self.model, texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        vector: list[float] = encode_queries(self.model, [text], self.task)[0].tolist()
        return vector
