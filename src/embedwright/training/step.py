"""One optimizer step: texts into one packed forward, or into several where they exceed the token budget.

N texts of a batch, Q queries, E embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from embedwright.model.embedder import Embedder
from embedwright.packing import batches, pack
from embedwright.text import TokenizedText, tokenize
from embedwright.training import gradcache
from embedwright.training.batch import Batch, Text
from embedwright.training.loss import info_nce
from embedwright.training.recipe import OptimPart, TunePart


def accumulate(model: Embedder, batch: Batch, *, temperature: float, batch_tokens: int, seed: int) -> tuple[float, int]:
    """Adds the gradient of the batch's mean loss to the parameters. Returns the loss and the number of tokens.

    A batch beyond `batch_tokens` is split by queries where they share no candidates, which is exact; else GradCache.
    """
    tokens = tokenize_batch(model, batch)
    total = sum(len(t.ids) for t in tokens.values())
    if total <= batch_tokens or not batch.alone():
        return _backward(model, batch, tokens, temperature, batch_tokens, seed, 1.0), total
    loss = 0.0
    for part_number, rows in enumerate(_row_groups(batch, tokens, batch_tokens)):
        weight = len(rows) / len(batch.queries)
        part_seed = seed + 1000 * (part_number + 1)
        loss += _backward(model, batch.take(rows), tokens, temperature, batch_tokens, part_seed, weight)
    return loss, total


def tokenize_batch(model: Embedder, batch: Batch) -> dict[Text, TokenizedText]:
    """Each distinct text of the batch, tokenised once."""
    by_prefix: dict[str, list[str]] = {}
    for prefix, text in dict.fromkeys([*batch.queries, *batch.candidates]):
        by_prefix.setdefault(prefix, []).append(text)
    backend = model.tokenizer.backend_tokenizer
    return {
        (prefix, text): tokens
        for prefix, texts in by_prefix.items()
        for text, tokens in zip(texts, tokenize(backend, model.contract, texts, prefix), strict=True)
    }


def _backward(
    model: Embedder,
    batch: Batch,
    tokens: Mapping[Text, TokenizedText],
    temperature: float,
    batch_tokens: int,
    seed: int,
    weight: float,
) -> float:
    texts = list(dict.fromkeys([*batch.queries, *batch.candidates]))
    groups = list(batches([len(tokens[t].ids) for t in texts], batch_tokens))
    packed = [pack([tokens[texts[i]] for i in group]) for group in groups]
    place = {texts[i]: at for at, i in enumerate(i for group in groups for i in group)}
    device = model.device
    query_Q = torch.tensor([place[t] for t in batch.queries], device=device)
    candidate_C = torch.tensor([place[t] for t in batch.candidates], device=device)
    positive_Q = torch.from_numpy(batch.positive_Q).to(device)
    allowed_QC = torch.from_numpy(batch.allowed_QC).to(device)

    def loss_of(embedded_NE: Tensor) -> Tensor:
        q_QE, c_CE = embedded_NE[query_Q], embedded_NE[candidate_C]
        return weight * info_nce(q_QE, c_CE, positive_Q, allowed_QC, temperature)

    return gradcache.backward(model.embed, packed, loss_of, seed)


def _row_groups(batch: Batch, tokens: Mapping[Text, TokenizedText], batch_tokens: int) -> list[list[int]]:
    sizes = []
    for i, query in enumerate(batch.queries):
        columns = np.append(np.flatnonzero(batch.allowed_QC[i]), batch.positive_Q[i])
        sizes.append(len(tokens[query].ids) + sum(len(tokens[batch.candidates[c]].ids) for c in columns))
    return list(batches(sizes, batch_tokens))


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
    norm = float(torch.nn.utils.clip_grad_norm_(trained, clip))
    if not np.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(f"gradient norm is {norm}")
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
