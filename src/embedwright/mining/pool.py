"""The texts that mining encodes and compares: the documents of a corpus, and the passages of the examples.

A corpus may be larger than memory, and so may the examples. Besides the queries in progress, memory holds only
numbers: 40 bytes a document, and 32 for each id that a passage has.

`C` documents of the corpus, `P` ids of passages.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedwright.data.answers import id_within, ids_of, scope_of, text_mark
from embedwright.data.schema import DataError, Example, Passage
from embedwright.data.tables.documents import DocumentTable

_CHUNK = 2**14  # examples whose texts are held while texts that a corpus lacks are looked for
Corpus = Mapping[str, str] | DocumentTable  # document id -> text


class Documents(dict[str, str]):
    """Positives as a corpus: id -> text.

    Two tasks, or two chunks of one document, may use one id for different texts. So a document's id here is not always
    the id that rows give it. `named` maps (`scope_of` an id in rows, the id or a part of a `class_id`) to the ids here;
    `given` maps an id here to the id that each task gives it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.named: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.given: dict[str, dict[str, str]] = defaultdict(dict)


def positives_of(examples: Iterable[Example]) -> Documents:
    """Makes a corpus of the examples' own positives: id -> text, each text once; without an id, it gets a number.

    Where several texts have one id, the first keeps it; the others get `<id>#2` and so on.
    """
    names: dict[str, dict[tuple[str, str], None]] = {}
    for example in examples:
        for passage in example.positives:
            own = names.setdefault(passage.text, {})
            if passage.id is not None:
                own[example.task, passage.id] = None
    reserved = {id for own in names.values() for _, id in own}
    documents = Documents()
    for number, (text, own) in enumerate(names.items()):
        first = next(iter(own))[1] if own else f"p{number}"
        free = (name for n in count(2) if (name := f"{first}#{n}") not in reserved and name not in documents)
        key = next(free) if first in documents or (not own and first in reserved) else first
        documents[key] = text
        for task, id in own:
            for part in dict.fromkeys([id, *ids_of(Passage(text, id))]):
                documents.named[scope_of(task, part), part].append(key)
            documents.given[key].setdefault(task, id)
    return documents


class Pool:
    """The documents of a corpus that have text, by row. The rows after them are texts that it lacks."""

    def __init__(self, corpus: Corpus, rows: Iterable[Example], answers: Iterable[Passage]) -> None:
        """`rows` are all examples, and are read twice. `answers` are what other data sets give.

        Where the rows name a document with its collection (`wiki::123`), a corpus may also have it as `123`.
        """
        self.corpus = corpus
        self.made_here = corpus if isinstance(corpus, Documents) else None
        numbers, names, ids, texts = array("I"), list[str](), array("q"), array("q")
        documents: Iterable[tuple[str, str]] = corpus.items()
        for number, (id, text) in enumerate(documents):
            if text and not text.isspace():
                numbers.append(number) if isinstance(corpus, DocumentTable) else names.append(id)
                ids.append(hash(id))
                texts.append(hash(text))
        if not ids:
            raise DataError("the corpus holds no text: nothing to mine from")
        self.place: Sequence[Any] = numbers or names  # by row, where the corpus has the document
        self._by_id, self._by_text = _First(ids), _First(texts)
        self.keys, self._known = np.empty(len(ids), np.int64), np.zeros(len(ids), bool)
        self.row_of_text: dict[str, int] = {}  # for the queries in progress
        self.lacking: list[str] = []
        self._foreign: set[tuple[str, str]] = set()  # (task, id) which the task gives to another document
        self._names = None
        if not self.made_here:
            passages = chain(((row.task, p) for row in rows for p in _passages(row)), (("", p) for p in answers))
            self._names = _names(passages)
            shared = set(self._names.shared[self._by_id.of(self._names.shared) >= 0].tolist())
            self._foreign = self._foreigners(rows, shared) if shared else set()

    def __len__(self) -> int:
        return len(self.place)

    def document(self, row: int) -> tuple[str, str]:
        """Returns id and text of a document."""
        if isinstance(self.corpus, DocumentTable):
            return self.corpus[self.place[row]]
        return self.place[row], self.corpus[self.place[row]]

    def texts(self) -> Iterator[str]:
        """Yields the text of each document, in order."""
        return (text for _, text in self.corpus.items() if text and not text.isspace())

    def keys_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the `text_mark` of each document. It is made on first use, since most of them never rank."""
        asked = np.unique(rows[~self._known[rows]])
        self._known[asked] = True
        marks = (text_mark(self.document(row)[1]) for row in asked.tolist())
        self.keys[asked] = np.fromiter(marks, np.int64, len(asked))
        return self.keys[rows]

    def rows_with_id(self, task: str, ids: Iterable[str]) -> list[int]:
        """Returns the rows of the documents that an example of `task` means by these ids, or parts of a `class_id`."""
        ids = [id for id in ids if (task, id) not in self._foreign]
        if self.made_here is not None:
            ids = [key for id in ids for key in self.made_here.named.get((scope_of(task, id), id), ())]
        if not ids:
            return []
        rows = self._by_id.find(ids)
        if self._names and self._names.collections:
            bare = list(map(id_within, ids))
            named = (rows < 0) & (self._names.ids.find(ids) >= 0) & list(map(bool, bare))
            rows = np.where(named, self._by_id.find(bare), rows)
        return list(rows[rows >= 0].tolist())

    def take(self, examples: Iterable[Example]) -> None:
        """Looks up the passages of these examples, the current chunk: sets `row_of_text` and `lacking`."""
        self.row_of_text, self.lacking = self.rows_of(examples)

    def rows_of(self, examples: Iterable[Example]) -> tuple[dict[str, int], list[str]]:
        """Returns the row of each passage's text, and the texts of the rows after the documents."""
        texts = list(dict.fromkeys(p.text for example in examples for p in _passages(example)))
        rows = self._by_text.find(texts)
        lacking = np.flatnonzero(rows < 0)
        rows[lacking] = len(self) + np.arange(len(lacking))
        return dict(zip(texts, rows.tolist(), strict=True)), [texts[i] for i in lacking.tolist()]

    def lacking_in(self, examples: Iterable[Example]) -> list[str]:
        """Returns the texts of all examples that the corpus lacks, each once. The others are not held."""
        lacking, given = dict[str, None](), iter(examples)
        while chunk := list(islice(given, _CHUNK)):
            lacking |= dict.fromkeys(self.rows_of(chunk)[1])
        return list(lacking)

    def passage(self, task: str, row: int) -> Passage:
        """Returns a document under the id that `task` gives it; without an id where the id means another document
        there.
        """
        id, text = self.document(row)
        if self.made_here is None:
            return Passage(text, None if (task, id) in self._foreign else self._id_in_rows(id))
        given = self.made_here.given.get(id, {})
        own = given.get(task) or next((id for id in given.values() if not scope_of(task, id)), None)
        return Passage(text, own or (None if (task, id) in self.made_here.named else id))

    def _id_in_rows(self, id: str) -> str:
        """Returns the id with the collection that rows name, if the corpus does not name it and it is one only."""
        if not (self._names and self._names.collections):
            return id
        place = int(self._names.bare.find([id])[0])
        if place < 0 or self._names.ids.find([id])[0] >= 0:
            return id
        named = f"{self._names.collections[self._names.collection_of[place]]}::{id}"
        return id if self._by_id.find([named])[0] >= 0 else named

    def _foreigners(self, rows: Iterable[Example], shared: set[int]) -> set[tuple[str, str]]:
        """Finds the (task, id) that name another document in the task than in the corpus, among `shared` ids.

        The document's text in the corpus is then that of another task's passage with this id, and of none of the
        task's own passages.
        """
        texts: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for example in rows:
            for p in _passages(example):
                if p.id is not None and hash(p.id) in shared and scope_of(example.task, p.id):
                    texts[p.id][example.task].add(text_mark(p.text))
        foreign = set()
        for id, by_task in texts.items():
            there = text_mark(self.document(int(self._by_id.find([id])[0]))[1])
            own = {task for task, marks in by_task.items() if there in marks}
            foreign |= {(task, id) for task in by_task.keys() - own} if own else set()
        return foreign


