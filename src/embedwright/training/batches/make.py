"""Rows into a batch: what each row draws, and who is whose negative. Q queries, C distinct candidates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedwright.data.answers import contrast_marks, document_marks, text_mark
from embedwright.data.schema import Example, InBatch
from embedwright.text import Contract
from embedwright.training.batches.batch import Batch, Bools, Ints, Masks, Targets, Text
from embedwright.training.batches.blend import Row
from embedwright.training.stages import LossPart


class Drawn(NamedTuple):
    """What one row brings to its batch: the query, one of its positives, and some of its negatives.

    `pick` is the place of the positive among the row's positives, `positive` its column. `negatives` maps the place of
    each drawn negative among the row's negatives to its column.
    """

    row: Row
    query: Text
    pick: int
    positive: int
    negatives: dict[int, int]


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

    A candidate is not a negative of a query if any row of the batch lists its text or its document as an answer to that
    query, or if its text is the query's. A row whose task has in-batch negatives `none` neither uses nor gives
    candidates. `loss` is the stage's and decides which targets are made (None: none). Rows with a score bring their
    pair alone where the loss is CoSENT, and the other text stands in the place of a positive, whatever the score.
    """
    loss = loss or LossPart()
    drawn, candidates = _draw(rows, contract, hard_negatives, rng, loss)
    positive_Q = np.array([one.positive for one in drawn], dtype=np.int64)
    own_QC = np.zeros((len(drawn), len(candidates)), dtype=bool)
    for i, one in enumerate(drawn):
        own_QC[i, list(one.negatives.values())] = True
    sharing_QQ = _sharing(drawn, in_batch)
    negative_QC = own_QC | _from_others(sharing_QQ, positive_Q, own_QC)
    mark = cache(text_mark)
    answers = _answers(drawn, mark)
    columns_of: dict[int, list[int]] = defaultdict(list)  # a text may have several forms and prefixes
    for column, (_, text) in enumerate(candidates):
        columns_of[mark(text)].append(column)
    for i, marks in enumerate(answers):
        negative_QC[i, [c for known in marks for c in columns_of.get(known, ())]] = False
    group_Q = _cosent_groups(drawn, loss)
    negative_QC[group_Q >= 0] = False
    own_QC &= negative_QC
    queries_QQ = distinct = teacher_QC = score_Q = None
    if loss.same_tower != "none":
        queries_QQ = _other_queries(drawn, answers, sharing_QQ)
        queries_QQ[group_Q >= 0] = False
    if loss.spread_out:
        queries = [one.query for one in drawn]
        distinct = _first_of_each(queries, range(len(queries)), mark), _first_of_each(candidates, positive_Q, mark)
    if loss.distill is not None and loss.distill.score_weight:
        teacher_QC = _teacher_scores(drawn, own_QC)
    if loss.scored == "cosent":
        score_Q = np.array([np.nan if one.row.example.score is None else one.row.example.score for one in drawn])
    return Batch(
        [one.query for one in drawn],
        candidates,
        [one.row.example.id for one in drawn],
        Masks(positive_Q, negative_QC, own_QC, queries_QQ, distinct),
        Targets(
            teacher_QC,
            None if score_Q is None else group_Q,
            score_Q,
            loss.distill is not None and loss.distill.similarity_weight > 0,
        ),
    )


def _draw(
    rows: Sequence[Row], contract: Contract, hard_negatives: int, rng: np.random.Generator, loss: LossPart
) -> tuple[list[Drawn], list[Text]]:
    """Draws for each row, and numbers the distinct candidates in the order in which they first come."""
    columns: dict[Text, int] = {}

    def column(prefix: str, text: str) -> int:
        return columns.setdefault((prefix, text), len(columns))

    drawn = []
    for row in rows:
        example, task = row.example, row.task
        prefix = contract.prefix(task.instruction)
        document_prefix = prefix if task.symmetric else contract.prefix(None)
        by_cosent = _by_cosent(example, loss)
        paired = example.paired if by_cosent else example.positives
        pick = int(rng.integers(len(paired)))
        order = rng.permutation(len(example.negatives))
        picks = [] if by_cosent else sorted(order[:hard_negatives].tolist())
        positive = column(document_prefix, paired[pick].text)
        negatives = {j: column(document_prefix, example.negatives[j].text) for j in picks}
        drawn.append(Drawn(row, (prefix, example.query), pick, positive, negatives))
    return drawn, list(columns)


