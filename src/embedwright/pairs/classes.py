"""Fields of documents as classes: documents of one tag, section or label are close to each other (clustering)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from embedwright.data.answers import class_id
from embedwright.data.files.documents import Document
from embedwright.data.keys import exact_key
from embedwright.data.schema import Example, Passage
from embedwright.pairs.way import Made, Make

TRIES = 50  # draws for one text, before there counts as none


def classes(documents: Iterable[Document], negatives: int) -> Make:
    """Reads all documents with labels, which stay in memory, and returns what makes the example of one.

    Its positive is a document with a label in common, its negatives are up to `negatives` documents without one; each
    is of another source than the document and each other. A class is drawn first, then one of its documents, so that
    small classes count like large ones. A text that has other labels elsewhere is of no use on either side.
    """
    labelled = [document for document in documents if document.labels]
    labels_of: dict[str, set[str]] = {}
    conflicting = set()
    for document in labelled:
        key = exact_key(document.whole)
        if labels_of.setdefault(key, {*document.labels}) != {*document.labels}:
            conflicting.add(key)
    of_class: dict[str, list[Document]] = {}
    for document in labelled:
        if exact_key(document.whole) not in conflicting:
            for label in dict.fromkeys(document.labels):
                of_class.setdefault(label, []).append(document)

    def make(document: Document, rng: random.Random) -> Made:
        if document.bad_label:
            return "bad_label"
        if not document.labels:
            return "no_label"
        if exact_key(document.whole) in conflicting:
            return "conflicting"
        taken = {document.family}
        close = list(dict.fromkeys(document.labels))
        positive = _draw(of_class, close, taken, rng)
        if positive is None:
            return "singleton"
        far, wrong = [label for label in of_class if label not in document.labels], list[Document]()
        while len(wrong) < negatives and (other := _draw(of_class, far, taken, rng, without=close)):
            wrong.append(other)
        right = (_passage(positive, beside=document),)
        return [Example("", "", document.whole, right, tuple(map(_passage, wrong)))]

    return make


def _draw(
    of_class: dict[str, list[Document]],
    names: list[str],
    taken: set[str],
    rng: random.Random,
    without: Sequence[str] = (),
) -> Document | None:
    """Draws a document of the classes `names` and of none in `without`, whose family is not `taken`; now it is."""
    for _ in range(TRIES if names else 0):
        other = rng.choice(of_class[rng.choice(names)])
        if other.family not in taken and {*other.labels}.isdisjoint(without):
            taken.add(other.family)
            return other
    return None


def _passage(document: Document, beside: Document | None = None) -> Passage:
    """Returns a document whose id holds its labels and its own ids, after those of the document `beside` it."""
    both = [each for each in (beside, document) if each]
    labels = dict.fromkeys(label for each in both for label in each.labels)
    return Passage(document.whole, class_id(labels, dict.fromkeys(id for each in both for id in each.ids)))
