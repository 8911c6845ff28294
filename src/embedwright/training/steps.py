"""The batch of a step, and the step itself: `train` and a dry run take the same ones."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from embedwright.model.embedder import Embedder
from embedwright.processes import Processes
from embedwright.training.batches.blend import Source
from embedwright.training.batches.feed import LocalBatch, Teach, batch_of_step, local_batch
from embedwright.training.engine.optim import learning_rate, update
from embedwright.training.engine.parallel import replicate
from embedwright.training.engine.step import accumulate
from embedwright.training.recipe import Recipe
from embedwright.training.run import memory
from embedwright.training.run.watch import HeadActivity, chance

_LOOK_EVERY = 10  # steps between two looks at what the pooling block does


class Steps:
    """The steps of a recipe on its model, one process's part of each. Stages go by their number, steps from 0."""

    def __init__(self, recipe: Recipe, model: Embedder, processes: Processes) -> None:
        self.recipe, self.model, self.processes = recipe, model, processes
        self.activity = HeadActivity(model.network.head)  # before FSDP cuts the head
        self.replica = replicate(processes, model.network, recipe.run.parallel)

    def batch(self, number: int, sources: Sequence[Source], step: int, teach: Teach | None) -> LocalBatch:
        """Makes this process's part of a step's batch. It asks no other process, so it may run ahead of its step."""
        model = self.model
        batch = batch_of_step(self.recipe, number, sources, model.contract, step)
        return local_batch(batch, model.text_tokenizer, model.contract, self.processes, teach)

    def take(
        self, number: int, step: int, local: LocalBatch, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], str | None]:
        """Updates the weights. Returns the step's record, and what is not finite: then nothing was updated."""
        recipe, stage, device = self.recipe, self.recipe.stages[number], self.model.device
        optim = stage.optim
        started = time.perf_counter()
        memory.forget_peak(device)
        self.activity.looks = step % _LOOK_EVERY == 0 or step == optim.steps - 1
        seed = int(np.random.default_rng([recipe.seed, number, step, 1]).integers(2**62))
        loss, tokens = accumulate(self.replica, local, stage, batch_tokens=recipe.run.batch_tokens, seed=seed)
        lr = learning_rate(optim, step)
        norm, problem = math.nan, None
        try:
            if not math.isfinite(loss):
                optimizer.zero_grad(set_to_none=True)
                raise FloatingPointError(f"the loss is {loss}")
            norm = update(self.model.network, optimizer, lr, optim.clip)
        except FloatingPointError as error:
            problem = str(error)
        peak = memory.peak(device)
        record = {
            "stage": stage.name,
            "step": step + 1,
            "loss": loss if math.isfinite(loss) else None,
            "chance": chance(local.batch),
            "lr": lr,
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens": tokens,
            "seconds": round(time.perf_counter() - started, 4),
            "peak_mb": None if peak is None else round(peak / 2**20),
            "ids": local.batch.ids_hash(),
            **self.activity.take(),
        }
        return record, problem
