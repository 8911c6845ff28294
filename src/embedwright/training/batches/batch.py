"""Rows into texts, and who is whose negative. Q queries, C distinct candidates."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from embedwright.data.answers import document_marks, text_mark
from embedwright.data.schema import Example, InBatch, Passage
from embedwright.text import Contract
from embedwright.training.batches.blend import Row, Source, rows_at
from embedwright.training.parts import LossPart
from embedwright.training.recipe import Recipe

Text = tuple[str, str]  # prefix, text
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """`positive_Q` is each query's column; `allowed_QC` marks the columns that stand against it as negatives.

    The rest is there as far as the stage's loss asks for it. `own_QC`: of the allowed, the row's own hard negatives.
    `queries_QQ`: other queries that stand against a query, as columns. `teacher_QC`: scores of the positive and the
    own negatives, NaN elsewhere. `group_Q`: who is ordered by `score_Q` together under CoSENT (-1: not at all); such
    a row has no negatives.
    """

    queries: list[Text]
    candidates: list[Text]
    positive_Q: NDArray[np.int64]
    allowed_QC: Bools
    ids: list[str]
    own_QC: Bools | None = None
    queries_QQ: Bools | None = None
    teacher_QC: NDArray[np.float32] | None = None
    group_Q: NDArray[np.int64] | None = None
    score_Q: NDArray[np.float64] | None = None

    def ids_hash(self) -> str:
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()[:16]

    def alone(self) -> bool:
        """Whether no query's loss needs another's texts: then the batch may be split without changing the loss."""
        if self.queries_QQ is not None and self.queries_QQ.any():
            return False
        if self.group_Q is not None and np.bincount(self.group_Q + 1)[1:].max(initial=0) > 1:
            return False
        uses_C = self.allowed_QC.sum(axis=0) + np.bincount(self.positive_Q, minlength=len(self.candidates))
        return bool((uses_C <= 1).all())

    def take(self, rows: Sequence[int]) -> Batch:
        """These queries with the candidates that they use, and of queries that stand against them those among them."""
        chosen = np.array(rows, dtype=np.int64)
        positive_Q = self.positive_Q[chosen]
        columns = np.union1d(np.flatnonzero(self.allowed_QC[chosen].any(axis=0)), positive_Q)
        return Batch(
            queries=[self.queries[i] for i in rows],
            candidates=[self.candidates[c] for c in columns],
            positive_Q=np.searchsorted(columns, positive_Q),
            allowed_QC=self.allowed_QC[np.ix_(chosen, columns)],
            ids=[self.ids[i] for i in rows],
            own_QC=None if self.own_QC is None else self.own_QC[np.ix_(chosen, columns)],
            queries_QQ=None if self.queries_QQ is None else self.queries_QQ[np.ix_(chosen, chosen)],
            teacher_QC=None if self.teacher_QC is None else self.teacher_QC[np.ix_(chosen, columns)],
            group_Q=None if self.group_Q is None else self.group_Q[chosen],
            score_Q=None if self.score_Q is None else self.score_Q[chosen],
        )


def batch_of_step(recipe: Recipe, number: int, sources: Sequence[Source], contract: Contract, step: int) -> Batch:
    """The batch of a step (from 0) of stage `number`: the same whenever it is asked for."""
    stage = recipe.stages[number]
    rows = rows_at(
        sources,
        step,
        batch_queries=stage.optim.batch_queries,
        batching=stage.batching,
        seed=recipe.seed,
        stage=stage.name,
    )
    return make_batch(
        rows,
        contract,
        hard_negatives=stage.hard_negatives,
        in_batch=stage.in_batch_negatives,
        rng=np.random.default_rng([recipe.seed, number, step]),
        loss=stage.loss,
    )


def make_batch(
    rows: Sequence[Row],
    contract: Contract,
    *,
    hard_negatives: int,
    in_batch: InBatch,
    rng: np.random.Generator,
    loss: LossPart | None = None,
) -> Batch:
    """Draws one positive and up to `hard_negatives` negatives a row; equal candidate texts become one column.

    A candidate that answers the query by any row of the batch, by its text or its document, or is the query's own text,
    is never its negative. A row whose task says `none` neither uses nor gives in-batch candidates. `loss` (the stage's)
    says what else it needs; a row that CoSENT takes brings its positive alone.
    """
    loss = loss or LossPart()
    columns: dict[Text, int] = {}
    queries, picked, positives, own = [], [], [], []
    for row in rows:
        example, task = row.example, row.task
        prefix = contract.prefix(task.instruction)
        behind = prefix if task.symmetric else contract.prefix(None)
        queries.append((prefix, example.query))
        pick = int(rng.integers(len(example.positives)))
        order = rng.permutation(len(example.negatives))
        picks = [] if _by_cosent(example, loss) else sorted(order[:hard_negatives].tolist())
        picked.append((pick, picks))
        positives.append(_column(columns, behind, example.positives[pick]))
        own.append([_column(columns, behind, example.negatives[j]) for j in picks])

    sharing_QQ = _sharing(rows, in_batch)
    own_QC = np.zeros((len(rows), len(columns)), dtype=bool)
    for i, mine in enumerate(own):
        own_QC[i, mine] = True
    allowed_QC = own_QC | _from_others(sharing_QQ, positives, own_QC)
    mark = cache(text_mark)
    answers = _answers(rows, [picks for _, picks in picked], mark)
    columns_of: dict[int, list[int]] = defaultdict(list)  # of a text: in several looks, and behind several prefixes
    for (_, text), column in columns.items():
        columns_of[mark(text)].append(column)
    for i, marks in enumerate(answers):
        allowed_QC[i, [c for known in marks for c in columns_of.get(known, ())]] = False

    group_Q = _cosent_groups(rows, loss)
    allowed_QC[group_Q >= 0] = False
    own_QC &= allowed_QC
    positive_Q = np.array(positives, dtype=np.int64)
    queries_QQ = teacher_QC = score_Q = None
    if loss.same_tower != "none":
        queries_QQ = _other_queries(queries, answers, sharing_QQ)
        queries_QQ[group_Q >= 0] = False
    if loss.distill is not None and loss.distill.score_weight:
        teacher_QC = _teacher_scores(rows, picked, positive_Q, own, own_QC)
    if loss.scored == "cosent":
        score_Q = np.array([np.nan if row.example.score is None else row.example.score for row in rows])
    return Batch(
        queries,
        list(columns),
        positive_Q,
        allowed_QC,
        [row.example.id for row in rows],
        own_QC,
        queries_QQ,
        teacher_QC,
        None if score_Q is None else group_Q,
        score_Q,
    )


def _column(columns: dict[Text, int], prefix: str, passage: Passage) -> int:
    return columns.setdefault((prefix, passage.text), len(columns))


def _answers(rows: Sequence[Row], picked: Sequence[Sequence[int]], mark: Callable[[str], int]) -> list[set[int]]:
    """For each row the marks (`data.answers`) of its own query and of all that answers it by any row of the batch.

    A text of the batch that is known there as a document that answers does so, too. `picked`: each row's negatives.
    """
    marks_of: dict[tuple[str, int], set[int]] = defaultdict(set)  # task, query
    texts_of: dict[int, set[int]] = defaultdict(set)  # document
    questions = [(row.example.task, mark(row.example.query)) for row in rows]
    for row, question, picks in zip(rows, questions, picked, strict=True):
        task, query = question
        answers = marks_of[question]
        answers.add(query)
        for passage in row.example.positives:
            text, documents = mark(passage.text), document_marks(task, passage)
            answers |= {text, *documents}
            marks_of[task, text].add(query)  # a judged pair holds in both directions
            for document in documents:
                texts_of[document].add(text)
        for passage in (row.example.negatives[j] for j in picks):
            for document in document_marks(task, passage):
                texts_of[document].add(mark(passage.text))
    for answers in marks_of.values():
        answers.update(*(texts_of[document] for document in answers & texts_of.keys()))
    return [marks_of[question] for question in questions]


def _sharing(rows: Sequence[Row], in_batch: InBatch) -> Bools:
    """Whether a row may use what another brings (Q, Q): `same_task` on either side asks for the same task."""
    modes = np.array([row.task.in_batch_negatives or in_batch for row in rows])
    names = np.array([row.task.name for row in rows])
    same_QQ = names[:, None] == names[None, :]
    widely_Q = modes == "all"
    shares_Q = modes != "none"
    sharing_QQ: Bools = np.outer(shares_Q, shares_Q) & (same_QQ | np.outer(widely_Q, widely_Q))
    np.fill_diagonal(sharing_QQ, False)
    return sharing_QQ


def _from_others(sharing_QQ: Bools, positives: Sequence[int], own_QC: Bools) -> Bools:
    """The columns that come to each row from rows that share with it."""
    brings_QC = own_QC.copy()
    brings_QC[np.arange(len(positives)), positives] = True
    return _any_product(sharing_QQ, brings_QC)


def _any_product(a: Bools, b: Bools) -> Bools:
    """The matrix product of truth values; in float32 numpy has BLAS for it."""
    found: Bools = a.astype(np.float32) @ b.astype(np.float32) > 0
    return found


def _other_queries(queries: Sequence[Text], answers: Sequence[set[int]], sharing_QQ: Bools) -> Bools:
    """Queries of others as negatives, under the rules of candidates; equal ones are one column, that of the first.

    Never one of the query's own text, one that answers it or that it answers, or one that shares an answer with it, by
    document or text.
    """
    first: dict[Text, int] = {}
    column_Q = [first.setdefault(query, i) for i, query in enumerate(queries)]
    asks_QQ = np.zeros_like(sharing_QQ)
    asks_QQ[np.arange(len(queries)), column_Q] = True
    stands_QQ = _any_product(sharing_QQ, asks_QQ)
    answered: dict[int, set[int]] = defaultdict(set)  # columns
    for marks, column in zip(answers, column_Q, strict=True):
        for mark in marks:
            answered[mark].add(column)
    for i, marks in enumerate(answers):
        stands_QQ[i, list(set().union(*(answered[mark] for mark in marks)))] = False
    return stands_QQ


def _teacher_scores(
    rows: Sequence[Row],
    picked: Sequence[tuple[int, list[int]]],
    positive_Q: NDArray[np.int64],
    own: Sequence[Sequence[int]],
    own_QC: Bools,
) -> NDArray[np.float32]:
    """The scores that rows carry, at their columns; NaN elsewhere, and for a row that lacks those of either side."""
    teacher_QC = np.full(own_QC.shape, np.nan, dtype=np.float32)
    for i, (row, (pick, picks)) in enumerate(zip(rows, picked, strict=True)):
        given, against = row.example.positive_scores, row.example.negative_scores
        if given is None or against is None:
            continue
        for column, j in zip(own[i], picks, strict=True):
            if own_QC[i, column]:
                teacher_QC[i, column] = against[j]
        teacher_QC[i, positive_Q[i]] = given[pick]
    return teacher_QC


def _by_cosent(example: Example, loss: LossPart) -> bool:
    return loss.scored == "cosent" and example.score is not None


def _cosent_groups(rows: Sequence[Row], loss: LossPart) -> NDArray[np.int64]:
    """The number of its task for each row that CoSENT takes, else -1."""
    numbers: dict[str, int] = {}
    return np.array(
        [numbers.setdefault(row.task.name, len(numbers)) if _by_cosent(row.example, loss) else -1 for row in rows],
        dtype=np.int64,
    )
