"""Which texts are the same: against Unicode's own example values, and texts that people confuse."""

import pytest

from embedwright.data.keys import NEAR, exact_key, jaccard, near_key, shingles


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do tides work?", "how  do\ttides work?\n"),
        ("café", "cafe\u0301"),
        ("Straße", "STRASSE"),
        ("ﬁne", "fine"),
        ("in\u00adfor\u00adma\u00adtion", "information"),
        ("zero\u200bwidth", "zerowidth"),
        ("\ufefffirst", "first"),
        ("ｆｕｌｌ", "full"),
        ("ᾳ", "αι"),
        ("no\u00a0break", "no break"),
    ],
)
def test_equal_texts_have_one_exact_key(one: str, other: str) -> None:
    assert exact_key(one) == exact_key(other)
    assert exact_key(exact_key(one)) == exact_key(one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("C", "C++"),
        ("C#", "C++"),
        ("-5 < 3", "5 > 3"),
        (":)", ":("),
        ("well-known", "well known"),
        ("is it?", "is it"),
        ("कि", "की"),
    ],
)
def test_different_texts_have_different_exact_keys(one: str, other: str) -> None:
    assert exact_key(one) != exact_key(other)


def near(one: str, other: str) -> bool:
    return jaccard(shingles(near_key(one)), shingles(near_key(other))) >= NEAR


def test_near_duplicates_differ_in_punctuation_and_few_words() -> None:
    text = "The tide rises twice a day, since the moon pulls the water of the seas towards it"
    assert near(text, text.replace(",", " -").upper() + "!")
    assert near(text, text + " again")
    assert not near(text, "A question of something else with just as many words in it as that one had before")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("how do I sort a list in C++", "how do I sort a list in C#"),
        ("how do I sort a list in C", "how do I sort a list in C#"),
        ("what is the value of -5 today", "what is the value of 5 today"),
        ("how do tides work", "how do tides work?"),  # four words: the exact key alone decides
    ],
)
def test_one_word_or_sign_can_make_another_text(one: str, other: str) -> None:
    assert not near(one, other)


def test_scripts_without_spaces_are_compared_by_letter() -> None:
    assert near_key("潮汐是如何形成的") == "潮 汐 是 如 何 形 成 的"
    assert near("潮汐是如何形成的以及为什么会发生", "潮汐是如何形成的以及为什么会发生？")
