"""Rows of public training sets as `Example`s: one converter for each kind of schema, not for each set.

A bad row goes to `Job.bad` with its number and the reason; whatever else gives no example is counted in `Job.report`.
Of a corpus that is looked up, a bad row is an error, as everywhere: without its document a query would lose a positive.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from embedwright.data.keys import exact_key
from embedwright.data.labels import Form, label_triples
from embedwright.data.schema import (
    DataError,
    Example,
    Passage,
    Task,
    id_of,
    label_of,
    number_of,
    text_of,
)
from embedwright.data.sources.catalog import (
    BeirRows,
    Columns,
    Entry,
    EvidenceRows,
    LabelledRows,
    NliRows,
    PairRows,
    ScoredRows,
)

Row = Mapping[str, Any]
Numbered = tuple[int, bytes | None, Row | DataError]  # number from 1, its bytes if it is a line, the row or why not
_Asked = tuple[str, str, list[str], list[str]]  # row id, query, positives, negatives
T = TypeVar("T")

HOPELESS = 1000  # so many bad rows before the first good one: the columns are other ones, and all rows would be bad


@dataclass(frozen=True, slots=True)
class Table:
    """Where rows are: a config and split of a repository, or files of it. What is None is not said."""

    hub: str | None
    revision: str | None
    config: str | None
    split: str
    files: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """What a conversion needs besides the rows. `limit`: see `convert`. It fills `report` and `tasks`."""

    entry: Entry
    seed: int = 0
    limit: int | None = None
    form: Form = "auto"
    negatives: int = 7
    known: frozenset[str] | None = None  # the closed list of labels
    bad: Callable[[int, bytes | None, Row | DataError, DataError], None] = lambda *_: None
    report: Counter[str] = field(default_factory=Counter)
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # of classes, by column
    tasks: dict[str, Task] = field(default_factory=dict)  # of the examples, by name, under the form that they have

    def describe(self, form: str | None = None) -> None:
        self.tasks.update({task.name: task for task in self.entry.tasks(form)})


def convert(job: Job, open_table: Callable[[Table], Iterable[Numbered]]) -> Iterator[Example]:
    """The examples of `job.entry`, in the order of its rows.

    `job.limit` takes a uniform sample of so many rows (of a BEIR set and of grouped pairs: queries) that `job.seed`
    decides, from all files: files are often sorted, and the first of several is one part of the set. Memory, besides
    the sample: one row of pairs and scored pairs, all of grouped pairs; of labelled rows and NLI those that are used;
    of a BEIR set and of claims the queries and the documents that are judged for them.
    Raises DataError for a corpus with a bad row, and where the first HOPELESS rows are all bad.
    """
    entry, rows = job.entry, job.entry.rows
    table = Table(entry.hub, entry.revision or entry.branch, entry.config, entry.split, entry.files)
    if not isinstance(rows, LabelledRows):
        job.describe()
    if isinstance(rows, PairRows):
        return _from_pairs(rows, open_table(table), job)
    if isinstance(rows, LabelledRows):
        return _from_labelled(rows, open_table(table), job)
    if isinstance(rows, ScoredRows):
        return _from_scored(rows, open_table(table), job)
    if isinstance(rows, NliRows):
        return _from_nli(rows, open_table(table), job)
    if isinstance(rows, BeirRows):
        return _from_beir(rows, table, open_table, job)
    return _from_evidence(rows, table, open_table, job)


# ---------------------------------------------------------------------------------------------------- values


def value_at(row: Row, path: str) -> Any:
    """The value of column `path`, where `a.b` is the key, and `a.0` the item, of what is in `a`. Raises DataError."""
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
    """The text of one column, or of several, joined by a space, of which not all may be empty. Raises DataError."""
    if len(columns) == 1:
        return text_of(value_at(row, columns[0]), columns[0])
    values = [(value_at(row, column), column) for column in columns]
    texts = [text_of(value, column) for value, column in values if value is not None and value != ""]
    return text_of(" ".join(texts), " and ".join(columns))


def _labels_at(row: Row, column: str, separator: str | None) -> str | list[str]:
    value = value_at(row, column)
    if isinstance(value, str) and separator is not None:
        value = [part for part in value.split(separator) if part]
    if not isinstance(value, list | tuple):
        return label_of(value, column)
    if not value:
        raise DataError(f"{column}: no label")
    return [label_of(label, f"{column}[{i}]") for i, label in enumerate(value)]


def _good(rows: Iterable[Numbered], parse: Callable[[int, Row], T], job: Job) -> Iterator[T]:
    """`parse(number, row)` of the good rows; all rows are counted."""
    good = 0
    for count, (number, raw, row) in enumerate(rows, 1):
        job.report["rows"] += 1
        try:
            if isinstance(row, DataError):
                raise row
            value = parse(number, row)
        except DataError as error:
            job.bad(number, raw, row, error)
            if not good and count == HOPELESS:
                raise DataError(f"{job.entry.name}: the first {HOPELESS:,} rows are all bad: {error}") from error
        else:
            good += 1
            yield value


def _drawn(items: Iterable[T], limit: int | None, job: Job) -> Iterable[T]:
    """All items, or a uniform sample of `limit` in their order, the same for the same seed; the rest is counted."""
    if limit is None:
        return items
    kept, left_out = _sample(items, limit, random.Random(f"{job.seed}:rows"))
    job.report["not_drawn"] += left_out
    return kept


def _row_id(row: Row, column: str | None, number: int, job: Job) -> str:
    value = row.get(column) if column else None
    return f"{job.entry.name}:{number}" if value is None else id_of(value, str(column))


def _example(job: Job, row_id: str, query: str, positives: Sequence[Passage], negatives: Iterable[str] = ()) -> Example:
    """A negative that is also a positive is counted and left out."""
    wrong = _each_once(negatives)
    right = {exact_key(passage.text) for passage in positives} if wrong else set()
    kept = tuple(Passage(text) for key, text in wrong.items() if key not in right)
    job.report["conflicting"] += len(wrong) - len(kept)
    return Example(row_id, job.entry.task_of(row_id, job.seed), query, tuple(positives), kept)


def _each_once(texts: Iterable[str]) -> dict[str, str]:
    """By its exact key, each text in its first look."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(exact_key(text), text)
    return found


