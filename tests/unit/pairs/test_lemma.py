"""One word of a sentence is another one: which words, in what places, and with what scores."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from small_wordnet import ENTRIES, TEXT, write_wordnet

from embedwright.data.files.documents import Document
from embedwright.pairs.lemma import lemma
from embedwright.pairs.wordnet import WordNet

Changes = set[tuple[float | None, str, str]]


@pytest.fixture
def changes(tmp_path: Path) -> Callable[[str], Changes]:
    """Returns (score, sentence, changed sentence) of all that comes out for a text."""
    make = lemma(WordNet(write_wordnet(tmp_path)))

    def of(text: str) -> Changes:
        made = [make(Document("d", text), random.Random(seed)) for seed in range(60)]
        rows = [row for rows in made if not isinstance(rows, str) for row in rows]
        # a low score is no answer: the other text is the negative
        sides = [(row.score, *map(len, (row.positives, row.negatives))) for row in rows]
        assert set(sides) <= {(5.0, 1, 0), (4.0, 1, 0), (2.5, 0, 1), (1.5, 0, 1)}
        assert all(row.paired[0].id == "d" for row in rows)
        return {(row.score, row.query, row.paired[0].text) for row in rows}

    return of


def sentence(words: str) -> str:
    return f"{words} in the old harbour town today."


def test_each_relation_has_its_score(changes: Callable[[str], Changes]) -> None:
    found = changes(sentence("People liked the ferry"))
    assert found == {
        (score, sentence("People liked the ferry"), sentence(f"People liked the {word}"))
        for score, word in ((5.0, "ferryboat"), (4.0, "boat"), (2.5, "barge"), (2.5, "canoe"))
    }
    usual = changes(sentence("They found the usual people there"))
    assert {(score, changed.split()[3]) for score, _, changed in usual} == {(5.0, "customary"), (1.5, "unusual")}
    assert {(score, changed.split()[1]) for score, _, changed in changes(sentence("People rarely slept outside"))} == {
        (1.5, "often")  # its antonym, and not the other word of that synset
    }


def test_one_row_for_each_relation_of_a_document(tmp_path: Path) -> None:
    made = lemma(WordNet(write_wordnet(tmp_path)))(Document("d", TEXT), random.Random(0))
    assert [row.score for row in made if not isinstance(row, str)] == [5.0, 4.0, 2.5, 1.5]


def test_the_article_fits_the_new_word(changes: Callable[[str], Changes]) -> None:
    (found,) = changes(sentence("They saw an unusual harbour boat"))
    assert found[2] == sentence("They saw a usual harbour boat")
    assert any("an unusual" in new for _, _, new in changes(sentence("They met a usual captain outside")))


@pytest.mark.parametrize(
    "words",
    [
        "People liked the ferries",  # inflected
        "People liked the Ferry",  # a name
        "People liked the bank",  # which one?
        "People liked the ferry captain",  # part of a longer noun
        "People liked the river boat",  # a term of its own
        "People always ferry",  # a verb here
        "People liked the usual",  # a noun here
        "Those people enable",  # or a noun
    ],
)
def test_places_that_are_left_alone(changes: Callable[[str], Changes], words: str) -> None:
    assert changes(f"{words}, said the old harbour master yesterday.") == set()


def test_nothing_to_replace(tmp_path: Path) -> None:
    make = lemma(WordNet(write_wordnet(tmp_path)))
    assert make(Document("d", "No word of this text stands in there."), random.Random(0)) == "nothing_to_replace"


def test_vague_hypernyms_and_large_families_are_left_out(tmp_path: Path) -> None:
    text = Document("d", sentence("People liked the ferry"))

    def scores(entries: list[tuple[str, list[str], list[tuple[str, int, int, int]]]]) -> set[float | None]:
        made = lemma(WordNet(write_wordnet(tmp_path, entries)))(text, random.Random(0))
        return {row.score for row in made if not isinstance(row, str)}

    near_the_top = [("n", ["boat"], []), ("n", ["ferry", "ferryboat"], [("@", 0, 0, 0)])]
    assert scores(near_the_top + [("n", [f"word{'abcde'[i]}"], []) for i in range(5)]) == {5.0}
    many = [("n", [f"boat{chr(97 + i)}"], [("@", 7, 0, 0)]) for i in range(26)]
    assert scores([*ENTRIES, *many]) == {5.0, 4.0, 2.5}  # 29 kinds of boats
    assert scores([*ENTRIES, *many, ("n", ["raft"], [("@", 7, 0, 0)]), ("n", ["yacht"], [("@", 7, 0, 0)])]) == {
        5.0,
        4.0,
    }
