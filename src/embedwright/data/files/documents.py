"""Reads plain documents: rows of data files, lines of a text, files of a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedwright.config import did_you_mean
from embedwright.data.answers import class_id
from embedwright.data.files.beir import corpus_files
from embedwright.data.files.folders import is_data, is_one_set, stem_of
from embedwright.data.files.rows import Row, plain_name, read_rows, text_rows
from embedwright.data.keys import exact_key
from embedwright.data.schema import DataError, Passage, id_of, label_of, text_of
from embedwright.errors import InputError, NotFoundError

OnBad = Callable[[int, bytes, DataError, Path], None]  # number of the line, its bytes, the reason, the file

# Where a row has each part of a document: the first of these columns that it has.
COLUMNS = {
    "text": ("text",),
    "title": ("title",),
    "id": ("_id", "id"),
    "label": ("label", "tags"),
    "source": ("source",),
    "links": ("see_also", "links"),
}
_PAGES = (".txt", ".md")  # files of a folder that are a document each
_OF_A_COPY = re.compile(r"README|LICEN[CS]E", re.IGNORECASE)
_HEADING = re.compile(r"\A\s*#\s+(\S.*)\n(?:[^\S\n]*\n)*")  # and the blank lines below


@dataclass(frozen=True, slots=True)
class Document:
    """Holds one document. Documents of one `source` are never each other's negatives.

    `labels` are its classes; there is none if its row has a `bad_label`, which names no class. `links` are ids or
    titles of documents that it names: those of its row, not those in its text.
    """

    id: str
    text: str
    title: str = ""
    labels: tuple[str, ...] = ()
    source: str = ""
    links: tuple[str, ...] = ()
    bad_label: bool = False

    @property
    def whole(self) -> str:
        """Returns title and text as one text, as corpora are encoded."""
        return f"{self.title} {self.text}" if self.title else self.text

    @property
    def family(self) -> str:
        """Returns what documents of one source have in common: the source, or else the document's own id."""
        return f"source {self.source}" if self.source else self.id

    @property
    def ids(self) -> tuple[str, ...]:
        """Returns what a passage of this document names in its id: its family, and the document, which a corpus has."""
        return tuple(dict.fromkeys((self.family, self.id)))

    def passage(self, text: str) -> Passage:
        """Returns a text of this document as a passage that is not a negative of others of its family."""
        return Passage(text, class_id((), self.ids))


def columns_of(given: list[str]) -> dict[str, tuple[str, ...]]:
    """Returns where a row has each part, from texts such as `title=summary` that replace the defaults."""
    columns = dict(COLUMNS)
    for text in given:
        part, _, column = text.partition("=")
        if part not in COLUMNS or not column:
            hint = did_you_mean(part, COLUMNS)
            raise InputError(f"column {text!r}: expected PART=COLUMN, where PART is one of {', '.join(COLUMNS)}{hint}")
        columns[part] = (column,)
    return columns


def read_documents(path: Path, columns: Mapping[str, tuple[str, ...]], on_bad: OnBad) -> Iterator[Document]:
    """Yields the documents at `path`; `on_bad` gets the lines that hold none.

    `path` is a data file, a folder of such, or a BEIR folder, whose rows have `columns`; a .txt with one text a line; a
    .md; or a folder of .txt and .md files, each a document. The title of a .md is the heading of level 1 that it begins
    with. A line is bad if it has no text, the id of an earlier one, or a title, id or source that is no text; a blank
    one is as good as none. Holds one row in memory, and 100 bytes for each id. Raises InputError if no row has a column
    that replaces the default.
    """
    ids: set[str] = set()
    unseen = {named[0]: part for part, named in columns.items() if part != "text" and named != COLUMNS[part]}
    for file, number, raw, row in document_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            unseen = {column: part for column, part in unseen.items() if column not in row} if unseen else unseen
            document = _document(row, columns, f"{stem_of(file)}:{number}")
            if document.id in ids:
                raise DataError(f"id {document.id[:60]!r} twice")
        except DataError as error:
            on_bad(number, raw or json.dumps(row, default=repr).encode() + b"\n", error, file)
            continue
        ids.add(document.id)
        yield document
    for column, part in unseen.items():
        raise InputError(f"{path}: no row has a column {column!r} (--column {part}={column})")


