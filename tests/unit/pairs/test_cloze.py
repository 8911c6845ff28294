"""Cloze questions: what is asked about a sentence, and what the passage keeps."""

from __future__ import annotations

import random

import pytest

from embedwright.data.files.documents import Document
from embedwright.pairs.cloze import cloze, questions


@pytest.mark.parametrize(
    ("sentence", "asked"),
    [
        (
            "Sendmail was written by Eric Allman at Berkeley in 1979.",
            {
                "what": "what was written by Eric Allman at Berkeley in 1979",
                "who": "who wrote Sendmail at Berkeley in 1979",
                "where": "where was Sendmail written by Eric Allman in 1979",
                "when": "when was Sendmail written by Eric Allman at Berkeley",
            },
        ),
        (
            "(GNU) The Group 3 protocol was first published by CCITT in late 1993, which nobody noticed.",
            {
                "what": "what was first published by CCITT in late 1993",
                "who": "who first published the Group 3 protocol in late 1993",
                "when": "when was the Group 3 protocol first published by CCITT",
            },
        ),
        ("A modem is a device that converts signals; it is slow.", {"what": "what is a device that converts signals"}),
        (
            "Ada Lovelace was an English mathematician and writer of programs.",
            {"what": "who was an English mathematician and writer of programs"},
        ),
        ("The BaitFisher package has at least 12 programs, and a manual.", {
            "how many": "how many programs does the BaitFisher package have",
        }),
        ("Most users of VMS consist of three kinds.", {}),
        ("Mongrel2 consists of two main programs.", {"how many": "how many main programs does Mongrel2 consist of"}),
        ("The VIPS library is divided into 1,024 modules of code.", {
            "what": "what is divided into 1,024 modules of code",
            "how many": "how many modules is the VIPS library divided into of code",
        }),
        ("EJB can be used to wrap legacy systems.", {"what": "what can be used to wrap legacy systems"}),
    ],
)  # fmt: skip
def test_questions(sentence: str, asked: dict[str, str]) -> None:
    assert dict(questions(sentence.removeprefix("(GNU) "))) == asked


@pytest.mark.parametrize(
    "sentence",
    [
        "It was written by Larry Wall for system administrators in 1987.",  # a reader of the question knows no `it`
        "The library is used by many other programs and packages.",  # nor this library
        "In 1987 Larry Wall was busy with the first release of Perl.",  # a sentence that begins with no subject
        "The package which it needs is installed by the system administrator.",
        "Perl is not what most other people think of it today.",
        "Perl is it.",
        "Perl runs on many machines and operating systems of all kinds.",  # no form that the rules know
        "Perl is a language by Larry Wall. it has many modules and users.",
    ],
)
def test_no_question(sentence: str) -> None:
    assert dict(questions(sentence)) == {}


def test_the_passage_lacks_the_sentence_in_half_of_the_rows_and_the_question_some_words() -> None:
    sentence = "The Group 3 protocol was published by CCITT in 1993."
    rest = "Fax machines of many makers speak it. They send a page in less than a minute over a line."
    document = Document("fax", f"{sentence} {rest}", "Group 3")
    masked, kinds = 0, set()
    for seed in range(1000):
        made = cloze(document, random.Random(seed))
        assert not isinstance(made, str)
        (row,) = made
        assert row.positives[0].text in (f"Group 3 {sentence} {rest}", f"Group 3 {rest}") and row.query.endswith("?")
        masked += sentence not in row.positives[0].text
        whole = {wh: question.split() for wh, question in questions(sentence)}
        kind = row.query.split()[0].rstrip("?")
        kinds.add(kind)
        asked = row.query.rstrip("?").split()
        assert asked == whole[kind]  # no word of it is spare
    assert 440 < masked < 560 and kinds == {"what", "who", "when"}
    modified = "A small protocol is a very clever piece of hard and old work on the old green machines of Norway."
    lost = set()
    for seed in range(300):
        made = cloze(Document("m", f"{modified} {rest}"), random.Random(seed))
        assert not isinstance(made, str)
        lost |= set(modified[:-1].split()) - set(made[0].query.rstrip("?").split())
    # of "what is a very clever ...": "A small protocol" is what it asks for
    assert lost == {"A", "small", "protocol", "clever", "the", "old", "green"}  # no noun, verb or preposition
    short = cloze(Document("x", f"{sentence} Few words."), random.Random(0))
    assert not isinstance(short, str) and sentence in short[0].positives[0].text
    assert cloze(Document("x", "Nothing here can be asked."), random.Random(0)) == "no_question"


@pytest.mark.parametrize(
    "sentence",
    [
        "The term was coined by Ada Lovelace in the late 1950s at some old institute.",
        "The president of HP is Lewis E. Platt.",
        "Berkeley Pascal is the best known one of these languages.",
    ],
)
def test_questions_that_say_nothing_alone_are_not_asked(sentence: str) -> None:
    assert list(questions(sentence)) == []
