"""BM25 as a teacher: what it ranks, its scores against the formula, and what may not be a negative."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import pytest

from embedwright.data.answers import ids_of
from embedwright.data.files.documents import Document
from embedwright.data.schema import Example
from embedwright.pairs.bm25 import taught

NAMES = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jewel"]


def forest(i: int, **fields: str) -> Document:
    """Words of its own, each before one that some of the other documents have as well."""
    own = " ".join(f"{NAMES[i]}{k} {NAMES[(i * (k + 1) + k) % 10]}" for k in range(9 + i % 3))
    return Document(f"d{i}", own, fields.get("title", ""), (), fields.get("source", ""))


def rows(documents: list[Document], negatives: int = 7, seeds: int = 1) -> dict[str, Example]:
    make = taught(documents, negatives)
    made = {(d.id, seed): make(d, random.Random(f"{d.id}:{seed}")) for d in documents for seed in range(seeds)}
    return {f"{id}:{seed}": row[0] for (id, seed), row in made.items() if not isinstance(row, str)}


def by_hand(query: str, text: str, texts: list[str]) -> float:
    """BM25 as Lucene defines it, k1 = 1.5, b = 0.75, on words of two or more characters."""
    bags = [Counter(re.findall(r"\b\w\w+\b", t.lower())) for t in texts]
    bag, mean = Counter(re.findall(r"\b\w\w+\b", text.lower())), sum(b.total() for b in bags) / len(bags)
    score = 0.0
    for word in re.findall(r"\b\w\w+\b", query.lower()):
        n = sum(word in b for b in bags)
        idf = math.log(1 + (len(bags) - n + 0.5) / (n + 0.5))
        score += idf * bag[word] / (bag[word] + 1.5 * (0.25 + 0.75 * bag.total() / mean))
    return score


def test_the_best_is_the_positive_and_the_scores_are_those_of_the_formula() -> None:
    documents = [forest(i, title=f"Title {NAMES[i]}") for i in range(10)]
    texts = {document.id: document.whole for document in documents}
    made = rows(documents, negatives=3, seeds=5)
    assert len(made) > 20
    for key, row in made.items():
        assert row.positive_scores is not None and row.negative_scores is not None
        assert [p.id for p in row.positives] == [key.split(":")[0]] and 1 <= len(row.negatives) <= 3
        assert list(row.negative_scores) == sorted(row.negative_scores, reverse=True)
        scored = [
            *zip(row.positives, row.positive_scores, strict=True),
            *zip(row.negatives, row.negative_scores, strict=True),
        ]
        for passage, score in scored:
            assert passage.text == texts[str(passage.id)]
            assert score == pytest.approx(by_hand(row.query, passage.text, [*texts.values()]), rel=1e-5)
        left = {id: by_hand(row.query, text, [*texts.values()]) for id, text in texts.items()}
        unseen = [score for id, score in left.items() if id not in {p.id for p, _ in scored}]
        assert max(unseen) <= row.negative_scores[-1] + 1e-6  # none of the rest ranks above a negative


def test_a_copy_is_a_positive_once_and_no_family_member_is_a_negative() -> None:
    first = forest(0)
    near = Document("near", first.text + " mill")
    copy = Document("copy", first.text.upper())
    kin = [forest(i, source="s") for i in (1, 2, 3)]
    for key, row in rows([first, near, copy, *kin, forest(4)], seeds=8).items():
        if key.startswith("d0:"):
            assert [p.id for p in row.positives] in (["d0", "near"], ["d0"])
            assert all(score >= 0.95 * row.positive_scores[0] for score in row.positive_scores or ())
        if key.startswith(("d1:", "d2:", "d3:")):
            assert all("source s" in ids_of(p) for p in row.positives)
            assert not any("source s" in ids_of(p) for p in row.negatives)


def test_a_document_that_says_the_whole_query_is_no_negative() -> None:
    first = forest(0)
    padding = " ".join(f"filler{i}" for i in range(90))
    longer = Document("longer", f"{padding} {first.text.upper().replace(' ', '  ')} {padding}")
    made = rows([first, longer, *(forest(i) for i in range(1, 6))], seeds=8)
    own = [row for key, row in made.items() if key.startswith("d0:")]
    assert own and all(row.positives[0].id == "d0" and len(row.positives) == 1 for row in own)
    assert all("longer" not in {p.id for p in row.negatives} for row in own)


def test_a_crop_that_finds_another_document_before_its_own_makes_no_example() -> None:
    first = forest(0)
    padding = " ".join(f"filler{i}" for i in range(90))
    longer = Document("longer", f"{first.text} {padding}")
    make = taught([longer, first, *(forest(i) for i in range(1, 6))], 7)
    made = [make(longer, random.Random(seed)) for seed in range(60)]
    found = [row[0] for row in made if not isinstance(row, str)]
    assert found and "other_is_best" in made
    assert all("longer" in {p.id for p in row.positives} for row in found)


def test_what_makes_no_example() -> None:
    alone = [Document(str(i), " ".join(f"{name}{i}" for name in NAMES)) for i in range(8)]
    assert {taught(alone, 7)(alone[0], random.Random(i))[:] for i in range(3)} == {"no_candidate"}
    same = [Document(str(i), " ".join(NAMES) + f" own{i}") for i in range(8)]
    assert "fits_many" in {str(taught(same, 7)(same[0], random.Random(i))) for i in range(9)}
    short = [Document("a", "nine words are not enough to crop two parts"), *alone]
    assert taught(short, 7)(short[0], random.Random(0)) == "short"
