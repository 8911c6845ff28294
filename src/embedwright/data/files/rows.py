"""Reads the rows of one data file: JSON Lines, a JSON array, CSV, TSV (all plain, .gz or .zst), Parquet, Arrow.

The first bytes tell the format, and the name where bytes cannot (CSV). A byte order mark is not part of the data.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from embedwright.data.schema import DataError
from embedwright.errors import NotFoundError

MAX_LINE = 64 << 20  # bytes; a line beyond it is never held in memory as a whole
BOM = codecs.BOM_UTF8

Row = dict[str, Any] | DataError
Rows = Iterator[tuple[int, bytes, Row]]

# The first bytes of files that are not data, and what they are.
_OTHER = {
    b"PK\x03\x04": "a zip file (or .xlsx, .npz, .pt): unpack it, or save it as JSON Lines, CSV or Parquet",
    b"BZh": "a bzip2 file: unpack it",
    b"\xfd7zXZ": "an xz file: unpack it",
    b"7z\xbc\xaf": "a 7z file: unpack it",
    b"SQLite format 3": "an SQLite file: export its table as CSV",
    b"\x80\x04": "a pickle file, which could run any code and is never opened: save it as JSON Lines or Parquet",
    b"\x80\x05": "a pickle file, which could run any code and is never opened: save it as JSON Lines or Parquet",
    codecs.BOM_UTF16_LE: "text in UTF-16: save it as UTF-8",
    codecs.BOM_UTF16_BE: "text in UTF-16: save it as UTF-8",
}


def read_rows(path: Path) -> Rows:
    """Yields (number from 1, bytes of the line, the row or the reason why there is none) for each row of a data file.

    The number is that of the line, or of the row where the format has no lines; then the bytes are empty if there is a
    row, and else say what is there. Blank lines are passed over. A line longer than MAX_LINE comes in pieces that share
    one number. Holds one line or one batch in memory; a JSON array as a whole. Raises FileNotFoundError, and DataError
    if the file as a whole cannot be read.
    """
    with opened_table(path) as table:
        if table is not None:
            yield from _table_rows(path, *table)
            return
    yield from _text_rows(path)


@contextmanager
def opened_table(path: Path) -> Iterator[tuple[pa.Schema, Iterable[pa.RecordBatch]] | None]:
    """Opens a Parquet or Arrow file: gives schema and batches, or None for text. Raises DataError if it is broken."""
    head = _head(path)
    kind = "Parquet" if head.startswith(b"PAR1") else "Arrow"
    try:
        if kind == "Parquet":
            with pq.ParquetFile(path, memory_map=True) as file:
                yield file.schema_arrow, file.iter_batches(batch_size=256)
        elif head.startswith(b"ARROW1"):
            with pa.ipc.open_file(pa.memory_map(str(path))) as file:
                yield file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
        elif head.startswith(b"\xff\xff\xff\xff"):  # Arrow's stream, which `datasets` saves
            with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
                yield stream.schema, stream
        else:
            yield None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: broken {kind} file: {error}") from error


def text_lines(path: Path, start: int = 0, end: int = 0, before: int = 0) -> Iterator[tuple[int, bytes, bool]]:
    """Yields (number from 1, bytes without a byte order mark, whether it is whole) for each line of a text file.

    Unpacks gzip and zstd. A line longer than MAX_LINE comes in pieces that share one number, and is not whole. With an
    `end`, it reads the bytes from `start` to there alone, which `before` lines precede.
    """
    number = before
    with _unpacked(path, lambda: f"{path}:{number + 1}") as stream:
        if end:
            stream.seek(start)
        while (not end or stream.tell() < end) and (raw := stream.readline(MAX_LINE)):
            number += 1
            whole = raw.endswith(b"\n") or len(raw) < MAX_LINE
            yield number, raw.removeprefix(BOM), whole
            while not whole and not raw.endswith(b"\n") and (raw := stream.readline(MAX_LINE)):
                yield number, raw, False


def text_rows(path: Path) -> Rows:
    """Yields (number from 1, bytes of the line, the row {"text"}) for each line of plain text that is not blank."""
    for number, raw, whole in text_lines(path):
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            yield number, raw, DataError(f"not UTF-8 at byte {error.start}")
            continue
        if not whole:
            yield number, raw, DataError(f"longer than {MAX_LINE >> 20} MiB")
        elif text:
            yield number, raw, {"text": text}


def plain_name(name: str) -> str:
    """Returns a file's name without the suffix of a packed file."""
    return name.removesuffix(".gz").removesuffix(".zst")


def is_csv(path: Path) -> bool:
    """Returns whether a file has cells of CSV or TSV. Its name says it, since its bytes cannot."""
    return plain_name(path.name).lower().endswith((".csv", ".tsv"))


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(f"{path} is a folder, and one file is expected here")
    if not path.exists():
        raise NotFoundError(f"{path} does not exist")
    with path.open("rb") as file:
        head = file.read(16)
    for start, what in _OTHER.items():
        if head.startswith(start):
            raise DataError(f"{path} is {what}")
    return head


