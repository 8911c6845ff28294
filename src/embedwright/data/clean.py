"""Repeated texts: equal when normalised, or near-duplicates by the Jaccard of their word 3-shingles.

Texts are read once, in order, and the first of several copies is the one kept; only the normalised form of what was
kept stays in memory. MinHash and LSH are rensa's (Rust); LSH proposes, the Jaccard of the shingles themselves decides,
so nothing below the threshold is ever called a repeat.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from rensa import RMinHash, RMinHashLSH

NEAR = 0.8  # Jaccard from which two texts are near-duplicates: the usual value (Lee et al. 2022, arXiv 2107.06499)
SHINGLE_WORDS = 3
# 20 bands of 6 rows propose a pair of Jaccard s with probability 1 - (1 - s^6)^20: 0.998 at 0.8, 0.9999 at 0.85, and
# only 0.27 at 0.5, which keeps the verification cheap on texts that share boilerplate.
_BANDS, _ROWS = 20, 6
_SEED = 7
_BATCH = 1024  # rensa sketches ten times as many texts a second in batches as one by one


@dataclass(frozen=True, slots=True)
class Counts:
    """How many texts repeat another one, by kind."""

    exact: int
    near: int


class Match(NamedTuple):
    """Index of the text that is repeated, and whether the two are equal when normalised."""

    first: int
    exact: bool


class _Fold(dict[int, str]):
    """What `str.translate` makes of each code point: letters, marks and numbers stay, all else parts words.

    Marks must stay: `\\w` of `re` leaves them out, and Hindi words that differ in a vowel sign would become equal.
    """

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = char if unicodedata.category(char)[0] in "LMN" else " "
        return self[code]


_FOLD = _Fold()


def normalise(text: str) -> str:
    """NFKC, casefolded, with every run of whitespace, punctuation and symbols as one space.

    A text of nothing else (`"?!"`) keeps its characters, so that such texts are not all the same.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.translate(_FOLD).split()) or folded.strip()


def shingles(normalised: str) -> set[str]:
    """The word 3-grams of a normalised text; the text itself where it is shorter."""
    words = normalised.split(" ")
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def repeats(texts: Iterable[str]) -> dict[int, Match]:
    """For each text that repeats an earlier one: the first such. What is not a key here repeats nothing."""
    kept, found = _Kept(), {}
    for index, sketch in enumerate(_sketches(texts)):
        if match := kept.find(sketch):
            found[index] = match
        else:
            kept.add(index, sketch)
    return found


def drop_duplicates(texts: Sequence[str]) -> tuple[list[int], Counts]:
    """Indices of the texts to keep, in order, and how many were dropped. No kept text is a repeat of another."""
    found = repeats(texts)
    return [index for index in range(len(texts)) if index not in found], _count(found)


def leaks(train_texts: Iterable[str], eval_texts: Iterable[str]) -> tuple[list[int], Counts]:
    """Indices of the training texts that equal or nearly equal an evaluation text, in order, and their counts."""
    held_out = _Kept()
    for index, sketch in enumerate(_sketches(eval_texts)):
        held_out.add(index, sketch)
    found = {i: match for i, sketch in enumerate(_sketches(train_texts)) if (match := held_out.find(sketch))}
    return list(found), _count(found)


class _Sketch(NamedTuple):
    normalised: str
    minhash: Any


def _sketches(texts: Iterable[str]) -> Iterator[_Sketch]:
    normalised = map(normalise, texts)
    while batch := list(islice(normalised, _BATCH)):
        sets = [list(shingles(text)) for text in batch]
        yield from map(_Sketch, batch, RMinHash.from_token_sets(sets, num_perm=_BANDS * _ROWS, seed=_SEED))


class _Kept:
    """The texts kept so far, and which of them a new one repeats."""

    def __init__(self) -> None:
        self.index_of: dict[str, int] = {}
        self.text_of: dict[int, str] = {}
        self.lsh = RMinHashLSH(threshold=NEAR, num_perm=_BANDS * _ROWS, num_bands=_BANDS)

    def add(self, index: int, sketch: _Sketch) -> None:
        if sketch.normalised in self.index_of:
            return
        self.index_of[sketch.normalised] = index
        self.text_of[index] = sketch.normalised
        self.lsh.insert(index, sketch.minhash)

    def find(self, sketch: _Sketch) -> Match | None:
        if (first := self.index_of.get(sketch.normalised)) is not None:
            return Match(first, exact=True)
        # Shingles are made again for the few candidates: keeping them would cost ten times the memory of the texts.
        mine: set[str] | None = None
        for first in sorted(self.lsh.query(sketch.minhash)):
            mine = mine or shingles(sketch.normalised)
            if _jaccard(mine, shingles(self.text_of[first])) >= NEAR:
                return Match(first, exact=False)
        return None


def _jaccard(a: set[str], b: set[str]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def _count(found: dict[int, Match]) -> Counts:
    exact = sum(match.exact for match in found.values())
    return Counts(exact=exact, near=len(found) - exact)
