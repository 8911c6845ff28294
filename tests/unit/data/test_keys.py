"""Which texts are the same: against Unicode's own example values, and texts that people confuse."""

import ast
import random
from array import array
from pathlib import Path

import pytest

import embedwright
from embedwright.data.keys import (
    NEAR,
    are_near,
    both_keys,
    exact_key,
    jaccard,
    near_key,
    refuse_repeats,
    shingles,
    word_key,
)
from embedwright.data.schema import DataError


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


def test_are_near_is_the_jaccard_against_the_threshold() -> None:
    rng = random.Random(0)
    outcomes = []
    for _ in range(2000):
        a, b = ({str(i) for i in range(rng.randrange(12)) if rng.random() < 0.9} for _ in range(2))
        outcomes.append(are_near(a, b))
        assert outcomes[-1] == (jaccard(a, b) >= NEAR)
    assert 100 < sum(outcomes) < 1900


def test_a_word_key_is_never_empty_for_a_text() -> None:
    assert word_key("How do tides work?") == word_key("how do  tides, work") == "how do tides work"
    assert word_key(":)") != word_key(":(") and word_key("C#") != word_key("C")
    for text in ("Tides, again!", ":)", "É\u0301 -5"):
        assert both_keys(text) == (exact_key(text), near_key(text))


def test_scripts_without_spaces_are_compared_by_letter() -> None:
    assert near_key("潮汐是如何形成的") == "潮 汐 是 如 何 形 成 的"
    assert near("潮汐是如何形成的以及为什么会发生", "潮汐是如何形成的以及为什么会发生？")


EVERYWHERE, WHERE_TEXTS_ARE = {"normalize", "casefold"}, {"lower", "upper", "swapcase"}
ROOMS = ("data/", "mining/", "synth/", "training/", "evaluation/", "studies/", "demo/", "vectors/")
NOT_FOR_SAMENESS = {
    "data/clean/filters.py": {"casefold", "lower"},  # licences, codes of languages
    "data/schema.py": {"lower"},  # a truth value as a label
    "data/files/rows.py": {"lower"},  # the ending of a file's name
    "evaluation/bench/airbench_sets.py": {"lower"},  # names of benchmarks
    "evaluation/bench/names.py": {"lower"},
    "serve/guard.py": {"casefold"},  # the scheme of an authorization header
    "studies/report/run.py": {"lower"},  # a title inside a sentence
}


def test_no_other_module_decides_when_texts_are_the_same() -> None:
    source = Path(embedwright.__file__).parent
    found: dict[str, set[str]] = {}
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = path.relative_to(source).as_posix()
            folding = EVERYWHERE | (WHERE_TEXTS_ARE if name.startswith(ROOMS) else set())
            if isinstance(node, ast.Attribute) and node.attr in folding and ast.unparse(node.value) != "F":  # torch's
                found.setdefault(name, set()).add(node.attr)
    assert found.pop("data/keys.py") >= {"normalize", "casefold", "lower"}
    extra = {file: names - NOT_FOR_SAMENESS.get(file, set()) for file, names in found.items()}
    assert {file: names for file, names in extra.items() if names} == {}


def test_the_first_id_that_repeats_another_is_named() -> None:
    def check(*ids: str) -> None:
        refuse_repeats(array("q", map(hash, ids)), ((f"line {n}", id) for n, id in enumerate(ids, 1)))

    check("a", "b", "c")
    check()
    with pytest.raises(DataError, match="line 4: id 'b' twice"):
        check("a", "b", "c", "b", "a")
    refuse_repeats(array("q", [7, 7]), [("x", "a"), ("y", "b")])  # equal marks of other ids
    refuse_repeats(array("q", [1, 2]), map(pytest.fail, ["read"]))
