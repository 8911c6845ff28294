"""Claims and passages that do not bear them out: a number or a name is another one (FactCC, arXiv 1910.12840).

A sentence as it stands is a claim that its own passage supports. With another number or name in that sentence, the
passage no longer supports the claim, though nearly all words are the same.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from embedwright.data.answers import contrast_id
from embedwright.data.files.documents import Document
from embedwright.data.schema import Passage
from embedwright.pairs.way import Made, pair
from embedwright.pairs.words import FUNCTION_WORDS, around, is_prose, sentences, unmarked

FEWEST = 8  # words around the claim
_BRACKETS = re.compile(r"[(\[][^()\[\]]*[)\]]")
_QUOTE = re.compile(r"[\"'`*]\B|\B[\"'`]")
_NUMBER = re.compile(r"(?<![\w.,-])(?:\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)(?![\w-]|[.,]\d)")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][\w+#-]*(?: [A-Z][\w+#-]*)*(?![\w.]*\w)")


def swap(document: Document, rng: random.Random) -> Made:
    """Makes a claim find its passage before the same passage with another number or name in the claim's sentence.

    A name is replaced by another one of the passage. In half of the rows the changed sentence is the claim, and the
    passage as it was the negative, so that no text is right because it reads better.
    """
    pieces = sentences(document.text)
    found = []
    for at, piece in enumerate(map(unmarked, pieces)):
        before, after = around(pieces, at)
        if is_prose(piece) and not _QUOTE.search(piece) and len(f"{before} {after}".split()) >= FEWEST:
            found += [(at, old) for old in _values(piece) if not _has(old, f"{before} {after}")]
    rng.shuffle(found)
    for at, old in found:
        before, after = around(pieces, at)
        claim = unmarked(pieces[at])
        if new := _other(old, claim, f"{before} {after}", rng):
            claims = claim, new.join(re.split(_whole(old), claim))
            (right, wrong) = claims if rng.random() < 0.5 else claims[::-1]
            texts = [" ".join(filter(None, [before, claim, after])) for claim in (right, wrong)]
            against = Passage(texts[1], contrast_id(document.family))  # it may answer other claims on the document
            return [replace(pair(document, right, texts[0]), negatives=(against,))]
    return "nothing_to_swap"


def _values(sentence: str) -> list[str]:
    bare = _BRACKETS.sub("", sentence)
    names = [name for name in _NAME.findall(bare) if name.lower() not in FUNCTION_WORDS and len(name) > 1]
    return list(dict.fromkeys(_NUMBER.findall(bare) + names))


def _other(old: str, sentence: str, rest: str, rng: random.Random) -> str:
    """Returns another number of the same form, or another name of the passage, or nothing."""
    if not old[0].isdigit():
        names = sorted({name for name in _values(rest) if not name[0].isdigit() and not _has(name, sentence)})
        names = [name for name in names if _alike(old, name) and old not in name and name not in old]
        return rng.choice(names) if names else ""
    digits = [i for i, char in enumerate(old) if char.isdigit()]
    place = rng.choice(digits[1:] if len(digits) > 2 else digits)  # a year stays one
    digit = rng.choice([d for d in "123456789" if d != old[place]])
    return old[:place] + digit + old[place + 1 :]


def _alike(a: str, b: str) -> bool:
    """Returns whether both are acronyms, or both names of as many words: so that none stands for the other."""
    return (a.isupper(), len(a.split())) == (b.isupper(), len(b.split()))


def _whole(value: str) -> str:
    return rf"(?<![\w.,-]){re.escape(value)}(?![\w-]|[.,]\d)"


def _has(value: str, text: str) -> bool:
    return re.search(_whole(value), text) is not None
