"""Filters by metadata: conditions such as `lang=en`, `year>=2020` or `lang in en,de`, checked exactly.

A condition in parts, `{"column": "lang", "operator": "in", "value": ["en", "de"]}`, takes values as they are: in a text
they lose outer spaces, and are parted at commas.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedwright.config import did_you_mean
from embedwright.errors import InputError
from embedwright.index.documents import Types
from embedwright.index.layout import ColumnType

logger = logging.getLogger(__name__)

Where = Mapping[str, Any] | Sequence[str | Mapping[str, Any]]

_COMPARE = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_SIGN = re.compile(r"!=|<=|>=|==?|<|>|(?<=\s)in\s")
_NEAR = 1000  # texts of a column among which the nearest is looked for
_PYTHON = {"text": str, "int": int | float, "float": int | float, "bool": bool}


class Condition(NamedTuple):
    """What a document must have: a column, how it is compared, and with which values; `in` alone takes several."""

    column: str
    how: str
    values: list[Any]


def matching(table: pa.Table, types: Types, where: Where) -> NDArray[np.bool_]:
    """Says for each document whether all conditions hold for it. One that lacks the value matches no condition.

    `where` is a list of conditions, as texts or in parts, or a mapping of columns to the value that they have, or to a
    list of possible values. Raises InputError for an unknown column or a value of another type, naming the nearest. A
    text that no document has is not an error.
    """
    found_N = np.ones(len(table), np.bool_)
    for condition in conditions(where, types):
        column, how, values = condition
        kind = table.schema.field(column).type
        if how == "in":
            mask = pc.is_in(table[column], value_set=pa.array(values, kind))
        else:
            mask = _COMPARE[how](table[column], pa.scalar(values[0], kind))
        found_N &= pc.fill_null(mask, False).to_numpy()
    return found_N


def warn_of_absent(table: pa.Table, types: Types, where: Where) -> None:
    """Warns of texts that no document has, each with the nearest, unless that would be sought for seconds.

    The message quotes the filter, so a server does not call this.
    """
    for column, how, values in conditions(where, types):
        if types[column] == "text" and how in ("=", "in") and values:
            there = pc.unique(table[column]).drop_null()
            if not pc.is_in(pa.array(values, there.type), value_set=there).to_numpy(zero_copy_only=False).any():
                near = did_you_mean(values[0], there.to_pylist()) if len(there) <= _NEAR else ""
                logger.warning("no document has %s %s%s", column, ", ".join(values), near)


def conditions(where: Where, types: Types) -> list[Condition]:
    """Reads conditions, each value as its column's type."""
    if isinstance(where, str):
        raise InputError(f"where is one text: give a list, [{where[:60]!r}]")
    if isinstance(where, Mapping):
        given = [
            (column, "in", list(value)) if isinstance(value, list | tuple) else (column, "=", [value])
            for column, value in where.items()
        ]
    else:
        given = [_split(each, types) if isinstance(each, str) else _in_parts(each) for each in where]
    return [_checked(column, how, values, types) for column, how, values in given]


def _in_parts(condition: Any) -> tuple[str, str, list[Any]]:
    if not isinstance(condition, Mapping) or condition.keys() != {"column", "operator", "value"}:
        raise InputError(f"where {str(condition)[:60]}: expected a text, or a mapping of column, operator and value")
    column, how, value = str(condition["column"]), condition["operator"], condition["value"]
    several = isinstance(value, list | tuple)
    if how not in (*_COMPARE, "in") or several != (how == "in"):
        signs = ", ".join(_COMPARE)
        raise InputError(f"where: {column[:60]}: operator {how!r}: {signs} take one value, and `in` takes a list")
    return column, how, list(value) if several else [value]


def _split(text: str, types: Types) -> tuple[str, str, list[Any]]:
    """Parts a condition after the longest column that it begins with, whose name may hold a sign; else at a sign."""
    text = text.strip()
    ends = sorted((len(column) for column in types if text.startswith(column)), reverse=True)
    after = (_SIGN.match(text, len(text) - len(text[end:].lstrip())) for end in ends)
    if not (match := next(filter(None, after), None) or _SIGN.search(text)):
        raise InputError(f"where {text[:60]!r}: expected a column, one of {', '.join(_COMPARE)} or in, and a value")
    column, how, value = text[: match.start()].strip(), match.group().strip(), text[match.end() :].strip()
    if how == "in":
        return column, "in", [part.strip() for part in value.split(",")]
    return column, how.replace("==", "="), [value]


def _checked(column: str, how: str, values: list[Any], types: Types) -> Condition:
    if column not in types:
        hint = did_you_mean(column[:60], types) or f"; the index has {', '.join(types) or 'no metadata'}"
        raise InputError(f"where: no metadata column {column[:60]!r}{hint}")
    kind = types[column]
    if kind == "bool" and how not in ("=", "!=", "in"):
        raise InputError(f"where: {column} is true or false, which {how} does not compare: take = or !=")
    return Condition(column, how, [_value(value, column, kind) for value in values])


def _value(value: Any, column: str, kind: ColumnType) -> Any:
    if isinstance(value, str) and kind != "text":
        value = _read(value, column, kind)
    if not isinstance(value, _PYTHON[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise InputError(f"where: {column} holds {kind}, not {str(value)[:60]!r}")
    if isinstance(value, str) and value.encode("utf-8", "replace").decode() != value:
        raise InputError(f"where: {column}: {value[:60]!r} has half a character, which is no text")
    number: Any = value
    if kind in ("int", "float") and (isinstance(number, int) or kind == "int") and 2**63 <= abs(number) < math.inf:
        raise InputError(f"where: {column}: {str(number)[:60]} does not fit into 64 bits")
    if kind == "int" and not float(number).is_integer():
        raise InputError(f"where: {column} holds whole numbers, not {number}")
    if kind == "float" and math.isnan(number):
        raise InputError(f"where: {column}: nan equals no number")
    return int(number) if kind == "int" else float(number) if kind == "float" else value


def _read(value: str, column: str, kind: ColumnType) -> Any:
    if kind == "bool":
        words = {"true": True, "false": False}
        if value not in words:
            raise InputError(f"where: {column} is true or false, not {value[:60]!r}{did_you_mean(value, words)}")
        return words[value]
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    raise InputError(f"where: {column} holds {kind}, not {value[:60]!r}")