# ---------------------------------------------------------------------------------------------------- one table


def _from_pairs(spec: PairRows, rows: Iterable[Numbered], job: Job) -> Iterator[Example]:
    def parse(number: int, row: Row) -> _Asked:
        query, positive = text_at(row, spec.query), text_at(row, spec.positive)
        negatives = [text_at(row, columns) for columns in spec.negatives]
        return _row_id(row, spec.id, number, job), query, [positive], negatives

    asked = _good(rows, parse, job)
    for row_id, query, positives, negatives in _drawn(_by_query(asked) if spec.grouped else asked, job.limit, job):
        yield _example(job, row_id, query, list(map(Passage, positives)), negatives)


def _by_query(asked: Iterable[_Asked]) -> Iterable[_Asked]:
    """The rows of each query as one, under the id and the words of the first; each positive once."""
    found: dict[str, _Asked] = {}
    for row_id, query, positives, negatives in asked:
        _, _, right, wrong = found.setdefault(exact_key(query), (row_id, query, [], []))
        right += positives
        wrong += negatives
    return [(row_id, query, [*_each_once(right).values()], wrong) for row_id, query, right, wrong in found.values()]


def _from_scored(spec: ScoredRows, rows: Iterable[Numbered], job: Job) -> Iterator[Example]:
    """Score >= the threshold: both directions (NV-Embed, section 3.3). The negatives are mined afterwards."""
    low, high = spec.scale

    def parse(number: int, row: Row) -> tuple[str, str, str, float]:
        score = number_of(value_at(row, spec.score), spec.score)
        if not low <= score <= high:
            raise DataError(f"{spec.score} {score:g} is not on the scale from {low:g} to {high:g}")
        texts = text_at(row, (spec.text1,)), text_at(row, (spec.text2,))
        return _row_id(row, spec.id, number, job), *texts, score

    for row_id, text1, text2, score in _drawn(_good(rows, parse, job), job.limit, job):
        if score < spec.threshold:
            job.report["below_threshold"] += 1
            continue
        for end, query, positive in (("ab", text1, text2), ("ba", text2, text1)):
            yield replace(_example(job, f"{row_id}:{end}", query, [Passage(positive)]), score=score)