def _answers(drawn: Sequence[Drawn], mark: Callable[[str], int]) -> list[set[int]]:
    """Returns for each row the marks (`data.answers`) of its query and of all that answers it by any row of the batch.

    A document that answers may come with several texts in the batch: all of them answer, but a row's own contrasts
    (`contrast_id`), unless a row lists them.
    """
    marks_of: dict[tuple[str, int], set[int]] = defaultdict(set)  # task, query
    texts_of: dict[int, set[int]] = defaultdict(set)  # document
    contrasts_of: dict[int, set[int]] = defaultdict(set)
    questions = [(one.row.example.task, mark(one.row.example.query)) for one in drawn]
    for one, question in zip(drawn, questions, strict=True):
        task, query = question
        answers = marks_of[question]
        answers.add(query)
        for passage in one.row.example.positives:
            text, documents = mark(passage.text), document_marks(task, passage)
            answers |= {text, *documents}
            marks_of[task, text].add(query)  # a judged pair holds in both directions
            for document in documents:
                texts_of[document].add(text)
        for passage in (one.row.example.negatives[j] for j in one.negatives):
            for document in document_marks(task, passage):
                texts_of[document].add(mark(passage.text))
            for document in contrast_marks(task, passage):
                contrasts_of[document].add(mark(passage.text))
    listed = {question: set(answers) for question, answers in marks_of.items()} if contrasts_of else {}
    for answers in marks_of.values():
        answers.update(*(texts_of[document] for document in answers & texts_of.keys()))
        answers.update(*(contrasts_of[document] for document in answers & contrasts_of.keys()))
    if not contrasts_of:
        return [marks_of[question] for question in questions]
    negatives = ([one.row.example.negatives[j] for j in one.negatives] for one in drawn)
    own = ({mark(p.text) for p in some if contrast_marks("", p)} for some in negatives)
    return [marks_of[each] - (texts - listed[each]) for each, texts in zip(questions, own, strict=True)]


def _sharing(drawn: Sequence[Drawn], in_batch: InBatch) -> Bools:
    """Returns whether each row may use what each other row brings (Q, Q).

    `same_task` on either side asks for the same task.
    """
    modes = np.array([one.row.task.in_batch_negatives or in_batch for one in drawn])
    names = np.array([one.row.task.name for one in drawn])
    same_QQ = names[:, None] == names[None, :]
    widely_Q = modes == "all"
    shares_Q = modes != "none"
    sharing_QQ: Bools = np.outer(shares_Q, shares_Q) & (same_QQ | np.outer(widely_Q, widely_Q))
    np.fill_diagonal(sharing_QQ, False)
    return sharing_QQ


def _from_others(sharing_QQ: Bools, positive_Q: Ints, own_QC: Bools) -> Bools:
    """Returns the columns that each row gets from the rows it shares with."""
    brings_QC = own_QC.copy()
    brings_QC[np.arange(len(positive_Q)), positive_Q] = True
    return _any_product(sharing_QQ, brings_QC)


def _any_product(a: Bools, b: Bools) -> Bools:
    """Returns the matrix product of truth values; in float32 numpy has BLAS for it."""
    found: Bools = a.astype(np.float32) @ b.astype(np.float32) > 0
    return found


def _other_queries(drawn: Sequence[Drawn], answers: Sequence[set[int]], sharing_QQ: Bools) -> Bools:
    """Returns which queries are negatives of each query (Q, Q). Equal queries count once, in the column of the first.

    `answers` has the marks of each row's answers, `sharing_QQ` the rows that may use each other. Two queries are no
    negatives of each other if they have the same text, if one is an answer to the other, or if they have an answer in
    common, by text or by document.
    """
    first: dict[Text, int] = {}
    column_Q = [first.setdefault(one.query, i) for i, one in enumerate(drawn)]
    asks_QQ = np.zeros_like(sharing_QQ)
    asks_QQ[np.arange(len(drawn)), column_Q] = True
    stands_QQ = _any_product(sharing_QQ, asks_QQ)
    answered: dict[int, set[int]] = defaultdict(set)  # mark -> columns
    for marks, column in zip(answers, column_Q, strict=True):
        for mark in marks:
            answered[mark].add(column)
    for i, marks in enumerate(answers):
        stands_QQ[i, list(set().union(*(answered[mark] for mark in marks)))] = False
    return stands_QQ


def _first_of_each(texts: Sequence[Text], places: Iterable[int], mark: Callable[[str], int]) -> Bools:
    """Marks, of the texts at these places, the first of each, whatever its prefix."""
    first: dict[int, int] = {}
    for place in places:
        first.setdefault(mark(texts[place][1]), int(place))
    firsts = np.zeros(len(texts), dtype=bool)
    firsts[list(first.values())] = True
    return firsts


def _teacher_scores(drawn: Sequence[Drawn], own_QC: Bools) -> NDArray[np.float32]:
    """Puts the scores that rows carry into their columns. NaN elsewhere, and in rows that lack those of either side."""
    teacher_QC = np.full(own_QC.shape, np.nan, dtype=np.float32)
    for i, one in enumerate(drawn):
        given, against = one.row.example.positive_scores, one.row.example.negative_scores
        if not given or against is None:
            continue
        for j, column in one.negatives.items():
            if own_QC[i, column]:
                teacher_QC[i, column] = against[j]
        teacher_QC[i, one.positive] = given[one.pick]
    return teacher_QC


def _by_cosent(example: Example, loss: LossPart) -> bool:
    return loss.scored == "cosent" and example.score is not None


def _cosent_groups(drawn: Sequence[Drawn], loss: LossPart) -> Ints:
    """Returns the number of its task for each row that CoSENT takes, else -1."""
    numbers: dict[str, int] = {}
    groups = [
        numbers.setdefault(one.row.task.name, len(numbers)) if _by_cosent(one.row.example, loss) else -1
        for one in drawn
    ]
    return np.array(groups, dtype=np.int64)
