from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from embedwright.model.embedder import Embedder
from embedwright.processes import ALONE
from embedwright.training.batches.batch import Batch, Masks, Targets
from embedwright.training.engine.optim import make_optimizer
from embedwright.training.losses.terms import cosent
from embedwright.training.parts import OptimPart, TunePart
from embedwright.training.run.watch import (
    TRIES,
    UPDATES,
    HeadActivity,
    MovedWeights,
    NonFinite,
    chance,
    stuck,
    warn_if_inert,
)


def trained(rate: float = 0.1) -> tuple[nn.Linear, torch.optim.Optimizer, MovedWeights]:
    linear = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=rate)
    return linear, optimizer, MovedWeights(linear, optimizer, ALONE)


def update(linear: nn.Linear, optimizer: torch.optim.Optimizer, *, bias: float = 1.0) -> None:
    linear.weight.grad, linear.bias.grad = torch.ones(2, 3), torch.full((2,), bias)
    optimizer.step()


def test_weights_that_move_are_fine_and_are_not_watched_any_longer() -> None:
    linear, optimizer, watch = trained()
    for _ in range(UPDATES):
        update(linear, optimizer)
    assert watch.moved == {"weight", "bias"} and not watch.hooks
    for _ in range(UPDATES):
        update(linear, optimizer, bias=0.0)
    assert watch.updates == UPDATES


def test_a_tensor_without_a_gradient_is_named_at_the_last_of_the_first_updates() -> None:
    linear, optimizer, _ = trained()
    for _ in range(UPDATES - 1):
        update(linear, optimizer, bias=0.0)
    with pytest.raises(RuntimeError, match=r"1 of 2 trained tensors had no gradient in 10 updates, e\.g\. bias"):
        update(linear, optimizer, bias=0.0)


def test_a_projection_that_stands_still_is_named() -> None:
    linear, projection = nn.Linear(3, 2), nn.Parameter(torch.ones(4, 2))
    optim = OptimPart(lr=0.1, steps=1, batch_queries=1)
    optimizer = make_optimizer(linear, TunePart(), optim, projection)
    MovedWeights(linear, optimizer, ALONE)
    for _ in range(UPDATES - 1):
        update(linear, optimizer)
    with pytest.raises(RuntimeError, match=r"1 of 3 trained tensors had no gradient .*, e\.g\. projection"):
        update(linear, optimizer)


def test_a_gradient_that_moves_nothing_is_named_too() -> None:
    linear, optimizer, watch = trained(rate=0.0)
    for _ in range(4):
        update(linear, optimizer)
    with pytest.raises(
        RuntimeError, match=r"2 of 2 trained tensors were not moved by the optimizer in 4 updates, e\.g\. weight"
    ):
        watch.check()


def test_one_gradient_in_time_is_enough_and_two_updates_say_nothing() -> None:
    linear, optimizer, watch = trained()
    for step in range(UPDATES):
        update(linear, optimizer, bias=float(step == UPDATES - 1))
    linear, optimizer, watch = trained()
    update(linear, optimizer, bias=0.0)
    update(linear, optimizer, bias=0.0)
    watch.check()


