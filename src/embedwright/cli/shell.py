"""What commands read from standard input: queries, and texts in place of a file."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from embedwright.errors import InputError

STDIN = "-"
_OBJECT = re.compile(r'\s*\{\s*["}]')  # a broken line is an error of JSONL, and no text


def queries_of(given: Sequence[str] | None) -> list[str]:
    """Returns the queries of a command line. Without any, and where one is `-`, standard input has a query a line."""
    queries = list(given or [STDIN])
    if STDIN in queries:
        at = queries.index(STDIN)
        queries[at : at + 1] = [line for line in map(str.strip, _standard_input().split("\n")) if line]
    if not queries:
        raise InputError("standard input has no query")
    return queries


@contextmanager
def file_of(source: Path) -> Iterator[Path]:
    """Gives the file of texts, or for `-` a copy of standard input: JSONL if it begins as an object does, else lines.

    A command that is run again with the same input goes on, as it does with a file.
    """
    if str(source) != STDIN:
        yield source
        return
    text = _standard_input()
    with TemporaryDirectory() as folder:
        copy = Path(folder) / ("stdin.jsonl" if _OBJECT.match(text) else "stdin.txt")
        copy.write_text(text, encoding="utf-8", newline="")
        try:
            yield copy
        except InputError as error:
            raise InputError(str(error).replace(str(copy), "standard input")) from error


def _standard_input() -> str:
    try:
        text = sys.stdin.read()
        text.encode()  # where the locale is C, bytes that are not UTF-8 come as lone surrogates
    except UnicodeError as error:
        raise InputError(f"standard input is not UTF-8: {error}") from None
    return text.removeprefix("\ufeff")
