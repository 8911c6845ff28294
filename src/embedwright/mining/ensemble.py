"""Several teachers for one set of examples, in the three ways that NV-Retriever compares (arXiv 2407.15831)."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Literal, TypeVar, get_args

import numpy as np

Ensemble = Literal["cross-sample", "intra-sample", "intra-sample-duplicates"]
ENSEMBLES: tuple[Ensemble, ...] = get_args(Ensemble)

T = TypeVar("T")


def drawn_teacher(example_id: str, teachers: int, seed: int) -> int:
    """The number of the one of `teachers` that an example gets (`cross-sample`), the same in every run."""
    # the word in front keeps this apart from the draw of negatives, which is seeded by the same two
    return int(np.random.default_rng([*b"teacher", seed, zlib.crc32(example_id.encode())]).integers(teachers))


def in_turn(ranked: Sequence[Iterable[T]]) -> Iterator[T]:
    """The best of each list, then the second best of each, and so on; a list that is at its end is left out.

    No item is None."""
    if len(ranked) == 1:
        yield from ranked[0]
        return
    for rank in zip_longest(*ranked):
        yield from (item for item in rank if item is not None)
