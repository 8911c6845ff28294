"""`train`: all stages of a recipe, in order, resuming by itself from the newest checkpoint."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedwright.config import ConfigError
from embedwright.evaluation.suite import evaluate
from embedwright.model import probe
from embedwright.model.adapter import has_lora, idle_adapters
from embedwright.model.embedder import Embedder
from embedwright.training.batch import make_batch
from embedwright.training.blend import Source, rows_at
from embedwright.training.checkpoint import (
    RunState,
    newest,
    read_state,
    read_weights,
    restore_optimizer,
    save_checkpoint,
)
from embedwright.training.recipe import Recipe, StagePart, expand
from embedwright.training.sources import data_fingerprint, open_sources
from embedwright.training.step import accumulate, learning_rate, make_optimizer, update
from embedwright.training.track import Tracker, read_records, write_records

logger = logging.getLogger(__name__)

OnStep = Callable[[dict[str, Any]], None]
OnEvaluation = Callable[[str], None]


def train(recipe: Recipe, *, on_step: OnStep | None = None, on_evaluation: OnEvaluation | None = None) -> Embedder:
    """Run every stage that is not done yet and return the embedder, adapters merged, in float32.

    Below `run.out`: `checkpoints/`, `metrics.jsonl` (one object a step), `evaluations.jsonl` (one a suite). `on_step`
    gets each step's record, `on_evaluation` a line of progress. ConfigError where the run in that folder is of another
    recipe or of other data; FloatingPointError, before the update, where a loss or gradient is not finite.
    """
    out = Path(recipe.run.out)
    sources = open_sources(recipe)
    state = RunState(stage=0, step=0, recipe=recipe.hash(), data=data_fingerprint(sources))
    checkpoint = newest(out / "checkpoints")
    if checkpoint is not None:
        state = _continue(checkpoint, state, out)
    model = start_model(recipe)
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None:
        _load_trained(model, read_weights(checkpoint))
    else:
        (out / "evaluations.jsonl").unlink(missing_ok=True)  # of a run that ended before its first checkpoint
    names = [stage.name for stage in recipe.stages]
    with Tracker(out, recipe.run.tracker, names, state.stage, state.step) as tracker:
        run = _Run(recipe, model, tracker, out, on_step, on_evaluation)
        if checkpoint is None:
            run.evaluate("start", 0)
        for number in range(state.stage, len(recipe.stages)):
            begin = replace(state, stage=number, step=state.step if number == state.stage else 0)
            run.stage(recipe.stages[number], sources[number], begin, checkpoint if begin.step else None)
    return finish(model)


def start_model(recipe: Recipe) -> Embedder:
    """The model before its first step: decoder, identity head, fresh adapters; probed."""
    spec, tune = recipe.model, recipe.tune
    frozen_in_bf16 = recipe.run.precision == "bf16" and tune.method == "lora"
    sizes = (
        {}
        if spec.pooling in ("mean", "last")
        else spec.model_dump(include={"latents", "heads", "head_dim", "multiple"})
    )
    model = Embedder.from_decoder(
        spec.base,
        pooling=spec.pooling,
        attention=spec.attention,
        layers=spec.layers,
        max_tokens=spec.max_tokens,
        dtype="bfloat16" if frozen_in_bf16 else "float32",
        seed=recipe.seed,
        **sizes,
    )
    network = model.network
    network.mixed = recipe.run.precision == "bf16"
    if tune.method == "lora":
        torch.manual_seed(recipe.seed)
        model.add_lora(tune.rank, tune.alpha, tune.dropout)
    if tune.gradient_checkpointing:
        network.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    probe.check(network)
    network.train()
    return model


def finish(model: Embedder) -> Embedder:
    """Merge the adapters in float32, prove that the merge changed nothing, and probe. RuntimeError if it did."""
    network = model.network
    network.float().eval()
    network.mixed = False
    if has_lora(network.backbone):
        if idle := idle_adapters(network.backbone):
            raise RuntimeError(f"{len(idle)} LoRA adapters are still zero after training, e.g. {idle[0]}")
        model.merge()
    network.requires_grad_(False)
    probe.check(network)
    return model


class _Run:
    """What stays the same from step to step."""

    def __init__(
        self,
        recipe: Recipe,
        model: Embedder,
        tracker: Tracker,
        out: Path,
        on_step: OnStep | None,
        on_evaluation: OnEvaluation | None,
    ) -> None:
        self.recipe, self.model, self.tracker, self.out = recipe, model, tracker, out
        self.on_step, self.on_evaluation = on_step, on_evaluation

    def stage(self, stage: StagePart, sources: list[Source], state: RunState, resumed: Path | None) -> None:
        recipe, network = self.recipe, self.model.network
        optimizer = make_optimizer(network, recipe.tune, stage.optim)
        if resumed is not None:
            restore_optimizer(resumed, optimizer)
        for step in range(state.step, stage.optim.steps):
            if step and recipe.eval.every and step % recipe.eval.every == 0:  # here, so that a resumed run does it too
                self.evaluate(stage.name, step)
            record = self.step(stage, sources, state.stage, step, optimizer)
            self.tracker.step(record)
            if self.on_step is not None:
                self.on_step(record)
            done = step + 1
            if done == stage.optim.steps or done % recipe.run.checkpoint_every == 0:
                save_checkpoint(
                    self.out / "checkpoints",
                    replace(state, step=done),
                    {n: p for n, p in network.named_parameters() if p.requires_grad},
                    optimizer,
                    recipe.run.keep,
                )
        probe.check(network)
        self.evaluate(stage.name, stage.optim.steps)

    def step(
        self, stage: StagePart, sources: list[Source], number: int, step: int, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        recipe, optim = self.recipe, stage.optim
        started = time.perf_counter()
        rows = rows_at(
            sources,
            step,
            batch_queries=optim.batch_queries,
            batching=stage.batching,
            seed=recipe.seed,
            stage=stage.name,
        )
        batch = make_batch(
            rows,
            self.model.contract,
            hard_negatives=stage.hard_negatives,
            in_batch=stage.in_batch_negatives,
            rng=np.random.default_rng([recipe.seed, number, step]),
        )
        seed = int(np.random.default_rng([recipe.seed, number, step, 1]).integers(2**62))
        loss, tokens = accumulate(
            self.model, batch, temperature=stage.temperature, batch_tokens=recipe.run.batch_tokens, seed=seed
        )
        where = f"stage {stage.name}, step {step + 1}, rows {batch.ids[:3]} ..."
        if not np.isfinite(loss):
            raise FloatingPointError(f"{where}: loss is {loss}")
        lr = learning_rate(optim, step)
        try:
            norm = update(self.model.network, optimizer, lr, optim.clip)
        except FloatingPointError as error:
            raise FloatingPointError(f"{where}: {error}") from None
        return {
            "stage": stage.name,
            "step": step + 1,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": tokens,
            "seconds": round(time.perf_counter() - started, 4),
            "ids": batch.ids_hash(),
        }

    def evaluate(self, stage: str, step: int) -> None:
        """Every suite of the recipe, unless this run has the result already."""
        file = self.out / "evaluations.jsonl"
        have = read_records(file)
        for suite in self.recipe.eval.suites:
            if any((h["stage"], h["step"], h["suite"]) == (stage, step, suite) for h in have):
                continue
            self.model.network.eval()
            path = suite if suite.isidentifier() else expand(suite)
            results = evaluate(self.model, path, progress=self.on_evaluation)
            self.model.network.train()
            have.append({"stage": stage, "step": step, "suite": suite, "results": json.loads(results.to_json())})
            write_records(file, have)


def _continue(checkpoint: Path, state: RunState, out: Path) -> RunState:
    found = read_state(checkpoint)
    for what in ("recipe", "data"):
        if getattr(found, what) != getattr(state, what):
            raise ConfigError(f"{out} holds a run of another {what}: choose another run.out, or remove that folder")
    logger.info("resuming %s at stage %d, step %d", out, found.stage, found.step)
    return found


def _load_trained(model: Embedder, weights: dict[str, Tensor]) -> None:
    own = {n: p for n, p in model.network.named_parameters() if p.requires_grad}
    if own.keys() != weights.keys():
        raise ValueError(f"checkpoint and model differ in {sorted(own.keys() ^ weights.keys())[:3]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
