"""The sets of AIR-Bench 24.05, and what a name such as `AIR-Bench/qa/en/dev` stands for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from embedwright.config import did_you_mean, load_yaml
from embedwright.errors import InputError

NAME = "AIR-Bench"


class AirSet(NamedTuple):
    """One set of AIR-Bench. `documents` is the size of its corpus."""

    task: str
    domain: str
    language: str
    dataset: str
    splits: tuple[str, ...]
    documents: int

    @property
    def name(self) -> str:
        """The name of its results, such as `qa_wiki_en` or `long-doc_arxiv_en_llama2`."""
        return "_".join(self[:3] if self.dataset == "default" else self[:4])

    @property
    def repository(self) -> str:
        return f"{NAME}/{self.task}_{self.domain}_{self.language}"


def choose(*names: str) -> list[AirSet]:
    """Returns the sets that names ask for: `AIR-Bench` and any words that narrow it, as in `AIR-Bench/qa/en/dev`.

    A word is a task, a domain, a language, a data set or a split, in any order. A set that several names ask for comes
    once, with the splits of all. InputError names the nearest words, or what there is with the other words where none
    has all of them.
    """
    merged: dict[str, AirSet] = {}
    for one in (one for name in names for one in _named(name)):
        asked = {*one.splits, *(merged[one.name].splits if one.name in merged else ())}
        merged[one.name] = one._replace(splits=tuple(sorted(asked)))
    return [*merged.values()]


def _named(name: str) -> list[AirSet]:
    head, *words = name.split("/")
    if head.lower() != NAME.lower():
        raise InputError(f"{name}: no benchmark {head!r}. Did you mean {NAME}, or a part of it such as {NAME}/qa/en?")
    chosen = _sets()
    for place, word in enumerate(words):
        if not any(word in _words(one) for one in _sets()):
            known = sorted({word for one in _sets() for word in _words(one)})
            raise InputError(
                f"{name}: no task, domain, language, data set or split {word!r}{did_you_mean(word, known)}"
            )
        split = (word,) if word in ("dev", "test") else None
        fits = [one._replace(splits=split or one.splits) for one in chosen if word in _words(one)]
        if not fits:
            with_these = sorted({other for one in chosen for other in _words(one)} - {*words})
            raise InputError(
                f"{name}: {'/'.join([NAME, *words[:place]])} has no {word!r}; it has {', '.join(with_these)}"
            )
        chosen = fits
    return chosen


def _words(one: AirSet) -> tuple[str, ...]:
    return (*one[:4], *one.splits)


@cache
def sets_file() -> dict[str, Any]:
    """Returns `airbench_sets.yaml`: the sets, the version, the instruction and published scores."""
    return load_yaml(Path(__file__).with_suffix(".yaml"))


def _sets() -> list[AirSet]:
    return [
        AirSet(task, domain, language, dataset, tuple(splits.split("+")), documents)
        for task, domain, language, dataset, splits, documents in sets_file()["sets"]
    ]