def _document(row: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]], default_id: str) -> Document:
    def value(part: str) -> tuple[Any, str]:
        found = [column for column in columns[part] if not _is_absent(row.get(column), part)]
        return (row[found[0]], found[0]) if found else (None, columns[part][0])

    if value("text")[0] is None:
        raise DataError(f"no {columns['text'][0]}; the row has {', '.join(map(str, row))[:100]} (--column text=NAME)")
    text, title, id_, label, source, link = map(value, ("text", "title", "id", "label", "source", "links"))
    labels, links = (one[0] if isinstance(one[0], list | tuple) else [one[0]] for one in (label, link))
    named = _labels(labels)
    return Document(
        id=default_id if id_[0] is None else id_of(*id_),
        text=_shown(*text),
        title="" if title[0] is None else " ".join(_shown(*title).split()),
        labels=named or (),
        source="" if source[0] is None else id_of(*source),
        links=tuple(str(item) for item in links if isinstance(item, str | int)),  # others name no document
        bad_label=named is None,
    )


def _is_absent(value: object, part: str) -> bool:
    """Returns whether a row lacks a part: tables have blank cells where it does. A blank text is an error."""
    return value is None or (part != "text" and isinstance(value, str) and not exact_key(value))


def _labels(values: Iterable[object]) -> tuple[str, ...] | None:
    """Returns the names of classes, or None if a value is none."""
    try:
        return tuple(label_of(value, "label") for value in values if not _is_absent(value, "label"))
    except DataError:
        return None


def _shown(value: object, column: str) -> str:
    """Returns a text that has more than characters that nobody sees."""
    text = text_of(value, column).strip()
    if not exact_key(text):
        raise DataError(f"{column} is empty")
    return text


def document_files(path: Path) -> list[Path]:
    """Returns the files that `read_documents` reads, in its order. Raises FileNotFoundError if there is nothing."""
    if not path.exists():
        raise NotFoundError(f"{path} does not exist")
    return _pages(path) or ([path] if _is_text(path) else corpus_files(path))


def _is_text(path: Path) -> bool:
    return path.is_file() and plain_name(path.name).endswith(".txt")


def document_rows(path: Path, file_titles: bool = False) -> Iterator[tuple[Path, int, bytes, Row]]:
    """Yields file, number, bytes and content of each row that `read_documents` reads.

    With `file_titles`, a file that is a document without a heading has its name as title.
    """
    files = document_files(path)
    if _pages(path):
        yield from ((page, 1, b"", _page(page, path, file_titles)) for page in files)
    elif _is_text(path):
        yield from ((path, number, raw, row) for number, raw, row in text_rows(path))
    else:
        yield from ((file, *numbered) for file in files for numbered in read_rows(file))


def _pages(path: Path) -> list[Path]:
    """Returns the files that are a document each: none where the path holds rows. Raises DataError where it has both.

    A repository's README and licence are not documents: they are left out beside rows.
    """
    if path.is_file():
        return [path] if path.suffix == ".md" else []
    if is_one_set(path):
        return []
    found = (file for file in path.rglob("*") if file.suffix in _PAGES and file.is_file())
    pages = sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(path).parts))
    data = sorted(file for file in path.iterdir() if file.is_file() and is_data(file))
    if not data:
        return pages
    if own := [page for page in pages if not (page.parent == path and _OF_A_COPY.fullmatch(page.stem))]:
        raise DataError(
            f"{path} holds pages ({own[0].relative_to(path)}) and rows ({data[0].name}): name the file of rows, or "
            "give a folder of pages alone"
        )
    return []


def _page(file: Path, root: Path, file_titles: bool) -> Row:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 at byte {error.start}")
    heading = _HEADING.match(text) if file.suffix == ".md" else None
    name = file.name if file == root else file.relative_to(root).as_posix()
    title = _without_marks(heading[1]) if heading else file.stem if file_titles else None
    return {"id": name, "title": title, "text": text[heading.end() :] if heading else text}


def _without_marks(heading: str) -> str:
    """Returns a heading without the marks that may close it, which stand after a space: `C#` keeps its own."""
    bare = heading.rstrip()
    text = bare.rstrip("#")
    return text.rstrip() if text[-1:].isspace() or not text else bare
