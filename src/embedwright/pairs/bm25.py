"""BM25 as a teacher: a crop finds what BM25 ranks first, with BM25's scores to learn from (arXiv 2110.06918)."""

from __future__ import annotations

import random
from collections.abc import Iterable

from embedwright.data.keys import exact_key
from embedwright.data.schema import Example, Passage
from embedwright.pairs.documents import Document, Made, Make
from embedwright.pairs.words import crop, window
from embedwright.vectors import bm25

QUERY_WORDS = 5, 32  # the fewest and the most of a crop
EQUAL = 0.95  # share of the best score from which a document is a positive, too: the rule of mining for false negatives

POSITIVES = 5  # a crop that fits more documents as well says what is in all of them, not what is in one


def taught(documents: Iterable[Document], negatives: int) -> Make:
    """Indexes title and text of all documents, which stay in memory, and returns what makes the examples of one.

    The query is a crop of the document. Its positives are the documents whose score is at least 95 % of the best, its
    negatives the next `negatives` ones that share a word with it and are of another family than the positives.
    `positive_scores` and `negative_scores` are BM25's. A crop with more than 5 positives makes no example.
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
        right, wrong = _split(ranked, negatives) if ranked else ([], [])
        if len(right) > POSITIVES:
            return "fits_many"
        if not wrong:
            return "no_candidate"
        (positives, positive_scores), (others, negative_scores) = zip(*right, strict=True), zip(*wrong, strict=True)
        return [Example("", "", query, positives, others, positive_scores, negative_scores)]

    return make


def _split(ranked: list[tuple[Passage, float]], negatives: int) -> tuple[list[tuple[Passage, float]], ...]:
    """Returns the positives and the negatives of a ranking, each text once."""
    each = list({exact_key(passage.text): (passage, score) for passage, score in reversed(ranked)}.values())[::-1]
    right = [(passage, score) for passage, score in each if score >= EQUAL * each[0][1]]
    families = {passage.id for passage, _ in right}
    return right, [one for one in each[len(right) :] if one[0].id not in families][:negatives]
