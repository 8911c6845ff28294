"""BM25 against its formula written out here, and against bm25s called by hand."""

from __future__ import annotations

import math
import re
from collections import Counter

import bm25s
import numpy as np
import pytest

from embedwright.errors import InputError
from embedwright.vectors import bm25

STOP = {"a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not"}
STOP |= {"of", "on", "or", "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was"}
STOP |= {"will", "with"}
POOL = ["cat", "dog", "fish", "bird", "the", "and", "of", "tree", "house", "river", "stone"]


def words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w\w+", text.lower()) if word not in STOP]


def by_formula(texts: list[str], query: str) -> list[float]:
    """Lucene's BM25, each word of the query as often as it stands there."""
    documents = [words(text) for text in texts]
    average = sum(map(len, documents)) / len(documents)
    found = []
    for document in documents:
        counts, total = Counter(document), 0.0
        for word in words(query):
            having = sum(word in other for other in documents)
            if having:
                idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
                length = 1.5 * (1 - 0.75 + 0.75 * len(document) / average)
                total += idf * counts[word] / (counts[word] + length)
        found.append(total)
    return found


def some_texts() -> list[str]:
    random = np.random.default_rng(3)
    return [" ".join(random.choice(POOL, random.integers(1, 9))).capitalize() + "!" for _ in range(60)]


def test_scores_are_those_of_the_formula() -> None:
    texts = some_texts()
    index = bm25.index(texts)
    for query in ("A cat, the river and a Dog", "stone stone fish", "house x y", "nothing known", "the and of"):
        np.testing.assert_allclose(bm25.scores(index, query), by_formula(texts, query), rtol=2e-6)


def test_the_best_are_those_of_a_stable_sort_and_of_bm25s() -> None:
    texts = some_texts()
    queries = ["cat river", "dog dog stone", "the", "bird"]
    scores, rows = bm25.top(bm25.index(texts), queries, 7)
    for q, query in enumerate(queries):
        reference = by_formula(texts, query)
        rounded = [round(score, 5) for score in reference]
        assert rows[q].tolist() == sorted(range(60), key=lambda row: -rounded[row])[:7]  # sorted() is stable
        np.testing.assert_allclose(scores[q], [reference[row] for row in rows[q]], rtol=2e-6)

    by_hand = bm25s.BM25()
    by_hand.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(queries, stopwords="en", return_ids=False, show_progress=False)
    for q in (0, 1, 3):
        found = by_hand.retrieve([tokens[q]], k=7, show_progress=False)
        np.testing.assert_allclose(found.scores[0], scores[q], rtol=2e-6)


def test_k_is_cut_and_checked_and_texts_without_words_are_told() -> None:
    index = bm25.index(["cat", "", "dog cat"])
    scores, rows = bm25.top(index, ["cat dog"], 9)
    assert rows.tolist() == [[2, 0, 1]] and scores[0, 2] == 0
    assert bm25.top(index, [], 2)[1].shape == (0, 2)
    with pytest.raises(InputError, match="k must be at least 1"):
        bm25.top(index, ["cat"], 0)
    with pytest.raises(InputError, match="no word"):
        bm25.index(["the", "", "!"])
    with pytest.raises(InputError, match="no word"):
        bm25.index([])
