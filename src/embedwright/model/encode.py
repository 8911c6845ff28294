"""Encodes texts batch by batch: the next one is tokenised while the model computes. Then converts the vectors.

N texts, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedwright import threads
from embedwright.errors import InputError, check_choice
from embedwright.packing import PackedTexts, batches, pack
from embedwright.text import Contract, NoTokenError, TokenizedText, check_limit, check_text, check_whole

Precision = Literal["float32", "int8", "binary"]

_CHUNK = 16_384  # texts tokenised at a time: bounds memory on a corpus, still sorts well by length
_GPU_CHUNK = 2_048  # a GPU waits for its first texts, and does not need many of one length


class NotFiniteError(InputError):
    """The vector of texts[index] is not finite: its states overflow the weights' dtype, or the weights are broken."""

    def __init__(self, index: int, dtype: torch.dtype | None = None) -> None:
        self.index = index
        name = str(dtype).removeprefix("torch.")
        help = 'load the model with dtype="float32" or "bfloat16"' if name == "float16" else "its weights are broken"
        super().__init__(f"texts[{index}]: the model computes no finite vector of it in {name}: {help}")


def encoded(
    texts: list[str],
    read: Callable[[Sequence[str]], list[TokenizedText]],
    embed: Callable[[PackedTexts], Tensor],
    *,
    device: torch.device,
    batch_tokens: int,
    width: int,
    progress: bool,
) -> NDArray[np.float32]:
    """Encodes each distinct text once. Returns float32 (N, E), in the order of the texts.

    `width` is E. Raises as `vectors_of`, naming the index in `texts`.
    """
    unique = list(dict.fromkeys(texts))
    vectors = np.empty((len(unique), width), dtype=np.float32)
    try:
        with progress_bar(len(unique), progress) as bar:
            for rows, found in vectors_of(unique, read, embed, device, batch_tokens):
                vectors[rows] = found
                bar.update(len(rows))
    except NoTokenError as error:
        raise NoTokenError(error.prefix, error.limit, texts.index(unique[error.index])) from None
    except NotFiniteError as error:
        raise NotFiniteError(texts.index(unique[error.index])) from None
    if len(unique) == len(texts):
        return vectors
    row = {text: i for i, text in enumerate(unique)}
    repeated: NDArray[np.float32] = vectors[[row[text] for text in texts]]
    return repeated


def vectors_of(
    texts: Sequence[str],
    read: Callable[[Sequence[str]], list[TokenizedText]],
    embed: Callable[[PackedTexts], Tensor],
    device: torch.device,
    batch_tokens: int,
) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """Yields (indices of texts, their vectors), batch by batch, in any order; each text once.

    Tokenising runs in a thread, ahead of the model. NoTokenError and NotFiniteError name the index of the text.
    """
    size = _CHUNK if device.type == "cpu" else _GPU_CHUNK

    def tokenized(start: int) -> list[TokenizedText]:
        try:
            return read(texts[start : start + size])
        except NoTokenError as error:
            raise NoTokenError(error.prefix, error.limit, start + error.index) from None

    for start, chunk in ahead(tokenized, range(0, len(texts), size)):

        def run(batch: list[int], chunk: list[TokenizedText] = chunk) -> Tensor:
            return embed(pack([chunk[i] for i in batch]))

        made = list(batches([len(text.ids) for text in chunk], batch_tokens))
        found = queued(run, made) if device.type == "cuda" else ((batch, run(batch).cpu().numpy()) for batch in made)
        for batch, vectors_NE in found:
            if (bad := first_not_finite(vectors_NE)) is not None:
                raise NotFiniteError(start + batch[bad])
            yield [start + i for i in batch], vectors_NE


def queued(
    run: Callable[[list[int]], Tensor], made: Sequence[list[int]]
) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """Yields (batch, run(batch) in host memory), in order. Each waits until the next one is in the GPU's queue.

    A GPU stands still while Python prepares a batch, unless it has another one to go on with.
    """
    before: tuple[list[int], Tensor, torch.cuda.Event] | None = None
    for batch in made:
        found_NE = run(batch)
        vectors_NE = found_NE.to("cpu", non_blocking=True)  # torch pins what it makes for such a copy
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(found_NE.device))  # the model's GPU need not be the current one
        if before is not None:
            yield _waited_for(*before)
        before = batch, vectors_NE, copied
    if before is not None:
        yield _waited_for(*before)


