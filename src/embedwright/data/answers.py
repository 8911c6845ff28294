"""Collects the answers of each question over all rows of a data set: none of them is ever a negative of the question.

A question is a task and the exact key of a query. Its answers are the positives of all its rows. A pair counts in both
directions: if a query is a positive of another row of its task, that row's query is an answer, too. Document ids are
compared within a task. An id that names its collection (`wiki::123`) stands for one document in all tasks.
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
_IN = "::"  # between a collection and a document of it
_CONTRAST = " contrast"


def question_of(task: str, query: str) -> int:
    """Returns a number that is equal for the same question. Among a million questions, two collide with chance 3e-8."""
    return _number(f"{task}\0{exact_key(query)}")


def text_mark(text: str) -> int:
    """Returns a number that is equal for texts with one exact key."""
    return _number(exact_key(text))


def marks_of(task: str, passages: Iterable[Passage]) -> set[int]:
    """Returns the texts and the document ids of these passages, each as a number."""
    marks = set()
    for passage in passages:
        marks.add(text_mark(passage.text))
        marks.update(document_marks(task, passage))
    return marks


def document_marks(task: str, passage: Passage) -> list[int]:
    """Returns the number of the passage's document, if it has an id, or one for each class of a `class_id`."""
    return [id_mark(task, part) for part in ids_of(passage)]


def ids_of(passage: Passage) -> list[str]:
    """Returns the id of the passage's document, if it has one, or the parts of a `class_id`."""
    return [] if passage.id is None else passage.id.split(_AND)


def class_id(labels: Iterable[str], documents: Iterable[str] = ()) -> str:
    """Returns the id of a text with these labels, and of these documents. Texts that share one answer each other."""
    return _AND.join([*(f"class {label}" for label in labels), *documents])


def collection_id(collection: str, id: str) -> str:
    """Returns an id that holds in all tasks, of one that holds in a collection: each of its parts names it."""
    return _AND.join(f"{collection}{_IN}{part}" for part in id.split(_AND))


def contrast_id(id: str) -> str:
    """Returns the id of a negative that is a text of this document itself, or nearly: it is one for its own row alone.

    To other rows with an answer of the document, it counts as an answer.
    """
    return f"{id}{_CONTRAST}"


def contrast_marks(task: str, passage: Passage) -> list[int]:
    """Returns the number of the document that this passage has the `contrast_id` of."""
    return [id_mark(task, id.removesuffix(_CONTRAST)) for id in ids_of(passage) if id.endswith(_CONTRAST)]


def id_within(document: str) -> str:
    """Returns the id that a document has in its collection: what follows the collection's name, else an empty text."""
    return document.partition(_IN)[2]


def scope_of(task: str, document: str) -> str:
    """Returns where a document's id holds: in the task of its row, or in all tasks (an empty string)."""
    return "" if _IN in document else task


def id_mark(task: str, document: str) -> int:
    """Returns a number for the document that rows of `task` name by this id."""
    return _number(f"{scope_of(task, document)}\0\0{document}")


def _number(key: str) -> int:
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Answers:
    """Holds the answers of each question. It takes 8 bytes a row, and the answers that several rows give."""

    def __init__(self, rows: Iterable[Example]) -> None:
        """`rows` are read twice: a list or a table."""
        self._shared: dict[int, dict[tuple[int, str | None], Passage]] = {}
        for question, _, passage in _exchanged(rows):
            self._shared.setdefault(question, {}).setdefault((text_mark(passage.text), passage.id), passage)

    def of(self, example: Example) -> tuple[Passage, ...]:
        """Returns all answers, in the order of the rows. A text with several ids comes once for each of them."""
        shared = self._shared.get(question_of(example.task, example.query))
        if shared is None:
            return example.positives
        own = (p for p in example.positives if (text_mark(p.text), p.id) not in shared)
        return (*shared.values(), *own)


class AnswerMarks:
    """Does the same for data of any size: of an answer it keeps the numbers of its text and of its id."""

    def __init__(self, rows: Iterable[Example]) -> None:
        """`rows` are read twice: a list or a table."""
        self._shared: dict[int, set[int]] = {}
        for question, task, passage in _exchanged(rows):
            self._shared.setdefault(question, set()).update(marks_of(task, [passage]))

    def of(self, example: Example) -> set[int]:
        """Returns the numbers of all answers."""
        own = marks_of(example.task, example.positives)
        return own | self._shared.get(question_of(example.task, example.query), set())


def _exchanged(rows: Iterable[Example]) -> Iterator[tuple[int, str, Passage]]:
    """Yields (question, its task, an answer) for questions of several rows, and for questions that are answers, too."""
    asked, repeated = _questions(rows)
    examples = iter(rows)
    while chunk := list(islice(examples, _CHUNK)):
        pairs = [(row, p) for row in chunk for p in row.positives]
        reversed_P = np.fromiter((question_of(row.task, p.text) for row, p in pairs), np.int64, len(pairs))
        for number in np.flatnonzero(among(asked, reversed_P)).tolist():
            row = pairs[number][0]
            yield int(reversed_P[number]), row.task, Passage(row.query)
        own_N = np.fromiter((question_of(row.task, row.query) for row in chunk), np.int64, len(chunk))
        for number in np.flatnonzero(among(repeated, own_N)).tolist():
            for passage in chunk[number].positives:
                yield int(own_N[number]), chunk[number].task, passage


def _questions(rows: Iterable[Example]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns all questions, and those of several rows, both in ascending order."""
    asked = array("q", (question_of(row.task, row.query) for row in rows))
    questions, counts = np.unique(np.frombuffer(asked, dtype=np.int64), return_counts=True)
    return questions, questions[counts > 1]


def among(ascending: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns whether each value is among the `ascending` ones."""
    place = np.searchsorted(ascending, values)
    found: NDArray[np.bool_] = place < len(ascending)
    found[found] = ascending[place[found]] == values[found]
    return found
