"""Entries of a dictionary, and word senses told apart by examples of use."""

from __future__ import annotations

import random

import pytest

from embedwright.data.files.documents import Document
from embedwright.data.schema import Example
from embedwright.pairs.dictionary import entry_of, gloss

WALK = Document("walk", 'walk fast; in step; "He marched into the room"; "The soldiers march"', "march, parade")
PROTEST = Document("protest", 'walk in protest; "Thousands marched against the war"', "demonstrate, march")
BORDER = Document("border", "lie next to another land", "march, abut")
HOUSE = Document("house", 'a building in which people live; "a house of stone"', "house")


def rows(document: Document, documents: list[Document], negatives: int = 7, seed: int = 0) -> list[Example]:
    made = gloss(documents, negatives)(document, random.Random(seed))
    assert not isinstance(made, str)
    return made


def test_an_entry_has_names_a_meaning_and_examples_of_use() -> None:
    entry = entry_of(WALK)
    assert (entry.names, entry.meaning) == (["march", "parade"], "walk fast; in step")
    assert entry.usages == ["He marched into the room", "The soldiers march"]
    author = entry_of(Document("x", 'not false; "the story is true"; "a true word"- B. Russell', "true"))
    assert (author.meaning, author.usages) == ("not false", ["the story is true", "a true word"])
    quoting = entry_of(Document("x", 'a term, "much used", of hackers', "term"))
    assert (quoting.meaning, quoting.usages) == ('a term, "much used", of hackers', [])
    assert entry_of(Document("x", "text", "Looking Glass Software, Inc.")).names == ["Looking Glass Software, Inc."]
    assert entry_of(Document("x", "text", "a title of more than five words")).names == []
    assert entry_of(Document("x", "text")).names == []


@pytest.mark.parametrize("number", [200, 10_000])
def test_many_quotes_are_read_at_once(number: int) -> None:
    usages = [f"q {i}" for i in range(number)]
    quotes = ", ".join(f'"{usage}" - Author' for usage in usages)
    assert entry_of(Document("x", f"He spoke: {quotes}; and so on", "speak")).usages == []
    assert entry_of(Document("x", f"utter words; {quotes}", "speak"))[2:] == ("utter words", usages)


@pytest.mark.parametrize(
    ("name", "usage", "found"),
    [
        ("march", "He marched in", True), ("march", "marches", True), ("march", "demarche", False),
        ("carry", "he carries it", True), ("carry", "he carried it", True), ("make", "making it", True),
        ("make", "a mak", True), ("in detail", "told in  detail", False), ("in detail", "told in detail", True),
        ("C++", "written in C++", False),
    ],
)  # fmt: skip
def test_forms_of_a_name(name: str, usage: str, found: bool) -> None:
    entry = entry_of(Document("x", f'meaning; "{usage}"', name))
    assert bool(entry.usages_of(name)) == found


def test_a_usage_finds_its_meaning_before_those_of_the_other_senses() -> None:
    documents = [WALK, PROTEST, BORDER, HOUSE]
    for seed in range(20):
        meaning, usage = rows(WALK, documents, seed=seed)
        example = meaning.query.removeprefix("march: ")
        assert example in ("He marched into the room", "The soldiers march")
        assert meaning.positives == (WALK.passage("walk fast; in step"),)
        assert {p.text: p.id for p in meaning.negatives} == {
            "walk in protest": "protest",
            "lie next to another land": "border",
        }
        assert (usage.task, usage.query) == ("usage", "march: walk fast; in step")
        assert [p.text for p in usage.positives] == [example]
        assert [p.text for p in usage.negatives] == ["Thousands marched against the war"]
    assert len(rows(WALK, documents, negatives=1)[0].negatives) == 1
    assert rows(HOUSE, documents)[0].negatives == ()


def test_entries_of_one_source_are_no_negatives() -> None:
    same = [Document(d.id, d.text, d.title, (), "wordnet") for d in (WALK, PROTEST)]
    assert rows(same[0], same)[0].negatives == ()


def test_what_makes_no_example() -> None:
    make, rng = gloss([BORDER], 7), random.Random(0)
    assert make(BORDER, rng) == "no_usage"
    assert make(Document("x", 'a fast walk; "he ran"', "march"), rng) == "no_name_in_usage"
    assert make(Document("x", 'a fast walk; "he ran"'), rng) == "no_usage"
