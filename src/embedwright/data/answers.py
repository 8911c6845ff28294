"""What answers each question, over all rows of a data set: none of it is ever a negative of the question.

A question is a task and the exact key of a query. Its answers are the positives of all its rows. A judged pair counts
in both directions: where a query is a positive of another row of its task, that row's query is an answer, too. Document
ids mean something within a task only.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from embedwright.data.keys import exact_key
from embedwright.data.schema import Example, Passage

_CHUNK = 4096  # rows
_AND = "\x1f"  # ASCII's separator of units: no id has it


def question_of(task: str, query: str) -> int:
    """Equal for the same question. Other questions share one of the 2^64 numbers with a chance of 3e-8 in a million."""
    return _number(f"{task}\0{exact_key(query)}")


def text_mark(text: str) -> int:
    """Equal for texts of one exact key."""
    return _number(exact_key(text))


def marks_of(task: str, passages: Iterable[Passage]) -> set[int]:
    """The texts and the document ids of these passages, each as a number."""
    marks = set()
    for passage in passages:
        marks.add(text_mark(passage.text))
        marks.update(document_marks(task, passage))
    return marks


def document_marks(task: str, passage: Passage) -> list[int]:
    """That of the document, if the passage has an id; of a text with classes in its place (`class_id`) one for each."""
    if passage.id is None:
        return []
    return [id_mark(task, part) for part in passage.id.split(_AND)]


def class_id(labels: Iterable[str]) -> str:
    """What stands for a document's id at a text with these labels: texts that share a label answer each other."""
    return _AND.join(f"class {label}" for label in labels)


def id_mark(task: str, document: str) -> int:
    """The document that rows of `task` call so."""
    return _number(f"{task}\0\0{document}")


def _number(key: str) -> int:
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Answers:
    """The answers of each question. Memory: 8 bytes a row, and the answers that rows share or exchange."""

    def __init__(self, rows: Iterable[Example]) -> None:
        """`rows` are read twice: a list or a table."""
        self._shared: dict[int, dict[tuple[int, str | None], Passage]] = {}
        for question, _, passage in _exchanged(rows):
            self._shared.setdefault(question, {}).setdefault((text_mark(passage.text), passage.id), passage)

    def of(self, example: Example) -> tuple[Passage, ...]:
        """All answers, in the order of the rows; a text that several rows give with other ids comes once for each."""
        shared = self._shared.get(question_of(example.task, example.query))
        if shared is None:
            return example.positives
        own = (p for p in example.positives if (text_mark(p.text), p.id) not in shared)
        return (*shared.values(), *own)


class AnswerMarks:
    """The same for data of any size: what is kept of an answer is the mark of its text and that of its id."""

    def __init__(self, rows: Iterable[Example]) -> None:
        """`rows` are read twice: a list or a table."""
        self._shared: dict[int, set[int]] = {}
        for question, task, passage in _exchanged(rows):
            self._shared.setdefault(question, set()).update(marks_of(task, [passage]))

    def of(self, example: Example) -> set[int]:
        """The marks of all answers."""
        own = marks_of(example.task, example.positives)
        return own | self._shared.get(question_of(example.task, example.query), set())


def _exchanged(rows: Iterable[Example]) -> Iterator[tuple[int, str, Passage]]:
    """(question, its task, an answer) of each question of several rows, and of each that is itself an answer."""
    asked, repeated = _questions(rows)
    examples = iter(rows)
    while chunk := list(islice(examples, _CHUNK)):
        pairs = [(row, p) for row in chunk for p in row.positives]
        reversed_P = np.fromiter((question_of(row.task, p.text) for row, p in pairs), np.int64, len(pairs))
        for number in np.flatnonzero(_among(asked, reversed_P)).tolist():
            row = pairs[number][0]
            yield int(reversed_P[number]), row.task, Passage(row.query)
        own_N = np.fromiter((question_of(row.task, row.query) for row in chunk), np.int64, len(chunk))
        for number in np.flatnonzero(_among(repeated, own_N)).tolist():
            for passage in chunk[number].positives:
                yield int(own_N[number]), chunk[number].task, passage


def _questions(rows: Iterable[Example]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All questions, and those of several rows; both in ascending order."""
    asked = array("q", (question_of(row.task, row.query) for row in rows))
    questions, counts = np.unique(np.frombuffer(asked, dtype=np.int64), return_counts=True)
    return questions, questions[counts > 1]


def _among(ascending: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.bool_]:
    place = np.searchsorted(ascending, values)
    found: NDArray[np.bool_] = place < len(ascending)
    found[found] = ascending[place[found]] == values[found]
    return found
