"""Sentences, passages and crops."""

from __future__ import annotations

import random

import pytest

from embedwright.pairs.words import PASSAGE_WORDS, around, content, crop, is_prose, sentences, unmarked, window


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One here. Two there! Three?", ["One here.", "Two there!", "Three?"]),
        ("Dr. J. A. Smith of the U.S. Army wrote 3.14 here. Then he left.",
         ["Dr. J. A. Smith of the U.S. Army wrote 3.14 here.", "Then he left."]),
        ("It is so, e.g. Here and i.e. There. \"Quoted.\" Next one.",
         ["It is so, e.g. Here and i.e. There.", '"Quoted."', "Next one."]),
        ("A heading\n\nA\nbroken line. end of it", ["A heading", "A broken line. end of it"]),
        ("A list:\n- first\n- second\n1. third", ["A list:", "- first", "- second", "1. third"]),
        ("一つ目。二つ目！", ["一つ目。", "二つ目！"]),
        (" ", []),
    ],
)  # fmt: skip
def test_sentences(text: str, pieces: list[str]) -> None:
    assert sentences(text) == pieces


def test_many_initials_and_leaders_of_dots_are_read_at_once() -> None:
    text = "J. " * 5000 + "Smith wrote it " + "." * 20_000 + "x."
    assert sentences(f"{text} Then he left.") == [text, "Then he left."]


def test_around_takes_neighbours_in_turn_up_to_the_limit() -> None:
    assert around(["a b", "c", "d e", "f"], 1) == ("a b", "d e f")
    pieces = [f"{i} " + "w " * 48 + "end" for i in range(20)]  # 50 words each
    before, after = around(pieces, 10)
    assert (before[:2], after[:2], before.count("end"), after.count("end")) == ("9 ", "11", 1, 2)
    assert len(f"{before} {pieces[10]} {after}".split()) == PASSAGE_WORDS
    assert around(["w " * 300, "b"], 0) == ("", "")


def test_crops_have_lengths_of_the_range_and_reach_every_place() -> None:
    words = [str(i) for i in range(100)]
    drawn = [crop(words, 8, random.Random(i)) for i in range(2000)]
    lengths = {len(part) for part in drawn}
    assert (min(lengths), max(lengths)) == (10, 50)
    assert set().union(*drawn) == set(range(100))
    assert crop(words[:9], 8, random.Random(0)) in (range(8), range(1, 9))
    long = " ".join(str(i) for i in range(1000))
    starts = {int(window(long, random.Random(i))[0]) for i in range(4000)}
    assert (min(starts), max(starts)) == (0, 800)
    assert window("a b", random.Random(0)) == ["a", "b"]


def test_prose_is_not_code_addresses_tables_or_nothing_said() -> None:
    assert is_prose("Perl was written by Larry Wall in 1987.")
    for text in (
        "It is what they are.", "See http://perl.org for the newest Perl documentation.",
        "The x y 1 2 3 4 5 6 7 8 9 10 11",
        "Call open($file) or die with the message.", "Write an e-mail to larry@wall.org about Perl bugs.",
        "The list (of all good languages begins with Perl.", "word " * 61,
    ):  # fmt: skip
        assert not is_prose(text), text
    assert content("It is the C++ library of IBM") == ["C++", "library", "IBM"]


def test_marks_of_dictionaries_go() -> None:
    assert unmarked("<language> An early system.") == "An early system."
    assert unmarked("1. <tool, text> (DNF) /dek/ A logical formula (of sorts).") == "A logical formula (of sorts)."
    assert unmarked("3 bits of (it)") == "3 bits of (it)"
    assert unmarked("(all of it)") == "(all of it)"
