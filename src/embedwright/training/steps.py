"""The batch of a step, and the step itself: `train` and a dry run take the same ones."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from embedwright.model.embedder import Embedder
from embedwright.processes import Processes
from embedwright.training.batches.blend import Source
from embedwright.training.batches.feed import LocalBatch, Teach, batch_of_step, local_batch
from embedwright.training.batches.sources import heldout_texts
from embedwright.training.engine.optim import learning_rate, projection_of, update
from embedwright.training.engine.parallel import replicate
from embedwright.training.engine.step import accumulate
from embedwright.training.masked import batch as masked_batches
from embedwright.training.masked import loss as masked
from embedwright.training.masked.batch import MaskedBatch, Masker
from embedwright.training.recipe import Recipe
from embedwright.training.run import memory
from embedwright.training.run.watch import HeadActivity, chance
from embedwright.training.stages import ContrastiveStage, MaskedStage

_LOOK_EVERY = 10  # steps between two looks at what the pooling block does


class Steps:
    """The steps of a recipe on its model, one process's part of each. Stages go by their number, steps from 0.

    Raises ConfigError if a masked phase lacks its mask token or its head.
    """

    def __init__(self, recipe: Recipe, model: Embedder, processes: Processes) -> None:
        self.recipe, self.model, self.processes = recipe, model, processes
        self.activity = HeadActivity(model.network.head)  # before FSDP shards the head
        self.replica = replicate(processes, model.network, recipe.run.parallel)
        self.maskers = {
            number: Masker(stage, model.text_tokenizer, model.contract)
            for number, stage in enumerate(recipe.stages)
            if isinstance(stage, MaskedStage)
        }
        self.language_head = masked.language_head(model.network, recipe.model) if self.maskers else None

    def part(self, number: int) -> nn.Module:
        """Returns the part of the network that a stage trains: a masked phase leaves the pooling block as it is."""
        backbone: nn.Module = self.model.network.backbone
        return backbone if number in self.maskers else self.model.network

    def batch(self, number: int, sources: Sequence[Source], step: int, teach: Teach | None) -> LocalBatch | MaskedBatch:
        """Makes this process's part of a step's batch. It does not communicate, so it may run ahead of its step."""
        model = self.model
        if number in self.maskers:
            return masked_batches.batch_of_step(
                self.recipe, number, sources, self.maskers[number], step, self.processes
            )
        batch = batch_of_step(self.recipe, number, sources, model.contract, step)
        return local_batch(batch, model.text_tokenizer, model.contract, self.processes, teach)

    def take(
        self, number: int, step: int, local: LocalBatch | MaskedBatch, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], str | None]:
        """Updates the weights. Returns the step's record, and what is not finite: then nothing was updated."""
        recipe, stage, device = self.recipe, self.recipe.stages[number], self.model.device
        optim = stage.optim
        started = time.perf_counter()
        memory.forget_peak(device)
        looks = step % _LOOK_EVERY == 0 or step == optim.steps - 1
        self.activity.looks = looks and number not in self.maskers
        seed = int(np.random.default_rng([recipe.seed, number, step, 1]).integers(2**62))
        self.replica = replace(self.replica, projection=projection_of(optimizer))
        loss, tokens, at_chance = self._accumulate(number, local, seed)
        lr = learning_rate(optim, step)
        norm = math.nan
        problem: str | None = None
        if self.processes.all_max(not math.isfinite(loss)):  # else one would skip what the others wait for
            optimizer.zero_grad(set_to_none=True)
            problem = "the loss of another process is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        else:
            try:
                norm = update(self.model.network, optimizer, lr, optim.clip)
            except FloatingPointError as error:
                problem = str(error)
        peak = memory.peak(device)
        record = {
            "stage": stage.name,
            "step": step + 1,
            "loss": loss if math.isfinite(loss) else None,
            "chance": at_chance,
            "lr": lr,
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens": tokens,
            "seconds": round(time.perf_counter() - started, 4),
            "peak_mb": None if peak is None else round(peak / 2**20),
            "ids": local.ids_hash(),
            **self.activity.take(),
        }
        return record, problem

    def _accumulate(self, number: int, local: LocalBatch | MaskedBatch, seed: int) -> tuple[float, int, float]:
        """Adds the gradient. Returns the loss, the tokens, and the loss at chance."""
        stage, budget = self.recipe.stages[number], self.recipe.run.batch_tokens
        if isinstance(local, MaskedBatch):
            network, head = self.model.network, self.language_head
            loss, tokens = masked.accumulate(network, head, local, self.processes, batch_tokens=budget, seed=seed)
            return loss, tokens, math.log(self.maskers[number].vocabulary)
        assert isinstance(stage, ContrastiveStage)
        loss, tokens = accumulate(self.replica, local, stage, batch_tokens=budget, seed=seed)
        return loss, tokens, chance(local.batch)

    def heldout(self, number: int, sources: Sequence[Source]) -> dict[str, float]:
        """Measures a masked phase on its held-out documents. All processes must call it."""
        texts, masker = heldout_texts(sources), self.maskers[number]
        own = masked_batches.heldout_batch(self.recipe, number, texts, masker, self.processes)
        network, budget = self.model.network, self.recipe.run.batch_tokens
        return {"documents": len(texts)} | masked.measure(network, self.language_head, own, self.processes, budget)
