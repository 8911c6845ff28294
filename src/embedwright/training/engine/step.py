"""One optimizer step: texts into one packed forward, or into several where they exceed the token budget.

N texts of a batch, Q queries, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from embedwright.model.embedder import Embedder
from embedwright.packing import batches, pack
from embedwright.text import Contract, TextTokenizer, TokenizedText, tokenize
from embedwright.training.batches.batch import Batch, Text
from embedwright.training.engine import gradcache
from embedwright.training.engine.parallel import Processes, Replica, full
from embedwright.training.losses.total import batch_loss
from embedwright.training.parts import OptimPart, StagePart, TunePart

Teach = Callable[[Sequence[Text]], Tensor]  # what a teacher makes of texts: (N, E) float32


@dataclass(frozen=True)
class Share:
    """What one process does of a batch. `texts`: the distinct texts of each process, `tokens`: of this one's.

    `rows` are this process's queries where no query needs another's candidates, so that each process, and each
    micro-batch, can do with its own; else None. `filler`: any text, for a process that has fewer micro-batches.
    `teacher_NE`: the vectors that the stage's teacher gives this process's texts, in their order.
    """

    batch: Batch
    texts: list[list[Text]]
    rows: list[int] | None
    tokens: Mapping[Text, TokenizedText]
    filler: TokenizedText
    teacher_NE: Tensor | None = None


def share_of(model: Embedder, batch: Batch, processes: Processes, teach: Teach | None = None) -> Share:
    """This process's share, tokenised and, with `teach`, encoded by the stage's teacher. Asks no other process, so that
    it can be made ahead of its step."""
    if batch.alone():
        needed = [[query, *(batch.candidates[c] for c in _columns(batch, i))] for i, query in enumerate(batch.queries)]
        shares = processes.share([sum(len(text) for _, text in texts) for texts in needed])
        texts = [list(dict.fromkeys(text for i in rows for text in needed[i])) for rows in shares]
        own_rows: list[int] | None = shares[processes.rank]
    else:
        distinct = list(dict.fromkeys([*batch.queries, *batch.candidates]))
        shares = processes.share([len(prefix) + len(text) for prefix, text in distinct])
        texts = [[distinct[i] for i in share] for share in shares]
        own_rows = None
    own = texts[processes.rank]
    filler = own[0] if own else batch.queries[0]
    tokens = tokenize_texts(model.text_tokenizer, model.contract, [*own, filler])
    # a process without texts has an empty part of what all gather
    teacher_NE = None if teach is None else teach(own or [filler])[: len(own)]
    return Share(batch, texts, own_rows, tokens, tokens[filler], teacher_NE)


def accumulate(replica: Replica, share: Share, stage: StagePart, *, batch_tokens: int, seed: int) -> tuple[float, int]:
    """Adds the gradient of the batch's loss to the parameters. Returns the loss and the number of tokens, of all.

    Within `batch_tokens` it is one forward. Beyond, a batch is split by queries where they share no candidates, which
    is exact and takes one pass; else, or where one query is beyond it, GradCache.
    """
    processes = replica.processes
    own = share.texts[processes.rank]
    total = int(processes.total(sum(len(share.tokens[text].ids) for text in own)))
    seed += 1_000_003 * processes.rank
    if share.rows is not None:
        sizes = [_size(share, row) for row in share.rows]
        if not processes.most(max(sizes, default=0) > batch_tokens):
            groups = [[share.rows[i] for i in group] for group in batches(sizes, batch_tokens)]
            return _by_queries(replica, share, groups, stage, seed), total
    return _cached(replica, share, stage, batch_tokens, seed), total


def tokenize_texts(tokenizer: TextTokenizer, contract: Contract, texts: Sequence[Text]) -> dict[Text, TokenizedText]:
    """Each distinct text, tokenised once."""
    by_prefix: dict[str, list[str]] = {}
    for prefix, text in dict.fromkeys(texts):
        by_prefix.setdefault(prefix, []).append(text)
    return {
        (prefix, text): tokens
        for prefix, some in by_prefix.items()
        for text, tokens in zip(some, tokenize(tokenizer, contract, some, prefix), strict=True)
    }


def _by_queries(replica: Replica, share: Share, groups: list[list[int]], stage: StagePart, seed: int) -> float:
    """Plain accumulation, a group of queries with their own candidates at a time."""
    processes, device = replica.processes, replica.device
    own = {text: i for i, text in enumerate(share.texts[processes.rank])}
    loss, count = 0.0, processes.most(len(groups))
    for i in range(count):
        torch.manual_seed(seed + i)
        with replica.syncing(i == count - 1):
            if i >= len(groups):  # others have more: take part in what they gather
                (0 * replica.embed(pack([share.filler]).to(device)).sum()).backward()
                continue
            batch = share.batch.take(groups[i])
            texts = list(dict.fromkeys([*batch.queries, *batch.candidates]))
            texts.sort(key=lambda text: -len(share.tokens[text].ids))  # attention finds runs of equal length
            embedded_NE = replica.embed(pack([share.tokens[text] for text in texts]).to(device))
            place = {text: at for at, text in enumerate(texts)}
            rows = [own[text] for text in texts]
            teacher_NE = None if share.teacher_NE is None else share.teacher_NE[rows].to(device)
            part = _loss(embedded_NE, teacher_NE, batch, place, stage, len(share.batch.queries))
            (part * processes.count).backward()
            loss += part.item()
    return processes.total(loss)


def _cached(replica: Replica, share: Share, stage: StagePart, batch_tokens: int, seed: int) -> float:
    """GradCache over this process's texts, under the loss of all."""
    processes, device = replica.processes, replica.device
    own = share.texts[processes.rank]
    groups = list(batches([len(share.tokens[text].ids) for text in own], batch_tokens))
    missing = processes.most(len(groups)) - len(groups)
    packed = [pack([share.tokens[own[i]] for i in group]).to(device) for group in groups]
    packed += [pack([share.filler]).to(device)] * missing
    back = torch.tensor(np.argsort([i for group in groups for i in group]), dtype=torch.int64, device=device)
    sizes = [len(texts) for texts in share.texts]
    place: dict[Text, int] = {}
    for at, text in enumerate(text for texts in share.texts for text in texts):
        place.setdefault(text, at)

    teacher_NE = None if share.teacher_NE is None else processes.gather(share.teacher_NE.to(device), sizes)

    def loss_of(embedded_NE: Tensor) -> Tensor:
        gathered_NE = processes.gather(embedded_NE[back], sizes)
        return _loss(gathered_NE, teacher_NE, share.batch, place, stage, len(share.batch.queries))

    return gradcache.backward(replica.embed, packed, loss_of, seed, processes=processes.count, syncing=replica.syncing)


