"""Long documents in chunks of so many tokens, so that a model reads all of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

from embedwright.encoders.protocol import Encoder
from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
from embedwright.encoders.sharded import itself
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.text import TextTokenizer

Spans = list[tuple[int, int]]


def chunked(encoder: Encoder, texts: Sequence[str], size: int) -> list[list[str]]:
    """Cuts each text after every `size` tokens of the encoder's own tokenizer. An empty text is one chunk.

    An encoder without a tokenizer (a server, a user's own object) counts words between spaces. Raises InputError for
    a chunk that the encoder would cut, since what is cut off would be in no chunk.
    """
    tokenizer, room = _reading(itself(encoder))

    def spans(text: str) -> Spans:
        if tokenizer is None:
            return [match.span() for match in re.finditer(r"\S+", text)]
        found: Spans = tokenizer.encode(text, add_special_tokens=False).offsets
        return found

    chunks = [_cut(text, spans(text), size) for text in texts]
    if tokenizer is not None:
        longest = max(len(spans(chunk)) for parts in chunks for chunk in parts)
        if longest > room:
            raise InputError(
                f"chunk_tokens: {size} gives chunks of up to {longest} tokens, and the model reads {room} of a "
                "document: take smaller chunks"
            )
    return chunks


def _cut(text: str, spans: Spans, size: int) -> list[str]:
    starts = [spans[place][0] for place in range(size, len(spans), size)]
    parts = [text[start:end].strip() for start, end in zip([0, *starts], [*starts, None], strict=True)]
    return [part for part in parts if part] or [text]


def _reading(encoder: Encoder) -> tuple[Tokenizer | None, int]:
    """Returns the encoder's tokenizer, which does not truncate, and how many tokens of a document it reads."""
    if isinstance(encoder, Embedder):
        plain = encoder.text_tokenizer.plain
        return plain, encoder.max_tokens - _around(plain, lambda text: encoder.tokenize([text]).ids_T.numel())
    if not isinstance(encoder, SentenceTransformerEncoder):
        return None, 0
    model = encoder.model
    if (backend := getattr(model.tokenizer, "backend_tokenizer", None)) is None:
        return None, 0
    plain = TextTokenizer(backend).plain
    front = model.prompts.get(encoder.prompt_name(None)) or ""
    around = _around(plain, lambda text: len(plain.encode(front + text).ids))
    return plain, sys.maxsize if model.max_seq_length is None else model.max_seq_length - around


def _around(tokenizer: Tokenizer, count: Callable[[str], int]) -> int:
    """Counts the tokens that stand around a text: prompt, BOS, EOS."""
    return count("a") - len(tokenizer.encode("a", add_special_tokens=False).ids)
