"""Repeated texts: equal by their exact key, or near-duplicates by the Jaccard of their word 3-shingles (`keys`).

The first of several copies is the one kept. MinHash is rensa's (Rust); texts that share one of 20 bands of their sketch
are candidates, and the Jaccard of the shingles themselves decides, so nothing below the threshold is called a repeat.
Bands are joined by sorting arrays: the hash maps of an LSH index take several times their memory. The texts themselves
wait in a temporary file, from which the candidates are read again.

    N texts, U of them different, B bands
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedwright.data.keys import NEAR, both_keys, jaccard, shingles

# 20 bands of 6 rows propose a pair of Jaccard s with probability 1 - (1 - s^6)^20: 0.998 at 0.8, 0.9999 at 0.85, and
# only 0.27 at 0.5, which keeps the verification cheap on texts that share boilerplate.
_BANDS, _ROWS = 20, 6
_SEED = 7
_BATCH = 1024  # rensa sketches ten times as many texts a second in batches as one by one
# Rows of a band -> one key: a linear hash modulo 2^64. A collision proposes a pair that the Jaccard then refuses.
_MIX = np.random.default_rng(_SEED).integers(1, 2**64, size=_ROWS, dtype=np.uint64) | np.uint64(1)


@dataclass(frozen=True, slots=True)
class Counts:
    """How many texts repeat another one, by kind."""

    exact: int
    near: int


class Match(NamedTuple):
    """Index of the text that is repeated, whether their exact keys are equal, the Jaccard of their shingles."""

    first: int
    exact: bool
    jaccard: float


def repeats(texts: Iterable[str]) -> dict[int, Match]:
    """For each text that repeats an earlier one: the first such that is kept. What is no key here repeats nothing.

    Texts are read once. Memory: about 300 bytes a text, 500 where nearly every text has a near-duplicate, and the
    answer; their near keys lie in a temporary file ($TMPDIR). Time grows with the square of the number of texts
    that share half of their words with all others without being near. No text that is kept repeats another.
    """
    spool, digests, blocks, shingled = DiskList(), array("Q"), [], array("b")
    for batch in _batched(map(both_keys, texts)):
        sets = [shingles(near) for _, near in batch]
        for (exact, near), own in zip(batch, sets, strict=True):
            spool.add(near)
            digests.frombytes(_digest(exact))
            shingled.append(bool(own))
        blocks.append(_band_keys(sets))
    if not blocks:
        return {}
    first_N = _first_equal(np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2))
    compared_N = (first_N == np.arange(len(first_N))) & np.frombuffer(shingled, dtype=bool)
    near_repeats = _near_repeats(spool, blocks, np.flatnonzero(compared_N))
    found: dict[int, Match] = {}
    for index, first in enumerate(first_N.tolist()):
        if match := near_repeats.get(first):  # a copy of what is no more than nearly a repeat is one, too
            found[index] = match
        elif first != index:
            found[index] = Match(first, exact=True, jaccard=1.0)
    return found


def drop_duplicates(texts: Sequence[str]) -> tuple[list[int], Counts]:
    """Indices of the texts to keep, in order, and how many were dropped. No kept text is a repeat of another."""
    found = repeats(texts)
    return [index for index in range(len(texts)) if index not in found], _count(found)


def leaks(train_texts: Iterable[str], eval_texts: Iterable[str]) -> tuple[list[int], Counts]:
    """Indices of the training texts that equal or nearly equal an evaluation text, in order, and their counts."""
    matches = DuplicateIndex(eval_texts).find(train_texts)
    found = {index: match for index, match in enumerate(matches) if match}
    return list(found), _count(found)


class DuplicateIndex:
    """Texts that others are held against. Memory: about 600 bytes a text, whatever its length.

    A text of the same words as one of these is near it, however short: a leak differs in punctuation alone, too.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = DiskList()  # their near keys
        self._index_of: dict[bytes, int] = {}
        self._index_of_words: dict[bytes, int] = {}  # of texts too short for shingles
        blocks, numbers = [], array("i")
        for batch in _batched(map(both_keys, texts)):
            sets = [shingles(near) for _, near in batch]
            for (exact, near), own in zip(batch, sets, strict=True):
                number = len(self.texts)
                self._index_of.setdefault(_digest(exact), number)
                if own:
                    numbers.append(number)
                elif near:
                    self._index_of_words.setdefault(_digest(near), number)
                self.texts.add(near)
            blocks.append(_band_keys([own for own in sets if own]))
        number_N = np.frombuffer(numbers, dtype=np.int32)
        self._bands = []  # keys in ascending order, and whose they are
        for band in range(_BANDS if len(number_N) else 0):
            keys_N = np.concatenate([block[:, band] for block in blocks])
            order_N = np.argsort(keys_N, kind="stable")
            self._bands.append((keys_N[order_N], number_N[order_N]))

    def find(self, texts: Iterable[str]) -> Iterator[Match | None]:
        """For each text, in order: what it repeats, an equal text before the nearest one; None where there is none."""
        for batch in _batched(map(both_keys, texts)):
            candidates: list[set[int]] = [set() for _ in batch]
            sets = [shingles(near) for _, near in batch]
            keys = _band_keys(sets)
            for band, (keys_N, number_N) in enumerate(self._bands):
                start, end = (np.searchsorted(keys_N, keys[:, band], side=side) for side in ("left", "right"))
                for i in np.flatnonzero(start < end):
                    candidates[i].update(number_N[start[i] : end[i]].tolist())
            for (exact, near), own, some in zip(batch, sets, candidates, strict=True):
                yield self._best(exact, near, own, some)

    def _best(self, exact: str, near: str, mine: set[str], candidates: set[int]) -> Match | None:
        if (first := self._index_of.get(_digest(exact))) is not None:
            return Match(first, exact=True, jaccard=1.0)
        if near and (first := self._index_of_words.get(_digest(near))) is not None:
            return Match(first, exact=False, jaccard=1.0)
        scores = {first: jaccard(mine, shingles(self.texts[first])) for first in sorted(candidates)}
        best = max(scores, key=scores.__getitem__, default=-1)
        return Match(best, exact=False, jaccard=scores[best]) if best >= 0 and scores[best] >= NEAR else None


