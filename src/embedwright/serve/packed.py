"""A model as the server uses it: texts become tokens in one place, and tokens become vectors in another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from embedwright.errors import InputError
from embedwright.model import encode
from embedwright.model.embedder import Embedder
from embedwright.packing import pack
from embedwright.text import TokenizedText, check_texts, read


class PackedModel:
    """An `Embedder` cut in two: `read` for many threads, `embed` for the one that computes."""

    def __init__(self, model: Embedder) -> None:
        self.model, self.max_tokens = model, model.max_tokens

    def read(self, texts: Sequence[str], task: str | None) -> list[TokenizedText]:
        """Tokenises texts as `Embedder.encode` does. Raises InputError for a text that has no token to pool."""
        model = self.model
        in_front, limit = encode.frame(model.contract, model.longest, task, None, self.max_tokens)
        return read(model.text_tokenizer, model.contract, check_texts(texts), in_front, limit)

    def text_of(self, ids: Sequence[int], name: str) -> str:
        """Returns the text of the model's own token ids; special tokens are left out. `name` is for InputError."""
        tokenizer = self.model.text_tokenizer.plain
        if max(ids) >= (size := tokenizer.get_vocab_size()):
            raise InputError(f"{name} holds the token id {max(ids)}: the model has {size} tokens")
        return str(tokenizer.decode(list(ids)))

    def embed(self, texts: Sequence[TokenizedText]) -> NDArray[np.float32]:
        """Computes the vectors of these texts in one packed batch."""
        with torch.inference_mode():
            vectors_NE: NDArray[np.float32] = self.model.embed(pack(texts)).cpu().numpy()
        return vectors_NE
