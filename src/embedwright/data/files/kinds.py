"""Defines the kinds of rows, one class each: their columns, the checks of these, and how rows become examples.

Data files have the columns of `KINDS`, which tell the kind of a file. A public set (`sources.catalog`) names its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from embedwright.data.files.columns import Columns, Row, text_at, value_at
from embedwright.data.files.conversion import THRESHOLD, Conversion, each_once, scored
from embedwright.data.files.folders import data_files
from embedwright.data.files.rows import read_rows
from embedwright.data.keys import exact_key
from embedwright.data.labels import label_triples
from embedwright.data.schema import (
    EXAMPLE_KEYS,
    DataError,
    Example,
    Passage,
    binary_of,
    check_keys,
    id_of,
    label_of,
    number_of,
)

Kind = Literal["example", "pairs", "labelled", "scored", "pair-labelled"]
Fields = dict[str, Any]  # the checked values of a row

LabelNames = Annotated[tuple[str, ...], BeforeValidator(lambda v: [str(x) for x in v] if isinstance(v, list) else v)]
Words = Annotated[
    dict[str, str], BeforeValidator(lambda v: {str(k): text for k, text in v.items()} if isinstance(v, dict) else v)
]


class RowKind(BaseModel):
    """Names the columns of a kind of row."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str | None = None

    def fields(self, row: Row, default_id: str) -> Fields:
        """Returns the checked values of a row, always with an `id`. Raises DataError, naming the column."""
        value = row.get(self.id) if self.id else None
        return {"id": default_id if value is None else id_of(value, str(self.id))} | self._parse(row)

    @abstractmethod
    def _parse(self, row: Row) -> Fields: ...

    @abstractmethod
    def examples(self, rows: Iterable[Fields], job: Conversion) -> Iterator[Example]:
        """Yields the examples that rows of such fields become."""

    def documents(self, row: Fields) -> list[Passage]:
        """Returns the texts of a row that other rows may be answered by: mining searches them."""
        return []


class PairRows(RowKind):
    """A row has a query and its answer, and it may have hard negatives.

    `grouped`: a query has several rows, each with one of its answers. They become one example; all rows are in memory.
    """

    kind: Literal["pairs"] = "pairs"
    query: Columns
    positive: Columns
    positive_id: str | None = None
    negatives: tuple[Columns, ...] = ()
    grouped: bool = False

    def _parse(self, row: Row) -> Fields:
        document = row.get(self.positive_id) if self.positive_id else None
        answer = None if document is None else id_of(document, str(self.positive_id))
        return {
            "query": text_at(row, self.query),
            "positives": [Passage(text_at(row, self.positive), answer)],
            "negatives": [Passage(text_at(row, columns)) for columns in self.negatives],
        }

    def examples(self, rows: Iterable[Fields], job: Conversion) -> Iterator[Example]:
        for row in rows:
            yield job.example(row["id"], row["query"], row["positives"], row["negatives"])

    def documents(self, row: Fields) -> list[Passage]:
        return [*row["positives"], *row["negatives"]]


def by_query(rows: Iterable[Fields]) -> Iterable[Fields]:
    """Merges the pairs of one query into one row, with the id and the words of the first, and each positive once."""
    found: dict[str, Fields] = {}
    for row in rows:
        first = found.setdefault(exact_key(row["query"]), row)
        if first is not row:
            first["positives"] += row["positives"]
            first["negatives"] += row["negatives"]
    return [row | {"positives": each_once(row["positives"]).values()} for row in found.values()]


class LabelledRows(RowKind):
    """A row has a text and its label, or labels: a list, or one text that `separator` splits. See `label_triples`.

    All rows are held in memory: a negative may come from any of them.
    """

    kind: Literal["labelled"] = "labelled"
    text: Columns
    label: str
    label_text: str | None = None  # the column of what stands for the label in the label form
    words: Words | None = None  # or label -> what stands for it; default: the names that the data has for its classes
    separator: str | None = None
    at_most: int | None = Field(default=None, gt=0)  # rows drawn unless `limit` is given

    def _parse(self, row: Row) -> Fields:
        value = value_at(row, self.label)
        if isinstance(value, str) and self.separator is not None:
            value = [part for part in value.split(self.separator) if part]
        values = value if isinstance(value, list | tuple) else [value]
        if not values:
            raise DataError(f"{self.label}: no label")
        names = [f"{self.label}[{i}]" if values is value else self.label for i in range(len(values))]
        return {"text": text_at(row, self.text), "labels": list(map(label_of, values, names))}

    def examples(self, rows: Iterable[Fields], job: Conversion) -> Iterator[Example]:
        rows = list(rows)
        names, (form, negatives, known) = job.names.get(self.label) or {}, job.labels
        labels = {label for row in rows for label in row["labels"] if known is None or label in known}
        examples, counts = label_triples(
            [(row["text"], row["labels"]) for row in rows],
            task=job.task,
            negatives=negatives,
            seed=job.seed,
            form=form or "auto",
            ids=[row["id"] for row in rows],
            known=known,
            words=self.words or (names if names and names.keys() >= labels else None),
            on_form=job.on_form,
        )
        job.report.update(counts)
        for example in examples:
            yield replace(example, task=job.task_of(example.query))


