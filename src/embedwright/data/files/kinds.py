"""Rows by their kind, bad lines, and BEIR folders.

A training file goes on behind a bad line, which `Quarantine` reports, counts and keeps. A corpus or qrels file does
not: a document that is silently missing changes every score computed on it.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, TypeVar

from embedwright.data.files.folders import data_files, is_beir
from embedwright.data.files.rows import read_rows, text_lines
from embedwright.data.schema import (
    EXAMPLE_KEYS,
    DataError,
    binary_of,
    check_keys,
    id_of,
    label_of,
    number_of,
    text_of,
)
from embedwright.errors import NotFoundError
from embedwright.files import whole_file

log = logging.getLogger(__name__)
T = TypeVar("T")

Kind = Literal["example", "pairs", "labelled", "scored", "pair-labelled"]

LOGGED = 5  # bad lines that are logged one by one


# ---------------------------------------------------------------------------------------------------- bad lines


def aside(path: Path) -> Path:
    """A name next to `path` that nobody else uses: what is written there and then moved is never seen half made."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}")


class Quarantine:
    """The bad lines of a data set: unchanged into the file `path`, the first few and their number into the log.

    A context; `path` is there, complete, when it ends, if there was a bad line, and is not touched if there was none.
    """

    def __init__(self, source: Path, path: Path) -> None:
        self.source, self.path = source, path
        self.count = 0
        self.reasons: list[str] = []  # "file:line: reason" of the first few
        self._last: tuple[Path, int] | None = None
        self._open = ExitStack()
        self._file: BinaryIO | None = None

    def add(self, number: int, raw: bytes, error: DataError, file: Path | None = None) -> None:
        """Keep one bad line of `file` (default: the source), or the next piece of the line that came last."""
        if self._file is None:
            self._file = self._open.enter_context(self._open.enter_context(whole_file(self.path)).open("wb"))
        self._file.write(raw)
        place = (file or self.source, number)
        if place == self._last:
            return
        self._last = place
        self.count += 1
        if self.count <= LOGGED:
            self.reasons.append(f"{place[0]}:{number}: {error}")
            log.warning("%s", self.reasons[-1])

    @property
    def first_reason(self) -> str:
        return self.reasons[0] if self.reasons else ""

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()  # kept, too, where the data as a whole is refused
        if self.count:
            log.warning("%s: %d bad lines, kept unchanged in %s", self.source, self.count, self.path)


def good_rows(path: Path, parse: Callable[[int, dict[str, Any]], T], quarantine: Quarantine) -> Iterator[T]:
    """`parse(line number, row)` of each row of `path`; a line without a row, or a DataError, goes to `quarantine`."""
    for number, raw, row in read_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            value = parse(number, row)
        except DataError as error:
            quarantine.add(number, raw, error, path)
        else:
            yield value


# ---------------------------------------------------------------------------------------------------- kinds


def _score(value: object, key: str) -> float:
    score = number_of(value, key)
    if not 0 <= score <= 5:
        raise DataError(f"{key} {score:g} is not on the scale from 0 to 5")
    return score


# What each kind must have. `example` is checked by parse_example: its two keys here only tell the kind.
_FIELDS: dict[Kind, dict[str, Callable[[object, str], Any]]] = {
    "example": {"query": text_of, "positives": text_of},
    "pairs": {"query": text_of, "positive": text_of},
    "labelled": {"text": text_of, "label": label_of},
    "scored": {"text1": text_of, "text2": text_of, "score": _score},
    "pair-labelled": {"text1": text_of, "text2": text_of, "label": binary_of},
}
_OPTIONAL: dict[Kind, tuple[str, ...]] = {"example": EXAMPLE_KEYS, "pairs": ("id", "positive_id")}  # others: id


def check_kind(row: Mapping[str, Any], kind: Kind) -> None:
    """Raise DataError unless `row` has every key that `kind` needs and no key that it does not know."""
    check_keys(row, (*_FIELDS[kind], *_OPTIONAL.get(kind, ("id",))))
    if missing := [key for key in _FIELDS[kind] if row.get(key) is None]:
        raise DataError(f"no {missing[0]}")


def detect_kind(path: Path) -> Kind:
    """The kind of a data file or folder, from the keys of the first row that are those of a kind (design, section 9).

    Raises FileNotFoundError, and DataError where no row has such keys.
    """
    first_reason = ""
    for file in data_files(path):
        for number, _, row in read_rows(file):
            try:
                if isinstance(row, DataError):
                    raise row
                keys = row.keys()
                kind = max(_FIELDS, key=lambda kind: len(_FIELDS[kind].keys() & keys))
                check_kind(row, kind)
            except DataError as error:
                where = f"line {number}" if file == path else f"{file.name}:{number}"
                first_reason = first_reason or f"{where}: {error}"
            else:
                return kind
    raise DataError(f"{path}: no good row ({first_reason or 'it is empty'}). {_EXPECTED}")


_EXPECTED = "A row has the keys " + ", or ".join(" and ".join(keys) for keys in _FIELDS.values())


def parse_fields(row: Mapping[str, Any], kind: Kind, *, default_id: str) -> dict[str, Any]:
    """The checked values of a row of a raw kind (any but `example`), always with an `id`. Raises DataError."""
    check_kind(row, kind)
    fields = {key: check(row[key], key) for key, check in _FIELDS[kind].items()}
    ids = {key: id_of(row[key], key) for key in _OPTIONAL.get(kind, ("id",)) if row.get(key) is not None}
    return {"id": default_id} | fields | ids