class DiskList:
    """Texts in a temporary file, written in order and read by number: 8 bytes of memory a text."""

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


def _batched(keys: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    while batch := list(islice(keys, _BATCH)):
        yield batch


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()  # 128 bits: equal digests are equal texts


def _band_keys(sets: Sequence[set[str]]) -> NDArray[np.uint64]:
    """uint64 (N, B): texts of equal shingles have equal keys."""
    from rensa import RMinHash  # of the extra `data`; shingles and their Jaccard, which mining takes, need none

    rows = RMinHash.digest_matrix_from_token_sets(list(map(list, sets)), num_perm=_BANDS * _ROWS, seed=_SEED).to_rows()
    digests = np.array(rows, dtype=np.uint64).reshape(-1, _BANDS, _ROWS)
    keys: NDArray[np.uint64] = (digests * _MIX).sum(axis=2, dtype=np.uint64)
    return keys


def _first_equal(digests_N2: NDArray[np.uint64]) -> NDArray[np.int64]:
    """int64 (N,): the first row that is equal to each."""
    order_N = np.lexsort((digests_N2[:, 1], digests_N2[:, 0]))  # stable: equal rows stay in order
    high, low = digests_N2[order_N, 0], digests_N2[order_N, 1]
    new_N = np.r_[True, (high[1:] != high[:-1]) | (low[1:] != low[:-1])]
    first_N = np.empty(len(order_N), dtype=np.int64)
    first_N[order_N] = order_N[new_N][np.cumsum(new_N) - 1]
    return first_N


def _near_repeats(spool: DiskList, blocks: list[NDArray[np.uint64]], unique_U: NDArray[np.int64]) -> dict[int, Match]:
    """Those of the texts `unique_U` (ascending, no two equal) that nearly repeat an earlier one which is kept."""
    group_UB, sizes = _groups(blocks, unique_U)
    # The kept members of group g, ascending: member[start[g] : start[g] + kept[g]]. There is room for all of them.
    start, kept = np.cumsum(sizes) - sizes, np.zeros(len(sizes), dtype=np.int32)
    member = np.empty(sizes.sum(), dtype=np.int32)
    found: dict[int, Match] = {}
    for row in np.flatnonzero((group_UB >= 0).any(axis=1)):
        index, groups = int(unique_U[row]), group_UB[row][group_UB[row] >= 0]
        candidates = {i for g in groups for i in member[start[g] : start[g] + kept[g]].tolist()}
        mine = shingles(spool[index]) if candidates else set()
        for first in sorted(candidates):
            if (score := jaccard(mine, shingles(spool[first]))) >= NEAR:
                found[index] = Match(first, exact=False, jaccard=score)
                break
        else:
            member[start[groups] + kept[groups]] = index
            kept[groups] += 1
    return found


def _groups(
    blocks: list[NDArray[np.uint64]], unique_U: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """int32 (U, B): the group of texts that share this band, -1 where nobody does; int64 (groups,): their sizes."""
    group_UB = np.full((len(unique_U), _BANDS), -1, dtype=np.int32)
    sizes = [np.zeros(0, dtype=np.int64)]
    total = 0
    for band in range(_BANDS):
        keys_U = np.concatenate([block[:, band] for block in blocks])[unique_U]
        _, number_U, count = np.unique(keys_U, return_inverse=True, return_counts=True)
        shared = count > 1
        name = np.where(shared, total + np.cumsum(shared) - 1, -1)
        group_UB[:, band] = name[number_U]
        sizes.append(count[shared].astype(np.int64))
        total += int(shared.sum())
    return group_UB, np.concatenate(sizes)


def _count(found: dict[int, Match]) -> Counts:
    exact = sum(match.exact for match in found.values())
    return Counts(exact=exact, near=len(found) - exact)