def _from_nli(spec: NliRows, rows: Iterable[Numbered], job: Job) -> Iterator[Example]:
    """One example for each premise that entails something: what contradicts it or is neutral is a hard negative."""

    def parse(number: int, row: Row) -> tuple[int, str, str, str]:
        premise, hypothesis = text_at(row, (spec.premise,)), text_at(row, (spec.hypothesis,))
        return number, premise, hypothesis, label_of(value_at(row, spec.label), spec.label)

    premises: dict[str, tuple[list[int], list[str], list[str]]] = {}  # row numbers, entailed, hard negatives
    for number, premise, hypothesis, label in _drawn(_good(rows, parse, job), job.limit, job):
        if label not in spec.entailment + spec.hard_negative:
            job.report["other_label"] += 1
            continue
        numbers, entailed, hard = premises.setdefault(premise, ([], [], []))
        numbers.append(number)
        (entailed if label in spec.entailment else hard).append(hypothesis)
    for premise, (numbers, entailed, hard) in premises.items():
        if not entailed:
            job.report["nothing_entailed"] += len(numbers)
            continue
        positives = [Passage(text) for text in dict.fromkeys(entailed)]
        yield _example(job, f"{job.entry.name}:{numbers[0]}", premise, positives, hard)


def _from_labelled(spec: LabelledRows, rows: Iterable[Numbered], job: Job) -> Iterator[Example]:
    column = spec.label_text if job.form == "label" and spec.label_text else spec.label

    def parse(number: int, row: Row) -> tuple[str, str, str | list[str]]:
        row_id = _row_id(row, spec.id, number, job)
        return row_id, text_at(row, spec.text), _labels_at(row, column, spec.separator)

    limit = spec.at_most if job.limit is None else job.limit
    kept = list(_drawn(_good(rows, parse, job), limit, job))
    examples, skipped = label_triples(
        [(text, labels) for _, text, labels in kept],
        task=job.entry.name,
        negatives=job.negatives,
        seed=job.seed,
        form=job.form,
        ids=[row_id for row_id, _, _ in kept],
        known=job.known,
        words=spec.words or job.names.get(column),
        on_form=job.describe,
    )
    job.report.update(skipped)
    for example in examples:
        yield replace(example, task=job.entry.task_of(example.id, job.seed))


def _sample(items: Iterable[T], limit: int | None, rng: random.Random) -> tuple[list[T], int]:
    """A uniform sample of `limit` items (None: all) in their order, by one pass (reservoir); how many are left out."""
    kept: list[tuple[int, T]] = []
    i = -1
    for i, item in enumerate(items):
        if limit is None or len(kept) < limit:
            kept.append((i, item))
        elif (j := rng.randrange(i + 1)) < limit:
            kept[j] = (i, item)
    kept.sort(key=lambda numbered: numbered[0])
    return [item for _, item in kept], i + 1 - len(kept)


# ---------------------------------------------------------------------------------------------------- several tables


