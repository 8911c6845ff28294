"""The texts that mining encodes and compares: the documents of a corpus, and the passages of the examples.

`C` documents of the corpus, `P` rows of the pool (the documents, then the passages that the corpus lacks).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedwright.data.answers import id_within, ids_of, scope_of, text_mark
from embedwright.data.schema import Example, Passage
from embedwright.encoders.protocol import Encoder
from embedwright.vectors.shards import Vectors
from embedwright.vectors.store import encode_texts


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


@dataclass(frozen=True, slots=True)
class Pool:
    """All texts to encode: the documents of the corpus, then the passages that it lacks, each once."""

    corpus: Mapping[str, str]
    ids: list[str]  # (C), of documents that have text
    lacking: list[str]  # (P - C)
    keys: NDArray[np.int64]  # (P), filled where `known`
    known: NDArray[np.bool_]  # (P)
    row_of_id: dict[str, int]  # by the ids that the examples name documents by
    id_in_rows: dict[str, str]  # of documents whose collection the corpus does not name, and the examples do
    row_of_text: dict[str, int]  # for the examples' passages
    foreign: set[tuple[str, str]]  # (task, id) which the task gives to another document than the corpus does

    def text(self, row: int) -> str:
        return self.corpus[self.ids[row]] if row < len(self.ids) else self.lacking[row - len(self.ids)]

    def keys_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the `text_mark` of each row. It is made on first use, since most documents of a large corpus never
        rank.
        """
        asked = np.unique(rows[~self.known[rows]])
        self.known[asked] = True
        self.keys[asked] = np.fromiter((text_mark(self.text(row)) for row in asked.tolist()), np.int64, len(asked))
        return self.keys[rows]

    def rows_with_id(self, task: str, ids: Iterable[str]) -> list[int]:
        """Returns the rows of the documents that an example of `task` means by these ids, or parts of a `class_id`."""
        ids = [id for id in ids if (task, id) not in self.foreign]
        if isinstance(self.corpus, Documents):
            ids = [key for id in ids for key in self.corpus.named.get((scope_of(task, id), id), ())]
        return [self.row_of_id[id] for id in ids if id in self.row_of_id]

    def rows_of_texts(self, passages: Iterable[Passage]) -> list[int]:
        return [self.row_of_text[p.text] for p in passages]

    def passage(self, task: str, row: int) -> Passage:
        """Returns a document under the id that `task` gives it; without an id where the id means another document
        there.
        """
        id, text = self.ids[row], self.text(row)
        if not isinstance(self.corpus, Documents):
            return Passage(text, None if (task, id) in self.foreign else self.id_in_rows.get(id, id))
        given = self.corpus.given.get(id, {})
        own = given.get(task) or next((id for id in given.values() if not scope_of(task, id)), None)
        return Passage(text, own or (None if (task, id) in self.corpus.named else id))

    def encoded(self, encoder: Encoder, folder: Path | None, advance: Callable[[int], None]) -> tuple[Vectors, Vectors]:
        """Encodes all rows. Returns the vectors of the corpus, and those of all rows."""
        documents = encode_texts(
            encoder, lambda: _with_text(self.corpus.values()), len(self.ids), folder=folder, advance=advance
        )
        lacking = encode_texts(encoder, lambda: self.lacking, len(self.lacking), folder=folder, advance=advance)
        return documents, documents + lacking


def make_pool(corpus: Mapping[str, str], examples: Sequence[Example], answers: Iterable[Passage]) -> Pool:
    """Makes the pool of a corpus and examples. `answers` of other examples are only compared, not encoded.

    Where the examples name a document with its collection (`wiki::123`), a corpus may also have it as `123`.
    """
    passages = [p for example in examples for p in (*example.positives, *example.negatives)]
    wanted_ids = {id for p in chain(passages, answers) for id in ids_of(p)}
    row_of_text = dict.fromkeys((p.text for p in passages), -1)
    made_here = isinstance(corpus, Documents)
    of_collections: dict[str, list[str]] = defaultdict(list)  # the ids in the rows by those within the collection
    for id in () if made_here else filter(id_within, wanted_ids):
        of_collections[id_within(id)].append(id)
    ids: list[str] = []
    row_of_id: dict[str, int] = {}
    for id_, text in corpus.items():
        if not text or text.isspace():
            continue
        if row_of_text.get(text) == -1:
            row_of_text[text] = len(ids)
        if made_here or id_ in wanted_ids:
            row_of_id[id_] = len(ids)
        for id in of_collections.get(id_, ()):
            row_of_id.setdefault(id, len(ids))
        ids.append(id_)
    lacking = [text for text, row in row_of_text.items() if row == -1]
    row_of_text.update(zip(lacking, range(len(ids), len(ids) + len(lacking)), strict=True))
    rows = len(ids) + len(lacking)
    foreign = set() if made_here else _foreign(corpus, examples, row_of_id)
    in_rows = {
        id: named[0]
        for id, named in of_collections.items()
        if len(named) == 1 and id not in wanted_ids and named[0] in row_of_id and ids[row_of_id[named[0]]] == id
    }
    keys, known = np.empty(rows, np.int64), np.zeros(rows, bool)
    return Pool(corpus, ids, lacking, keys, known, row_of_id, in_rows, row_of_text, foreign)


def _foreign(
    corpus: Mapping[str, str], examples: Sequence[Example], row_of_id: Mapping[str, int]
) -> set[tuple[str, str]]:
    """Finds the (task, id) that name another document in the task than in the corpus.

    The document's text in the corpus is then that of another task's passage with this id, and of none of the task's
    own passages.
    """
    if len({example.task for example in examples}) < 2:
        return set()
    texts: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for example in examples:
        for passage in (*example.positives, *example.negatives):
            if passage.id is not None and passage.id in row_of_id and scope_of(example.task, passage.id):
                texts[passage.id][example.task].add(passage.text)
    foreign = set()
    for id, by_task in texts.items():
        if len(by_task) > 1:
            there = text_mark(corpus[id])
            own = {task for task, some in by_task.items() if there in set(map(text_mark, some))}
            foreign |= {(task, id) for task in by_task.keys() - own} if own else set()
    return foreign


def _with_text(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text and not text.isspace())
