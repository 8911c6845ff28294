"""Encoders whose work all processes share: rank 0 decides what is encoded, and each process encodes a part of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from embedwright.encoders.protocol import Encoder, quoting
from embedwright.errors import InputError
from embedwright.fingerprint import Facts, fingerprint_of
from embedwright.processes import Processes

Result = TypeVar("Result")
Ranker = Encoder | str  # what ranks without vectors, such as BM25, goes by its name

_BLOCK = 8192  # texts of a process that are encoded and sent at a time


def shared(
    opened: Callable[[], Sequence[Ranker]], processes: Processes, work: Callable[[list[Any]], Result]
) -> Result | None:
    """Runs `work` in rank 0, with encoders that all processes share, and returns its result there, None elsewhere.

    All processes must call this, and `opened` gives the same encoders in each. Rank 0 alone reads, scores, searches and
    writes; the others encode their part of the texts that it asks for. A name among the encoders stays as it is.

    An error in rank 0 or in `opened` raises in all processes. One of any process while it encodes is raised by `encode`
    in rank 0.
    """
    with processes.together():
        encoders = list(opened())
    if processes.count == 1:
        return work(encoders)
    if not processes.is_rank_0:
        while (asked := processes.broadcast())["texts"] is not None:
            try:
                rows, part = _part(encoders[asked.pop("encoder")], processes, **asked)
            except Exception:  # rank 0 knows it, and decides
                continue
            _gathered(part, rows, processes)
        processes.agree(None)
        return None
    found, error = None, None
    try:
        found = work(
            [one if isinstance(one, str) else ShardedEncoder(one, i, processes) for i, one in enumerate(encoders)]
        )
    except Exception as caught:
        error = caught
    processes.broadcast({"texts": None})
    processes.agree(error)
    return found


def itself(encoder: Any) -> Any:
    """Returns the encoder that all processes share, or any other as it is: what its tokenizer and its class are."""
    return encoder.encoder if isinstance(encoder, ShardedEncoder) else encoder


class ShardedEncoder:
    """An encoder of rank 0 whose texts all processes encode, each a part. `shared` makes it.

    Vectors equal those of one process up to rounding, since each process packs other texts together. A model whose
    weights are cut over the processes needs all of them in every forward: there each encodes all texts.
    """

    def __init__(self, encoder: Encoder, number: int, processes: Processes) -> None:
        self.encoder, self.number, self.processes = encoder, number, processes
        self.contract = getattr(encoder, "contract", None)

    def encode(self, texts: Sequence[str], task: str | None = None, **options: Any) -> NDArray[Any]:
        """Encodes each distinct text once, in one of the processes. `options` are those of the encoder's `encode`."""
        if not texts:
            return np.asarray(self.encoder.encode(texts, task=task, **options))
        place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        distinct, size = list(place), _BLOCK * self.processes.count
        blocks = []
        for start in range(0, len(distinct), size):
            asked: Any = {"texts": distinct[start : start + size], "task": task, "options": options}
            self.processes.broadcast(asked | {"encoder": self.number})
            rows, part = _part(self.encoder, self.processes, **asked)
            blocks.append(_gathered(part, rows, self.processes))
        found = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
        return found if len(place) == len(texts) else found[[place[text] for text in texts]]

    def fingerprint(self) -> Facts | None:
        """Returns the encoder's fingerprint, or None if its weights are sharded over the processes."""
        return None if _is_cut(self.encoder) else fingerprint_of(self.encoder)


def _is_cut(encoder: Any) -> bool:
    return bool(getattr(getattr(encoder, "network", None), "sharded", False))


def _part(
    encoder: Any, processes: Processes, texts: list[str], task: str | None, options: dict[str, Any]
) -> tuple[list[list[int]], NDArray[Any]]:
    """Encodes this process's part of distinct texts. Raises in all processes if one of them cannot.

    Returns the places of each process's texts, and the vectors (N, E) of its own.
    """
    rows, error = processes.split([len(text) for text in texts]), None
    mine, cut = rows[processes.rank], _is_cut(encoder)
    own = texts if cut else [texts[row] for row in mine]
    vectors_NE: NDArray[Any] = np.empty((0, 0), np.float32)
    try:
        if own:
            vectors_NE = np.asarray(encoder.encode(own, task=task, **options))
            if vectors_NE.ndim != 2 or len(vectors_NE) != len(own):
                raise InputError(f"the model gave {vectors_NE.shape} for {len(own)} texts")
    except Exception as caught:
        error = quoting(caught, own)
    processes.agree(error)
    return rows, vectors_NE[mine] if cut else vectors_NE


def _gathered(part_NE: NDArray[Any], rows: list[list[int]], processes: Processes) -> NDArray[Any]:
    """Returns the vectors of all processes in the order of the texts, in rank 0; elsewhere those of this process."""
    shapes = processes.all_gather([part_NE.shape[1], part_NE.dtype.str])
    width, dtype = next(shape for shape, own in zip(shapes, rows, strict=True) if own)
    sent_NE = np.zeros((max(map(len, rows)), width), dtype)  # all send as many
    if len(part_NE):
        sent_NE[: len(part_NE)] = part_NE
    received = [torch.from_numpy(np.empty_like(sent_NE)) for _ in rows] if processes.is_rank_0 else None
    dist.gather(torch.from_numpy(sent_NE), received, group=processes.channel)
    if received is None:
        return part_NE
    found_NE = np.empty((sum(map(len, rows)), width), dtype)
    for own, of_one in zip(rows, received, strict=True):
        found_NE[own] = of_one.numpy()[: len(own)]
    return found_NE
