"""What a suite says of a task, and how the rows of its files are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, PositiveInt, StrictBool, model_validator

from embedwright.config import did_you_mean
from embedwright.data.files.beir import beir_splits
from embedwright.data.files.folders import data_files, stem_of
from embedwright.data.files.quarantine import good_rows
from embedwright.data.files.rows import read_rows
from embedwright.data.schema import binary_of, label_of, number_of, text_of
from embedwright.errors import InputError
from embedwright.evaluation.metrics import METRICS, Kind

T = TypeVar("T")

# Keys that not every kind of task has.
_KEYS: dict[str, tuple[Kind, ...]] = {
    "train": ("classification",),
    "ignore_identical_ids": ("retrieval",),
    "corpus_limit": ("retrieval",),
    "chunk_tokens": ("retrieval",),
    "candidates": ("reranking",),
    "depth": ("reranking",),
}


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
    metric: str = ""  # the main metric; empty: the first of the kind's METRICS
    limit: PositiveInt | None = None  # takes the first rows only; of a BEIR folder the first queries
    corpus_limit: PositiveInt | None = None  # retrieval only: the size of the corpus, which keeps all judged documents
    chunk_tokens: PositiveInt | None = None  # retrieval only: a document's score is the best of its chunks' (MaxP)
    candidates: Literal["bm25"] | Path | None = None  # reranking of a BEIR folder: what is ranked, of each query
    depth: PositiveInt | None = None  # with candidates: how many of the best of each query are ranked
    ignore_identical_ids: StrictBool = False  # retrieval only: the document with the query's own id is not a hit

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> SuiteTask:
        for key, kinds in _KEYS.items():
            if getattr(self, key) and self.kind not in kinds:
                raise InputError(f"task {self.name!r}: {key!r} is for {', '.join(kinds)}, not for {self.kind}")
        if self.depth and not self.candidates:
            raise InputError(f"task {self.name!r}: 'depth' is how many 'candidates' a query has, and none are named")
        known = METRICS[self.kind]
        if self.metric and self.metric not in known:
            raise InputError(
                f"task {self.name!r}: {self.kind} has no metric {self.metric!r}{did_you_mean(self.metric, known)}; "
                f"it has {', '.join(known)}"
            )
        return self

    @property
    def main(self) -> str:
        """The name of the main metric."""
        return self.metric or METRICS[self.kind][0]


def _texts_of(value: object, key: str) -> list[str]:
    """Returns one text or a list of texts as a list. Raises DataError naming `key`."""
    if isinstance(value, list):
        return [text_of(text, f"{key}[{place}]") for place, text in enumerate(value)]
    return [text_of(value, key)]


def split_of(folder: Path) -> str | None:
    """Returns the split of a BEIR folder to evaluate on: `test`, if it has one."""
    return "test" if "test" in beir_splits(folder) else None


# Rows may have other keys. A file of a folder is of the first kind whose keys it has.
COLUMNS: dict[Kind, dict[str, Callable[[object, str], Any]]] = {
    "reranking": {"query": text_of, "positive": _texts_of, "negative": _texts_of},
    "sts": {"text1": text_of, "text2": text_of, "score": number_of},
    "pair": {"text1": text_of, "text2": text_of, "label": binary_of},
    "classification": {"text": text_of, "label": label_of},
    "clustering": {"text": text_of, "label": label_of},
}


def read_columns(path: Path, kind: Kind, limit: int | None = None, split: str = "test") -> list[list[Any]]:
    """Reads the columns of `kind` in the first `limit` rows. A bad row is an error: without it, the test changes."""
    checks = COLUMNS[kind]
    rows = rows_of(path, split, lambda row, _: [check(row.get(key), key) for key, check in checks.items()])
    return [list(column) for column in zip(*islice(rows, limit), strict=True)] or [[] for _ in checks]


def digest(*parts: Iterable[Any]) -> str:
    """Returns a digest of the data that a task is scored on: lists of JSON values, and mappings in any order."""
    found = hashlib.sha256()
    for part in parts:
        for row in sorted(part.items()) if isinstance(part, Mapping) else part:
            found.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        found.update(b"\0")
    return f"sha256 {found.hexdigest()[:16]}"


def rows_of(path: Path, split: str, parse: Callable[[dict[str, Any], str], T]) -> Iterator[T]:
    """Parses each row of a data set. DataError names file and line of a bad one."""
    for file in data_files(path, split):
        yield from good_rows(read_rows(file), parse, stem_of(file), None, file)