def _from_beir(
    spec: BeirRows, qrels: Table, open_table: Callable[[Table], Iterable[Numbered]], job: Job
) -> Iterator[Example]:
    """One example for each query with a judgement above 0, with all its documents."""

    def parse(row: Row) -> tuple[str, str, float]:
        query, document = (id_of(value_at(row, key), key) for key in ("query-id", "corpus-id"))
        return query, document, number_of(value_at(row, "score"), "score")

    relevant: dict[str, dict[str, None]] = {}  # query id -> the ids of its documents
    for query, document, score in _sound(open_table(replace(qrels, config=spec.qrels)), parse, spec.qrels):
        job.report["rows"] += 1
        if score <= 0:
            job.report["not_relevant"] += 1
        else:
            relevant.setdefault(query, {})[document] = None
    relevant = dict(_drawn(relevant.items(), job.limit, job))
    asked = open_table(replace(qrels, config=spec.queries, split=spec.queries_split))
    queries = _look_up(asked, spec.id, ("text",), relevant, spec.queries)
    wanted = {document for documents in relevant.values() for document in documents}
    documents_of = open_table(replace(qrels, config=spec.corpus, split=spec.corpus_split))
    corpus = _look_up(documents_of, spec.id, spec.text, wanted, spec.corpus)
    for query, documents in relevant.items():
        positives = [Passage(corpus[document], document) for document in documents if document in corpus]
        job.report["document_without_text"] += len(documents) - len(positives)
        if query not in queries or not positives:
            job.report["query_without_text" if query not in queries else "no_positive"] += 1
            continue
        yield _example(job, f"{job.entry.name}:{query}", queries[query], positives)


def _from_evidence(
    spec: EvidenceRows, claims: Table, open_table: Callable[[Table], Iterable[Numbered]], job: Job
) -> Iterator[Example]:
    """One example for each claim, with the pages that its evidence names."""

    def parse(number: int, row: Row) -> tuple[str, str, list[str]]:
        facts = value_at(row, spec.evidence)
        if not isinstance(facts, list | tuple) or not facts or not all(isinstance(fact, Mapping) for fact in facts):
            raise DataError(f"{spec.evidence}: expected a list of objects")
        titles = [text_of(value_at(fact, spec.title), f"{spec.evidence}.{spec.title}") for fact in facts]
        return _row_id(row, spec.id, number, job), text_at(row, spec.query), list(dict.fromkeys(titles))

    rows = list(_drawn(_good(open_table(claims), parse, job), job.limit, job))
    wanted = {title for _, _, titles in rows for title in titles}
    pages = Table(spec.pages.hub, spec.pages.revision, spec.pages.config, spec.pages.split)
    texts = _look_up(open_table(pages), spec.pages.title, spec.pages.text, wanted, pages.config or "corpus")
    for row_id, claim, titles in rows:
        positives = [Passage(texts[title]) for title in titles if title in texts]
        job.report["page_without_text"] += len(titles) - len(positives)
        if not positives:
            job.report["no_positive"] += 1
            continue
        yield _example(job, row_id, claim, positives)


def _look_up(rows: Iterable[Numbered], key: str, text: Columns, wanted: Container[str], where: str) -> dict[str, str]:
    """Key -> text of the rows whose key is `wanted`, the first of several; one without text (some of BEIR) is left out.

    Of `text` only the last column must be there: many a corpus has no titles.
    """

    def parse(row: Row) -> tuple[str, str]:
        value = value_at(row, key)
        name = value if isinstance(value, str) else id_of(value, key)  # a title may be anything
        if name not in wanted:
            return name, ""
        columns = (*[column for column in text[:-1] if column in row], text[-1])
        blank = all(value_at(row, column) is None or not str(value_at(row, column)).strip() for column in columns)
        return name, "" if blank else text_at(row, columns)

    found: dict[str, str] = {}
    for name, content in _sound(rows, parse, where):
        if content:
            found.setdefault(name, content)
    return found


def _sound(rows: Iterable[Numbered], parse: Callable[[Row], T], where: str) -> Iterator[T]:
    """`parse(row)` of each row of a table that is looked up. Raises DataError, naming table and row."""
    for number, _, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            value = parse(row)
        except DataError as error:
            raise DataError(f"{where}, row {number}: {error}") from None
        yield value