@contextmanager
def _unpacked(path: Path, where: Callable[[], str] | None = None) -> Iterator[BinaryIO]:
    """Opens a text file, unpacked. Raises DataError if the packed bytes are damaged: nobody knows how much is lost."""
    head = _head(path)
    kind = "gzip" if head.startswith(b"\x1f\x8b") else "zstd" if head.startswith(b"\x28\xb5\x2f\xfd") else ""
    with path.open("rb") as file:
        if not kind:
            yield file
            return
        stream: Any = gzip.GzipFile(fileobj=file) if kind == "gzip" else pa.CompressedInputStream(file, kind)
        try:
            yield stream if kind == "gzip" else io.BufferedReader(stream)
        except (EOFError, zlib.error, OSError) as error:
            raise DataError(f"{where() if where else path}: broken {kind} stream: {error}") from error


# ---------------------------------------------------------------------------------------------------- text


def _text_rows(path: Path) -> Rows:
    if is_csv(path):
        yield from _csv_rows(path)
        return
    lines = text_lines(path)
    for number, raw, whole in lines:
        if whole and raw.isspace():
            continue
        if raw.lstrip().startswith(b"[") and (items := _array(path)) is not None:
            for i, item in enumerate(items, start=1):
                yield i, json.dumps(item).encode() + b"\n", _as_row(item)
            return
        if whole and raw.strip() == b"{":
            raise DataError(f"{path}: one JSON object over several lines: write a row a line, or one array of rows")
        yield _row(number, raw, whole)
        break
    yield from line_rows(lines)


def line_rows(lines: Iterable[tuple[int, bytes, bool]]) -> Rows:
    """Yields the rows of `text_lines` that hold a JSON object each."""
    for number, raw, whole in lines:
        if not whole or not raw.isspace():
            yield _row(number, raw, whole)


def _row(number: int, raw: bytes, whole: bool) -> tuple[int, bytes, Row]:
    return number, raw, _decode(raw) if whole else DataError(f"longer than {MAX_LINE >> 20} MiB")


def _decode(raw: bytes) -> Row:
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
    return _as_row(row)


def _as_row(value: Any) -> Row:
    return value if isinstance(value, dict) else DataError(f"expected an object, not {type(value).__name__}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):  # json would keep the last one, silently
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise DataError(f"key {twice[:60]!r} twice")
    return row


def _refuse(constant: str) -> NoReturn:
    raise DataError(f"not JSON: {constant}")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)


def _array(path: Path) -> list[Any] | None:
    """Returns the items of a file that is one JSON array, or None if it has lines and the first is a list."""
    with _unpacked(path) as stream:
        text = stream.read().removeprefix(BOM).strip()
    if not text.endswith(b"]"):
        return None
    try:
        values = _DECODER.decode(text.decode("utf-8"))
    except UnicodeDecodeError:
        return None  # its lines say which of them is bad
    except (DataError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON array: {error}") from None
    return values if isinstance(values, list) else None


def _csv_rows(path: Path) -> Rows:
    """Reads CSV with commas, semicolons or tabs, as the header has them. An empty cell is absent.

    All cells of CSV are texts; those of `score` and `label` are read as numbers where they are some.
    """
    with _unpacked(path) as stream:
        lines = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        reader = csv.DictReader(lines)
        try:
            header = lines.readline()
            delimiter = max(",;\t", key=header.count)  # a comma where there is one column
            reader = csv.DictReader(itertools.chain([header] if header else [], lines), delimiter=delimiter)
            if twice := [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]:
                raise DataError(f"{path}:1: column {twice[0]!r} twice")
            for cells in reader:
                row: Row = {key: _cell(key, value) for key, value in cells.items() if key is not None and value}
                if None in cells:
                    row = DataError(f"more cells than the {len(reader.fieldnames or ())} columns of the header")
                yield reader.line_num, json.dumps(cells, ensure_ascii=False, default=str).encode() + b"\n", row
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{reader.line_num + 1}: not UTF-8: {error.reason}") from None
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num + 1}: not CSV: {error}; use JSON Lines or Parquet") from None


def _cell(key: str, value: str) -> Any:
    if key not in ("score", "label"):
        return value
    for number in (int, float):
        try:
            read = number(value)
        except ValueError:
            continue
        return read if math.isfinite(read) and (number is float or str(read) == value) else value
    return value


# ---------------------------------------------------------------------------------------------------- tables


def _table_rows(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Rows:
    if len(set(schema.names)) < len(schema.names):
        raise DataError(f"{path}: a column name occurs twice")
    number = 0
    for batch in batches:
        for i in range(batch.num_rows):
            number += 1
            try:  # one by one: to_pylist of the batch would fail as a whole
                yield number, b"", batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield number, json.dumps({"row": number, "error": str(error)}).encode() + b"\n", DataError("not UTF-8")
