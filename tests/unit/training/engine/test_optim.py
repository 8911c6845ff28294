from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import get_scheduler

from embedwright.model.embedder import Embedder
from embedwright.model.pooling import WEIGHTLESS, Kind
from embedwright.training.engine.optim import learning_rate, make_optimizer, projection_of, update
from embedwright.training.parts import OptimPart, TunePart

OPTIM = OptimPart(lr=1e-2, steps=20, batch_queries=8, weight_decay=0.1)


def test_the_learning_rate_warms_up_and_decays_linearly() -> None:
    optim = OptimPart(lr=1.0, steps=10, batch_queries=1, warmup_steps=4)
    rates = [learning_rate(optim, step) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert learning_rate(optim, 10) == 0
    plain = OptimPart(lr=2.0, steps=4, batch_queries=1)
    assert [learning_rate(plain, step) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_after_the_warm_up_the_rate_is_that_of_transformers(schedule: str) -> None:
    """Whose own warm-up begins at a rate of zero."""
    optim = OptimPart(lr=3e-4, steps=37, batch_queries=1, warmup_steps=5, schedule=schedule)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=32)
    for step in range(5, 37):
        assert learning_rate(optim, step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()
    assert [learning_rate(optim, step) for step in range(5)] == pytest.approx([3e-4 * n / 5 for n in range(1, 6)])


# ---- the optimizer


def test_betas_and_eps_are_those_of_the_recipe() -> None:
    """One update by hand, after Adam's paper, algorithm 1."""
    linear = nn.Linear(2, 1, bias=False)
    before = linear.weight.detach().clone()
    optim = OptimPart(lr=0.1, steps=1, batch_queries=1, betas=(0.5, 0.75), eps=0.3)
    optimizer = make_optimizer(linear, TunePart(), optim)
    for gradient in ([[1.0, -2.0]], [[3.0, 0.5]]):
        linear.weight.grad = torch.tensor(gradient)
        optimizer.step()
    m = v = np.zeros((1, 2))
    expected = before.double().numpy()
    for t, g in enumerate(np.array([[[1.0, -2.0]], [[3.0, 0.5]]]), start=1):
        m, v = 0.5 * m + 0.5 * g, 0.75 * v + 0.25 * g**2
        expected = expected - 0.1 * (m / (1 - 0.5**t)) / (np.sqrt(v / (1 - 0.75**t)) + 0.3)
    np.testing.assert_allclose(linear.weight.detach().numpy(), expected, rtol=1e-5)


def test_the_fused_kernel_is_asked_for_on_a_gpu_alone() -> None:
    """Weights that only pretend to be on a GPU: there is none here."""
    optim = OptimPart(lr=0.1, steps=1, batch_queries=1)
    for device in ("cpu", "cuda"):
        with FakeTensorMode():
            network = nn.Module()
            network.weight = nn.Parameter(torch.empty(3, 2, device=device))
            optimizer = make_optimizer(network, TunePart(), optim)
        assert [group["fused"] for group in optimizer.param_groups] == [True if device == "cuda" else None]


@pytest.mark.parametrize("pooling", get_args(Kind))
def test_groups_of_the_optimizer(make: Callable[..., Embedder], pooling: str) -> None:
    network = make(pooling).network
    optimizer = make_optimizer(network, TunePart(pooling_lr_ratio=3.0), OPTIM)
    name_of = {id(p): n for n, p in network.named_parameters()}
    seen = [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(seen) == sorted(n for n, p in network.named_parameters() if p.requires_grad)
    for group in optimizer.param_groups:
        names = {name_of[id(p)] for p in group["params"]}
        in_head = {n.startswith("head.") for n in names}
        assert in_head == {group["lr_ratio"] == 3.0}
        without = {n.endswith(("bias", "latents")) or ".norm" in n for n in names}
        assert without == {group["weight_decay"] == 0.0}
        assert group["weight_decay"] in (0.0, 0.1)
    kinds = {(n.startswith("head."), n.endswith(("bias", "latents")) or ".norm" in n) for n in seen}
    assert len(optimizer.param_groups) == len(kinds) and (len(kinds) == 1) == (pooling in WEIGHTLESS)


def test_full_tuning_decays_no_norm_of_the_backbone(tiny_decoder: Callable[..., Path]) -> None:
    network = Embedder.from_decoder(tiny_decoder("qwen2"), pooling="mean").network
    optimizer = make_optimizer(network, TunePart(method="full"), OPTIM)
    name_of = {id(p): n for n, p in network.named_parameters()}
    groups = {g["weight_decay"]: {name_of[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert all("norm" in n or n.endswith(".bias") for n in groups[0.0])
    assert not any("norm" in n or n.endswith(".bias") for n in groups[0.1])
    assert groups[0.0] | groups[0.1] == set(dict(network.named_parameters()))


def test_update_clips_and_scales_the_learning_rate_by_group() -> None:
    def run(scale: float) -> tuple[nn.Linear, float]:
        linear = nn.Linear(3, 2)
        nn.init.ones_(linear.weight)
        nn.init.ones_(linear.bias)
        groups = [
            {"params": [linear.weight], "lr": 0.0, "lr_ratio": 1.0},
            {"params": [linear.bias], "lr": 0.0, "lr_ratio": 0.5},
        ]
        optimizer = torch.optim.SGD(groups)
        linear.weight.grad, linear.bias.grad = torch.full((2, 3), scale), torch.full((2,), scale)
        norm = update(linear, optimizer, lr=0.1, clip=1.0)
        assert linear.weight.grad is None and linear.bias.grad is None
        return linear, norm

    linear, norm = run(0.1)  # below the clip
    assert norm == pytest.approx(0.1 * 8**0.5)
    assert torch.allclose(linear.weight, torch.tensor(0.99)) and torch.allclose(linear.bias, torch.tensor(0.995))
    linear, norm = run(10.0)
    assert norm == pytest.approx(10 * 8**0.5)
    assert torch.allclose(linear.weight, torch.tensor(1 - 0.1 / 8**0.5))
    assert torch.allclose(linear.bias, torch.tensor(1 - 0.05 / 8**0.5))


def test_a_projection_trains_at_the_heads_rate_and_counts_in_the_clip() -> None:
    linear, projection = nn.Linear(3, 2), nn.Parameter(torch.ones(4, 2))
    before = [p.detach().clone() for p in (*linear.parameters(), projection)]
    tune, optim = TunePart(pooling_lr_ratio=3.0), OptimPart(lr=0.1, steps=1, batch_queries=1)
    assert projection_of(make_optimizer(linear, tune, optim)) is None
    optimizer = make_optimizer(linear, tune, optim, projection)
    assert projection_of(optimizer) is projection
    for parameter in (*linear.parameters(), projection):
        parameter.grad = torch.full_like(parameter, 10.0)
    assert update(linear, optimizer, lr=0.1, clip=1.0) == pytest.approx(10 * 16**0.5)
    assert projection.grad is None
    state = [optimizer.state[p]["exp_avg"] / 0.1 for p in (*linear.parameters(), projection)]  # 0.1: AdamW's own
    assert all(torch.allclose(moment, torch.tensor(1 / 16**0.5)) for moment in state)
    moved = [(p.detach() - old).abs() for p, old in zip((*linear.parameters(), projection), before, strict=True)]
    assert all(
        torch.allclose(by, torch.tensor(rate), rtol=1e-3) for by, rate in zip(moved, (0.1, 0.1, 0.3), strict=True)
    )