def _waited_for(
    batch: list[int], vectors_NE: Tensor, copied: torch.cuda.Event
) -> tuple[list[int], NDArray[np.float32]]:
    copied.synchronize()
    return batch, vectors_NE.numpy()


def ahead(
    make: Callable[[int], list[TokenizedText]], starts: Sequence[int]
) -> Iterator[tuple[int, list[TokenizedText]]]:
    """Yields (start, make(start)), in order. A thread makes the next one: tokenizers releases the interpreter."""
    if len(starts) < 2:
        yield from ((start, make(start)) for start in starts)
        return
    with ThreadPoolExecutor(1, initializer=threads.unbind) as pool:
        waiting = pool.submit(make, starts[0])
        for start, following in zip(starts, [*starts[1:], None], strict=True):
            chunk = waiting.result()
            if following is not None:
                waiting = pool.submit(make, following)
            yield start, chunk


def quantize(vectors_NE: NDArray[np.float32], precision: Precision) -> NDArray[Any]:
    """Converts vectors: `int8` scales each one, which keeps cosines; `binary` packs the signs, eight to a uint8.

    Raises:
        InputError: The precision is unknown, or a vector is not finite.
    """
    check_precision(precision)
    if (bad := first_not_finite(vectors_NE)) is not None:
        raise InputError(f"vector {bad} is not finite")
    if precision == "float32":
        return vectors_NE
    if precision == "int8":
        largest = np.abs(vectors_NE).max(axis=1, keepdims=True)
        scaled: NDArray[np.int8] = np.rint(vectors_NE * (127 / np.maximum(largest, 1e-12))).astype(np.int8)
        return scaled
    bits: NDArray[np.uint8] = np.packbits(vectors_NE > 0, axis=1)
    return bits


def shortened(vectors_NE: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """Keeps the first `dim` dimensions of each vector and normalises again. Raises InputError if all are zero."""
    cut = vectors_NE[:, :dim]
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    lost = (lengths[:, 0] == 0) & vectors_NE.any(axis=1)
    if lost.any():
        index = lost.argmax()
        raise InputError(f"texts[{index}]: the first {dim} dimensions of its vector are zero: give a larger dim")
    scaled: NDArray[np.float32] = cut / np.maximum(lengths, 1e-12)
    return scaled


def first_not_finite(vectors_NE: NDArray[np.float32]) -> int | None:
    """Returns the index of a vector that is not finite, or None."""
    finite = np.isfinite(vectors_NE).all(axis=1)
    return None if finite.all() else int(finite.argmin())


def prefix_and_limit(
    contract: Contract, longest: int, task: str | None, prefix: str | None, limit: int | None
) -> tuple[str, int]:
    """Checks these arguments of `encode`. Returns the string in front of each text, and the tokens it is cut to."""
    for name, value in (("task", task), ("prefix", prefix)):
        if value is not None:
            check_text(value, name)
    if task is not None and prefix is not None:
        raise InputError("give task or prefix, not both")
    limit = check_limit(contract, contract.max_tokens if limit is None else limit)
    if limit > longest:
        raise InputError(f"max_tokens={limit}: the model has positions for {longest} tokens")
    return contract.prefix(task) if prefix is None else prefix, limit


def check_sizes(dim: int | None, batch_tokens: int, precision: str, width: int) -> None:
    """Raises InputError or InputTypeError if an argument of `encode` is invalid for vectors of this width."""
    check_precision(precision)
    check_whole(batch_tokens, "batch_tokens")
    if batch_tokens < 1:
        raise InputError(f"batch_tokens={batch_tokens} must be positive")
    if dim is not None:
        check_whole(dim, "dim")
        if not 1 <= dim <= width:
            raise InputError(f"dim={dim}: the model has {width} dimensions")


def progress_bar(total: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="text", desc="encode", disable=not shown)


def check_precision(precision: str) -> None:
    """Raises InputError for a precision that `quantize` does not know."""
    check_choice("precision", precision, get_args(Precision))
