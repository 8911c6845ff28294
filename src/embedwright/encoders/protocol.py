"""Anything that encodes texts, as one protocol: our Embedder, sentence-transformers, a server, a user's own object.

Mining and evaluation take any object with `encode`, so that any model can be teacher or baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
from embedwright.errors import InputError, InputTypeError
from embedwright.text import Contract

_SHOWN = 100  # characters of a text that a message quotes


class Encoder(Protocol):
    """Turns texts into float32 (N, E) by `encode(texts, task=None)`.

    `task` is an instruction for these texts. None means that they are documents; an empty one means that they are
    queries without an instruction. A prompt that the model puts in front of every query stays there.

    An encoder may have a `contract` (`text.Contract`), whose `default_task` is its own instruction of queries. It may
    have `fingerprint() -> dict[str, str]`, equal for two models exactly when they give the same vectors. Stored vectors
    are known by it; without one, they are known by the vectors of a few texts that are encoded again.
    """

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]: ...


def as_encoder(model: Any) -> Encoder:
    """Returns `model` as an `Encoder`. Raises TypeError if it has no `encode`."""
    if not callable(getattr(model, "encode", None)):
        raise InputTypeError(f"{type(model).__name__} has no encode(texts, task=None)")
    if any(base.__module__.startswith("sentence_transformers.") for base in type(model).__mro__):
        return SentenceTransformerEncoder(model)
    encoder: Encoder = model
    return encoder


def task_for(encoder: Encoder, stated: str | None) -> str | None:
    """Returns the instruction of texts whose data states `stated`: the model's own for an empty one. None stays."""
    contract = getattr(encoder, "contract", None)
    return contract.default_task if stated == "" and isinstance(contract, Contract) else stated


class TextError(InputError):
    """A model has no vector for one `text`, which the message quotes."""

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


def quoting(error: Exception, texts: Sequence[str]) -> Exception:
    """Returns an error about `texts[index]` as one that quotes that text, since callers of callers have other numbers.

    Returns any other as it is.
    """
    index = getattr(error, "index", None)
    if not isinstance(error, InputError) or not isinstance(index, int):
        return error
    return TextError(str(error).replace(f"texts[{index}]", repr(texts[index][:_SHOWN])), texts[index])


def encode_queries(encoder: Encoder, queries: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
    """Encodes queries to float32 (N, E), under `task`, or for None under the model's own instruction.

    An encoder with `encode_query` knows best whether it has one: `Embedder.encode_query` raises ValueError if not. Any
    other gets the empty task. Raises as `encode_finite`, too.
    """
    own = getattr(encoder, "encode_query", None)
    if own is None:
        return encode_finite(encoder, queries, task_for(encoder, "") if task is None else task)
    return _checked(partial(own, queries, task=task), queries)


def encode_finite(encoder: Encoder, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
    """Encodes to float32 (N, E). Raises ValueError for another shape, and TextError for a text without a vector."""
    return _checked(partial(encoder.encode, texts, task=task), texts)


def _checked(encode: Callable[[], Any], texts: Sequence[str]) -> NDArray[np.float32]:
    try:
        vectors_NE = np.ascontiguousarray(encode(), dtype=np.float32)
    except InputError as error:
        raise quoting(error, texts) from None
    if vectors_NE.ndim != 2 or len(vectors_NE) != len(texts):
        raise InputError(f"the model gave {vectors_NE.shape} for {len(texts)} texts")
    with np.errstate(over="ignore", invalid="ignore"):
        total = vectors_NE.sum()  # one pass; what is not finite makes it so too, and it is then looked for
    if not np.isfinite(total) and not (finite_N := np.isfinite(vectors_NE).all(axis=1)).all():
        bad = int(finite_N.argmin())
        raise TextError(f"the model's vector is not finite for {texts[bad][:_SHOWN]!r}", texts[bad])
    return vectors_NE
