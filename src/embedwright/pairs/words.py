"""Cuts documents into sentences, passages and crops of words, and tells words that say something from others."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

PASSAGE_WORDS = 200  # length of a passage cut from a longer document: about 256 tokens
CROP = (0.1, 0.5)  # a crop's share of the words: those of Contriever, arXiv 2112.09118
CONTENT_WORDS, SENTENCE_WORDS = 4, 60  # the fewest and the most of a sentence that becomes a query
_FUNCTION = (
    "a an the this that these those it its he she they them their his her him we us our you your i me my who whom whose"
    " which what when where why how there here one some any each all both such same other another no not only also than"
    " then so too very just more most much many few and or but nor if as at by for from in into of on onto off to with"
    " without within about over under between through during before after above below up down out is are was were be"
    " been being am has have had having do does did can could will would shall should may might must while because"
    " since until although though however therefore thus hence etc e.g i.e eg ie see"
)
FUNCTION_WORDS = frozenset(_FUNCTION.split())

_MARKS = re.compile(r"^(?:\d{1,2}\.\s+|<[^<>]{1,60}>\s*|[(\[][^()\[\]]{1,60}[)\]]\s*|/[^/ ]{1,30}/\s*)+(?=\S)")
_CODE = re.compile(r"[{}$=@\\|<>]|://|::|\b\w+\(|--|\s\*\s")
_BREAK = re.compile(
    r"((?<![.!?])[.!?]+[\"')\]]*)\s+(?=[\"'(\[<]*[^\W_a-z])|[。！？]|\n\s*\n|\n(?=\s*(?:[-*•#]|\d+[.)])\s)"
)
# What a full stop follows without ending a sentence: an initial, letters with stops (U.S., e.g.), titles and the like.
_NO_END = re.compile(
    r"(?:\b[A-Z]|\b(?:\w\.)+\w|\b(?:[Mm]rs?|[DJS]r|[Pp]rof|[Ss]t|[Nn]os?|[Ff]igs?|[Vv]ol|vs|cf|al|ca|approx))$"
)
WORD = re.compile(r"\w[\w'’+#.-]*[\w+#]|\w")


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text by its punctuation and blank lines, with single spaces."""
    pieces, start = [], 0
    for match in _BREAK.finditer(text):
        word = max(start, text.rfind(" ", start, match.start()))  # from `start` on, a row of initials takes n²
        if match[1] == "." and _NO_END.search(text, word, match.start()):
            continue
        pieces.append(text[start : match.end()])
        start = match.end()
    pieces.append(text[start:])
    return [sentence for piece in pieces if (sentence := " ".join(piece.split()))]


def around(pieces: Sequence[str], at: int) -> tuple[str, str]:
    """Returns what stands before and after the sentence at `at`: with it, PASSAGE_WORDS words at most."""
    left, right, room = at, at + 1, PASSAGE_WORDS - len(pieces[at].split())
    for step in range(1, len(pieces)):
        before = right - left
        if at + step == right < len(pieces) and (size := len(pieces[right].split())) <= room:
            right, room = right + 1, room - size
        if at - step == left - 1 >= 0 and (size := len(pieces[left - 1].split())) <= room:
            left, room = left - 1, room - size
        if right - left == before:  # both ends are reached, or what comes next is too long
            break
    return " ".join(pieces[left:at]), " ".join(pieces[at + 1 : right])


def is_prose(sentence: str) -> bool:
    """Returns whether a sentence says enough to find its text: words, not code, addresses or tables."""
    letters = sum(char.isalpha() for char in sentence)
    return (
        len(content(sentence)) >= CONTENT_WORDS
        and len(sentence.split()) <= SENTENCE_WORDS
        and letters >= 0.8 * len(sentence.replace(" ", ""))
        and not _CODE.search(sentence)
        and all(sentence.count(left) == sentence.count(right) for left, right in ("()", "[]"))
    )


def unmarked(sentence: str) -> str:
    """Returns a sentence without what dictionaries put in front: a number, a field or an abbreviation in brackets."""
    return _MARKS.sub("", sentence)


def content(text: str) -> list[str]:
    """Returns the words that say what a text is about: not articles, pronouns, prepositions and the like."""
    return [word for word in WORD.findall(text) if word.lower() not in FUNCTION_WORDS]


def crop(words: Sequence[str], fewest: int, rng: random.Random) -> range:
    """Draws a run of words, as their places: first its share of all words (CROP, at least `fewest`), then its start."""
    length = min(len(words), max(fewest, round(rng.uniform(*CROP) * len(words))))
    start = rng.randrange(len(words) - length + 1)
    return range(start, start + length)


def window(text: str, rng: random.Random) -> list[str]:
    """Returns the words of a text: of a long one, PASSAGE_WORDS of them from a place that is drawn."""
    words = text.split()
    start = rng.randrange(max(1, len(words) - PASSAGE_WORDS + 1))
    return words[start : start + PASSAGE_WORDS]
