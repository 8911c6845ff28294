"""Cuts data files into pieces that several processes can read, each some lines of a file or a whole one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from embedwright.data.files.rows import BOM, Rows, is_csv, line_rows, read_rows, text_lines
from embedwright.data.schema import DataError
from embedwright.threads import cores

_BYTES = 16 << 20  # size of a piece
_LARGE = 256 << 20  # bytes: as serial work 5 s or more, and each process takes one to start


class Piece(NamedTuple):
    """The bytes of a file from `start` to `end`, which `before` lines precede; the whole file where `end` is 0."""

    file: Path
    start: int = 0
    end: int = 0
    before: int = 0

    def rows(self) -> Rows:
        """Yields the rows as `read_rows` does, under the same numbers."""
        return line_rows(text_lines(*self)) if self.end else read_rows(self.file)


@contextmanager
def unchanged(files: Iterable[Path]) -> Iterator[None]:
    """Raises DataError at the end of the block if a file was replaced or changed meanwhile.

    Each piece opens its file anew, so its rows could be of two files, under the name of one.
    """
    before = {file: identity(file) for file in files}
    yield
    for file, known in before.items():
        if identity(file) != known:
            raise DataError(f"{file} was replaced while it was read: run the command again")


def identity(file: Path) -> tuple[int, ...]:
    """Returns what tells a file from one that replaced or changed it, without reading it."""
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def pieces_of(files: Sequence[Path]) -> list[Piece]:
    """Returns the pieces of large files, in order: parts of JSON Lines, and files of other formats as they are.

    There are none where one process reads the files as soon as several.
    """
    if cores() == 1 or sum(file.stat().st_size for file in files) < _LARGE:
        return []
    pieces = [piece for file in files for piece in (_cut(file) if _has_lines(file) else [Piece(file)])]
    return pieces if len(pieces) > 1 else []


def _has_lines(file: Path) -> bool:
    """Returns whether a file is surely JSON Lines, neither packed nor an array."""
    with file.open("rb") as stream:
        head = stream.read(1 << 16).removeprefix(BOM).lstrip()
    return not is_csv(file) and head.startswith(b"{") and head.partition(b"\n")[0].strip() != b"{"


def _cut(file: Path) -> Iterator[Piece]:
    start = before = 0
    with file.open("rb") as stream:
        while block := stream.read(_BYTES):
            end, lines = start + len(block), block.count(b"\n")
            while not block.endswith(b"\n") and (block := stream.readline(_BYTES)):
                end, lines = end + len(block), lines + block.endswith(b"\n")
            yield Piece(file, start, end, before)
            start, before = end, before + lines
