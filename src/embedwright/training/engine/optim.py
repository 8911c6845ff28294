"""AdamW, its learning rate, and one update of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from embedwright.training.engine.parallel import full_tensor
from embedwright.training.parts import OptimPart, TunePart


def make_optimizer(
    network: nn.Module, tune: TunePart, optim: OptimPart, projection: nn.Parameter | None = None
) -> torch.optim.Optimizer:
    """Makes AdamW over the trained weights: groups for backbone and head, no decay on latents, norms and biases.

    A `projection` to a teacher's width trains along at the head's rate. It lives in the optimizer of its stage alone,
    not in the network, so that no saved model has it. On a GPU one fused kernel updates all weights.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and "norm" not in name and not name.endswith("latents")
            groups.setdefault((name.startswith("head."), decays), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": optim.lr,
                "lr_ratio": tune.pooling_lr_ratio if in_head else 1.0,
                "weight_decay": optim.weight_decay if decays else 0.0,
            }
            for (in_head, decays), parameters in groups.items()
        ],
        betas=optim.betas,
        eps=optim.eps,
        fused=all(p.device.type == "cuda" for parameters in groups.values() for p in parameters) or None,
    )
    if projection is not None:
        group = {"params": [projection], "lr": optim.lr, "lr_ratio": tune.pooling_lr_ratio, "projection": True}
        optimizer.add_param_group(group | {"weight_decay": optim.weight_decay})
    return optimizer


def projection_of(optimizer: torch.optim.Optimizer) -> nn.Parameter | None:
    """Returns the projection that the optimizer trains along with the network, if there is one."""
    return next((group["params"][0] for group in optimizer.param_groups if group.get("projection")), None)


def learning_rate(optim: OptimPart, step: int) -> float:
    """Returns the rate of a step (from 0): linear warm-up, then the decay of `schedule`.

    `linear` and `cosine` end at zero one step after the last; `constant` stays at the highest rate.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    left, length = optim.steps - step, optim.steps - optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "cosine":
        return optim.lr * (1 - math.cos(math.pi * left / length)) / 2
    return optim.lr * left / length


def update(network: nn.Module, optimizer: torch.optim.Optimizer, lr: float, clip: float) -> float:
    """Clips the gradient, takes a step and zeroes it. Returns its norm before clipping, a projection's included.

    Raises FloatingPointError, and takes no step, if the norm is not finite.
    """
    trained: Sequence[nn.Parameter] = [p for p in network.parameters() if p.requires_grad]
    # full before it is compared: of a sharded gradient, each process has only part of the norm
    total = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
    projection = projection_of(optimizer)
    if projection is not None and projection.grad is not None:  # separately: it is never sharded
        total = torch.linalg.vector_norm(torch.stack([total, projection.grad.norm()]))
        torch.nn.utils.clip_grads_with_norm_([projection], clip, total)
    torch.nn.utils.clip_grads_with_norm_(trained, clip, total)
    norm = float(total)
    if not np.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(f"gradient norm is {norm}")
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
