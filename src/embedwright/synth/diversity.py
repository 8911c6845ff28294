"""How varied synthetic examples are: tasks, lengths, words, and what was drawn for them."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations
from statistics import fmean
from typing import Any

from embedwright.data.keys import jaccard, near_key
from embedwright.data.schema import Example

SAMPLE = 200  # texts of each kind and side that are held against each other: 19,900 pairs


class Diversity:
    """Counts over all examples, and samples (even, seeded) of their texts. In memory: the samples, task names."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._tasks: dict[str, set[str]] = defaultdict(set)
        self._draws: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        self._sides: dict[str, dict[str, _Side]] = defaultdict(lambda: defaultdict(_Side))
        self._examples: Counter[str] = Counter()

    def add(self, kind: str, example: Example, draws: Mapping[str, str]) -> None:
        """`draws`: the value of each placeholder."""
        self._examples[kind] += 1
        self._tasks[kind].add(example.task)
        for name, value in draws.items():
            self._draws[kind][name][value] += 1
        sides = {
            "query": (example.query,),
            "positive": (passage.text for passage in example.positives),
            "negative": (passage.text for passage in example.negatives),
        }
        for name, texts in sides.items():
            for text in texts:
                self._sides[kind][name].add(near_key(text), self._random)

    def to_json(self) -> dict[str, Any]:
        """By kind: examples, distinct tasks, each side's words and variety, and how often each value was drawn."""
        return {
            kind: {
                "examples": count,
                "tasks": len(self._tasks[kind]),
                **{name: side.to_json() for name, side in self._sides[kind].items()},
                "drawn": {name: dict(values.most_common()) for name, values in self._draws[kind].items()},
            }
            for kind, count in self._examples.items()
        }


class _Side:
    """All queries, positives or negatives of one kind."""

    def __init__(self) -> None:
        self.count, self.words, self.shortest, self.longest = 0, 0, 0, 0
        self.sample: list[str] = []

    def add(self, key: str, rng: random.Random) -> None:
        length = len(key.split())
        self.shortest = min(self.shortest, length) if self.count else length
        self.longest = max(self.longest, length)
        self.count += 1
        self.words += length
        if len(self.sample) < SAMPLE:
            self.sample.append(key)
        elif (place := rng.randrange(self.count)) < SAMPLE:
            self.sample[place] = key

    def to_json(self) -> dict[str, float]:
        return {
            "words_shortest": self.shortest,
            "words_mean": round(self.words / self.count, 1),
            "words_longest": self.longest,
            "sample": len(self.sample),
            "distinct_1": round(distinct(self.sample, 1), 4),
            "distinct_2": round(distinct(self.sample, 2), 4),
            "self_similarity": round(self_similarity(self.sample), 4),
        }


def distinct(texts: Iterable[str], n: int) -> float:
    """Different word n-grams per word n-gram (Li et al. 2016, arXiv 1510.03055); 0 where no text has n words.

    Falls with the number of texts: compare equal samples only.
    """
    grams = [gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_similarity(texts: Iterable[str]) -> float:
    """Mean Jaccard of the words of two different texts: 0, nothing in common, to 1, all the same; 0 for one text."""
    words = [set(text.split()) or {text} for text in texts]
    return fmean(jaccard(a, b) for a, b in combinations(words, 2)) if len(words) > 1 else 0.0
