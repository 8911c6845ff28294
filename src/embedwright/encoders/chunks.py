"""Cuts long documents into chunks of a number of tokens, so that a model reads all of them."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from embedwright.encoders.protocol import Encoder
from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
from embedwright.encoders.sharded import itself
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.text import TextTokenizer

Spans = list[tuple[int, int]]


class Chunk(NamedTuple):
    """A part of a document: its characters in the document's text, and what the model reads of it."""

    start: int
    end: int
    read: str


def chunked(encoder: Encoder, texts: Sequence[str], size: int) -> list[list[str]]:
    """Cuts each text after every `size` tokens of the encoder's own tokenizer. An empty text is one chunk.

    An encoder without a tokenizer (a server, a user's own object) counts words between spaces. Raises InputError for
    a chunk that the encoder would cut, since what is cut off would be in no chunk.
    """
    tokenizer, room = _reading(itself(encoder))
    chunks = [[text[a:b] for a, b in _cut(text, _tokens(tokenizer, text), size)] for text in texts]
    if tokenizer is not None:
        longest = max(len(_tokens(tokenizer, chunk)) for parts in chunks for chunk in parts)
        if longest > room:
            raise InputError(
                f"chunk_tokens: {size} gives chunks of up to {longest} tokens, and the model reads {room} of a "
                "document: take smaller chunks"
            )
    return chunks


def chunker(encoder: Encoder, size: int, overlap: int = 0) -> Callable[[str, str], list[Chunk]]:
    """Returns a function that cuts a document, given its title and its text, into chunks of at most `size` tokens.

    A chunk begins `overlap` tokens before the end of the one before it. The model reads the title in front of every
    chunk. No chunk is longer than what the model reads with it: where the title leaves less room than `size`, the
    document gets smaller chunks, and a title that takes more than half of the room is cut there.

    Raises InputError if the model reads fewer than `size` tokens, or `overlap` is not below `size`.
    """
    if size < 1 or not 0 <= overlap < size:
        raise InputError(f"chunks of {size} tokens with an overlap of {overlap}: the overlap must be smaller")
    tokenizer, room = _reading(itself(encoder))
    if tokenizer is not None and size > room:
        raise InputError(
            f"chunks of {size} tokens: the model reads {room} of a document: take smaller chunks (an index keeps those "
            "that it has: make a new one)"
        )

    def cut(title: str, text: str) -> list[Chunk]:
        tokens = _tokens(tokenizer, text)
        front = _tokens(tokenizer, title) if title else []
        if tokenizer is not None and len(front) > room // 2:
            title = title[: front[max(room // 2, 1) - 1][1]]
        at_most = size
        while True:
            spans = _cut(text, tokens, at_most, min(overlap, at_most - 1))
            chunks = [Chunk(a, b, f"{title} {text[a:b]}".strip()) for a, b in spans]
            if tokenizer is None:
                return chunks
            longest = max(len(_tokens(tokenizer, chunk.read)) for chunk in chunks)
            if longest <= room or at_most == 1:
                return chunks
            at_most = max(1, at_most - (longest - room))

    return cut


def token_counter(encoder: Encoder) -> Callable[[str], int]:
    """Returns a function that counts the tokens that the encoder reads of a document; words without a tokenizer."""
    tokenizer, room = _reading(itself(encoder))
    return lambda text: min(len(_tokens(tokenizer, text)), room if tokenizer is not None else sys.maxsize)


def _tokens(tokenizer: Tokenizer | None, text: str) -> Spans:
    """Returns the characters of each token; of each word between spaces without a tokenizer."""
    if tokenizer is None:
        return [match.span() for match in re.finditer(r"\S+", text)]
    found: Spans = tokenizer.encode(text, add_special_tokens=False).offsets
    return found


def _cut(text: str, tokens: Spans, size: int, overlap: int = 0) -> Spans:
    """Returns the characters of each chunk, without white space around it. A text of white space is one chunk."""
    found = []
    for place in range(0, max(len(tokens) - overlap, 1), size - overlap):
        start = tokens[place][0] if place else 0
        end = tokens[place + size][0] if place + size < len(tokens) else len(text)
        part = text[start:end]
        if part.strip():
            start += len(part) - len(part.lstrip())
            found.append((start, start + len(part.strip())))
    return found or [(0, len(text))]


def _reading(encoder: Encoder) -> tuple[Tokenizer | None, int]:
    """Returns the encoder's tokenizer, which does not truncate, and how many tokens of a document it reads."""
    if isinstance(encoder, Embedder):
        plain = encoder.text_tokenizer.plain
        return plain, encoder.max_tokens - _around(plain, lambda text: encoder.tokenize([text]).ids_T.numel())
    if not isinstance(encoder, SentenceTransformerEncoder):
        return None, 0
    model = encoder.model
    if (backend := encoder.backend_tokenizer) is None:
        return None, 0
    plain = TextTokenizer(backend).plain
    front = model.prompts.get(encoder.prompt_name(None)) or ""
    around = _around(plain, lambda text: len(plain.encode(front + text).ids))
    endless = model.max_seq_length in (None, math.inf)  # a static model, which adds up all tokens
    return plain, sys.maxsize if endless else model.max_seq_length - around


def _around(tokenizer: Tokenizer, count: Callable[[str], int]) -> int:
    """Counts the tokens that stand around a text: prompt, BOS, EOS."""
    return count("a") - len(tokenizer.encode("a", add_special_tokens=False).ids)
