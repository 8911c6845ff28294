"""Defines `Task` and `Example`, one row of training data, and reads and writes an example as a JSON object."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from embedwright.errors import InputError

Family = Literal["retrieval", "reranking", "classification", "clustering", "sts", "pair"]
InBatch = Literal["none", "same_task", "all"]


SYNTHETIC = "synthetic: "  # how `source` of a task begins whose rows `synth` wrote: a run does not mine for them


class DataError(InputError):
    """Data cannot be used. The message names file, line and key, as far as they are known where it is raised."""


class Task(BaseModel):
    """What a row asks for: its instruction, and how other rows of its batch may be used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"\S")]
    """Of the task: rows, `in_batch_negatives: same_task` and the model card go by it."""
    family: Family = "retrieval"
    """What kind of task it is: decides what mining does with its rows."""
    instruction: str = ""
    """Put before queries. Source: paper, 3.3."""
    symmetric: Annotated[bool, Field(strict=True)] = False
    """The instruction goes on documents too. Source: paper, 4.2: STS."""
    in_batch_negatives: InBatch | None = None
    """Without it, the stage's."""
    licence: str = ""
    """For the model card and for `data clean --licence`."""
    source: str = ""
    """Where the rows come from, for the model card."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Holds a positive or a negative: a text, and the id of its document if it has one."""

    text: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """Holds one training row: a query, passages that answer it, and passages that do not, any number of each.

    A pair whose `score` is too low for an answer has no positive: its other text is the one negative. CoSENT learns
    from it, InfoNCE does not.
    """

    id: str
    task: str
    query: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...] = ()
    positive_scores: tuple[float, ...] | None = None
    negative_scores: tuple[float, ...] | None = None
    score: float | None = None
    language: str | None = None

    @property
    def paired(self) -> tuple[Passage, ...]:
        """Returns the passages that `score` may be of: the positives, or the negative of a pair without any."""
        return self.positives or self.negatives


EXAMPLE_KEYS = tuple(Example.__dataclass_fields__)  # a row has the keys of the dataclass


def parse_example(
    row: Mapping[str, Any], *, default_task: str, default_id: str = "", corpus: Mapping[str, str] | None = None
) -> Example:
    """Reads a row of a data file as an Example. Raises DataError, naming the key, if it is none.

    An item of `positives` or `negatives` is a text, `{"id", "text"}`, or `{"id"}`, which is looked up in `corpus`
    (document id -> text). A key with the value None counts as absent: Parquet cannot leave a column out of one row.
    """
    check_keys(row, EXAMPLE_KEYS)
    positives = _passages(row.get("positives"), "positives", corpus)
    negatives = _passages(row.get("negatives"), "negatives", corpus)
    query = text_of(row.get("query"), "query")
    if not positives and (row.get("score") is None or len(negatives) != 1):
        raise DataError("no positive")  # nor is it a pair whose score is too low for one
    return Example(
        id=default_id if row.get("id") is None else id_of(row["id"], "id"),
        task=text_of(row["task"], "task") if row.get("task") else default_task,
        query=query,
        positives=positives,
        negatives=negatives,
        positive_scores=_scores(row.get("positive_scores"), "positive_scores", len(positives)),
        negative_scores=_scores(row.get("negative_scores"), "negative_scores", len(negatives)),
        score=None if row.get("score") is None else number_of(row["score"], "score"),
        language=None if row.get("language") is None else text_of(row["language"], "language"),
    )


def to_row(example: Example) -> dict[str, Any]:
    """Returns the JSON object of `example`, without keys that are not set. `parse_example` gives `example` back."""
    row = {key: value for key in EXAMPLE_KEYS if (value := getattr(example, key)) is not None and value != ""}
    for key in ("positives", "negatives"):
        row[key] = [p.text if p.id is None else {"id": p.id, "text": p.text} for p in row[key]]
    for key in ("positive_scores", "negative_scores"):
        if key in row:
            row[key] = list(row[key])
    if not row["negatives"]:
        del row["negatives"]
    return row


def check_keys(row: Mapping[str, Any], known: Collection[str], where: str = "") -> None:
    """Raises DataError on a key of `row` that is not in `known`, and names the nearest known key."""
    for key in row:
        if key not in known:
            short = str(key)[:60]  # a key can be as long as the line it comes from
            near = difflib.get_close_matches(short, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise DataError(f"{where}unknown key {short!r}, {hint}")


def text_of(value: object, key: str) -> str:
    """Returns `value` if it is a text that is not blank. Raises DataError naming `key`."""
    if value is None:
        raise DataError(f"no {key}")
    if not isinstance(value, str):
        raise DataError(f"{key}: expected a text, not {type(value).__name__}")
    if not value or value.isspace():
        raise DataError(f"{key} is empty")
    if "\0" in value:
        raise DataError(f"{key} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, UTF-8 cannot
        raise DataError(f"{key} holds a lone surrogate at character {error.start}") from None
    return value


def id_of(value: object, key: str) -> str:
    """Returns `value` as an id: a text, or a whole number, as in many public sets. Raises DataError naming `key`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text_of(value, key)


def label_of(value: object, key: str) -> str:
    """Returns `value` as the name of a class: a text, a whole number, true or false. Raises DataError."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(f"{key}: {value} names no class: expected a text, a whole number, true or false")
        return str(int(value))
    return id_of(value, key)


def binary_of(value: object, key: str) -> int:
    """Returns `value` as 0 or 1. Raises DataError naming `key`."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise DataError(f"{key}: expected 0 or 1, not {repr(value)[:60]}")
    return int(value)


def number_of(value: object, key: str) -> float:
    """Returns `value` as a finite float. Raises DataError naming `key`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{key}: expected a number, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"{key} is not finite")
    return number


def _passages(value: object, key: str, corpus: Mapping[str, str] | None) -> tuple[Passage, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise DataError(f"{key}: expected a list, not {type(value).__name__}")
    return tuple(_passage(item, f"{key}[{i}]", corpus) for i, item in enumerate(value))


def _passage(item: object, key: str, corpus: Mapping[str, str] | None) -> Passage:
    if not isinstance(item, Mapping):
        return Passage(text_of(item, key))
    check_keys(item, ("id", "text"), where=f"{key}: ")
    if item.get("id") is None:
        return Passage(text_of(item.get("text"), f"{key}.text"))
    document = id_of(item["id"], f"{key}.id")
    if item.get("text") is not None:
        return Passage(text_of(item["text"], f"{key}.text"), document)
    if corpus is None:
        raise DataError(f"{key}: document {document[:60]!r} has no text, and no corpus is given")
    if document not in corpus:
        raise DataError(f"{key}: document {document[:60]!r} is not in the corpus")
    return Passage(text_of(corpus[document], f"{key}: document {document[:60]!r}"), document)


def _scores(value: object, key: str, length: int) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise DataError(f"{key}: expected a list, not {type(value).__name__}")
    if len(value) != length:
        raise DataError(f"{key}: {len(value)} scores for {length} {key.removesuffix('_scores')}s")
    return tuple(number_of(score, f"{key}[{i}]") for i, score in enumerate(value))
