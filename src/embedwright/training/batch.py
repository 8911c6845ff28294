"""Rows into texts, and who is whose negative. Q queries, C distinct candidates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedwright.data.example import InBatch, Task
from embedwright.text import Contract
from embedwright.training.blend import Row

Text = tuple[str, str]  # prefix, text


@dataclass(frozen=True)
class Batch:
    """`positive_Q` is each query's column; `allowed_QC` marks the columns that stand against it as negatives."""

    queries: list[Text]
    candidates: list[Text]
    positive_Q: NDArray[np.int64]
    allowed_QC: NDArray[np.bool_]
    ids: list[str]

    def ids_hash(self) -> str:
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()[:16]

    def alone(self) -> bool:
        """Whether no candidate is shared between queries: then the batch may be split without changing the loss."""
        uses_C = self.allowed_QC.sum(axis=0) + np.bincount(self.positive_Q, minlength=len(self.candidates))
        return bool((uses_C <= 1).all())

    def take(self, rows: Sequence[int]) -> Batch:
        """These queries with the candidates that they use."""
        chosen = np.array(rows, dtype=np.int64)
        positive_Q = self.positive_Q[chosen]
        columns = np.union1d(np.flatnonzero(self.allowed_QC[chosen].any(axis=0)), positive_Q)
        return Batch(
            queries=[self.queries[i] for i in rows],
            candidates=[self.candidates[c] for c in columns],
            positive_Q=np.searchsorted(columns, positive_Q),
            allowed_QC=self.allowed_QC[np.ix_(chosen, columns)],
            ids=[self.ids[i] for i in rows],
        )


def make_batch(
    rows: Sequence[Row], contract: Contract, *, hard_negatives: int, in_batch: InBatch, rng: np.random.Generator
) -> Batch:
    """Draws one positive and up to `hard_negatives` negatives a row; equal candidate texts become one column.

    A candidate that shares a document id or its text with any positive of the query, or is the query's own text, is
    never its negative. A row whose task says `none` neither uses nor gives in-batch candidates.
    """
    columns: dict[Text, int] = {}
    documents: list[set[str]] = []  # per column: ids it is known by
    givers: list[set[int]] = []  # per column: rows that brought it
    queries, positives, own = [], [], []
    for i, row in enumerate(rows):
        example, task = row.example, row.task
        prefix = contract.prefix(task.instruction)
        behind = prefix if task.symmetric else contract.prefix(None)
        queries.append((prefix, example.query))
        positive = example.positives[int(rng.integers(len(example.positives)))]
        order = rng.permutation(len(example.negatives))
        chosen = [example.negatives[j] for j in sorted(order[:hard_negatives])]
        for passage in (positive, *chosen):
            column = columns.setdefault((behind, passage.text), len(columns))
            if column == len(documents):
                documents.append(set())
                givers.append(set())
            if passage.id is not None:
                documents[column].add(passage.id)
            givers[column].add(i)
        positives.append(columns[behind, positive.text])
        own.append({columns[behind, p.text] for p in chosen})

    candidates = list(columns)
    modes = [row.task.in_batch_negatives or in_batch for row in rows]
    allowed_QC = np.zeros((len(rows), len(candidates)), dtype=bool)
    for i, row in enumerate(rows):
        forbidden_texts = {p.text for p in row.example.positives} | {row.example.query}
        forbidden_ids = {p.id for p in row.example.positives if p.id is not None}
        for column, (_, text) in enumerate(candidates):
            stands = column in own[i] or any(
                _shares(modes[i], row.task, modes[j], rows[j].task) for j in givers[column] if j != i
            )
            allowed_QC[i, column] = (
                stands and text not in forbidden_texts and forbidden_ids.isdisjoint(documents[column])
            )
    return Batch(queries, candidates, np.array(positives, dtype=np.int64), allowed_QC, [r.example.id for r in rows])


def _shares(mode: InBatch, task: Task, other_mode: InBatch, other_task: Task) -> bool:
    """Whether a row may use what another row brings: `same_task` on either side asks for the same task."""
    if "none" in (mode, other_mode):
        return False
    return task.name == other_task.name or mode == other_mode == "all"
