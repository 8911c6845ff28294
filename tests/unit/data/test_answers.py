"""The answers of a question over all rows, against a plain reading of every pair of rows."""

from __future__ import annotations

import random

from embedwright.data.answers import AnswerMarks, Answers, id_mark, marks_of, question_of, text_mark
from embedwright.data.keys import exact_key
from embedwright.data.schema import Example, Passage

LOOKS = [str, str.upper, lambda t: f" {t}\u200b ", lambda t: t.replace(" ", "  ").replace("é", "e\u0301")]


def random_rows(rng: random.Random, count: int) -> list[Example]:
    """Few questions and answers, each in several looks."""

    def text() -> str:
        return rng.choice(LOOKS)(f"texté {rng.randrange(12)}")

    def passage() -> Passage:
        return Passage(text(), rng.choice([None, f"d{rng.randrange(6)}"]))

    return [
        Example(f"e{i}", rng.choice("ab"), text(), tuple(passage() for _ in range(rng.randrange(1, 4))))
        for i in range(count)
    ]


def plainly(rows: list[Example], asked: Example) -> tuple[set[str], set[str]]:
    """The texts and the ids that answer, by reading all rows."""
    texts, ids = set(), set()
    for row in (row for row in rows if row.task == asked.task):
        own = {exact_key(p.text) for p in row.positives}
        if exact_key(row.query) == exact_key(asked.query):
            texts |= own
            ids |= {p.id for p in row.positives if p.id}
        if exact_key(asked.query) in own:
            texts.add(exact_key(row.query))
    return texts, ids


def test_answers_are_those_of_all_rows_and_of_pairs_read_the_other_way() -> None:
    rng = random.Random(0)
    shared = 0
    for _ in range(150):
        rows = random_rows(rng, rng.randrange(1, 15))
        answers, marks = Answers(rows), AnswerMarks(rows)
        for row in rows:
            texts, ids = plainly(rows, row)
            found = answers.of(row)
            assert {exact_key(p.text) for p in found} == texts and {p.id for p in found if p.id} == ids
            assert marks.of(row) == set(map(text_mark, texts)) | {id_mark(row.task, id) for id in ids}
            shared += len(texts) > len({exact_key(p.text) for p in row.positives})
    assert shared > 100


def test_a_question_without_another_row_keeps_its_own_positives() -> None:
    row = Example("e", "t", "q", (Passage("a"), Passage("b", "1")))
    assert Answers([row]).of(row) is row.positives
    other = Example("f", "t", "elsewhere", (Passage("z"),))
    assert Answers([row]).of(other) is other.positives  # rows that were not read answer for themselves


def test_numbers_are_the_same_in_every_process() -> None:
    assert text_mark("Tides") == text_mark(" tides") == 1065114850601568925
    assert question_of("t", "q") != question_of("u", "q") and id_mark("t", "1") != id_mark("u", "1")
    assert id_mark("t", "wiki::1") == id_mark("u", "wiki::1") != id_mark("u", "news::1")
    assert marks_of("t", [Passage("A", "1"), Passage("a")]) == {text_mark("a"), id_mark("t", "1")}
