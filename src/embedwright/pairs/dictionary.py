"""Entries of a dictionary: a document whose title is one or more names, and whose text says what they mean.

Examples of use stand in quotes at the end of the text, as in WordNet's glosses: `walk fast; "He marched in"`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from embedwright.data.files.documents import Document
from embedwright.data.schema import Example
from embedwright.pairs.way import Made, Make, pair

NAME_WORDS = 5  # the most of a name
_AFTER_USAGE = re.compile(r"(?:\s*-[^;]++)?[;:,.]?\s*")  # its author, perhaps, and a mark
_COMPANY = re.compile(r", (?:Inc|Ltd|Co|Corp|LLC|GmbH)\b")


class Entry(NamedTuple):
    """Holds one meaning: its names, what they mean, and examples of use."""

    document: Document
    names: list[str]
    meaning: str
    usages: list[str]

    def usages_of(self, name: str) -> list[str]:
        """Returns the examples of use with this name in them, or a form of it."""
        stem = re.escape(name[:-1] if name[-1] in "ey" else name)
        last = f"(?:{name[-1]}|i)?" if name[-1] in "ey" else f"{re.escape(name[-1])}?"
        form = re.compile(rf"\b{stem}{last}(?:s|es|d|ed|ing|er|est|ly)?\b", re.IGNORECASE)
        return [usage for usage in self.usages if form.search(usage)]


def entry_of(document: Document) -> Entry:
    """Reads a document as an entry. A document that is not an entry has no names, or no usages."""
    names = [document.title] if _COMPANY.search(document.title) else document.title.split(", ")
    if any(len(name.split()) > NAME_WORDS or not name[:1].isalnum() for name in names):
        names = []
    meaning, usages = _split(document.text)
    return Entry(document, names, meaning.strip(" ;:,"), usages)


def _split(text: str) -> tuple[str, list[str]]:
    """Returns what stands before the examples of use, and these: after a mark nothing but quotes up to the end."""
    pieces = text.split('"')
    first = len(pieces)
    # Backwards, because the end alone tells which quotes open: a text may have an odd number of them.
    for at in range(len(pieces) - 2, 0, -2):
        if not pieces[at] or not _AFTER_USAGE.fullmatch(pieces[at + 1]):
            break
        if pieces[at - 1].rstrip().endswith((";", ":", ",")):
            first = at
    usages = pieces[first:-1:2]
    return ('"'.join(pieces[:first]).rstrip()[:-1] if usages else text), usages


def gloss(documents: Iterable[Document], negatives: int) -> Make:
    """Reads all entries, which stay in memory, and returns what makes the examples of one.

    A name with an example of its use finds its meaning, and with its meaning the example. The negatives are meanings,
    or examples, of the same name in other entries, `negatives` at most.
    """
    senses: dict[str, list[Entry]] = {}
    for entry in map(entry_of, documents):
        for name in entry.names:
            senses.setdefault(name.lower(), []).append(entry)

    def make(document: Document, rng: random.Random) -> Made:
        entry = entry_of(document)
        if not entry.names or not entry.usages or len(entry.meaning.split()) < 2:
            return "no_usage"
        used = [(name, usage) for name in entry.names for usage in entry.usages_of(name)]
        if not used:
            return "no_name_in_usage"
        name, usage = rng.choice(used)
        others = [other for other in senses[name.lower()] if other.document.family != document.family]
        rng.shuffle(others)
        meanings = [(other, other.meaning) for other in others]
        usages = [(other, rng.choice(found)) for other in others if (found := other.usages_of(name))]
        return [
            _against(pair(document, f"{name}: {usage}", entry.meaning), meanings[:negatives]),
            _against(pair(document, f"{name}: {entry.meaning}", usage, "usage"), usages[:negatives]),
        ]

    return make


def _against(example: Example, others: list[tuple[Entry, str]]) -> Example:
    return replace(example, negatives=tuple(other.document.passage(text) for other, text in others if text))