class _First:
    """Finds the first place of a text among many, of which it keeps Python's own hashes: 64 bits, as `text_mark`."""

    def __init__(self, hashes: array[int] | NDArray[np.int64]) -> None:
        given = np.array(hashes, np.int64)
        self.order = np.argsort(given, kind="stable").astype(np.uint32)
        self.sorted = given[self.order]

    def find(self, texts: Collection[str]) -> NDArray[np.int64]:
        """Returns the place of each text, -1 if it is not there."""
        return self.of(np.fromiter(map(hash, texts), np.int64, len(texts)))

    def of(self, hashes: NDArray[np.int64]) -> NDArray[np.int64]:
        place = np.searchsorted(self.sorted, hashes)
        found = np.full(len(hashes), -1)
        there = place < len(self.sorted)
        there[there] = self.sorted[place[there]] == hashes[there]
        found[there] = self.order[place[there]]
        return found


class _Names(NamedTuple):
    """How rows name documents."""

    ids: _First  # all of them
    shared: NDArray[np.int64]  # hashes of ids that several tasks use
    bare: _First  # ids within a collection that no other collection has
    collection_of: NDArray[np.int64]  # for each of `bare`
    collections: list[str]


def _names(passages: Iterable[tuple[str, Passage]]) -> _Names:
    ids, tasks, bare, collections = array("q"), array("i"), array("q"), array("i")
    task_numbers: dict[str, int] = {}
    collection_numbers: dict[str, int] = {}
    for task, passage in passages:
        for id in ids_of(passage):
            ids.append(hash(id))
            tasks.append(task_numbers.setdefault(task, len(task_numbers)))
            if within := id_within(id):
                bare.append(hash(within))
                collections.append(collection_numbers.setdefault(id[: -len(within) - 2], len(collection_numbers)))
    all_ids, several_tasks, _ = _grouped(ids, tasks)
    all_bare, several, first = _grouped(bare, collections)
    return _Names(
        _First(all_ids), all_ids[several_tasks], _First(all_bare[~several]), first[~several], list(collection_numbers)
    )


def _grouped(keys: array[int], values: array[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """Returns each key once, ascending, whether it occurs with several values, and one of them."""
    key_P, value_P = np.array(keys, np.int64), np.array(values, np.int64)
    order_P = np.argsort(key_P, kind="stable")
    key_P, value_P = key_P[order_P], value_P[order_P]
    starts = np.flatnonzero(np.diff(key_P, prepend=key_P[:1] - 1))
    if not len(starts):
        return key_P, np.zeros(0, bool), value_P
    least = np.minimum.reduceat(value_P, starts)
    return key_P[starts], least != np.maximum.reduceat(value_P, starts), least


def _passages(example: Example) -> Iterator[Passage]:
    return chain(example.positives, example.negatives)
