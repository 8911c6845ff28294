"""Judges rows by licence and language, and texts by length.

py3langid tells languages (140 of them, by byte n-grams, offline).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from embedwright.data.schema import Example
from embedwright.data.sources.catalog import find_task
from embedwright.errors import InputError

SURE = 0.5  # probability from which a foreign language counts: a text too short to tell stays
SEEN = 1000  # characters of a row that its language is told by


@dataclass(frozen=True, slots=True)
class Filters:
    """Says what rows must be like. The defaults let everything pass.

    `allow`, `deny`: licences as shell patterns (`CC-BY*`), upper and lower case alike. `licences`: that of each task,
    for tasks that are not in the catalogue. `languages`: codes of ISO 639. Lengths, in characters and in words parted
    by spaces, are of each text.
    """

    licences: Mapping[str, str] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    min_chars: int = 0
    max_chars: int | None = None
    min_words: int = 0
    max_words: int | None = None

    def __post_init__(self) -> None:
        if self.languages and (unknown := set(self.languages) - set(_identifier().labels)):
            raise InputError(f"no language {', '.join(sorted(unknown))}; known are {', '.join(_identifier().labels)}")
        for unit in ("chars", "words"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if high is not None and high < max(low, 1):
                raise InputError(f"max_{unit} is {high}, min_{unit} {low}: no text passes")


def row_fault(example: Example, filters: Filters) -> str | None:
    """Returns why a row is left out: `licence`, `licence_unknown` or `language`; None if it stays."""
    return _licence_fault(example.task, filters) or _language_fault(example, filters.languages)


def fits(text: str, filters: Filters) -> bool:
    """Returns whether a text is neither too short nor too long."""
    chars = (len(text), filters.min_chars, filters.max_chars)
    words = (len(text.split()), filters.min_words, filters.max_words)
    return all(least <= size and (most is None or size <= most) for size, least, most in (chars, words))


def _licence_fault(task: str, filters: Filters) -> str | None:
    """Judges the licence of a task. An unknown one is a fault as soon as licences are asked for."""
    if not (filters.allow or filters.deny):
        return None
    known = find_task(task)
    licence = filters.licences.get(task, known.licence if known else "")
    if not licence:
        return "licence_unknown"
    denied = _matches(licence, filters.deny) or bool(filters.allow and not _matches(licence, filters.allow))
    return "licence" if denied else None


def _matches(licence: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(licence.casefold(), pattern.casefold()) for pattern in patterns)


def _language_fault(example: Example, languages: Collection[str]) -> str | None:
    """Judges the language of a row: its own `language` if it has one, else that of query and paired texts together."""
    if not languages:
        return None
    if example.language is not None:
        return None if example.language.replace("_", "-").split("-")[0].lower() in languages else "language"
    text = "\n".join((example.query, *(passage.text for passage in example.paired)))[:SEEN]
    found, probability = _identifier().classify(text)
    return "language" if found not in languages and probability >= SURE else None


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
