"""Describes the public training sets of NV-Embed (arXiv 2405.17428, sections 3 and 4), and sets that a user adds.

An entry says where a set is, what its rows are, and what they ask for. Entries are in `catalog.yaml`, or in one YAML
file of the user's own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from embedwright.config import did_you_mean, load_yaml, validate
from embedwright.data.files.columns import Columns
from embedwright.data.files.kinds import LabelledRows, NliRows, PairRows, ScoredRows
from embedwright.data.keys import exact_key
from embedwright.data.schema import Family, InBatch, Task
from embedwright.errors import InputError

Version = Literal["v1", "v2"]
Target = Literal["passage", "label", "example"]  # label: the text of the label
# Where a value comes from: `confirmed` (a source that was read), `sister` (a confirmed value of a sister model or mix),
# `recalled` (from memory of the paper, not confirmed), `derived` (follows from other values), `guess` (our choice).
Mark = Literal["confirmed", "sister", "recalled", "derived", "guess"]
FEWEST = 500  # rows of a set that any share draws: a share of few rows has no two texts of one class


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BeirRows(_Frozen):
    """A set has corpus, queries and judgements as three configs of one repository, as mteb's retrieval sets have."""

    kind: Literal["beir"]


class Pages(_Frozen):
    """Names a repository with a corpus, whose documents are found by title."""

    hub: str
    revision: str | None = Field(default=None, pattern="^[0-9a-f]{40}$")


class EvidenceRows(_Frozen):
    """A row has a claim and the titles of the pages that decide it. Their texts are in another set."""

    kind: Literal["evidence"]
    query: Columns
    evidence: str  # a list of objects
    title: str  # the key of the title in each
    pages: Pages
    id: str | None = None


Rows = Annotated[PairRows | BeirRows | EvidenceRows | LabelledRows | ScoredRows | NliRows, Field(discriminator="kind")]


class Marks(_Frozen):
    """Says how well each fact of an entry is known."""

    columns: Mark = "guess"  # the schema
    source: Mark = "guess"  # that NV-Embed took it from this repository
    instructions: Mark = "guess"
    samples: Mark = "guess"
    target: Mark = "guess"


class Entry(_Frozen):
    """Describes one public training set."""

    name: str = Field(min_length=1)
    hub: str | None = None  # owner/name; None: it is on no hub, see `url`, and is built from a local copy
    url: str | None = None
    revision: str | None = Field(default=None, pattern="^[0-9a-f]{40}$")  # None: not pinned
    branch: str | None = None  # read while there is no revision (`refs/convert/parquet`, where the set is a script)
    config: str | None = None
    split: str = "train"
    files: str | None = None  # a pattern of files to read one by one; each row then has its file's name as `_file`
    rows: Rows
    family: Family
    instructions: Annotated[tuple[str, ...], Field(min_length=1)]
    symmetric: bool = False
    in_batch_negatives: InBatch | None = None
    target: dict[Version, Target] = Field(min_length=1)  # by version of NV-Embed that has the set
    samples: int | None = Field(default=None, gt=0)  # how many NV-Embed v2 used
    licence: str = "unknown"
    marks: Marks = Marks()
    note: str = ""

    @model_validator(mode="after")
    def _targets_fit(self) -> Entry:
        labelled = self.rows.kind == "labelled"
        for version, target in self.target.items():
            if labelled == (target == "passage"):
                raise InputError(f"target {target!r} of {version} does not fit rows of kind {self.rows.kind!r}")
        return self

    @property
    def form(self) -> Literal["label", "example"] | None:
        """Says how its labels become examples: as in the newest version that has it. None means no labels."""
        target = self.target[max(self.target)]
        return None if target == "passage" else target

    def drawn(self, share: float) -> int | None:
        """Returns how many rows `share` of the set's samples are, at least FEWEST. None means all rows.

        Of scored pairs, 1 means all rows: their samples count pairs that reach the threshold, in both directions.
        """
        if not 0 < share <= 1:
            raise InputError(f"a share of {share:g} is not above 0 and at most 1")
        if self.samples is None:
            raise InputError(f"{self.name}: its number of samples is not known: give a limit instead of a share")
        whole = self.rows.kind == "scored" and share == 1
        return None if whole else max(round(share * self.samples), min(FEWEST, self.samples))

    def tasks(self, form: str | None = None) -> list[Task]:
        """Returns one Task for each wording of the instruction: `name`, `name.2`, ...

        Texts compared with texts of their own kind (STS, and the example form) bear the instruction on both sides.
        """
        shared = {
            "family": self.family,
            "symmetric": self.symmetric or (form or self.form) == "example",
            "in_batch_negatives": self.in_batch_negatives,
            "licence": "" if self.licence == "unknown" else self.licence,
            "source": self.hub or self.url or "",
        }
        names = [self.name, *(f"{self.name}.{i}" for i in range(2, len(self.instructions) + 1))]
        return [
            Task.model_validate(shared | {"name": name, "instruction": wording})
            for name, wording in zip(names, self.instructions, strict=True)
        ]

    def task_of(self, query: str, seed: int) -> str:
        """Returns the name of the task, so the wording, of a query: by `seed` and its exact key alone.

        All rows of a question get one, because its answers are collected within a task.
        """
        pick = random.Random(f"{seed}:wording:{exact_key(query)}").randrange(len(self.instructions))
        return self.name if pick == 0 else f"{self.name}.{pick + 1}"


