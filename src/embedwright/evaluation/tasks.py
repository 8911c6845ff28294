"""The tasks of a suite: how each kind reads its data, encodes it and is scored.

N texts, E embedding, Q queries, C corpus.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt, StrictBool, model_validator

from embedwright.data.files.beir import read_beir
from embedwright.data.files.folders import data_files, stem_of
from embedwright.data.files.quarantine import good_rows
from embedwright.data.files.rows import read_rows
from embedwright.data.schema import DataError, binary_of, label_of, number_of, text_of
from embedwright.encoders.protocol import Encoder, encode_finite
from embedwright.errors import InputError
from embedwright.evaluation import metrics
from embedwright.evaluation.metrics import Embeddings, Kind, Scored

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Strict(BaseModel):
    """A part of a suite file: a key that it does not know is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SuiteTask(Strict):
    """One data file or BEIR folder, and how to score it."""

    name: str
    kind: Kind
    path: Path
    train: Path | None = None  # classification only; without it, the file is split 50/50
    instruction: str = ""
    limit: PositiveInt | None = None  # takes the first rows only; in retrieval the first queries, with the whole corpus
    ignore_identical_ids: StrictBool = False  # retrieval only: the document with the query's own id is no hit

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> SuiteTask:
        if self.train is not None and self.kind != "classification":
            raise InputError(f"task {self.name!r}: 'train' is for classification, not for {self.kind}")
        if self.ignore_identical_ids and self.kind != "retrieval":
            raise InputError(f"task {self.name!r}: 'ignore_identical_ids' is for retrieval, not for {self.kind}")
        return self


def score(encoder: Encoder, task: SuiteTask) -> Scored:
    """Scores a model on one task, whose paths are absolute. Raises ValueError for data that is not of the kind."""
    if task.kind == "retrieval":
        return _retrieval(encoder, task)
    if task.kind == "classification":
        return _classification(encoder, task)
    *texts, gold = _read(task.path, task.kind, task.limit)
    _refuse_one_label(gold, task.path)
    vectors_NE = _encode(encoder, [text for column in texts for text in column], task.instruction or None)
    if task.kind == "clustering":
        return metrics.clustering(vectors_NE, gold)
    left_NE, right_NE = np.split(vectors_NE, 2)
    return metrics.sts(left_NE, right_NE, gold) if task.kind == "sts" else metrics.pair(left_NE, right_NE, gold)


def _retrieval(encoder: Encoder, task: SuiteTask) -> Scored:
    beir = read_beir(task.path, split_of(task.path))
    queries = dict(islice(((id_, text) for id_, text in beir.queries.items() if id_ in beir.qrels), task.limit))
    query_QE = _encode(encoder, list(queries.values()), task.instruction)
    corpus_CE = _encode(encoder, list(beir.corpus.values()))
    own = sum(beir.corpus.get(query) == text for query, text in queries.items())
    if own and not task.ignore_identical_ids:
        logger.warning(
            "%s: %d queries are documents too, under their own ids, and find themselves first; mteb leaves these out "
            "for ArguAna, Quora and some others, and so does ignore_identical_ids: true in a suite file",
            *(task.path, own),
        )
    ids, corpus_ids = list(queries), list(beir.corpus)
    return metrics.retrieval(query_QE, ids, corpus_CE, corpus_ids, beir.qrels, task.ignore_identical_ids)


def _classification(encoder: Encoder, task: SuiteTask) -> Scored:
    texts, labels = _read(task.path, task.kind, task.limit)
    if task.train:
        train_texts, train_labels = _read(task.train, task.kind, split="train")
        test = list(range(len(texts)))
    else:
        train, test = metrics.halves(labels)
        train_texts, train_labels = [texts[row] for row in train], [labels[row] for row in train]
        texts, labels = [texts[row] for row in test], [labels[row] for row in test]
    _refuse_one_label(train_labels, task.train or task.path)
    draws = metrics.few_shot(train_labels)
    drawn = sorted(set().union(*draws))  # the other training rows are not used, so they are not encoded
    place = {row: number for number, row in enumerate(drawn)}
    vectors_NE = _encode(encoder, [train_texts[row] for row in drawn] + texts, task.instruction or None)
    train_NE, test_NE = np.split(vectors_NE, [len(drawn)])
    places = [[place[row] for row in draw] for draw in draws]
    scored = metrics.classification(train_NE, [train_labels[row] for row in drawn], test_NE, labels, places)
    return replace(scored, items={"id": np.array(test)})


def split_of(folder: Path) -> str | None:
    """Returns the split of a BEIR folder to evaluate on: `test`, if it has one."""
    return "test" if any(folder.glob("qrels/test.tsv*")) else None


# Rows may have other keys. A file of a folder is of the first kind whose keys it has.
COLUMNS: dict[Kind, dict[str, Callable[[object, str], Any]]] = {
    "sts": {"text1": text_of, "text2": text_of, "score": number_of},
    "pair": {"text1": text_of, "text2": text_of, "label": binary_of},
    "classification": {"text": text_of, "label": label_of},
    "clustering": {"text": text_of, "label": label_of},
}


def _read(path: Path, kind: Kind, limit: int | None = None, split: str = "test") -> list[list[Any]]:
    """Reads the columns of `kind` in the first `limit` rows. A bad row is an error: without it, the test changes."""
    checks = COLUMNS[kind]
    rows = rows_of(path, split, lambda row, _: [check(row.get(key), key) for key, check in checks.items()])
    return [list(column) for column in zip(*islice(rows, limit), strict=True)] or [[] for _ in checks]


def rows_of(path: Path, split: str, parse: Callable[[dict[str, Any], str], T]) -> Iterator[T]:
    """Parses each row of a data set. DataError names file and line of a bad one."""
    for file in data_files(path, split):
        yield from good_rows(read_rows(file), parse, stem_of(file), None, file)


def _refuse_one_label(gold: Sequence[Any], file: Path) -> None:
    """Raises DataError if there is one label only: every metric would be 0, 1 or undefined for any model."""
    if len(set(gold)) < 2:
        raise DataError(f"{file}: {len(gold)} rows, all of one label or score (a `limit` on a sorted file does that)")


def _encode(encoder: Encoder, texts: Sequence[str], task: str | None = None) -> Embeddings:
    """Encodes texts to float32 (N, E), each distinct text once."""
    place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    vectors_NE = encode_finite(encoder, list(place), task)
    return vectors_NE if len(place) == len(texts) else vectors_NE[[place[text] for text in texts]]
