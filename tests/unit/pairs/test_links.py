"""Documents that name each other: what counts as a name, and who is whose negative."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from embedwright.data.files.documents import Document
from embedwright.data.schema import Example, Task
from embedwright.pairs.links import MOST, see_also
from embedwright.text import Contract
from embedwright.training.batches.blend import Row
from embedwright.training.batches.make import make_batch

OTHERS = [
    Document("p", "A language.", "Perl"),
    Document("q", "Another language.", "Python, CPython"),
    Document("sub/z.md", "A shell.", "Z shell"),
    Document("x1", "One of two.", "Twice"),
    Document("x2", "Two of two.", "Twice"),
]


def named(text: str, *links: str, id_: str = "sub/a.md") -> list[str]:
    document = Document(id_, text, "A", links=links)
    made = see_also([*OTHERS, document])(document, random.Random(0))
    return [] if isinstance(made, str) else [passage.text.rsplit(" ", 2)[0] for passage in made[0].positives]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("About it. See also Perl, CPython and the Z shell.", ["Perl", "Python, CPython", "Z shell"]),
        ("About it. See Perl; see also Z shell. More.", ["Perl", "Z shell"]),
        ("It is like a {Z\n  shell} or {perl} ({nothing} at all).", ["Z shell", "Perl"]),
        ("A [[Perl|scripting language]] and [[Python]].", ["Perl", "Python, CPython"]),
        ("See [the shell](z.md), [that one](../sub/z.md#part) or [there](http://z.md).", ["Z shell"]),
        ("A thing (see Perl) and another (see also: 'CPython').", ["Perl", "Python, CPython"]),
        ("We see Perl as a language, and Perl is one. See it. Twice. See Twice.", []),
        ("See A. Nothing else.", []),
        ("[[" + "open" * 10_000 + " [[Perl]]", ["Perl"]),
    ],
)
def test_names_in_the_text(text: str, expected: list[str]) -> None:
    assert named(text) == expected


def test_names_in_columns() -> None:
    assert named("nothing", "p", "sub/z.md", "CPython", "no such", "Twice", "x2") == [
        "Perl",
        "Z shell",
        "Python, CPython",
        "Twice Two",
    ]
    assert named("See p, x1 and x2.") == []  # an id in a text is a word


def test_what_many_name_and_who_names_many_is_left_out() -> None:
    def reasons(count: int) -> list[object]:
        common = Document("c", "common", "Common")
        naming = [Document(str(i), "See Common.", f"n {i}") for i in range(count)]
        index = Document("i", "index", links=tuple(str(i) for i in range(count)))
        make = see_also([common, *naming, index])
        made = [make(one, random.Random(0)) for one in (naming[0], index, common)]
        return [one if isinstance(one, str) else len(one[0].positives) for one in made]

    assert reasons(MOST) == [1, MOST, "names_none"]
    assert reasons(MOST + 1) == ["named_by_many", "names_many", "names_none"]


def test_documents_that_name_each_other_are_no_negatives_of_each_other() -> None:
    documents = [
        Document("a", "first", "A", links=("b", "c")),
        Document("b", "second", "B", links=("d",)),
        Document("e", "fifth", "E", links=("c",)),
        Document("c", "third", "C"),
        Document("d", "fourth", "D", source="s"),
        Document("f", "sixth", "F", links=("g",), source="s"),
        Document("g", "seventh", "G"),
    ]
    make = see_also(documents)
    rows: dict[str, Example] = {}
    for document in documents:
        if not isinstance(made := make(document, random.Random(0)), str):
            rows[document.id] = replace(made[0], id=document.id, task="t")
    assert [*rows] == ["a", "b", "e", "f"]
    task = Task(name="t", symmetric=True)
    seen: set[tuple[str, str]] = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        batch = make_batch(
            [Row(row, task) for row in rows.values()], Contract(eos_id=1), hard_negatives=1, in_batch="all", rng=rng
        )
        texts = [text.split()[0].lower() for _, text in batch.candidates]
        for query, negative_C in zip(rows, batch.masks.negative_QC, strict=True):
            seen |= {(query, texts[column]) for column in np.flatnonzero(negative_C)}
    linked = {
        ("a", "b"),
        ("a", "c"),
        ("b", "d"),
        ("b", "a"),
        ("e", "c"),
        ("c", "e"),
        ("f", "g"),
        ("f", "d"),
        ("d", "f"),
    }
    assert not seen & linked  # d and f are of one source
    assert {("a", "g"), ("e", "d"), ("e", "g"), ("f", "c")} <= seen
