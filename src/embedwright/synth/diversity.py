"""Measures how varied synthetic examples are: tasks, lengths, words, and the values drawn for them."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations, pairwise
from statistics import fmean
from typing import Any

from embedwright.data.keys import jaccard, near_key
from embedwright.data.schema import Example

SAMPLE = 200  # texts of each kind and side that are compared with each other: 19,900 pairs


class Diversity:
    """Counts all examples, and keeps a seeded, uniform sample of their texts."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._tasks: dict[str, Counter[str]] = defaultdict(Counter)
        self._draws: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        self._samples: dict[str, dict[str, list[str]]] = defaultdict(dict)
        self._seen: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, example: Example, draws: Mapping[str, str]) -> None:
        """Adds an example. `draws` has the value of each placeholder."""
        self._tasks[kind][example.task] += 1
        for name, value in draws.items():
            self._draws[kind][name][value] += 1
        self._sample(kind, "query", example.query)
        for passage in example.positives:
            self._sample(kind, "positive", passage.text)
        for passage in example.negatives:
            self._sample(kind, "negative", passage.text)

    def _sample(self, kind: str, side: str, text: str) -> None:
        sample = self._samples[kind].setdefault(side, [])
        self._seen[kind, side] += 1
        if len(sample) < SAMPLE:
            sample.append(near_key(text))
        elif (place := self._random.randrange(self._seen[kind, side])) < SAMPLE:
            sample[place] = near_key(text)

    def to_json(self) -> dict[str, Any]:
        """Returns by kind: examples, distinct tasks, each side's lengths and variety, and counts of drawn values."""
        return {
            kind: {
                "examples": tasks.total(),
                "tasks": len(tasks),
                **{side: _variety(sample) for side, sample in self._samples[kind].items()},
                "drawn": {name: dict(values.most_common()) for name, values in self._draws[kind].items()},
            }
            for kind, tasks in self._tasks.items()
        }


def _variety(sample: list[str]) -> dict[str, float]:
    lengths = [len(text.split()) for text in sample]
    return {
        "sample": len(sample),
        "words_shortest": min(lengths),
        "words_mean": round(fmean(lengths), 1),
        "words_longest": max(lengths),
        "distinct_2": round(distinct_2(sample), 4),
        "self_similarity": round(self_similarity(sample), 4),
    }


def distinct_2(texts: Iterable[str]) -> float:
    """Returns distinct word pairs over all word pairs (Li et al. 2016, arXiv 1510.03055); 0 if there are none.

    It falls with the number of texts, so compare samples of one size only.
    """
    pairs = [pair for text in texts for pair in pairwise(text.split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def self_similarity(texts: Iterable[str]) -> float:
    """Returns the mean Jaccard index of the words of two texts: 0 for none in common, 1 for all; 0 for one text."""
    words = [set(text.split()) or {text} for text in texts]
    return fmean(jaccard(a, b) for a, b in combinations(words, 2)) if len(words) > 1 else 0.0
