"""Data files as rows: JSONL (plain or gzip), Parquet and BEIR folders, one row at a time.

A training file goes on behind a bad line, which `Quarantine` reports, counts and keeps. A corpus or qrels file does
not: a document that is silently missing changes every score computed on it.
"""

from __future__ import annotations

import codecs
import gzip
import json
import logging
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NoReturn, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from embedwright.data.example import EXAMPLE_KEYS, DataError, check_keys, id_of, number_of, text_of
from embedwright.errors import NotFoundError

log = logging.getLogger(__name__)
T = TypeVar("T")

Kind = Literal["example", "pairs", "labelled", "scored", "pair-labelled"]

MAX_LINE = 64 << 20  # bytes; a line beyond it (a JSON array saved as .jsonl, say) is never held in memory as a whole
LOGGED = 5  # bad lines that are logged one by one


# ---------------------------------------------------------------------------------------------------- lines


def read_rows(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | DataError]]:
    """(line number from 1, the line's bytes, its JSON object or why it has none) for each line of a data file.

    The container (JSONL, gzip, Parquet) is told by the file's first bytes. Blank lines hold no row and are passed over.
    A line longer than MAX_LINE comes in pieces that share one number. A Parquet row's bytes are its JSON. Holds one
    line, or one Parquet batch, in memory. Raises FileNotFoundError, and DataError where the container itself is broken.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PAR1":
            yield from _parquet_rows(path)
            return
    for number, raw, whole in _lines(path):
        if not whole:
            yield number, raw, DataError(f"longer than {MAX_LINE >> 20} MiB")
        elif not raw.isspace():
            yield number, raw, _decode(raw)


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    number = 0
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=file) if zipped else file
        try:
            while raw := stream.readline(MAX_LINE):
                number += 1
                whole = raw.endswith(b"\n") or len(raw) < MAX_LINE
                yield number, raw, whole
                while not whole and not raw.endswith(b"\n") and (raw := stream.readline(MAX_LINE)):
                    yield number, raw, False
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            # What is behind the damage is lost, and nobody knows how much it was: not a matter for the quarantine.
            raise DataError(f"{path}:{number + 1}: broken gzip stream: {error}") from error


def _decode(raw: bytes) -> dict[str, Any] | DataError:
    if raw.startswith(codecs.BOM_UTF8):
        return DataError("starts with a byte order mark")
    if b"\0" in raw:
        return DataError("holds a NUL byte")
    try:
        row = _DECODER.decode(raw.decode("utf-8"))
    except DataError as error:
        return error
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return DataError(f"not JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        return DataError("nested too deep")
    except ValueError as error:  # a number of more digits than Python converts
        return DataError(f"not JSON: {error}")
    return row if isinstance(row, dict) else DataError(f"expected an object, not {type(row).__name__}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):  # json would keep the last one, silently
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise DataError(f"key {twice[:60]!r} twice")
    return row


def _refuse(constant: str) -> NoReturn:
    raise DataError(f"not JSON: {constant}")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)


def _parquet_rows(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | DataError]]:
    number = 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{path}: a column name occurs twice")
            for batch in file.iter_batches(batch_size=256):
                for i in range(batch.num_rows):
                    number += 1
                    row: dict[str, Any] | DataError
                    try:  # one by one: to_pylist of the batch would fail as a whole
                        row = kept = batch.slice(i, 1).to_pylist()[0]
                    except UnicodeDecodeError as error:
                        row, kept = DataError("not UTF-8"), {"row": number, "error": str(error)}
                    yield number, json.dumps(kept, default=repr).encode() + b"\n", row
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}:{number + 1}: broken Parquet file: {error}") from error


# ---------------------------------------------------------------------------------------------------- bad lines


def aside(path: Path) -> Path:
    """A name next to `path` that nobody else uses: what is written there and then moved is never seen half made."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}")