@pytest.mark.parametrize(
    ("start", "rate", "dtype"),
    [
        (1.0, 1e-9, torch.float32),  # lr 1e-6 with a warm-up over 1,000 steps
        (8.0, 1.6e-8, torch.float32),  # 8e-6 over 500, and a norm's weight of 8
        (1.0, 1e-4, torch.bfloat16),
    ],
)
def test_updates_below_the_last_bit_of_a_weight_are_fine(start: float, rate: float, dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(4, bias=False, dtype=dtype)
    nn.init.constant_(norm.weight, start)
    optimizer = torch.optim.AdamW(norm.parameters(), lr=rate, weight_decay=0.0)
    watch = MovedWeights(norm, optimizer, ALONE)
    for _ in range(UPDATES):
        norm.weight.grad = torch.ones(4, dtype=dtype)
        optimizer.step()
    assert (norm.weight == start).all()  # nothing is seen in the numbers themselves
    assert watch.moved == {"weight"} and not watch.hooks


def test_weights_that_the_optimizer_does_not_have_are_named() -> None:
    linear = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([linear.weight], lr=0.1)
    MovedWeights(linear, optimizer, ALONE)
    for _ in range(UPDATES - 1):
        update(linear, optimizer)
    with pytest.raises(RuntimeError, match=r"1 of 2 trained tensors were not moved .* e\.g\. bias"):
        update(linear, optimizer)


@pytest.mark.parametrize("pooling", ["latent", "mlp", "mean"])
def test_what_a_head_changes_is_what_it_gives_less_what_it_gets(
    tiny_decoder: Callable[..., Path], pooling: Any
) -> None:
    sizes = {} if pooling == "mean" else {"latents": 8, "heads": 4, "multiple": 1}
    model = Embedder.from_decoder(tiny_decoder("llama"), pooling=pooling, **sizes)
    head, packed = model.network.head, model.tokenize(["how do tides work?", "the moon and the sea"])
    activity = HeadActivity(head)
    assert model.embed(packed) is not None and activity.take() == {}  # nobody asked
    activity.looks = True
    model.embed(packed)
    found = activity.take()
    if pooling == "mean":
        assert found == {}
        return
    assert found["head_change"] == 0  # the identity that it starts as
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.1)
    activity.looks = True
    hidden_TD = model.network.hidden(packed)
    out_TD = head(hidden_TD, packed)
    found = activity.take()
    rows = zip(hidden_TD[:32], out_TD[:32], strict=True)
    expected = np.mean([float((out - h).norm() / h.norm()) for h, out in rows])
    assert found["head_change"] == pytest.approx(expected, rel=1e-5) and expected > 0.01
    if pooling == "latent":
        weights = head.attention_weights(hidden_TD[:32]).detach().double().numpy()
        assert found["head_entropy"] == pytest.approx(
            -(weights * np.log(weights)).sum(-1).mean() / math.log(8), rel=1e-4
        )
    else:
        assert "head_entropy" not in found


def test_an_inert_head_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_if_inert([])
        warn_if_inert([{"head_change": 0.0}, {}, {"head_change": 0.02}])
        assert not caplog.records
        warn_if_inert([{"head_change": 0.02}, {"head_change": 1e-5}, {}])
    assert "stayed inert: it changes states by 1.0e-05" in caplog.text


def batch(allowed_QC: list[list[bool]]) -> Batch:
    negative_QC = np.array(allowed_QC)
    masks = Masks(np.zeros(len(allowed_QC), np.int64), negative_QC, negative_QC)
    return Batch([("", "a")] * len(allowed_QC), [("", "b")] * 4, [], masks)


def test_chance_is_the_loss_of_equal_scores() -> None:
    allowed = batch([[False, True, True, True], [False, True, False, False], [False] * 4])
    assert chance(allowed) == pytest.approx((math.log(4) + math.log(2) + 0) / 3)


def test_chance_of_scored_rows_is_cosent_of_equal_cosines() -> None:
    plain = batch([[False, True, True, True], *[[False] * 4] * 4])
    targets = Targets(group_Q=np.array([-1, 0, 0, 0, 1]), score_Q=np.array([np.nan, 1.0, 3.0, 3.0, 2.0]))
    one = torch.tensor([[1.0, 0.0]])
    rows = one.expand(3, 2)
    blind = cosent(rows, rows, torch.tensor([1.0, 3.0, 3.0]), 0.05).item()  # two pairs to be ordered
    assert blind == pytest.approx(math.log(3))
    assert chance(replace(plain, targets=targets)) == pytest.approx((math.log(4) + 3 * blind + 0) / 5)


def test_a_loss_that_stays_at_chance_is_stuck() -> None:
    at_chance = [{"loss": 3.0 + 0.2 * (-1) ** i, "chance": 3.0} for i in range(60)]
    assert stuck(at_chance) and not stuck(at_chance[:49])
    assert not stuck([{"loss": 2.5, "chance": 3.0}] * 60)
    assert not stuck([{"loss": 5.0, "chance": 3.0}] * 60)
    assert stuck([*[{"loss": None, "chance": 3.0}] * 3, *at_chance[:50]])


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    watch = NonFinite(tmp_path / "nonfinite.jsonl", ALONE)
    for step in (1, 2):
        watch.note("s", step, "the loss is nan", ["a", "b"])
    watch.fine()
    for step in range(TRIES - 1):
        watch.note("s", 4 + step, "the loss is inf", ["c"])
    with pytest.raises(FloatingPointError, match=r"stage s, step 6: the loss is inf, for the third step in a row"):
        watch.note("s", 6, "the loss is inf", ["d"])
    rows = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 5, 6] and rows[0]["ids"] == ["a", "b"]
