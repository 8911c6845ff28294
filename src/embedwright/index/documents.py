"""The documents of an index: read from a source with the chosen metadata, written once, opened as one table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from embedwright.config import did_you_mean
from embedwright.data.schema import DataError
from embedwright.errors import InputError
from embedwright.files import whole_file
from embedwright.index.layout import ColumnType
from embedwright.vectors.corpus import read_source

Types = Mapping[str, ColumnType]

OWN_COLUMNS = ("id", "title", "text")
_RESERVED = {"_id", *OWN_COLUMNS}
_ARROW = {"text": pa.large_string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
_ROWS = 4096  # rows of a batch
_DIGEST = b"embedwright.documents"


class Document(NamedTuple):
    """A document of an index, with its metadata by column; a value may be None."""

    id: str
    title: str
    text: str
    metadata: dict[str, Any]


def find_types(source: Path, names: Sequence[str]) -> dict[str, ColumnType]:
    """Reads a source for the types of its metadata columns. `names` of `["all"]` takes all that hold single values.

    Dates count as text in ISO form, which sorts as they do. Raises InputError for an unknown column, naming the nearest
    one, and for one that holds lists, or text beside numbers.
    """
    if reserved := [name for name in names if name in _RESERVED]:
        raise InputError(f"metadata {reserved[0]!r}: id, title and text are kept anyway: name other columns")
    kinds: dict[str, set[str]] = {}
    for row in read_source(source):
        for name, value in row.row.items():
            if name not in _RESERVED and (names == ["all"] or name in names or name not in kinds):
                kinds.setdefault(name, set()).add(_kind(value))
    if names == ["all"]:
        names = [name for name, found in kinds.items() if "list" not in found]
    for name in names:
        if name not in kinds:
            hint = did_you_mean(name, kinds) or f"; there are {', '.join(sorted(kinds)) or 'none'}"
            raise InputError(f"{source}: no metadata column {name!r}{hint}")
    return {name: _one_type(name, kinds[name] - {"none"}) for name in names}


def read_documents(source: Path, types: Types) -> Iterator[Document]:
    """Yields the documents of a source. Raises DataError, naming the line, if a value is not of its column's type."""
    return (document for document, _ in placed_documents(source, types))


def placed_documents(source: Path, types: Types) -> Iterator[tuple[Document, str | None]]:
    """Does the same, each with file and line if that line's number is its id, for want of an own one; else None."""
    for row in read_source(source):
        try:
            metadata = {name: _value(row.row.get(name), name, kind) for name, kind in types.items()}
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None
        numbered = row.row.get("_id") is None and row.row.get("id") is None
        yield Document(row.id, row.title, row.text, metadata), row.where if numbered else None


def digest_of(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document).encode() + b"\n")
    return digest.hexdigest()


def write_documents(path: Path, documents: Iterable[Document], types: Types, digest: str) -> None:
    """Writes documents, whole or not at all, with their digest."""
    schema = _schema(types).with_metadata({_DIGEST: digest.encode()})
    given = iter(documents)
    with whole_file(path) as temp, pa.ipc.new_file(str(temp), schema) as writer:
        while chunk := list(islice(given, _ROWS)):
            rows = [{**document._asdict(), **document.metadata} for document in chunk]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))


def written_digest(path: Path) -> str | None:
    """Returns the digest of the documents in a file; None if there is no file, empty if it is no index's."""
    if not path.is_file():
        return None
    try:
        metadata = pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata or {}
    except pa.ArrowInvalid:
        return ""
    return str(metadata.get(_DIGEST, b"").decode())


def open_table(files: Sequence[Path], types: Types) -> pa.Table:
    """Opens files of documents as one table, a view of them. Shards of `encode` have no title: theirs is empty."""
    tables = []
    for file in files:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        if "title" not in table.schema.names:
            table = table.append_column("title", pa.repeat(pa.scalar("", pa.large_string()), len(table)))
        tables.append(table.select([*OWN_COLUMNS, *types]).replace_schema_metadata(None))
    return pa.concat_tables(tables)


def take(table: pa.Table, rows: Sequence[int]) -> list[Document]:
    """Returns the documents at these rows."""
    found = table.take(pa.array(rows, pa.int64())).to_pylist()
    return [Document(row.pop("id"), row.pop("title"), row.pop("text"), row) for row in found]


def _schema(types: Types) -> pa.Schema:
    own = {name: pa.large_string() for name in OWN_COLUMNS}
    return pa.schema(own | {name: _ARROW[kind] for name, kind in types.items()})


def _kind(value: Any) -> str:
    if value is None or value != value:  # NaN, which pandas writes for a missing number
        return "none"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int"
    if isinstance(value, float):
        return "float"
    return "text" if isinstance(value, str | date) else "list"


def _one_type(name: str, kinds: set[str]) -> ColumnType:
    if kinds <= {"int", "float"} and "float" in kinds:
        return "float"
    if len(kinds) > 1 or "list" in kinds:
        raise InputError(f"metadata {name!r}: it holds {' and '.join(sorted(kinds))}: name columns of one type")
    kind: Any = next(iter(kinds), "text")
    return kind  # type: ignore[no-any-return]


def _value(value: Any, name: str, kind: ColumnType) -> Any:
    found = _kind(value)
    if found == "none":
        return None
    if found != kind and (found, kind) != ("int", "float"):
        raise DataError(f"{name}: expected {kind}, not {str(value)[:60]!r}")
    if found == "int" and not -(2**63) <= value < 2**63:
        raise DataError(f"{name}: {value} does not fit into 64 bits")
    return value.isoformat() if isinstance(value, date) else float(value) if kind == "float" else value
