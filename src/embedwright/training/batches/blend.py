"""Which rows make up step s: a pure function of sources, seed and step. Nothing is shuffled, nothing is remembered.

Each source gets its exact share of the slots so far; within it, rows follow a keyed permutation, new in each epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embedwright.data.schema import Example, Task
from embedwright.data.tables.table import ExampleTable


@dataclass(frozen=True)
class Source:
    """Rows of one data entry whose tasks have the same family, `symmetric` and `in_batch_negatives`.

    Only tasks that the task file beside the rows describes are grouped so; any other task has a source of its own.
    `tasks` maps names to tasks if there are several, else it is empty. `sampling_weight` is relative to the stage's
    other sources.
    """

    name: str
    table: ExampleTable
    rows: NDArray[np.int64]
    task: Task
    sampling_weight: float = 0.0
    tasks: Mapping[str, Task] = field(default_factory=dict)

    def row(self, number: int) -> Row:
        example = self.table[int(self.rows[number])]
        return Row(example, self.tasks.get(example.task, self.task))


class Rows:
    """All rows of these sources' tables, as often as they are read, without their negatives; each table once."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._tables = list({source.table.fingerprint: source.table for source in sources}.values())

    def __iter__(self) -> Iterator[Example]:
        for table in self._tables:
            yield from table.without_negatives()


def sampling_weight(weight: float, rows: int, alpha: float, of: int | None = None) -> float:
    """Returns the sampling weight of a data set of `rows` rows, weight * rows ** alpha, relative to the others of its
    stage.

    `alpha` 1 draws in proportion to size, 0 each alike; 1 / alpha is the sampling temperature. Source: mT5 (arXiv
    2010.11934), section 3.1, with 0.3 for languages. With `of`, these are `rows` rows of a data set of `of`
    rows, and get their part of its weight.
    """
    return weight * rows * (of or rows) ** (alpha - 1) if rows else 0.0


@dataclass(frozen=True)
class Row:
    """One example with the task it is trained under (its in-batch switch settled)."""

    example: Example
    task: Task


def rows_at(
    sources: Sequence[Source],
    step: int,
    *,
    batch_queries: int,
    batching: Literal["blended", "homogeneous"],
    seed: int,
    stage: str,
) -> list[Row]:
    """Returns the `batch_queries` rows of this step; `homogeneous` takes all of a step from one source."""
    if batching == "blended":
        first, size = step * batch_queries, batch_queries
        per_slot = 1
    else:
        first, size = step, 1
        per_slot = batch_queries
    before, after = _counts(sources, first), _counts(sources, first + size)
    return [
        source.row(_row(source, i, seed, stage))
        for source, start, stop in zip(sources, before, after, strict=True)
        for i in range(start * per_slot, stop * per_slot)
    ]


def _counts(sources: Sequence[Source], slots: int) -> list[int]:
    """Returns how many of the first `slots` slots each source has had: sums to `slots`, and one slot more is one
    source's.

    The largest source gets its rounded share of the slots, the next one its share of those left, and so on: rounding
    cumulative shares instead would let counts shrink. Off by less than one with up to three sources, else by less than
    two.
    """
    largest_first = sorted(range(len(sources)), key=lambda i: -sources[i].sampling_weight)
    counts, left, weights = [0] * len(sources), slots, sum(s.sampling_weight for s in sources)
    for i in largest_first[:-1]:
        counts[i] = math.floor(left * (sources[i].sampling_weight / weights) + 0.5)
        left -= counts[i]
        weights -= sources[i].sampling_weight
    counts[largest_first[-1]] = left
    return counts


def _row(source: Source, i: int, seed: int, stage: str) -> int:
    epoch, position = divmod(i, len(source.rows))
    return permuted(position, len(source.rows), f"{seed}/{stage}/{source.name}/{epoch}")


def permuted(position: int, n: int, key: str) -> int:
    """Returns where a keyed pseudo-random permutation of range(n) sends `position`: O(1) time and memory.

    Four rounds of a balanced Feistel network over the next power of four, walked until it falls inside n.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(4):
            digest = hashlib.blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        position = left << half | right
        if position < n:
            return position
