"""When are two texts the same? One exact key and one near key, for everything that asks.

Exact: equal after Unicode's NFKC_Casefold and with runs of white space as one space. Near: the Jaccard index of the
sets of word 3-shingles is at least 0.8. Texts of fewer than five words have no near-duplicates: one word decides there.
"""

from __future__ import annotations

import re
import unicodedata

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
    """The form in which equal texts are equal: NFKC_Casefold, each run of white space as one space, none at the ends.

    A text of nothing but ignorable characters has the key of an empty text.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold()).casefold()
    return " ".join(unicodedata.normalize("NFKC", _IGNORABLE.sub("", folded)).split())


class _Fold(dict[int, str]):
    """What `str.translate` makes of each code point of an exact key: word characters stay, the rest separates words.

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
_SIGN = re.compile(r"(?<!\S)-(?=\d)")  # of a number: -5 is not 5


def near_key(text: str) -> str:
    """The words of a text, lower case, one space between them: what near-duplicates are compared by.

    Punctuation is dropped; symbols and the marks that are part of a word (C++, C#, 50%, -5) are kept. Letters of
    scripts without spaces (Han, kana, Thai, ...) are words of their own. Empty for a text of punctuation alone.
    """
    return _near(exact_key(text))


def both_keys(text: str) -> tuple[str, str]:
    """The exact key and the near key, for those that need both."""
    exact = exact_key(text)
    return exact, _near(exact)


def word_key(text: str) -> str:
    """The near key, or the exact key of a text without a word (`:)`).

    Texts of equal word keys differ in punctuation and case alone. For checks in which a false alarm is cheap and a miss
    is not: a hard negative, a leak. These ask for equal word keys of texts that are too short for near-duplicates, too.
    """
    exact = exact_key(text)
    return _near(exact) or exact


def _near(exact: str) -> str:
    return " ".join(_SIGN.sub("\u2212", exact).translate(_FOLD).split())


def shingles(key: str) -> set[str]:
    """The word 3-grams of a near key; empty for a key of fewer than five words, which has no near-duplicates."""
    words = key.split(" ")
    if len(words) < FEWEST_WORDS:
        return set()
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def jaccard(a: set[str], b: set[str]) -> float:
    """|a and b| / |a or b|; 0 if either set is empty."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0


def are_near(a: set[str], b: set[str]) -> bool:
    """Whether texts of these shingles are near-duplicates."""
    few, many = (len(a), len(b)) if len(a) < len(b) else (len(b), len(a))
    return few >= NEAR * many > 0 and jaccard(a, b) >= NEAR