class Quarantine:
    """The bad lines of one data file: unchanged into the file `path`, the first few and their number into the log.

    A context; `path` is there, complete, when it ends, if there was a bad line, and is not touched if there was none.
    """

    def __init__(self, source: Path, path: Path) -> None:
        self.source, self.path = source, path
        self.count = 0
        self.reasons: list[str] = []  # "line: reason" of the first few
        self._last_number = 0
        self._aside = aside(path)
        self._file: BinaryIO | None = None

    def add(self, number: int, raw: bytes, error: DataError) -> None:
        """Keep one bad line, or the next piece of the line that came last."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._aside.open("wb")
        self._file.write(raw)
        if number == self._last_number:
            return
        self._last_number = number
        self.count += 1
        if self.count <= LOGGED:
            self.reasons.append(f"{number}: {error}")
            log.warning("%s:%s", self.source, self.reasons[-1])

    @property
    def first_reason(self) -> str:
        return f"{self.source}:{self.reasons[0]}" if self.reasons else ""

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
            self._aside.replace(self.path)
            log.warning("%s: %d bad lines, kept unchanged in %s", self.source, self.count, self.path)


def good_rows(path: Path, parse: Callable[[int, dict[str, Any]], T], quarantine: Quarantine) -> Iterator[T]:
    """`parse(line number, row)` of each row of `path`; a line without a row, or a DataError, goes to `quarantine`."""
    for number, raw, row in read_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            value = parse(number, row)
        except DataError as error:
            quarantine.add(number, raw, error)
        else:
            yield value


# ---------------------------------------------------------------------------------------------------- kinds


def _score(value: object, key: str) -> float:
    score = number_of(value, key)
    if not 0 <= score <= 5:
        raise DataError(f"{key} {score:g} is not on the scale from 0 to 5")
    return score


def _binary(value: object, key: str) -> int:
    if not isinstance(value, int) or value not in (0, 1):
        raise DataError(f"{key}: expected 0 or 1")
    return int(value)


# What each kind must have. `example` is checked by parse_example: its two keys here only tell the kind.
_FIELDS: dict[Kind, dict[str, Callable[[object, str], Any]]] = {
    "example": {"query": text_of, "positives": text_of},
    "pairs": {"query": text_of, "positive": text_of},
    "labelled": {"text": text_of, "label": id_of},
    "scored": {"text1": text_of, "text2": text_of, "score": _score},
    "pair-labelled": {"text1": text_of, "text2": text_of, "label": _binary},
}
_OPTIONAL: dict[Kind, tuple[str, ...]] = {"example": EXAMPLE_KEYS, "pairs": ("id", "positive_id")}  # others: id


def check_kind(row: Mapping[str, Any], kind: Kind) -> None:
    """Raise DataError unless `row` has every key that `kind` needs and no key that it does not know."""
    check_keys(row, (*_FIELDS[kind], *_OPTIONAL.get(kind, ("id",))))
    if missing := [key for key in _FIELDS[kind] if row.get(key) is None]:
        raise DataError(f"no {missing[0]}")


def detect_kind(path: Path) -> Kind:
    """The kind of a data file, from the keys of the first row that are those of a kind (design, section 9).

    Raises FileNotFoundError, and DataError where no row has such keys.
    """
    first_reason = ""
    for number, _, row in read_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            keys = row.keys()
            kind = max(_FIELDS, key=lambda kind: len(_FIELDS[kind].keys() & keys))
            check_kind(row, kind)
        except DataError as error:
            first_reason = first_reason or f"line {number}: {error}"
        else:
            return kind
    raise DataError(f"{path}: no good row ({first_reason or 'it is empty'})")


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
    found = sorted((*(folder / "qrels").glob("*.tsv"), *(folder / "qrels").glob("*.tsv.gz")))
    splits = {path.name.removesuffix(".gz").removesuffix(".tsv"): path for path in found}
    if split is None:
        if len(splits) > 1:
            raise DataError(f"{folder / 'qrels'}: several splits ({', '.join(splits)}), name one")
        split = next(iter(splits), "test")
    if split not in splits:
        raise NotFoundError(f"{folder / 'qrels' / split}.tsv")
    return _plain_or_gz(folder / "corpus.jsonl"), _plain_or_gz(folder / "queries.jsonl"), splits[split]


def _plain_or_gz(path: Path) -> Path:
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    raise NotFoundError(f"{path}[.gz]")


def read_corpus(path: Path) -> dict[str, str]:
    """Document id -> title, space, text, from rows `{"_id" or "id", "text", "title"?}`; other keys are not read.

    A document may be empty, as some of BEIR's are. Raises FileNotFoundError, and DataError naming file and line.
    """
    corpus: dict[str, str] = {}
    for number, _, row in read_rows(path):
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
            raise DataError(f"{path}:{number}: {error}") from None
        corpus[document] = f"{title} {text}".strip() if title else text
    if not corpus:
        raise DataError(f"{path}: no document")
    return corpus


def _text_or_empty(value: object, key: str) -> str:
    return "" if value is None or (isinstance(value, str) and not value.strip()) else text_of(value, key)


def _read_qrels(path: Path, corpus: Mapping[str, str], queries: Mapping[str, str]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for number, raw, _ in _lines(path):
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
        query, document, score = fields
        if query not in queries:
            raise DataError(f"{where}: query {query[:60]!r} is not among the queries")
        if document not in corpus:
            raise DataError(f"{where}: document {document[:60]!r} is not in the corpus")
        if qrels.setdefault(query, {}).setdefault(document, int(score)) != int(score):
            raise DataError(f"{where}: another score of query {query[:60]!r} and document {document[:60]!r} is above")
    if not qrels:
        raise DataError(f"{path}: no judgement")
    return qrels
