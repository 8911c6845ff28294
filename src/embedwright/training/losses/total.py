"""The loss of one batch, as its stage asks for it. Q queries, C distinct candidates, E embedding."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedwright.config import ConfigError
from embedwright.errors import InputError
from embedwright.packing import moved
from embedwright.training.batches.batch import Masks, Targets
from embedwright.training.losses.terms import (
    cosent,
    cosines,
    cut,
    info_nce,
    projected,
    score_distillation,
    spread_out,
    vector_distance,
    vector_distillation,
)
from embedwright.training.stages import ContrastiveStage, Stage

Value = TypeVar("Value")


def batch_loss(
    q_QE: Tensor,
    c_CE: Tensor,
    masks: Masks,
    targets: Targets,
    stage: ContrastiveStage,
    *,
    total: int,
    teacher: tuple[Tensor, Tensor] | None = None,
    projection_TE: Tensor | None = None,
) -> Tensor:
    """Returns the summed loss of these queries, divided by `total`: the number of queries of the whole step.

    `q_QE` and `c_CE` are the unit-length float32 vectors of the queries and candidates; `teacher` holds the same two of
    `stage.loss.distill.teacher`, which may be of another width T. Through `projection_TE` they are compared with ours.
    The parts of a separable batch add up to the loss of the whole.

    The loss is InfoNCE, or CoSENT over the scored rows of a task (its value counts once for each of them), plus the
    spread-out term and the KL divergences from a row's scores and from the teacher's cosines. With `dims` it is the
    mean over these widths and the full one. The distance to the teacher's vectors is added at the full width.

    Raises:
        InputError: The batch or the teacher's vectors are not made for the stage's loss.
        ConfigError: See `check_widths`.
    """
    loss, weight = stage.loss, len(q_QE) / total
    check_widths(stage, q_QE.shape[1])
    if loss.distill is not None and loss.distill.teacher and teacher is None:
        raise InputError(f"stages.{stage.name}.loss.distill: vectors of {', '.join(loss.distill.teacher)} are missing")
    values = [_at_one_width(q_QE, c_CE, masks, targets, stage, total, teacher)]
    # each cut stands beside its loss: autograd adds up gradients in the order of the calls
    for dim in loss.dims:
        values.append(_at_one_width(cut(q_QE, dim), cut(c_CE, dim), masks, targets, stage, total, teacher))
    value = torch.stack(values).mean()
    if loss.distill is not None and loss.distill.vector_weight and teacher is not None:
        if projection_TE is not None:
            q_QE, c_CE = projected(q_QE, projection_TE), projected(c_CE, projection_TE)
        distance_Q, distance_C = vector_distance(q_QE, teacher[0]), vector_distance(c_CE, teacher[1])
        texts_QC = _on(q_QE, masks.own_QC).scatter(1, _on(q_QE, masks.positive_Q)[:, None], True)
        value = value + loss.distill.vector_weight * weight * vector_distillation(distance_Q, distance_C, texts_QC)
    return value


def check_widths(stage: Stage, width: int) -> None:
    """Raises ConfigError if the stage's `dims` are not below the model's `width`."""
    for dim in stage.loss.dims:
        if dim >= width:
            raise ConfigError(
                f"stages.{stage.name}.loss.dims: {dim} is not below the model's {width} dimensions, which always count"
            )


def _at_one_width(
    q_QE: Tensor,
    c_CE: Tensor,
    masks: Masks,
    targets: Targets,
    stage: ContrastiveStage,
    total: int,
    teacher: tuple[Tensor, Tensor] | None,
) -> Tensor:
    loss, weight = stage.loss, len(q_QE) / total
    positive_Q, negative_QC = _on(q_QE, masks.positive_Q), _on(q_QE, masks.negative_QC)
    queries_QQ = documents_QC = hard_QC = None
    if loss.same_tower != "none":
        queries_QQ = _on(q_QE, _needed(masks.queries_QQ, "queries_QQ"))
    if loss.same_tower == "both":  # documents of other rows stand against the positive as against the query
        documents_QC = negative_QC & ~_on(q_QE, masks.own_QC)
    if loss.hardness:
        hard_QC = _on(q_QE, masks.own_QC)
    value = weight * info_nce(
        q_QE,
        c_CE,
        positive_Q,
        negative_QC,
        stage.temperature,
        queries_QQ=queries_QQ,
        documents_QC=documents_QC,
        mask_above=loss.mask_above,
        hardness=loss.hardness,
        hard_QC=hard_QC,
        focal=loss.focal,
    )
    if loss.scored == "cosent":  # such rows have no negatives: InfoNCE gave 0 for them
        group_Q, score_Q = _needed(targets.group_Q, "group_Q"), _needed(targets.score_Q, "score_Q")
        for group in np.unique(group_Q[group_Q >= 0]):
            own = np.flatnonzero(group_Q == group)
            rows, score_S = _on(q_QE, own), torch.from_numpy(score_Q[own])
            value = value + len(rows) / total * cosent(q_QE[rows], c_CE[positive_Q[rows]], score_S, stage.temperature)
    if loss.spread_out:
        # places instead of truth values, which a GPU would have to count first
        distinct_Q, distinct_C = (_on(q_QE, np.flatnonzero(part)) for part in _needed(masks.distinct, "distinct"))
        value = value + loss.spread_out * (spread_out(q_QE[distinct_Q]) + spread_out(c_CE[distinct_C]))
    if (distill := loss.distill) is not None:
        followed: list[tuple[float, Tensor]] = []
        if distill.score_weight:
            followed.append((distill.score_weight, torch.from_numpy(_needed(targets.teacher_QC, "teacher_QC"))))
        if distill.similarity_weight and teacher is not None:
            followed.append((distill.similarity_weight, cosines(*teacher)))
        temperature = distill.temperature or stage.temperature
        for scale, teacher_QC in followed:
            term = score_distillation(q_QE, c_CE, teacher_QC, stage.temperature, temperature)
            value = value + scale * weight * term
    return value


def _on(vectors: Tensor, array: NDArray[np.generic]) -> Tensor:
    return moved(torch.from_numpy(array), vectors.device)


def _needed(value: Value | None, name: str) -> Value:
    if value is None:
        raise InputError(f"the batch has no {name}: make_batch needs the stage's loss")
    return value
