"""A number or a name is another one: what is changed, and on which side."""

from __future__ import annotations

import random
import re

from embedwright.data.files.documents import Document
from embedwright.data.schema import Example
from embedwright.pairs.swap import swap

CLAIM = "The first release of 1987 ran on Unix (BSD 4.2) with about 12,500 lines of carefully written source code."
REST = "Its author Larry Wall worked at Bell Labs then. Later many other people of Sun Microsystems moved to Solaris."


def rows(text: str, count: int = 1) -> list[Example]:
    made = (swap(Document("d", text), random.Random(seed)) for seed in range(count))
    return [row for rows in made if not isinstance(rows, str) for row in rows]


def test_one_value_of_the_claims_sentence_differs_between_positive_and_negative() -> None:
    made = rows(f"{CLAIM} {REST}", 400)
    assert len(made) == 400
    changes = set()
    for row in made:
        positive, negative = row.positives[0].text, row.negatives[0].text
        assert row.query in positive and row.query not in negative
        assert (row.positives[0].id, row.negatives[0].id) == (
            "d",
            "d contrast",
        )  # one document, but no answer of the claim
        original, changed = (positive, negative) if positive == f"{CLAIM} {REST}" else (negative, positive)
        assert original == f"{CLAIM} {REST}"
        before = next(i for i in range(len(original)) if original[i] != changed[i])
        changes.add(re.split(r"[ .]", original[original.rfind(" ", 0, before) + 1 :])[0])
    assert changes == {"1987", "12,500", "Unix", "Solaris", "Larry", "Bell", "Sun"}
    kept = sum(row.query in f"{CLAIM} {REST}" for row in made)
    assert 150 < kept < 250  # in half of the rows the changed sentence is the claim


def test_numbers_keep_their_form() -> None:
    for row in rows("The first release of 1987 ran well there. Nothing else is known about any of it today.", 100):
        years = [re.findall(r"\d+", text)[0] for text in (row.query, row.negatives[0].text)]
        assert len({*years}) == 2 and all(re.fullmatch(r"1[0-9]{3}", year) for year in years)


def test_what_makes_no_example() -> None:
    for text in (
        CLAIM,  # nothing around it
        f"Perl was in wide use already. {'many words ' * 9}",  # no number, and no name but the first word
        f"{CLAIM.replace('1987', 'it').replace('12,500', 'many')} many words without any name at all there.",
        "A quoted 'name of Unix' is left alone here. It is said by many other people of all kinds.",
    ):
        assert rows(text) == [], text