@cache
def load_catalog() -> dict[str, Entry]:
    """Reads the packaged sets by name, in the order of the file."""
    path = Path(__file__).with_name("catalog.yaml")
    sets = {}
    for group in load_yaml(path)["groups"]:
        for own in group.pop("sets"):
            content = group | own | {"marks": group["marks"] | own.get("marks", {})}
            sets[own["name"]] = validate(Entry, content, f"{path}: {own['name']}")
    return sets


def find_entry(name: str) -> Entry:
    """Returns the packaged set `name`, or the one that the YAML file `name` describes.

    Raises FileNotFoundError or ConfigError for a file that is missing or wrong, ValueError for an unknown name.
    """
    if name.endswith((".yaml", ".yml")):
        return validate(Entry, load_yaml(Path(name)), name)
    sets = load_catalog()
    if name not in sets:
        raise InputError(f"no data set {name!r}; known: docstrings, {', '.join(sets)}{did_you_mean(name, sets)}")
    return sets[name]


def find_task(name: str, form: str | None = None) -> Task | None:
    """Returns the task of the packaged sets that rows call `name`, or None. Labels have this form, or the set's."""
    entry = load_catalog().get(name.partition(".")[0])
    return next((task for task in entry.tasks(form) if task.name == name), None) if entry else None


HEADER = ("name", "family", "in", "target", "rows", "source", "pinned", "samples", "licence", "columns")


def table_rows(entries: Iterable[Entry]) -> list[tuple[str, ...]]:
    """Returns a row of texts, as HEADER names them, for each entry."""
    return [
        (
            entry.name,
            entry.family,
            ", ".join(sorted(entry.target)),
            ", ".join(dict.fromkeys(entry.target[version] for version in sorted(entry.target))),
            entry.rows.kind,
            "/".join(part for part in (entry.hub or entry.url or "a local copy", entry.config) if part),
            entry.revision[:7] if entry.revision else "no",
            f"{entry.samples:,} ({entry.marks.samples})" if entry.samples else "unknown",
            entry.licence,
            entry.marks.columns,
        )
        for entry in entries
    ]


def plain(entries: Iterable[Entry]) -> str:
    """Returns the table for the terminal, in aligned columns. The documentation alone shows more of them."""
    lines = [(*line[:5], line[5][:56], *line[6:8]) for line in (HEADER, *table_rows(entries))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


def markdown(entries: Iterable[Entry]) -> str:
    """Returns the two tables of the documentation: the sets, and their instructions and notes."""
    entries = list(entries)
    sets = _markdown_table(HEADER, table_rows(entries))
    asked = [
        (entry.name, f"{' / '.join(entry.instructions)} ({entry.marks.instructions})", entry.note or " ")
        for entry in entries
    ]
    return f"{sets}\n{_markdown_table(('name', 'instruction', 'note'), asked)}"


def _markdown_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
