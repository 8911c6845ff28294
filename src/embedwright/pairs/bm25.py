"""BM25 as a teacher: a crop finds what BM25 ranks first, with BM25's scores to learn from (arXiv 2110.06918)."""

from __future__ import annotations

import random
from collections.abc import Iterable

from embedwright.data.answers import ids_of
from embedwright.data.files.documents import Document
from embedwright.data.keys import exact_key
from embedwright.data.schema import Example, Passage
from embedwright.pairs.way import Made, Make
from embedwright.pairs.words import crop, window
from embedwright.vectors import bm25

QUERY_WORDS = 5, 32  # the fewest and the most of a crop
EQUAL = 0.95  # share of the best score from which a document is a positive, too: the rule of mining for false negatives

POSITIVES = 5  # a crop that fits more documents as well says what is in all of them, not what is in one


def taught(documents: Iterable[Document], negatives: int) -> Make:
    """Indexes title and text of all documents, which stay in memory, and returns what makes the examples of one.

    The query is a crop of the document. Its positives are the documents whose score is at least 95 % of the best, its
    negatives the next `negatives` ones that share a word with it, do not contain it as it stands, and are of another
    family than the positives and the document. `positive_scores` and `negative_scores` are BM25's. A crop with more
    than 5 positives makes no example, nor does one whose own document is none of them.
    """
    pool = [document.passage(document.whole) for document in documents]
    index = bm25.index(passage.text for passage in pool)

    def make(document: Document, rng: random.Random) -> Made:
        words = window(document.text, rng)
        if len(words) < 2 * QUERY_WORDS[0]:
            return "short"
        part = crop(words, QUERY_WORDS[0], rng)[: QUERY_WORDS[1]]
        query = " ".join(words[part.start : part.stop])
        scores_N = bm25.scores(index, query)
        best = [(pool[row], float(scores_N[row])) for row in bm25.best(scores_N, 4 * (negatives + 1)).tolist()]
        ranked = [(passage, score) for passage, score in best if score > 0]
        right, wrong = _split(ranked, exact_key(query), document.family) if ranked else ([], [])
        wrong = wrong[:negatives]
        if len(right) > POSITIVES:
            return "fits_many"
        if exact_key(document.whole) not in {exact_key(passage.text) for passage, _ in right}:
            return "other_is_best"
        if not wrong:
            return "no_candidate"
        (positives, positive_scores), (others, negative_scores) = zip(*right, strict=True), zip(*wrong, strict=True)
        return [Example("", "", query, positives, others, positive_scores, negative_scores)]

    return make


def _split(ranked: list[tuple[Passage, float]], query: str, family: str) -> tuple[list[tuple[Passage, float]], ...]:
    """Returns the positives and the possible negatives of a ranking, each text once, for a query as its exact key."""
    each: dict[str, tuple[Passage, float]] = {}
    for passage, score in ranked:
        each.setdefault(exact_key(passage.text), (passage, score))
    right = [(passage, score) for passage, score in each.values() if score >= EQUAL * ranked[0][1]]
    known = {family, *(id for passage, _ in right for id in ids_of(passage))}
    rest = list(each.items())[len(right) :]
    return right, [one for key, one in rest if query not in key and known.isdisjoint(ids_of(one[0]))]
