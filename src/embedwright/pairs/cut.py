"""Ways that cut a document in two: its title and body, its first sentence and the rest, two crops, a sentence."""

from __future__ import annotations

import random

from embedwright.data.files.documents import Document
from embedwright.pairs.way import Made, pair
from embedwright.pairs.words import around, crop, is_prose, sentences, unmarked, window

KEPT = 0.1  # share of the passages that keep the sentence: the inverse cloze task, arXiv 1906.00300
FEWEST = 8  # words of a rest that still says something
CROP_WORDS = 8  # the fewest of a crop
TRIES = 50  # draws of two crops, before a document counts as short


def title(document: Document, rng: random.Random) -> Made:
    """Makes the title find the body."""
    if not document.title:
        return "no_title"
    return [pair(document, document.title, document.text)]


def summary(document: Document, rng: random.Random) -> Made:
    """Makes the first sentence find the sentences after it."""
    first, *rest = sentences(unmarked(document.text))
    if not is_prose(first):
        return "no_sentence"
    if len(" ".join(rest).split()) < FEWEST:
        return "short"
    return [pair(document, first, " ".join(rest))]


def crops(document: Document, rng: random.Random) -> Made:
    """Makes one crop of the words find another (arXiv 2112.09118, 2508.03453); half of the shorter may overlap."""
    words = window(document.text, rng)
    if len(words) < 2 * CROP_WORDS:
        return "short"
    for _ in range(TRIES):
        a, b = crop(words, CROP_WORDS, rng), crop(words, CROP_WORDS, rng)
        both = min(a.stop, b.stop) - max(a.start, b.start)
        if 2 * both <= min(len(a), len(b)):
            return [pair(document, " ".join(words[a.start : a.stop]), " ".join(words[b.start : b.stop]))]
    return "short"


def sentence(document: Document, rng: random.Random) -> Made:
    """Makes a sentence find what stands around it, which keeps the sentence in 10 % of the rows."""
    pieces = sentences(document.text)
    good = [i for i, piece in enumerate(pieces) if is_prose(unmarked(piece))]
    if not good:
        return "no_sentence"
    at = rng.choice(good)
    before, after = around(pieces, at)
    if len(f"{before} {after}".split()) < FEWEST:
        return "short"
    kept = [pieces[at]] if rng.random() < KEPT else []
    return [pair(document, unmarked(pieces[at]), " ".join(filter(None, [before, *kept, after])))]
