"""A model as the server uses it: texts become tokens in one place, and tokens become vectors in another."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from embedwright import threads
from embedwright.errors import InputError
from embedwright.model import encode
from embedwright.model.embedder import Embedder
from embedwright.packing import pack
from embedwright.text import NoTokenError, TokenizedText, check_texts, tokenize_checked

_PER_TOKEN = 8  # characters of a text that are looked at first, for each token that the model reads
_SPARE = 64  # tokens after the last one that is kept: a cut may change its neighbours
_END = 100  # characters of a text's end, which a suffix of the contract may merge with
_RUNS = string.whitespace + string.digits  # tokenizers part a run of these by its length, so no cut is made in one


class PackedModel:
    """An `Embedder` cut in two: `read` for many threads, `embed` for the one that computes."""

    def __init__(self, model: Embedder) -> None:
        self.model, self.max_tokens = model, model.max_tokens

    def read(self, texts: Sequence[str], task: str | None) -> list[TokenizedText]:
        """Tokenises texts as `Embedder.encode` does. Raises InputError for a text that has no token to pool."""
        model, contract = self.model, self.model.contract
        in_front, limit = encode.prefix_and_limit(contract, model.longest, task, None, self.max_tokens)
        checked, by_count = check_texts(texts), contract.mask_rule == "count"
        if self._start(in_front, by_count or contract.template_specials) != in_front:
            raise NoTokenError(in_front, limit, 0)  # now, since it would be tokenised once more for each text
        shorter = [self._start(text, by_count) for text in checked]
        return tokenize_checked(model.text_tokenizer, contract, shorter, in_front, limit)

    def _start(self, text: str, special: bool) -> str:
        """Returns a part of a long text that gives the tokens of the whole: those beyond `max_tokens` are cut anyway.

        The part grows until it has tokens to spare, so that a text of megabytes is not tokenised to its end. `special`
        says whether special tokens written in it are read as such.
        """
        tokenizer = self.model.text_tokenizer.special if special else self.model.text_tokenizer.plain
        size = _PER_TOKEN * self.max_tokens
        while len(text) > size + _END:
            start = text[:size].rstrip(_RUNS)
            with threads.unbound():
                (encoding,) = tokenizer.encode_batch([start], add_special_tokens=False)
            if len(encoding.ids) >= self.max_tokens + _SPARE:
                return start + text[-_END:]
            size *= 4
        return text

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
