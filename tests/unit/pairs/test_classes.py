"""Classes from a field of documents: who may be whose positive and negative."""

from __future__ import annotations

import random
from collections import Counter

from embedwright.data.answers import document_marks
from embedwright.data.files.documents import Document
from embedwright.data.schema import Example
from embedwright.pairs.classes import classes

DOCUMENTS = [
    *(Document(f"game{i}", f"game {i}", "A", ("games",)) for i in range(30)),
    *(Document(f"mail{i}", f"mail {i}", "B", ("mail", "net")) for i in range(3)),
    Document("web", "web", "", ("net", "web")),
]


def row(document: Document, documents: list[Document], seed: int = 0, negatives: int = 7) -> Example | str:
    made = classes(documents, negatives)(document, random.Random(seed))
    return made if isinstance(made, str) else made[0]


def test_positives_share_a_label_and_negatives_none() -> None:
    labels = {document.whole: {*document.labels} for document in DOCUMENTS}
    for document in DOCUMENTS[28:]:
        for seed in range(30):
            made = row(document, DOCUMENTS, seed, negatives=3)
            assert isinstance(made, Example) and made.query == document.whole
            (positive,) = made.positives
            assert positive.text != document.whole and labels[positive.text] & {*document.labels}
            assert len(made.negatives) == len({p.text for p in made.negatives}) == 3
            assert all(labels[p.text].isdisjoint(document.labels) for p in made.negatives)


def test_a_class_is_drawn_before_its_documents() -> None:
    firsts: Counter[str] = Counter()
    other = Document("x", "x", "", ("x",))
    documents = [*DOCUMENTS, other, Document("y", "y", "", ("x",))]
    for seed in range(400):
        made = row(other, documents, seed, negatives=1)
        assert isinstance(made, Example)
        firsts[made.negatives[0].text.split()[0]] += 1
    assert 60 < firsts["A"] < 140  # games are one class of four: 100 of 400, and not 30 of 34


def test_documents_of_one_source_are_neither_positive_nor_negative_and_share_a_mark() -> None:
    kin = [Document(f"k{i}", f"text {i}", "", (f"c{i % 2}",), "one") for i in range(6)]
    assert row(kin[0], kin) == "singleton"
    made = row(kin[0], [*kin, Document("p", "other c0", "", ("c0",)), Document("n", "other c1", "", ("c1",))])
    assert isinstance(made, Example)
    assert [p.text for p in made.positives] == ["other c0"] and [p.text for p in made.negatives] == ["other c1"]
    marks = {*document_marks("t", made.positives[0])}
    again = row(kin[1], [*kin, Document("n", "other c1", "", ("c1",))])
    assert isinstance(again, Example) and marks & {*document_marks("t", again.positives[0])}  # by their source
    assert not marks & {*document_marks("t", made.negatives[0])}


def test_what_makes_no_example() -> None:
    twice = [Document("a", "Same text", "", ("x",)), Document("b", "same TEXT", "", ("y",)), *DOCUMENTS]
    assert row(twice[0], twice) == "conflicting" == row(twice[1], twice)
    assert row(Document("c", "c"), DOCUMENTS) == "no_label"
    assert row(Document("c", "c", bad_label=True), DOCUMENTS) == "bad_label"
    assert row(DOCUMENTS[-1], [DOCUMENTS[-1]]) == "singleton"
    alone = row(DOCUMENTS[0], DOCUMENTS[:2])
    assert isinstance(alone, Example) and alone.negatives == ()
