"""Finds repeated texts: equal by their exact key, or near-duplicates by the Jaccard index of their shingles (`keys`).

rensa's MinHash index proposes candidates, and the Jaccard index of the shingles themselves decides, so nothing below
the threshold is called a repeat. Near keys wait in a temporary file, from which those of the candidates are read again.

    N texts, B bands
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash, RMinHashLSH

from embedwright.data.keys import NEAR, both_keys, jaccard, shingles

T = TypeVar("T")

# 20 bands of 6 rows propose a pair of Jaccard s with probability 1 - (1 - s^6)^20: 0.998 at 0.8, 0.9999 at 0.85, and
# only 0.27 at 0.5, which keeps the verification cheap on texts that share boilerplate.
_BANDS, _ROWS = 20, 6
_SKETCH = {"num_perm": _BANDS * _ROWS, "seed": 7}
_BATCH = 1024  # rensa sketches ten times as many texts a second in batches as one by one
# The rows of a band -> one key, the upper half of a linear hash modulo 2^64.
_MIX = np.random.default_rng(7).integers(1, 2**64, size=_ROWS, dtype=np.uint64) | np.uint64(1)


class Match(NamedTuple):
    """Holds the index of the repeated text, whether the exact keys are equal, and the Jaccard index of the shingles."""

    first: int
    exact: bool
    jaccard: float


def repeats(texts: Iterable[str]) -> dict[int, Match]:
    """Maps the index of each repeat to the first kept text that it repeats. Texts without an entry are kept.

    No kept text repeats another one. Texts are read once. Memory: about 300 bytes a text, and 2 KB more for each kept
    text that shares a band of its sketch with another one; near keys lie in a temporary file ($TMPDIR). Time grows with
    the square of the number of texts that share half of their words with all others without being near.
    """
    near_keys, first_of, firsts = DiskList(), dict[bytes, int](), array("q")
    bands = [np.zeros((0, _BANDS), dtype=np.uint32)]
    for batch in _batched(map(both_keys, texts)):
        for exact, near in batch:
            firsts.append(first_of.setdefault(_digest(exact), len(near_keys)))
            near_keys.add(near)
        bands.append(_band_keys([shingles(near) for _, near in batch]))
    del first_of
    first_N = np.frombuffer(firsts, dtype=np.int64)
    unique = np.flatnonzero(first_N == np.arange(len(first_N)))
    found: dict[int, Match] = {}
    index = RMinHashLSH(NEAR, _SKETCH["num_perm"], _BANDS)
    for numbers in _batched(iter(unique[_sharing(np.concatenate(bands)[unique])].tolist())):
        sets = [shingles(near_keys[number]) for number in numbers]
        for number, mine, sketch in zip(numbers, sets, _sketches(sets), strict=True):
            scores = ((first, jaccard(mine, shingles(near_keys[first]))) for first in sorted(index.query(sketch)))
            if match := next((Match(first, False, score) for first, score in scores if score >= NEAR), None):
                found[number] = match
            elif mine:
                index.insert(number, sketch)
    for number, first in enumerate(firsts):
        if first != number:  # a copy of a near-duplicate is one, too
            found[number] = found.get(first) or Match(first, exact=True, jaccard=1.0)
    return found


class DuplicateIndex:
    """Holds texts that others are compared with. It takes about 2 KB of memory a text, whatever its length.

    A text with the same words as one of these is near it, however short: a leak may differ in punctuation alone.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.near_keys = DiskList()
        self._first: dict[bytes, int] = {}  # by exact key
        self._first_short: dict[bytes, int] = {}  # by near key, of texts too short for shingles
        self._index = RMinHashLSH(NEAR, _SKETCH["num_perm"], _BANDS)
        for batch in _batched(map(both_keys, texts)):
            sets = [shingles(near) for _, near in batch]
            for (exact, near), own, sketch in zip(batch, sets, _sketches(sets), strict=True):
                number = len(self.near_keys)
                self._first.setdefault(_digest(exact), number)
                if own:
                    self._index.insert(number, sketch)
                elif near:
                    self._first_short.setdefault(_digest(near), number)
                self.near_keys.add(near)

    def find(self, texts: Iterable[str]) -> Iterator[Match | None]:
        """Yields for each text, in order, what it repeats: an equal text, else the nearest one, else None."""
        for batch in _batched(map(both_keys, texts)):
            sets = [shingles(near) for _, near in batch]
            for (exact, near), mine, sketch in zip(batch, sets, _sketches(sets), strict=True):
                if (first := self._first.get(_digest(exact))) is not None:
                    yield Match(first, exact=True, jaccard=1.0)
                elif (first := self._first_short.get(_digest(near))) is not None:
                    yield Match(first, exact=False, jaccard=1.0)
                else:
                    yield self._nearest(mine, sorted(self._index.query(sketch)))

    def _nearest(self, mine: set[str], candidates: Sequence[int]) -> Match | None:
        scores = [jaccard(mine, shingles(self.near_keys[first])) for first in candidates]
        best = max(scores, default=0.0)
        return Match(candidates[scores.index(best)], exact=False, jaccard=best) if best >= NEAR else None


class DiskList:
    """Holds texts in a temporary file. They are added in order and read by number, and take 8 bytes of memory each."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as this object
        self._ends = array("q", [0])
        self._written = True

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, text: str) -> None:
        self._ends.append(self._ends[-1] + self._file.write(text.encode()))
        self._written = False

    def __getitem__(self, index: int) -> str:
        if not self._written:
            self._file.flush()
            self._written = True
        start, end = self._ends[index], self._ends[index + 1]
        return os.pread(self._file.fileno(), end - start, start).decode()  # not mapped: pages would count as memory


def _batched(items: Iterator[T]) -> Iterator[list[T]]:
    while batch := list(islice(items, _BATCH)):
        yield batch


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()  # 128 bits: equal digests are equal texts


def _sketches(sets: Iterable[set[str]]) -> Any:
    return RMinHash.from_token_sets(list(map(list, sets)), **_SKETCH)


def _band_keys(sets: Sequence[set[str]]) -> NDArray[np.uint32]:
    """Returns uint32 (N, B). Texts of equal shingles have equal keys; others share one by chance with 2^-32."""
    rows = RMinHash.digest_matrix_from_token_sets(list(map(list, sets)), **_SKETCH).to_rows()
    mixed = (np.array(rows, dtype=np.uint64).reshape(-1, _BANDS, _ROWS) * _MIX).sum(axis=2, dtype=np.uint64)
    keys: NDArray[np.uint32] = (mixed >> np.uint64(32)).astype(np.uint32)
    return keys


def _sharing(bands_NB: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Tells which texts share a band with another one. The index takes these alone, as it needs 2 KB for each."""
    shares_N = np.zeros(len(bands_NB), dtype=np.bool_)
    for keys_N in bands_NB.T:
        _, which_N, counts = np.unique(keys_N, return_inverse=True, return_counts=True)
        shares_N |= counts[which_N] > 1
    return shares_N
