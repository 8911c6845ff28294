"""Decides when two texts are the same. All rooms take the exact key and the near key from here.

Texts are exact duplicates if they are equal after Unicode's NFKC_Casefold, with each run of white space as one space.
They are near-duplicates if the Jaccard index of their sets of word 3-shingles is at least 0.8. Texts of fewer than five
words have no near-duplicates: one word decides there.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable

import numpy as np

from embedwright.data.schema import DataError

NEAR = 0.8  # Jaccard from which two texts are near-duplicates: the usual value (Lee et al. 2022, arXiv 2107.06499)
SHINGLE_WORDS = 3
FEWEST_WORDS = 5  # below it, texts are compared by their exact key alone

# Unicode's Default_Ignorable_Code_Point (DerivedCoreProperties 16.0), which NFKC_Casefold drops: soft hyphens,
# zero-width spaces and joiners, byte order marks, direction marks, variation selectors, tags.
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
# Scripts written without spaces. Each of their letters counts as a word, or a whole sentence would be one.
_UNSPACED = ("CJK UNIFIED", "CJK COMPATIBILITY", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
# Punctuation that changes what a word is: C#, C*, 50%, @name, a/b, a_b, R&D. Symbols (+ < = $ ...) count as well.
_IN_WORDS = frozenset("#*%@/\\_&")


def exact_key(text: str) -> str:
    """Returns the text after NFKC_Casefold, with each run of white space as one space and none at the ends.

    Duplicates have equal keys. A text of ignorable characters alone has the key of an empty text.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold()).casefold()
    return " ".join(unicodedata.normalize("NFKC", _IGNORABLE.sub("", folded)).split())


class _Fold(dict[int, str]):
    """Tells `str.translate` what a code point of an exact key becomes: word characters stay, others separate words.

    Marks must stay: `\\w` of `re` leaves them out, and Hindi words that differ in a vowel sign would become equal.
    """

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        in_word = category[0] in "LMNS" or char in _IN_WORDS
        alone = category[0] == "L" and unicodedata.name(char, "").startswith(_UNSPACED)
        self[code] = f" {char}" if alone else char if in_word else " "
        return self[code]


_FOLD = _Fold()
_SIGN = re.compile(r"(?<!\S)-(?=\d)")  # sign of a number: -5 is not 5


def near_key(text: str) -> str:
    """Returns the words of a text in lower case, with one space between them. Near-duplicates are compared by it.

    It drops punctuation and keeps symbols and the marks that are part of a word (C++, C#, 50%, -5). Letters of scripts
    without spaces (Han, kana, Thai, ...) are words of their own. A text of punctuation alone gives an empty key.
    """
    return _near(exact_key(text))


def both_keys(text: str) -> tuple[str, str]:
    """Returns the exact key and the near key, for callers that need both."""
    exact = exact_key(text)
    return exact, _near(exact)


def word_key(text: str) -> str:
    """Returns the near key, or the exact key of a text without a word (`:)`).

    Texts with equal word keys differ in punctuation and case alone, however short they are. Use it where a false alarm
    is cheap and a miss is not: for a hard negative, for a leak.
    """
    exact = exact_key(text)
    return _near(exact) or exact


def _near(exact: str) -> str:
    return " ".join(_SIGN.sub("\u2212", exact).translate(_FOLD).split())


def shingles(key: str) -> set[str]:
    """Returns the word 3-grams of a near key. A key of fewer than five words has none, so no near-duplicates."""
    words = key.split(" ")
    if len(words) < FEWEST_WORDS:
        return set()
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def jaccard(a: set[str], b: set[str]) -> float:
    """Returns |a and b| / |a or b|, and 0 if a set is empty."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0


def are_near(a: set[str], b: set[str]) -> bool:
    """Returns whether texts with these shingles are near-duplicates."""
    few, many = (len(a), len(b)) if len(a) < len(b) else (len(b), len(a))
    return few >= NEAR * many > 0 and jaccard(a, b) >= NEAR


def refuse_repeats(marks: array[int], ids: Iterable[tuple[str, str]]) -> None:
    """Raises DataError if an id repeats an earlier one. `ids` yields where each stands, and the id.

    `marks` are the hashes of the ids, so that memory holds 8 bytes each. `ids` is read where two marks are equal.
    """
    hashes, counts = np.unique(np.array(marks, np.int64), return_counts=True)
    twice, seen = set(hashes[counts > 1].tolist()), set[str]()
    for where, id in ids if twice else ():
        if hash(id) in twice:
            if id in seen:
                raise DataError(f"{where}: id {id[:60]!r} twice")
            seen.add(id)