def _columns(batch: Batch, row: int) -> list[int]:
    return sorted({int(batch.positive_Q[row]), *np.flatnonzero(batch.allowed_QC[row]).tolist()})


def _size(share: Share, row: int) -> int:
    """Tokens of a query and of its own candidates."""
    batch = share.batch
    texts = [batch.queries[row], *(batch.candidates[c] for c in _columns(batch, row))]
    return sum(len(share.tokens[text].ids) for text in texts)


def _loss(
    embedded_NE: Tensor,
    teacher_NE: Tensor | None,
    batch: Batch,
    place: Mapping[Text, int],
    stage: StagePart,
    total: int,
) -> Tensor:
    query_Q, candidate_C = (
        torch.tensor([place[text] for text in texts], device=embedded_NE.device)
        for texts in (batch.queries, batch.candidates)
    )
    return batch_loss(
        embedded_NE[query_Q],
        embedded_NE[candidate_C],
        batch,
        stage,
        total,
        teacher_QE=None if teacher_NE is None else teacher_NE[query_Q],
        teacher_CE=None if teacher_NE is None else teacher_NE[candidate_C],
    )


def make_optimizer(network: nn.Module, tune: TunePart, optim: OptimPart) -> torch.optim.Optimizer:
    """AdamW over what trains: backbone and pooling block apart, no decay on latents, norms and biases."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and "norm" not in name and not name.endswith("latents")
            groups.setdefault((name.startswith("head."), decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": optim.lr,
                "lr_ratio": tune.pooling_lr_ratio if in_head else 1.0,
                "weight_decay": optim.weight_decay if decays else 0.0,
            }
            for (in_head, decays), parameters in groups.items()
        ]
    )


def learning_rate(optim: OptimPart, step: int) -> float:
    """Of the step numbered from 0: linear warm-up, then linear decay that would reach zero one step after the last."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    return optim.lr * (optim.steps - step) / (optim.steps - optim.warmup_steps)


def update(network: nn.Module, optimizer: torch.optim.Optimizer, lr: float, clip: float) -> float:
    """Clip, step, zero. Returns the gradient's norm before clipping; FloatingPointError, and no step, if not finite."""
    trained: Sequence[nn.Parameter] = [p for p in network.parameters() if p.requires_grad]
    # whole before it is compared: of gradients that are cut, each process has a part of the norm
    whole = full(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
    torch.nn.utils.clip_grads_with_norm_(trained, clip, whole)
    norm = float(whole)
    if not np.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(f"gradient norm is {norm}")
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
