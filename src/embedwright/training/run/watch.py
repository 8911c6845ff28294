"""Checks for silent failures: weights that never move, a loss that stays at chance, an inert pooling block."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedwright.model.pooling import LatentPooling
from embedwright.processes import Processes
from embedwright.training.batches.batch import Batch
from embedwright.training.engine.optim import projection_of
from embedwright.training.engine.parallel import trainable_parameters

logger = logging.getLogger(__name__)

FILE = "nonfinite.jsonl"
UPDATES = 10  # over which the optimizer must have moved every trained tensor
_SHIELDED = 2  # updates in which tensors that start at zero keep the gradient from their partners
TRIES = 3  # steps in a row without a finite loss and gradient
_STUCK_OVER, _STUCK_WITHIN = 50, 0.02  # steps; relative distance from the loss at chance
_INERT = 1e-3  # share of a state's length
_TOKENS = 32  # tokens on which the head is measured


class MovedWeights:
    """Watches an optimizer's first updates. Raises RuntimeError for unmoved tensors, then or in `check`.

    A tensor has moved once a gradient reached it and the optimizer holds a nonzero moment and a learning rate for it.
    Its values prove nothing: early in a warm-up an update may be smaller than their last bit.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
        projection = projection_of(optimizer)
        self.trained = trainable_parameters(network) | ({} if projection is None else {"projection": projection})
        self.reached: set[str] = set()
        self.moved: set[str] = set()
        self.updates, self.processes = 0, processes
        self.optimizer = optimizer
        self.hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._look()),
            optimizer.register_step_post_hook(lambda *_: self._updated()),
        ]

    def _look(self) -> None:
        for name in self.trained.keys() - self.reached:
            gradient = self.trained[name].grad
            if gradient is not None and _own(gradient).any():
                self.reached.add(name)

    def _updated(self) -> None:
        rates = {id(p): float(group["lr"]) for group in self.optimizer.param_groups for p in group["params"]}
        for name in self.reached - self.moved:
            moment = self.optimizer.state.get(self.trained[name], {}).get("exp_avg")
            if moment is not None and rates.get(id(self.trained[name]), 0.0) > 0 and _own(moment).any():
                self.moved.add(name)
        self.updates += 1
        if self.updates == UPDATES:
            self.check()

    def check(self) -> None:
        """Checks once, at the latest at the end of a stage. Too few updates prove nothing, and pass."""
        if not self.hooks:
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if self.updates <= _SHIELDED:
            return
        for what, seen in (("had no gradient", self.reached), ("were not moved by the optimizer", self.moved)):
            # another process may hold the part of a sharded tensor that moves
            still = [name for name in self.trained if not self.processes.all_max(name in seen)]
            if still:
                raise RuntimeError(
                    f"{len(still)} of {len(self.trained)} trained tensors {what} in {self.updates} updates, "
                    f"e.g. {still[0]}: the run would train nothing there"
                )


def _own(tensor: Tensor) -> Tensor:
    local = getattr(tensor, "to_local", None)
    return tensor.detach() if local is None else local().detach()


class HeadActivity:
    """Measures how much the pooling block changes its input, on some tokens of the next forward after `looks` is set.

    `head_change` is the mean of |head(h) - h| / |h|. `head_entropy`, for a latent block, is the mean entropy of its
    attention, divided by log R: at 1 it attends to all latents equally.
    """

    def __init__(self, head: nn.Module) -> None:
        self.looks, self.found = False, dict[str, tuple[Tensor, float]]()  # a number on the device, and what divides it
        if any(True for _ in head.parameters()):
            head.register_forward_hook(self._see)

    def _see(self, head: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not self.looks:
            return
        self.looks = False
        with torch.no_grad():
            h_TD, out_TD = (x[:_TOKENS].detach() for x in (inputs[0], output))
            self.found["head_change"] = ((out_TD - h_TD).norm(dim=-1) / h_TD.norm(dim=-1)).mean(), 1.0
            if isinstance(head, LatentPooling):
                weights_HTR = head.attention_weights(h_TD).float()
                entropy = -(weights_HTR * weights_HTR.clamp_min(1e-12).log()).sum(-1).mean()
                self.found["head_entropy"] = entropy, math.log(max(weights_HTR.shape[-1], 2))

    def take(self) -> dict[str, float]:
        """Returns what was measured since the last call: after the step, when a GPU is waited for anyway."""
        found, self.found = self.found, {}
        return {name: float(value) / by for name, (value, by) in found.items()}


def warn_if_inert(records: Sequence[dict[str, Any]]) -> None:
    """Logs a warning if the pooling block ended a stage as the identity that it started as."""
    changes = [record["head_change"] for record in records if "head_change" in record]
    if changes and changes[-1] < _INERT:
        logger.warning("the pooling block stayed inert: it changes states by %.1e of their length", changes[-1])


def chance(batch: Batch) -> float:
    """Returns the loss of a model that cannot tell texts apart: the mean of log(number of candidates).

    For rows that CoSENT takes, it is the log of 1 + the number of pairs of their group that it orders.
    """
    chance_Q = np.log(batch.masks.negative_QC.sum(axis=1) + 1)
    group_Q, score_Q = batch.targets.group_Q, batch.targets.score_Q
    if group_Q is not None and score_Q is not None:
        for group in set(group_Q.tolist()) - {-1}:
            score_S = score_Q[group_Q == group]
            chance_Q[group_Q == group] = np.log1p((score_S[:, None] > score_S).sum())
    return float(chance_Q.mean())


def stuck(records: Sequence[dict[str, Any]]) -> bool:
    """Returns whether the loss of a stage's last steps has stayed at chance."""
    last = [record for record in records[-_STUCK_OVER:] if record["loss"] is not None]
    if len(last) < _STUCK_OVER:
        return False
    loss, at_chance = (sum(record[key] for record in last) for key in ("loss", "chance"))
    return bool(at_chance > 0 and abs(loss / at_chance - 1) < _STUCK_WITHIN)


class NonFinite:
    """Counts steps without a finite loss and gradient, and records their rows. TRIES of them in a row stop the run."""

    def __init__(self, file: Path, processes: Processes) -> None:
        self.file, self.processes, self.tries = file, processes, 0

    def fine(self) -> None:
        self.tries = 0

    def note(self, stage: str, step: int, what: str, ids: list[str]) -> None:
        """Records such a step. Raises FloatingPointError at the last try."""
        self.tries += 1
        if self.processes.is_rank_0:
            with self.file.open("a") as stream:
                stream.write(json.dumps({"stage": stage, "step": step, "what": what, "ids": ids}) + "\n")
        logger.warning("stage %s, step %d: %s, no update (the rows are in %s)", stage, step, what, self.file)
        if self.tries == TRIES:
            raise FloatingPointError(
                f"stage {stage}, step {step}: {what}, for the third step in a row. The weights are those "
                f"from before these steps, the last checkpoint is good, the rows are in {self.file}"
            )
