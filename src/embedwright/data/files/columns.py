"""Finds the values and texts of a row by the names of their columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from embedwright.data.schema import DataError, text_of

Row = Mapping[str, Any]
# One column, or several that are joined by a space; `texts.0` is the first item of the list in `texts`.
Columns = Annotated[tuple[str, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(min_length=1)]


def value_at(row: Row, path: str) -> Any:
    """Returns the value of column `path`: `a.b` is a key, and `a.0` an item, of the value of `a`. Raises DataError."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise DataError(f"no column {path!r}; the row has {', '.join(map(str, row))[:200]}")
    return value


def text_at(row: Row, columns: Columns) -> str:
    """Returns the text of one column, or of several joined by a space. Raises DataError if all of them are empty."""
    if len(columns) == 1:
        return text_of(value_at(row, columns[0]), columns[0])
    values = [(value_at(row, column), column) for column in columns]
    texts = [text_of(value, column) for value, column in values if value is not None and value != ""]
    return text_of(" ".join(texts), " and ".join(columns))
