"""The numbers of the diversity report, by hand."""

from __future__ import annotations

import pytest

from embedwright.data.schema import Example, Passage
from embedwright.synth.diversity import SAMPLE, Diversity, distinct_2, self_similarity


def test_distinct_word_pairs() -> None:
    assert distinct_2(["a b c", "a b d"]) == 3 / 4
    assert distinct_2(["a"]) == 0.0


def test_self_similarity() -> None:
    assert self_similarity(["a b", "a b", "c d"]) == pytest.approx(1 / 3)
    assert self_similarity(["a b", "b c"]) == pytest.approx(1 / 3)
    assert self_similarity(["a b"]) == 0.0


def example(i: int, query: str, positive: str, *negatives: str) -> Example:
    return Example(f"{i}", f"task {i % 2}", query, (Passage(positive),), tuple(map(Passage, negatives)))


def test_the_report() -> None:
    diversity = Diversity()
    diversity.add("k", example(0, "One, two!", "three"), {"clarity": "clear"})
    diversity.add("k", example(1, "one two three four", "four", "five six"), {"clarity": "ambiguous"})
    diversity.add("k", example(2, "five", "six"), {"clarity": "clear"})
    diversity.add("other", example(0, "x", "y"), {})
    report = diversity.to_json()
    assert set(report) == {"k", "other"}
    assert report["k"]["examples"] == 3 and report["k"]["tasks"] == 2
    assert report["k"]["drawn"] == {"clarity": {"clear": 2, "ambiguous": 1}}
    query = {"words_shortest": 1, "words_mean": 2.3, "words_longest": 4, "sample": 3}
    query |= {"distinct_2": round(3 / 4, 4), "self_similarity": round(0.5 / 3, 4)}
    assert report["k"]["query"] == query
    assert report["k"]["negative"]["sample"] == 1 and "negative" not in report["other"]


def test_the_sample_is_bounded_and_even() -> None:
    diversity = Diversity()
    for i in range(20 * SAMPLE):
        diversity.add("k", example(i, f"query{i}", "p"), {})
    sample = diversity._samples["k"]["query"]
    assert len(sample) == len(set(sample)) == SAMPLE
    from_first_half = sum(int(text.removeprefix("query")) < 10 * SAMPLE for text in sample)
    assert 0.35 * SAMPLE < from_first_half < 0.65 * SAMPLE
