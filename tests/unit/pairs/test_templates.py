"""Questions by the form of a document: headings, definitions, terms."""

from __future__ import annotations

import random

import pytest

from embedwright.data.files.documents import Document
from embedwright.data.schema import Example
from embedwright.pairs.templates import TERM, WHAT, templates


def rows(text: str, title: str = "", seed: int = 0) -> list[Example]:
    made = templates(Document("d", text, title), random.Random(seed))
    return [] if isinstance(made, str) else made


def asked(text: str, title: str = "") -> list[tuple[str, str]]:
    return [(row.query, row.positives[0].text) for row in rows(text, title)]


def test_a_title_that_is_a_question_finds_the_text() -> None:
    answer = "Ask them, because nobody else knows."
    assert asked(answer, "How do I find the address?") == [("How do I find the address?", answer)]
    assert asked(answer, "3.1. How do I find it?") == [("How do I find it?", answer)]
    assert asked("Too short.", "How do I find the address?") == [] == asked(answer, "Why not?")


FAQ = """# All about Perl

Some words at the beginning of the page.

## How do I *install* it?

Fetch the newest archive
and unpack it there.

```
make install
```

## Notes

Is this a heading, or is it a line
of a paragraph?
It is the latter, so nothing is asked.

**Who wrote this page?**

Some people wrote this page together.

Q: Does it cost any money?
A: It is free for everybody to use.
Which version should I take?

The newest one that is stable.
"""


def test_headings_and_lines_that_are_questions_find_what_follows_them() -> None:
    assert asked(FAQ, "All about Perl") == [
        ("How do I *install* it?", "Fetch the newest archive and unpack it there. ``` make install ```"),
        ("Who wrote this page?", "Some people wrote this page together."),
        (
            "Does it cost any money?",
            "It is free for everybody to use. Which version should I take? The newest one that is stable.",
        ),
    ]


@pytest.mark.parametrize(
    "line", ["#" * 10_000, "# " * 10_000, "**" * 10_000, "Q: " * 10_000 + "x", "Q" + " " * 10_000 + "x"]
)
def test_a_line_of_marks_is_read_at_once(line: str) -> None:
    assert asked(f"{line}\n\n## What is it?\n\nIt is what stands here below it.") == [
        ("What is it?", "It is what stands here below it.")
    ]


def test_an_answer_ends_at_an_underlined_heading() -> None:
    text = (
        "How do I install it?\n--------------------\n\nUse pip to install the package.\n\nParts:\n- one\n- two\n\n"
        "Uninstalling\n============\n\nDelete the folder that it is in.\n"
    )
    assert asked(text) == [("How do I install it?", "Use pip to install the package. Parts: - one - two")]


@pytest.mark.parametrize(
    ("title", "text", "verb"),
    [
        ("library", "a room where books are kept", "is"),
        ("SLIB", "<library> (PD) A portable Scheme library. It runs.", "is"),
        ("Open Clip Art", "The Open Clip Art collection is a set of pictures by many people.", "is"),
        ("tides", "Tides are the rise and fall of the sea.", "are"),
        ("march", "walk in protest", ""),  # a verb
        ("menu", "An image can be imported by it.", ""),  # a sentence on something else
        ("a title of more than five words", "a room where books are kept", ""),
        ("", "a room where books are kept", ""),
    ],
)
def test_definitions_are_asked_for(title: str, text: str, verb: str) -> None:
    forms = {template.format(title) for template in (f"what {verb} {{}}?", *WHAT)}
    found = {row.query for seed in range(60) for row in rows(text, title, seed) if not row.task}
    assert found == (forms if verb else set())


def test_a_person_is_asked_for_with_who() -> None:
    found = {row.query for seed in range(60) for row in rows("a mathematician (1815-1852)", "Ada Lovelace", seed)}
    assert "who is Ada Lovelace?" in found and "what is Ada Lovelace?" in found


def test_a_meaning_finds_its_terms() -> None:
    text = 'An open automobile having a front seat; "they drove a roadster"'
    meaning = "an open automobile having a front seat"
    found = {row.query for seed in range(60) for row in rows(text, "roadster, runabout", seed) if row.task == "term"}
    assert found == {template.format(meaning) for template in TERM}
    (row,) = (row for row in rows(text, "roadster, runabout") if row.task)
    assert [(p.text, p.id) for p in row.positives] == [("roadster", "d"), ("runabout", "d")]
    linked = rows("A fast editor for small screens. (http://a.org/b)", "ed")
    assert [row.query.endswith("a fast editor for small screens?") for row in linked if row.task] == [True]
    for text in ("a red front of a roadster", "a thing", "one of " + "many words " * 20):
        assert not [row for row in rows(text, "roadster") if row.task], text
