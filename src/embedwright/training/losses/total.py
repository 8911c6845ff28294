"""The loss of one batch, as its stage asks for it. Q queries, C distinct candidates, E embedding."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedwright.config import ConfigError
from embedwright.errors import InputError
from embedwright.training.batches.batch import Batch
from embedwright.training.losses.info_nce import (
    cosent,
    cut,
    info_nce,
    score_distillation,
    vector_distance,
    vector_distillation,
)
from embedwright.training.parts import StagePart

Value = TypeVar("Value")


def batch_loss(
    q_QE: Tensor,
    c_CE: Tensor,
    batch: Batch,
    stage: StagePart,
    total: int,
    *,
    teacher_QE: Tensor | None = None,
    teacher_CE: Tensor | None = None,
) -> Tensor:
    """The sum over the batch's queries of what each one loses, over `total`: the queries of the whole step.

    `q_QE`, `c_CE` unit-length float32, a row for each of `batch.queries` and `batch.candidates`; `teacher_QE` and
    `teacher_CE` the same of `stage.loss.distill.teacher`, where there is one. A part of a step that has no more than
    some of its queries gives that part of its loss: the parts add up, where `batch.alone()`.

    InfoNCE, or CoSENT over the scored rows of a task (its value counts once for each of them), and KL to the teacher's
    scores; with `dims`, the mean of that over the widths, the full one among them. The distance to the teacher's
    vectors is added at the full width. ValueError where the batch or the teacher's vectors are not made for the
    stage's loss; ConfigError as in `check_widths`.
    """
    loss, width = stage.loss, q_QE.shape[1]
    check_widths(stage, width, None if teacher_QE is None else teacher_QE.shape[1])
    values = [_at_one_width(q_QE, c_CE, batch, stage, total)]
    values += [_at_one_width(cut(q_QE, dim), cut(c_CE, dim), batch, stage, total) for dim in loss.dims]
    value = torch.stack(values).mean()
    if loss.distill is not None and loss.distill.vector_weight:
        if teacher_QE is None or teacher_CE is None:
            raise InputError(f"stages.{stage.name}.loss.distill: vectors of {loss.distill.teacher} are missing")
        distance_Q = vector_distance(q_QE, teacher_QE)
        distance_C = vector_distance(c_CE, teacher_CE)
        texts_QC = _on(q_QE, _needed(batch.own_QC, "own_QC")).scatter(1, _on(q_QE, batch.positive_Q)[:, None], True)
        share = len(batch.queries) / total
        value = value + loss.distill.vector_weight * share * vector_distillation(distance_Q, distance_C, texts_QC)
    return value


def check_widths(stage: StagePart, width: int, teacher_width: int | None = None) -> None:
    """ConfigError where the stage's `dims` are not below the model's `width`, or the teacher's width is another."""
    for dim in stage.loss.dims:
        if dim >= width:
            raise ConfigError(
                f"stages.{stage.name}.loss.dims: {dim} is not below the model's {width} numbers, which always count"
            )
    if teacher_width is not None and teacher_width != width:
        teacher = stage.loss.distill and stage.loss.distill.teacher
        raise ConfigError(
            f"stages.{stage.name}.loss.distill.teacher: vectors of {teacher} have {teacher_width} numbers, the "
            f"model's {width}; distil its scores instead, or choose a teacher of this width"
        )


def _at_one_width(q_QE: Tensor, c_CE: Tensor, batch: Batch, stage: StagePart, total: int) -> Tensor:
    loss, weight = stage.loss, len(batch.queries) / total
    positive_Q, allowed_QC = _on(q_QE, batch.positive_Q), _on(q_QE, batch.allowed_QC)
    queries_QQ = documents_QC = hard_QC = None
    if loss.same_tower != "none":
        queries_QQ = _on(q_QE, _needed(batch.queries_QQ, "queries_QQ"))
    if loss.same_tower == "both":  # documents of other rows stand against the positive as against the query
        documents_QC = allowed_QC & ~_on(q_QE, _needed(batch.own_QC, "own_QC"))
    if loss.hardness:
        hard_QC = _on(q_QE, _needed(batch.own_QC, "own_QC"))
    value = weight * info_nce(
        q_QE,
        c_CE,
        positive_Q,
        allowed_QC,
        stage.temperature,
        queries_QQ=queries_QQ,
        documents_QC=documents_QC,
        mask_above=loss.mask_above,
        hardness=loss.hardness,
        hard_QC=hard_QC,
        focal=loss.focal,
    )
    if loss.scored == "cosent":  # such rows have no negatives: InfoNCE gave 0 for them
        group_Q, score_Q = _needed(batch.group_Q, "group_Q"), _needed(batch.score_Q, "score_Q")
        for group in np.unique(group_Q[group_Q >= 0]):
            rows = _on(q_QE, np.flatnonzero(group_Q == group))
            score_S = _on(q_QE, score_Q)[rows]
            value = value + len(rows) / total * cosent(q_QE[rows], c_CE[positive_Q[rows]], score_S, stage.temperature)
    if loss.distill is not None and loss.distill.score_weight:
        teacher_QC = _on(q_QE, _needed(batch.teacher_QC, "teacher_QC"))
        temperature = loss.distill.temperature or stage.temperature
        value = value + loss.distill.score_weight * weight * score_distillation(
            q_QE, c_CE, teacher_QC, stage.temperature, temperature
        )
    return value


def _on(vectors: Tensor, array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array).to(vectors.device)


def _needed(value: Value | None, name: str) -> Value:
    if value is None:
        raise InputError(f"the batch has no {name}: make_batch needs the stage's loss")
    return value