class ScoredRows(RowKind):
    """A row has two texts and a score of their similarity. `scale` and `threshold` are in its units.

    A pair becomes an example in each direction. In pairs that reach the threshold, the other text is the positive; in
    those below it, the negative (`Example`).
    """

    kind: Literal["scored"] = "scored"
    text1: str
    text2: str
    score: str
    scale: tuple[float, float] = (0.0, 5.0)
    threshold: float = THRESHOLD

    def _parse(self, row: Row) -> Fields:
        score = number_of(value_at(row, self.score), self.score)
        if not self.scale[0] <= score <= self.scale[1]:
            low, high = self.scale
            raise DataError(f"{self.score} {score:g} is not on the scale from {low:g} to {high:g}")
        return {"text1": text_at(row, (self.text1,)), "text2": text_at(row, (self.text2,)), "score": score}

    def examples(self, rows: Iterable[Fields], job: Conversion) -> Iterator[Example]:
        for row in rows:
            job.report["below_threshold"] += row["score"] < self.threshold
            for end, query, text in (("ab", row["text1"], row["text2"]), ("ba", row["text2"], row["text1"])):
                example = job.example(f"{row['id']}:{end}", query, [Passage(text)])
                yield scored(example, row["score"], self.threshold)

    def documents(self, row: Fields) -> list[Passage]:
        return [Passage(row["text1"]), Passage(row["text2"])]


class NliRows(RowKind):
    """A row has premise, hypothesis and label. Other labels are counted and left out; if `binary`, they are errors.

    Each premise that entails something becomes one example. What is neutral or contradicts it is a hard negative.
    """

    kind: Literal["nli"] = "nli"
    premise: str
    hypothesis: str
    label: str
    entailment: LabelNames = ("0",)
    hard_negative: LabelNames = ("1", "2")  # neutral, contradiction
    binary: bool = False  # labels are 0 and 1, or false and true

    def _parse(self, row: Row) -> Fields:
        label = value_at(row, self.label)
        return {
            "premise": text_at(row, (self.premise,)),
            "hypothesis": text_at(row, (self.hypothesis,)),
            "label": str(binary_of(label, self.label)) if self.binary else label_of(label, self.label),
        }

    def examples(self, rows: Iterable[Fields], job: Conversion) -> Iterator[Example]:
        premises: dict[str, tuple[list[str], list[str], list[str]]] = {}  # ids, entailed, hard negatives
        for row in rows:
            if row["label"] not in self.entailment + self.hard_negative:
                job.report["other_label"] += 1
                continue
            ids, entailed, hard = premises.setdefault(row["premise"], ([], [], []))
            ids.append(row["id"])
            (entailed if row["label"] in self.entailment else hard).append(row["hypothesis"])
        for premise, (ids, entailed, hard) in premises.items():
            if entailed:
                yield job.example(ids[0], premise, each_once(map(Passage, entailed)).values(), map(Passage, hard))
            else:
                job.report["no_positive"] += len(ids)

    def documents(self, row: Fields) -> list[Passage]:
        return [Passage(row["hypothesis"])]


# ---------------------------------------------------------------------------------------------------- data files


class FileKind(NamedTuple):
    """A row must have the keys `texts` and `others`. Texts of evaluation data are looked for in training data."""

    rows: RowKind | None
    texts: tuple[str, ...]
    others: tuple[str, ...] = ()
    optional: tuple[str, ...] = ("id",)

    @property
    def needs(self) -> tuple[str, ...]:
        return self.texts + self.others


_PAIRS = PairRows(query=("query",), positive=("positive",), positive_id="positive_id", id="id")
_LABELLED = LabelledRows(text=("text",), label="label", id="id")
_SCORED = ScoredRows(text1="text1", text2="text2", score="score", id="id")
_PAIR_LABELLED = NliRows(
    premise="text1", hypothesis="text2", label="label", entailment=("1",), hard_negative=("0",), binary=True, id="id"
)
# No two kinds need the same keys. `example` is read by `schema.parse_example`.
KINDS: dict[Kind, FileKind] = {
    "example": FileKind(None, ("query",), ("positives",), EXAMPLE_KEYS),
    "pairs": FileKind(_PAIRS, ("query", "positive"), optional=("id", "positive_id")),
    "labelled": FileKind(_LABELLED, ("text",), ("label",)),
    "scored": FileKind(_SCORED, ("text1", "text2"), ("score",)),
    "pair-labelled": FileKind(_PAIR_LABELLED, ("text1", "text2"), ("label",)),
}
ROW_BY_ROW: set[Kind] = {"example", "pairs", "scored"}  # whose examples do not depend on other rows
_EXPECTED = "A row has the keys " + ", or ".join(" and ".join(kind.needs) for kind in KINDS.values())


def detect_kind(path: Path) -> Kind:
    """Tells the kind of a data file or folder from the first row whose keys are those of a kind.

    Raises FileNotFoundError, and DataError if no row has such keys.
    """
    first_reason = ""
    for file in data_files(path):
        for number, _, row in read_rows(file):
            try:
                if isinstance(row, DataError):
                    raise row
                kind = max(KINDS, key=lambda kind: len(row.keys() & KINDS[kind].needs))
                _check_kind(row, kind)
            except DataError as error:
                where = f"line {number}" if file == path else f"{file.name}:{number}"
                first_reason = first_reason or f"{where}: {error}"
            else:
                return kind
    raise DataError(f"{path}: no good row ({first_reason or 'it is empty'}). {_EXPECTED}")


def parse_fields(kind: Kind, row: Row, default_id: str) -> Fields:
    """Returns the checked values of a data file's row of any kind but `example`, with an `id`. Raises DataError."""
    spec = KINDS[kind].rows
    assert spec is not None
    _check_kind(row, kind)
    return spec.fields(row, default_id)


def _check_kind(row: Row, kind: Kind) -> None:
    """Raises DataError unless the row has every key that `kind` needs and none that it does not know."""
    check_keys(row, (*KINDS[kind].needs, *KINDS[kind].optional))
    if missing := [key for key in KINDS[kind].needs if row.get(key) is None]:
        raise DataError(f"no {missing[0]}")
