from __future__ import annotations

import json
import math
from typing import Any

import pytest

from embedwright.data.schema import DataError, Example, Passage, parse_example, to_row

FULL = Example(
    id="q1",
    task="nq",
    query="how do tides work?",
    positives=(Passage("the moon pulls"), Passage("gravity", "d1")),
    negatives=(Passage("a recipe for soup", "d2"),),
    positive_scores=(0.9, 1.0),
    negative_scores=(-0.25,),
    score=4.5,
    language="en",
)
PLAIN = Example(id="q2", task="nq", query="q", positives=(Passage("p"),))
LOW = Example(id="q3", task="sts", query="a", positives=(), negatives=(Passage("b"),), score=1.0)


@pytest.mark.parametrize("example", [FULL, PLAIN, LOW])
def test_a_row_is_its_example_again(example: Example) -> None:
    row = json.loads(json.dumps(to_row(example)))
    assert parse_example(row, default_task="other", default_id="other") == example


def test_the_row_has_no_key_that_is_not_set() -> None:
    assert to_row(PLAIN) == {"id": "q2", "task": "nq", "query": "q", "positives": ["p"]}


def test_what_is_paired_with_a_query() -> None:
    assert (FULL.paired, LOW.paired) == (FULL.positives, (Passage("b"),))
    assert to_row(LOW)["positives"] == []  # the key tells a file of examples


def test_defaults_stand_in_for_what_the_row_leaves_out() -> None:
    row = {"query": "q", "positives": ["p"], "negatives": None, "score": None, "language": None}
    assert parse_example(row, default_task="t", default_id="t:7") == Example("t:7", "t", "q", (Passage("p"),))


def test_a_bare_document_id_is_looked_up_and_a_given_text_wins_over_the_corpus() -> None:
    row = {
        "query": "q",
        "positives": [{"id": 12}],
        "negatives": [{"id": "b", "text": "own"}, {"id": None, "text": "t"}],
    }
    example = parse_example(row, default_task="t", corpus={"12": "twelve", "b": "corpus"})
    assert example.positives == (Passage("twelve", "12"),)
    assert example.negatives == (Passage("own", "b"), Passage("t"))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no query": ({"query": None}, "no query"),
    "empty query": ({"query": ""}, "query is empty"),
    "blank query": ({"query": " \n\t"}, "query is empty"),
    "query of a wrong type": ({"query": 3}, "query: expected a text, not int"),
    "no positive": ({"positives": []}, "no positive"),
    "no positive and no score": ({"positives": [], "negatives": ["n"]}, "no positive"),
    "a score of no pair": ({"positives": [], "score": 1.0}, "no positive"),
    "a score of several pairs": ({"positives": [], "negatives": ["n", "m"], "score": 1.0}, "no positive"),
    "positives not a list": ({"positives": "p"}, "positives: expected a list, not str"),
    "empty positive": ({"positives": ["p", ""]}, r"positives\[1\] is empty"),
    "number as negative": ({"negatives": [1.5]}, r"negatives\[0\]: expected a text, not float"),
    "item without anything": ({"positives": [{}]}, r"no positives\[0\]\.text"),
    "item with a misspelt key": (
        {"positives": [{"txt": "p"}]},
        r"positives\[0\]: unknown key 'txt', did you mean 'text'",
    ),
    "scores too short": ({"positive_scores": []}, "positive_scores: 0 scores for 1 positive"),
    "scores too long": ({"negatives": ["n"], "negative_scores": [1, 2]}, "negative_scores: 2 scores for 1 negative"),
    "score not a number": ({"positive_scores": ["1"]}, r"positive_scores\[0\]: expected a number, not str"),
    "score is true": ({"score": True}, "score: expected a number, not bool"),
    "score not finite": ({"score": math.nan}, "score is not finite"),
    "score beyond float": ({"score": 10**400}, "score is not finite"),
    "misspelt key": ({"positve_scores": [1.0]}, "unknown key 'positve_scores', did you mean 'positive_scores'"),
    "key from elsewhere": ({"zzz": 1}, "unknown key 'zzz', known are id, task, query"),
    "lone surrogate": ({"query": "a\ud800"}, "query holds a lone surrogate at character 1"),
    "NUL": ({"query": "a\0b"}, "query holds a NUL"),
    "empty id": ({"id": ""}, "id is empty"),
    "unknown document": ({"positives": [{"id": "d9"}]}, r"positives\[0\]: document 'd9' is not in the corpus"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_says_what_is_wrong_with_which_key(name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(DataError, match=message):
        parse_example({"query": "q", "positives": ["p"]} | change, default_task="t", corpus={"d1": "text"})


def test_a_document_id_without_a_corpus_is_an_error() -> None:
    with pytest.raises(DataError, match="no corpus is given"):
        parse_example({"query": "q", "positives": [{"id": "d1"}]}, default_task="t")


def test_a_very_long_key_does_not_flood_the_message() -> None:
    with pytest.raises(DataError) as caught:
        parse_example({"query": "q", "positives": ["p"], "x" * 1_000_000: 1}, default_task="t")
    assert len(str(caught.value)) < 300
