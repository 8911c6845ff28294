"""Turns rows of public training sets into examples: it draws samples, and joins the tables of a set (`files.kinds`).

A bad row goes to the quarantine. Other rows that give no example are counted in `Job.report`. A bad row of a corpus is
an error, as everywhere: without its document a query would lose a positive.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from embedwright.data.files.beir import document_text
from embedwright.data.files.columns import Row, text_at, value_at
from embedwright.data.files.conversion import Conversion
from embedwright.data.files.kinds import (
    Fields,
    LabelledRows,
    NliRows,
    PairRows,
    by_query,
)
from embedwright.data.files.quarantine import Quarantine, good_rows
from embedwright.data.files.rows import Rows
from embedwright.data.schema import DataError, Example, Passage, Task, id_of, number_of, text_of
from embedwright.data.sources.catalog import BeirRows, Entry, EvidenceRows

T = TypeVar("T")

HOPELESS = 1000  # bad rows before the first good one: then the columns are other ones, and all rows would be bad


@dataclass(frozen=True, slots=True)
class Table:
    """Says where rows are: in a config and split of a repository, or in files of it. None means not said."""

    hub: str | None
    revision: str | None
    config: str | None
    split: str
    files: str | None = None


OpenTable = Callable[[Table], Rows]


@dataclass(kw_only=True)
class Job(Conversion):
    """Holds the conversion of one set. It fills `tasks`, the tasks of the examples by name."""

    entry: Entry
    quarantine: Quarantine
    limit: int | None = None
    tasks: dict[str, Task] = field(default_factory=dict)

    def task_of(self, query: str) -> str:
        return self.entry.task_of(query, self.seed)

    def on_form(self, form: str | None) -> None:
        self.tasks.update({task.name: task for task in self.entry.tasks(form)})


def table_of(entry: Entry) -> Table:
    """Returns where the rows of a set are; of a BEIR set, its judgements but for the config."""
    return Table(entry.hub, entry.revision or entry.branch, entry.config, entry.split, entry.files)


def corpus_of(entry: Entry) -> Table | None:
    """Returns where the documents of a set are, if it has a table of them."""
    if isinstance(entry.rows, BeirRows):
        return replace(table_of(entry), config="corpus", split="corpus")
    if isinstance(entry.rows, EvidenceRows):
        return Table(entry.rows.pages.hub, entry.rows.pages.revision, "corpus", "corpus")
    return None


def convert(job: Job, open_table: OpenTable) -> Iterator[Example]:
    """Yields the examples of `job.entry`, in the order of its rows.

    `job.limit` takes a uniform sample of this many rows (of a BEIR set and of grouped pairs: queries; of NLI: premises
    that entail something) that `job.seed` decides, from all files: files are often sorted, and the first of several is
    one part of the set. Memory, besides the sample: one row of pairs and scored pairs, all of grouped pairs and NLI; of
    labelled rows the ones in use; of a BEIR set and of claims the queries and the documents judged for them.
    Raises DataError for a corpus with a bad row, and where the first HOPELESS rows are all bad.
    """
    entry, spec = job.entry, job.entry.rows
    table = table_of(entry)
    if not isinstance(spec, LabelledRows):
        job.on_form(None)
    if isinstance(spec, BeirRows):
        return _from_beir(table, open_table, job)
    if isinstance(spec, EvidenceRows):
        return _from_evidence(spec, table, open_table, job)
    limit = job.limit
    if isinstance(spec, LabelledRows):
        limit = limit or spec.at_most
        if job.labels.form == "label" and spec.label_text:
            spec = spec.model_copy(update={"label": spec.label_text})
    rows = _fields(open_table(table), spec.fields, job)
    if isinstance(spec, PairRows) and spec.grouped:
        rows = by_query(rows)
    if isinstance(spec, NliRows):
        return iter(_sampled(spec.examples(rows, job), limit, job))
    return spec.examples(_sampled(rows, limit, job), job)


# ---------------------------------------------------------------------------------------------------- rows


def _fields(rows: Rows, parse: Callable[[Row, str], Fields], job: Job) -> Iterable[Fields]:
    """Yields `parse(row, an id for a row that has none)` of the good rows, and counts all rows."""

    def counted() -> Rows:
        for numbered in rows:
            job.report["rows"] += 1
            yield numbered
            if job.report["rows"] == job.quarantine.count == HOPELESS:
                reason = job.quarantine.reasons[0]
                raise DataError(f"{job.entry.name}: the first {HOPELESS:,} rows are all bad: {reason}")

    return good_rows(counted(), parse, job.entry.name, job.quarantine)


def _sampled(items: Iterable[T], limit: int | None, job: Job) -> Iterable[T]:
    """Returns all items, or a uniform sample of `limit` in their order (a reservoir), and counts the rest."""
    if limit is None:
        return items
    rng = random.Random(f"{job.seed}:rows")
    kept: dict[int, tuple[int, T]] = {}  # place in the reservoir -> number and item
    for i, item in enumerate(items):
        place = i if i < limit else rng.randrange(i + 1)
        if place < limit:
            kept[place] = (i, item)
        job.report["not_drawn"] += i >= limit
    return [item for _, item in sorted(kept.values(), key=lambda numbered: numbered[0])]


# ---------------------------------------------------------------------------------------------------- several tables


def _from_beir(qrels: Table, open_table: OpenTable, job: Job) -> Iterator[Example]:
    """Yields one example for each query with a judgement above 0, with all its documents."""
    relevant: dict[str, dict[str, None]] = {}  # query id -> the ids of its documents
    for number, _, row in open_table(replace(qrels, config="default")):
        with row_of("default", number, row) as sound:
            query, document = (id_of(value_at(sound, key), key) for key in ("query-id", "corpus-id"))
            score = number_of(value_at(sound, "score"), "score")
        job.report["rows"] += 1
        job.report["not_relevant"] += score <= 0
        if score > 0:
            relevant.setdefault(query, {})[document] = None
    relevant = dict(_sampled(relevant.items(), job.limit, job))
    wanted = {document for documents in relevant.values() for document in documents}
    looked_up = (
        _look_up(open_table(replace(qrels, config=config, split=config)), "_id", ids, config)
        for config, ids in (("queries", relevant), ("corpus", wanted))
    )
    queries, corpus = ({id: passage.text for id, passage in found.items()} for found in looked_up)
    yield from job.judged(relevant, queries, corpus, prefix=f"{job.entry.name}:")


def _from_evidence(spec: EvidenceRows, claims: Table, open_table: OpenTable, job: Job) -> Iterator[Example]:
    """Yields one example for each claim, with the pages that its evidence names."""

    def parse(row: Row, row_id: str) -> Fields:
        facts = value_at(row, spec.evidence)
        if not isinstance(facts, list | tuple) or not facts or not all(isinstance(fact, Mapping) for fact in facts):
            raise DataError(f"{spec.evidence}: expected a list of objects")
        titles = [text_of(value_at(fact, spec.title), f"{spec.evidence}.{spec.title}") for fact in facts]
        row_id = row_id if spec.id is None or row.get(spec.id) is None else id_of(row[spec.id], spec.id)
        return {"id": row_id, "query": text_at(row, spec.query), "titles": list(dict.fromkeys(titles))}

    rows = list(_sampled(_fields(open_table(claims), parse, job), job.limit, job))
    wanted = {title for row in rows for title in row["titles"]}
    corpus = corpus_of(job.entry)
    assert corpus is not None
    pages = _look_up(open_table(corpus), "title", wanted, "corpus")
    for row in rows:
        positives = [pages[title] for title in row["titles"] if title in pages]
        job.report["page_without_text"] += len(row["titles"]) - len(positives)
        if positives:
            yield job.example(row["id"], row["query"], positives)
        else:
            job.report["no_positive"] += 1


def _look_up(rows: Rows, key: str, wanted: Container[str], config: str) -> dict[str, Passage]:
    """Maps each key that is `wanted` to the first text and its id. Rows with an empty text are left out."""
    found: dict[str, Passage] = {}
    for number, _, row in rows:
        with row_of(config, number, row) as sound:
            value = value_at(sound, key)
            name = value if isinstance(value, str) else id_of(value, key)  # a title may be anything
            if name in wanted and (text := document_text(sound)):
                found.setdefault(name, Passage(text, id_of(value_at(sound, "_id"), "_id")))
    return found


@contextmanager
def row_of(config: str, number: int, row: Row | DataError) -> Iterator[Row]:
    """Gives a row of a table that is looked up. A DataError of the block names table and row."""
    try:
        if isinstance(row, DataError):
            raise row
        yield row
    except DataError as error:
        raise DataError(f"{config}, row {number}: {error}") from None
