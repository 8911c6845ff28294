"""Keeps the bad lines of training data: the reader reports, counts and copies them, and reads the next line."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

from embedwright.data.files.rows import Rows
from embedwright.data.schema import DataError
from embedwright.files import whole_file

log = logging.getLogger(__name__)
T = TypeVar("T")

LOGGED = 5  # bad lines that are logged one by one


class Quarantine:
    """Copies the bad lines of a data set to the file `path`, and logs the first few and their number.

    A context. At its end `path` is complete if there was a bad line, and untouched if there was none.
    """

    def __init__(self, source: Path, path: Path) -> None:
        self.source, self.path = source, path
        self.count = 0
        self.reasons: list[str] = []  # "file:line: reason" of the first few
        self._last: tuple[Path, int] | None = None
        self._ended = True  # whether the last line has its newline: that of a file may lack it
        self._open = ExitStack()
        self._file: BinaryIO | None = None

    def add(self, number: int, line: bytes, error: DataError, file: Path | None = None) -> None:
        """Keeps one bad line of `file` (default: the source), or the next piece of the line that came last."""
        place = (file or self.source, number)
        same = place == self._last
        self._opened(new_line=not same).write(line)
        self._ended = line.endswith(b"\n")
        if same:
            return
        self._last = place
        self.count += 1
        if self.count <= LOGGED:
            self.reasons.append(f"{place[0]}:{number}: {error}")
            log.warning("%s", self.reasons[-1])

    def extend(self, path: Path, count: int, reasons: list[str]) -> None:
        """Adds the `count` bad lines of another quarantine, whose file is `path`, and its first few `reasons`."""
        if not count:
            return
        for reason in reasons[: max(LOGGED - self.count, 0)]:
            self.reasons.append(reason)
            log.warning("%s", reason)
        self.count += count
        with path.open("rb") as lines:
            shutil.copyfileobj(lines, self._opened(new_line=True))
            lines.seek(-1, os.SEEK_END)
            self._ended = lines.read() == b"\n"

    def _opened(self, new_line: bool) -> BinaryIO:
        if self._file is None:
            self._file = self._open.enter_context(self._open.enter_context(whole_file(self.path)).open("wb"))
        if new_line and not self._ended:
            self._file.write(b"\n")
        return self._file

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()  # the file is kept, too, where the data as a whole is refused
        if self.count:
            log.warning("%s: %d bad lines, kept unchanged in %s", self.source, self.count, self.path)


def good_rows(
    rows: Rows,
    parse: Callable[[dict[str, Any], str], T],
    name: str,
    quarantine: Quarantine | None,
    file: Path | None = None,
) -> Iterator[T]:
    """Yields `parse(row, "name:number")` of each row of `file`. A line without a good row goes to `quarantine`.

    Without a quarantine such a line is a DataError that names file and line.
    """
    for number, line, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            value = parse(row, f"{name}:{number}")
        except DataError as error:
            if quarantine is None:
                raise DataError(f"{file}:{number}: {error}") from None
            quarantine.add(number, line or json.dumps(row, default=repr).encode() + b"\n", error, file)
        else:
            yield value