# ---------------------------------------------------------------------------------------------------- BEIR


@dataclass(frozen=True, slots=True)
class Beir:
    """A retrieval set in the layout of BEIR (arXiv 2104.08663)."""

    corpus: dict[str, str]  # document id -> title and text
    queries: dict[str, str]  # query id -> text
    qrels: dict[str, dict[str, int]]  # query id -> document id -> relevance


def read_beir(folder: Path, split: str | None = None) -> Beir:
    """`corpus.jsonl[.gz]`, `queries.jsonl[.gz]` and `qrels/<split>.tsv[.gz]` of `folder`.

    `split` may be left out where there is one. A document's text is title, space, text. Raises FileNotFoundError, and
    DataError naming file and line: on a bad line, an id that occurs twice, a judgement of an unknown query or document.
    """
    corpus_path, queries_path, qrels_path = beir_files(folder, split)
    corpus, queries = read_corpus(corpus_path), read_corpus(queries_path)
    return Beir(corpus, queries, _read_qrels(qrels_path, corpus, queries))


def beir_files(folder: Path, split: str | None = None) -> tuple[Path, Path, Path]:
    """The corpus, queries and qrels files of a BEIR folder."""
    splits = beir_splits(folder)
    if split is None:
        if len(splits) > 1:
            raise DataError(f"{folder / 'qrels'}: several splits ({', '.join(splits)}), name one")
        split = next(iter(splits), "test")
    if split not in splits:
        raise NotFoundError(f"{folder / 'qrels' / split}.tsv")
    return _plain_or_gz(folder / "corpus.jsonl"), _plain_or_gz(folder / "queries.jsonl"), splits[split]


def beir_splits(folder: Path) -> dict[str, Path]:
    """The judgements of a BEIR folder by split."""
    found = sorted((*(folder / "qrels").glob("[!.]*.tsv"), *(folder / "qrels").glob("[!.]*.tsv.gz")))
    return {path.name.removesuffix(".gz").removesuffix(".tsv"): path for path in found}


def _plain_or_gz(path: Path) -> Path:
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    raise NotFoundError(f"{path}[.gz]")


def read_corpus(path: Path) -> dict[str, str]:
    """Document id -> title, space, text, from rows `{"_id" or "id", "text", "title"?}`; other keys are not read.

    `path` is a file, a folder of files, or a BEIR folder. A document may be empty, as some of BEIR's are. Raises
    FileNotFoundError, and DataError naming file and line.
    """
    corpus: dict[str, str] = {}
    for file, number, row in corpus_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            key = "_id" if row.get("_id") is not None else "id"
            document = id_of(row.get(key), key)
            if document in corpus:
                raise DataError(f"{key} {document[:60]!r} twice")
            if row.get("text") is None:
                raise DataError("no text")
            title, text = (_text_or_empty(row.get(key), key) for key in ("title", "text"))
        except DataError as error:
            raise DataError(f"{file}:{number}: {error}") from None
        corpus[document] = f"{title} {text}".strip() if title else text
    if not corpus:
        raise DataError(f"{path}: no document")
    return corpus


def corpus_rows(path: Path) -> Iterator[tuple[Path, int, dict[str, Any] | DataError]]:
    """(file, number, row) of each document of a file, a folder of files, or a BEIR folder."""
    files = [_plain_or_gz(path / "corpus.jsonl")] if path.is_dir() and is_beir(path) else data_files(path, "corpus")
    for file in files:
        yield from ((file, number, row) for number, _, row in read_rows(file))


def _text_or_empty(value: object, key: str) -> str:
    return "" if value is None or (isinstance(value, str) and not value.strip()) else text_of(value, key)


def _read_qrels(path: Path, corpus: Mapping[str, str], queries: Mapping[str, str]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for where, query, document, score in read_judgements(path):
        if query not in queries:
            raise DataError(f"{where}: query {query[:60]!r} is not among the queries")
        if document not in corpus:
            raise DataError(f"{where}: document {document[:60]!r} is not in the corpus")
        if qrels.setdefault(query, {}).setdefault(document, score) != score:
            raise DataError(f"{where}: another score of query {query[:60]!r} and document {document[:60]!r} is above")
    if not qrels:
        raise DataError(f"{path}: no judgement")
    return qrels


def read_judgements(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """(file:line, query id, document id, relevance) of each line of a qrels file. Raises DataError naming the line."""
    for number, raw, _ in text_lines(path):
        if raw.isspace():
            continue
        where = f"{path}:{number}"
        try:
            fields = raw.decode("utf-8").rstrip("\r\n").split("\t")
        except UnicodeDecodeError:
            raise DataError(f"{where}: not UTF-8") from None
        if number == 1:
            if fields != ["query-id", "corpus-id", "score"]:
                raise DataError(f"{where}: expected the header query-id, corpus-id, score, separated by tabs")
            continue
        if len(fields) != 3 or not fields[2].removeprefix("-").isdecimal():
            raise DataError(f"{where}: expected query id, document id and a whole number, separated by tabs")
        yield where, fields[0], fields[1], int(fields[2])
