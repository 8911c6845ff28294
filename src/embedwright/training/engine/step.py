"""One optimizer step: texts into one packed forward, or into several where they exceed the token budget.

N texts of a batch, Q queries, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from embedwright.packing import batches, moved, pack
from embedwright.training.batches.batch import Batch, Text, split_token_limit
from embedwright.training.batches.feed import LocalBatch
from embedwright.training.engine import gradcache
from embedwright.training.engine.parallel import Replica
from embedwright.training.losses.total import batch_loss
from embedwright.training.stages import ContrastiveStage


def accumulate(
    replica: Replica, local: LocalBatch, stage: ContrastiveStage, *, batch_tokens: int, seed: int
) -> tuple[float, int]:
    """Adds the gradient of the batch's loss to the parameters. Returns the loss and the tokens of all processes.

    A batch of at most `batch_tokens` takes one forward. A larger one is split by queries where it is separable, which
    is exact and takes one pass; each part encodes all of its texts, shared ones included. GradCache does the rest:
    batches that are not separable, batches with a query that is larger than `batch_tokens` by itself, and batches whose
    parts would together encode over a third more tokens than the batch has.
    """
    processes = replica.processes
    own, elsewhere = local.texts[processes.rank], set[Text]().union(*local.texts[: processes.rank])
    groups = None if local.rows is None else _grouped(local, batch_tokens)
    encoded = [_size(local, (text for row in group for text in local.batch.texts(row))) for group in groups or ()]
    total, distinct, again, too_large = processes.all_sums(
        _size(local, (text for text in own if text not in elsewhere)),
        _size(local, own),
        sum(encoded),
        max(encoded, default=0) > batch_tokens,
    )
    seed += 1_000_003 * processes.rank
    if groups is not None and not too_large and again <= split_token_limit(distinct):
        loss = _by_queries(replica, local, groups, stage, seed)
        if replica.projection is not None:  # not part of the network, whose gradients are averaged on the way
            processes.all_reduce_gradients([replica.projection])
            if replica.projection.grad is not None:
                replica.projection.grad /= processes.count
        return loss, int(total)
    return _cached(replica, local, stage, batch_tokens, seed), int(total)


def _by_queries(
    replica: Replica, local: LocalBatch, groups: list[list[int]], stage: ContrastiveStage, seed: int
) -> float:
    """Accumulates the gradient over groups of queries, each with its own candidates. Returns the loss."""
    processes, device = replica.processes, replica.device
    own = {text: i for i, text in enumerate(local.texts[processes.rank])}
    losses, count = list[Tensor](), int(processes.all_max(len(groups)))
    for i in range(count):
        torch.manual_seed(seed + i)
        with replica.syncing(i == count - 1):
            if i >= len(groups):  # others have more: take part in what they gather
                (0 * replica.embed(pack([local.filler]).to(device)).sum()).backward()
                continue
            batch = local.batch.take(groups[i])
            texts = list(dict.fromkeys([*batch.queries, *batch.candidates]))
            texts.sort(key=lambda text: -len(local.tokens[text].ids))  # attention finds runs of equal length
            embedded_NE = replica.embed(pack([local.tokens[text] for text in texts]).to(device))
            place = {text: at for at, text in enumerate(texts)}
            rows = [own[text] for text in texts]
            teacher_NE = None if local.teacher_NE is None else moved(local.teacher_NE[rows], device)
            part = _loss(embedded_NE, teacher_NE, batch, place, stage, len(local.batch.queries), replica.projection)
            (part * processes.count).backward()
            losses.append(part.detach())
    # read at the end alone: a GPU would stand still until the next part is packed and sent
    return processes.all_sum(sum(torch.stack(losses).tolist()) if losses else 0.0)


def _cached(replica: Replica, local: LocalBatch, stage: ContrastiveStage, batch_tokens: int, seed: int) -> float:
    """Runs GradCache over this process's texts, with the loss of the whole batch. Returns the loss.

    Every process has the whole gradient of a projection from it.
    """
    processes, device = replica.processes, replica.device
    own = local.texts[processes.rank]
    groups = list(batches([len(local.tokens[text].ids) for text in own], batch_tokens))
    missing = int(processes.all_max(len(groups))) - len(groups)
    packed = [pack([local.tokens[own[i]] for i in group]).to(device) for group in groups]
    packed += [pack([local.filler]).to(device)] * missing
    back = moved(torch.from_numpy(np.argsort(np.array([i for group in groups for i in group], dtype=np.int64))), device)
    sizes = [len(texts) for texts in local.texts]
    place: dict[Text, int] = {}
    for at, text in enumerate(text for texts in local.texts for text in texts):
        place.setdefault(text, at)

    teacher_NE = None if local.teacher_NE is None else processes.gather_vectors(moved(local.teacher_NE, device), sizes)

    def loss_of(embedded_NE: Tensor) -> Tensor:
        gathered_NE = processes.gather_vectors(embedded_NE[back], sizes)
        return _loss(gathered_NE, teacher_NE, local.batch, place, stage, len(local.batch.queries), replica.projection)

    return gradcache.backward(replica.embed, packed, loss_of, seed, processes=processes.count, syncing=replica.syncing)


def _grouped(local: LocalBatch, batch_tokens: int) -> list[list[int]]:
    """Groups this process's queries: the distinct texts of a group have at most `batch_tokens` tokens.

    Those with the most tokens come first. A query that is larger than `batch_tokens` is a group of its own.
    """
    groups: list[list[int]] = []
    held: set[Text] = set()
    for row in sorted(local.rows or (), key=lambda row: -_size(local, local.batch.texts(row))):
        texts = local.batch.texts(row)
        if not groups or _size(local, held.union(texts)) > batch_tokens:
            groups.append([])
            held = set()
        groups[-1].append(row)
        held.update(texts)
    return groups


def _size(local: LocalBatch, texts: Iterable[Text]) -> int:
    """Counts the tokens of the distinct ones of these texts."""
    return sum(len(local.tokens[text].ids) for text in set(texts))


def _loss(
    embedded_NE: Tensor,
    teacher_NE: Tensor | None,
    batch: Batch,
    place: Mapping[Text, int],
    stage: ContrastiveStage,
    total: int,
    projection: nn.Parameter | None,
) -> Tensor:
    query_Q, candidate_C = (
        moved(torch.tensor([place[text] for text in texts]), embedded_NE.device)
        for texts in (batch.queries, batch.candidates)
    )
    teacher = None if teacher_NE is None else (teacher_NE[query_Q], teacher_NE[candidate_C])
    return batch_loss(
        embedded_NE[query_Q],
        embedded_NE[candidate_C],
        batch.masks,
        batch.targets,
        stage,
        total=total,
        teacher=teacher,
        projection_TE=projection,
    )
