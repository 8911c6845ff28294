from __future__ import annotations

import pytest

from embedwright.data.clean.filters import Filters, fits, row_fault
from embedwright.data.schema import Example, Passage
from embedwright.data.sources.catalog import load_catalog


def example(query: str, positive: str, *, task: str = "mine", language: str | None = None) -> Example:
    return Example("e", task, query, (Passage(positive),), language=language)


ENGLISH = example("how do tides work", "Tides are the rise and fall of sea levels, caused by the moon and the sun.")
GERMAN = example("Wie entstehen Gezeiten?", "Gezeiten sind das Steigen und Fallen des Meeresspiegels durch den Mond.")
HINDI = example("ज्वार कैसे आते हैं", "ज्वार चंद्रमा और सूर्य के गुरुत्वाकर्षण से समुद्र के स्तर का उठना और गिरना है।")
JAPANESE = example("潮汐はどのように起こりますか", "潮汐は月と太陽の引力によって海面が上下する現象です。")


def test_without_options_everything_passes() -> None:
    for row in (ENGLISH, GERMAN, HINDI, JAPANESE, example("?", "x" * 100_000)):
        assert row_fault(row, Filters()) is None
        assert fits(row.positives[0].text, Filters())


@pytest.mark.parametrize("kept", ["en", "de", "hi", "ja"])
def test_only_rows_of_the_language_stay(kept: str) -> None:
    rows = {"en": ENGLISH, "de": GERMAN, "hi": HINDI, "ja": JAPANESE}
    faults = {language: row_fault(row, Filters(languages=(kept,))) for language, row in rows.items()}
    assert faults == {language: None if language == kept else "language" for language in rows}
    assert row_fault(rows[kept], Filters(languages=("nl", kept))) is None


def test_the_language_of_query_and_positives_together_decides() -> None:
    short = example("Gezeiten", ENGLISH.positives[0].text)
    assert row_fault(short, Filters(languages=("en",))) is None
    assert row_fault(example("tides", GERMAN.positives[0].text), Filters(languages=("en",))) == "language"


def test_texts_too_short_to_tell_stay() -> None:
    for query, positive in (("ls", "x1"), ("12", "34 %"), ("a", "b")):
        assert row_fault(example(query, positive), Filters(languages=("en",))) is None


def test_the_language_that_a_row_states_wins() -> None:
    for stated, fault in (("de", "language"), ("de-AT", "language"), ("en", None), ("EN_gb", None)):
        row = example(ENGLISH.query, ENGLISH.positives[0].text, language=stated)
        assert row_fault(row, Filters(languages=("en",))) == fault
    assert row_fault(example(GERMAN.query, "...", language="en"), Filters(languages=("en",))) is None


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no language english; known are .*en"):
        Filters(languages=("de", "english"))


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        (Filters(min_chars=3), ["abc", "abcd", "a b c d"]),
        (Filters(max_chars=3), ["ab", "abc"]),
        (Filters(min_chars=3, max_chars=4), ["abc", "abcd"]),
        (Filters(min_words=2), ["a b c d"]),
        (Filters(max_words=1), ["ab", "abc", "abcd"]),
        (Filters(min_words=4, max_words=4), ["a b c d"]),
        (Filters(max_chars=6, min_words=1), ["ab", "abc", "abcd"]),
    ],
)
def test_lengths_are_inclusive(limits: Filters, kept: list[str]) -> None:
    texts = ["ab", "abc", "abcd", "a b c d"]
    assert [text for text in texts if fits(text, limits)] == kept


def test_limits_that_nothing_passes_are_refused() -> None:
    for limits in ({"min_chars": 5, "max_chars": 4}, {"max_words": 0}):
        with pytest.raises(ValueError, match="no text passes"):
            Filters(**limits)  # type: ignore[arg-type]


LICENCES = {"free": "MIT", "share": "CC-BY-SA-4.0", "closed": "cc-by-nc-4.0", "nothing": ""}


@pytest.mark.parametrize(
    ("allow", "deny", "faults"),
    [
        (("mit",), (), [None, "licence", "licence", "licence_unknown"]),
        (("CC-BY*", "MIT"), (), [None, None, None, "licence_unknown"]),
        ((), ("*-NC-*",), [None, None, "licence", "licence_unknown"]),
        (("CC-*",), ("*-NC-*",), ["licence", None, "licence", "licence_unknown"]),
        ((), (), [None, None, None, None]),
    ],
)
def test_licences_by_pattern(allow: tuple[str, ...], deny: tuple[str, ...], faults: list[str | None]) -> None:
    filters = Filters(licences=LICENCES, allow=allow, deny=deny)
    assert [row_fault(example("q", "p", task=task), filters) for task in LICENCES] == faults


def test_licences_of_the_catalogue_are_known_and_ones_own_come_first() -> None:
    name, entry = next((name, entry) for name, entry in load_catalog().items() if entry.licence != "unknown")
    assert row_fault(example("q", "p", task=name), Filters(allow=(entry.licence,))) is None
    assert row_fault(example("q", "p", task=name), Filters(deny=(entry.licence,))) == "licence"
    assert row_fault(example("q", "p", task=name), Filters(licences={name: "mine"}, deny=(entry.licence,))) is None
    assert row_fault(example("q", "p", task="nobody's"), Filters(allow=("*",))) == "licence_unknown"
