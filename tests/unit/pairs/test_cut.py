"""Ways that cut one document in two, on documents made by hand."""

from __future__ import annotations

import random

from embedwright.data.files.documents import Document
from embedwright.data.schema import Passage
from embedwright.pairs.cut import crops, sentence, summary, title

FIRST = "Perl is a programming language by Larry Wall."
REST = ["Its users share modules on a large archive.", "Many system administrators write short scripts in it."]
PERL = Document("perl", " ".join([FIRST, *REST]), "Perl, a language")
RNG = random.Random


def test_the_title_finds_the_body() -> None:
    (row,) = title(PERL, RNG(0))
    assert (row.query, row.positives) == ("Perl, a language", (Passage(PERL.text, "perl"),))
    assert title(Document("x", "text"), RNG(0)) == "no_title"


def test_the_first_sentence_finds_the_rest() -> None:
    (row,) = summary(PERL, RNG(0))
    assert (row.query, row.positives[0].text) == (FIRST, " ".join(REST))
    (marked,) = summary(Document("x", f"<language> (PL) {PERL.text}"), RNG(0))
    assert marked.query == FIRST
    assert summary(Document("x", FIRST), RNG(0)) == "short"
    assert summary(Document("x", f"See below. {PERL.text}"), RNG(0)) == "no_sentence"


def test_two_crops_are_runs_of_words_that_overlap_by_half_at_most() -> None:
    words = [f"w{i}" for i in range(60)]
    document = Document("x", " ".join(words))
    lengths = []
    for seed in range(300):
        (row,) = crops(document, RNG(seed))
        a, b = ([int(word[1:]) for word in text.split()] for text in (row.query, row.positives[0].text))
        assert a == list(range(a[0], a[-1] + 1)) and b == list(range(b[0], b[-1] + 1))
        assert 2 * len({*a} & {*b}) <= min(len(a), len(b))
        lengths += [len(a), len(b)]
    assert (min(lengths), max(lengths)) == (8, 30)
    assert crops(Document("x", " ".join(words[:15])), RNG(0)) == "short"


def test_a_sentence_finds_what_is_around_it_and_is_kept_in_a_tenth() -> None:
    queries, kept = set(), 0
    for seed in range(2000):
        (row,) = sentence(PERL, RNG(seed))
        queries.add(row.query)
        pieces = [FIRST, *REST]
        left_out = [piece for piece in pieces if piece != row.query]
        assert row.positives[0].text in (" ".join(pieces), " ".join(left_out))
        kept += row.query in row.positives[0].text
    assert queries == {FIRST, *REST}
    assert 0.08 < kept / 2000 < 0.12  # four standard deviations are 0.027
    assert sentence(Document("x", FIRST), RNG(0)) == "short"
    assert sentence(Document("x", "So it is. That was all of it."), RNG(0)) == "no_sentence"
