"""Scores a model on one task of a suite: retrieval and reranking in `ranking`, the other kinds here.

N texts, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from embedwright.data.schema import DataError
from embedwright.encoders.protocol import Encoder
from embedwright.evaluation import metrics, ranking
from embedwright.evaluation.metrics import Scored
from embedwright.evaluation.ranking import encode_once
from embedwright.evaluation.tasks import SuiteTask, digest, read_columns


def score(encoder: Encoder | None, task: SuiteTask) -> Scored | None:
    """Scores a model on one task, whose paths are absolute. Raises ValueError for data that is not of the kind.

    No encoder stands for BM25, which ranks: it has no score for the other kinds.
    """
    if task.kind in ("retrieval", "reranking"):
        return ranking.score(encoder, task)
    if encoder is None:
        return None
    if task.kind == "classification":
        return _classification(encoder, task)
    *texts, gold = read_columns(task.path, task.kind, task.limit)
    _refuse_one_label(gold, task.path)
    vectors_NE = encode_once(encoder, [text for column in texts for text in column], task.instruction or None)
    data = digest(*texts, gold)
    if task.kind == "clustering":
        return replace(metrics.clustering(vectors_NE, gold), data=data)
    left_NE, right_NE = np.split(vectors_NE, 2)
    of_pairs = metrics.sts if task.kind == "sts" else metrics.pair
    return replace(of_pairs(left_NE, right_NE, gold), data=data)


def _classification(encoder: Encoder, task: SuiteTask) -> Scored:
    texts, labels = read_columns(task.path, task.kind, task.limit)
    if task.train:
        train_texts, train_labels = read_columns(task.train, task.kind, split="train")
        test = list(range(len(texts)))
    else:
        train, test = metrics.halves(labels)
        train_texts, train_labels = [texts[row] for row in train], [labels[row] for row in train]
        texts, labels = [texts[row] for row in test], [labels[row] for row in test]
    _refuse_one_label(train_labels, task.train or task.path)
    draws = metrics.few_shot(train_labels)
    drawn = sorted(set().union(*draws))  # the other training rows are not used, so they are not encoded
    place = {row: number for number, row in enumerate(drawn)}
    vectors_NE = encode_once(encoder, [train_texts[row] for row in drawn] + texts, task.instruction or None)
    train_NE, test_NE = np.split(vectors_NE, [len(drawn)])
    places = [[place[row] for row in draw] for draw in draws]
    scored = metrics.classification(train_NE, [train_labels[row] for row in drawn], test_NE, labels, places)
    drawn_rows = [(train_texts[row], train_labels[row]) for row in drawn]
    return replace(scored, items={"id": np.array(test)}, data=digest(drawn_rows, [places], texts, labels))


def _refuse_one_label(gold: Sequence[Any], file: Path) -> None:
    """Raises DataError if there is one label only: every metric would be 0, 1 or undefined for any model."""
    if len(set(gold)) < 2:
        raise DataError(f"{file}: {len(gold)} rows, all of one label or score (a `limit` on a sorted file does that)")
