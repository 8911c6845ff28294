"""What a recipe takes on this device: two real steps of each stage, on its largest batch. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch

from embedwright.host import restored_rng
from embedwright.model.embedder import Embedder
from embedwright.processes import start
from embedwright.training.cost import GB
from embedwright.training.engine.optim import make_optimizer
from embedwright.training.lengths import Tokens, sampled, stand_ins
from embedwright.training.plan import columns
from embedwright.training.recipe import Recipe
from embedwright.training.run.checks import check_fits_model, open_checked
from embedwright.training.run.distill import projection_to, teacher_of
from embedwright.training.run.start import start_model
from embedwright.training.steps import Steps

LOOKED_AT_ROWS = 16_384  # rows searched for a stage's largest batch
HEAD = ["stage", "steps", "tokens a step", "largest", "peak GB", "seconds of the largest", "hours"]


@dataclass(frozen=True)
class Measured:
    """One stage on this device: the tokens of its steps, and peak memory and seconds of a step on the largest batch.

    `seconds` is that of a step with the mean number of tokens, as seconds follow tokens.
    """

    stage: str
    steps: int
    tokens: Tokens
    peak_mb: int
    largest_seconds: float

    @property
    def seconds(self) -> float:
        return self.largest_seconds * self.tokens.step / self.tokens.largest


@restored_rng()
def measure(recipe: Recipe, count: int = 2) -> tuple[list[Measured], Embedder]:
    """Takes `count` real steps of each stage on its largest batch, and returns what they took, with the model.

    The first step does not count: it has no optimizer state yet, and some things are done for the first time. Of the
    others the median counts. Neither reads nor writes `run.out`. All processes must call this; memory and seconds are
    the most of any of them. InputError as in `train`, FloatingPointError if a loss or gradient is not finite.
    """
    processes = start(recipe.run.timeout_minutes)
    with processes.together():
        sources = open_checked(recipe)
        model = start_model(recipe, processes)
        check_fits_model(recipe, sources, model)
    steps = Steps(recipe, model, processes)
    found = []
    for number, stage in enumerate(recipe.stages):
        tokenizer, contract = model.text_tokenizer, model.contract
        tokens = sampled(recipe, number, sources[number], tokenizer, contract, rows=LOOKED_AT_ROWS)
        teacher = teacher_of(stage, sources[number], contract)
        projection = projection_to(teacher, recipe, number, model)
        optimizer = make_optimizer(steps.part(number), recipe.tune, stage.optim, projection)
        teach = None if teacher is None else teacher.encode
        batch = steps.batch(number, stand_ins(stage, sources[number]), tokens.largest_step, teach)
        records = []
        for _ in range(count):
            record, problem = steps.take(number, tokens.largest_step, batch, optimizer)
            if problem is not None:
                raise FloatingPointError(f"stage {stage.name}, step {record['step']}: {problem}")
            records.append(record)
        peak = int(processes.all_max(records[-1]["peak_mb"] or 0))
        seconds = processes.all_max(median(record["seconds"] for record in records[1:]))
        found.append(Measured(stage.name, stage.optim.steps, tokens, peak, seconds))
    return found, model


def dry_run(recipe: Recipe) -> list[str]:
    """Measures memory and time of a recipe in two steps of each stage (`measure`), as lines of text."""
    stages, model = measure(recipe)
    rows, hours, whole = [HEAD], 0.0, True
    for stage, found in zip(recipe.stages, stages, strict=True):
        whole &= found.tokens.rows == stage.optim.steps * stage.optim.batch_queries
        stage_hours = found.steps * found.seconds / 3600
        hours += stage_hours
        gigabytes = f"{found.peak_mb * 2**20 / GB:.2f}" if found.peak_mb else "?"
        counts = [f"{count:,.0f}" for count in (found.steps, found.tokens.step, found.tokens.largest)]
        rows.append([stage.name, *counts, gigabytes, f"{found.largest_seconds:.3g}", f"{stage_hours:.2f}"])
    processes = start()
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "this CPU"
    each = "" if processes.count == 1 else f", {processes.count} processes ({recipe.run.parallel})"
    return [
        f"dry run on {device}{each}: two steps of each stage on its largest batch"
        + ("" if whole else f" of {LOOKED_AT_ROWS:,} rows"),
        *columns(rows),
        f"all steps: {hours:.2f} hours. Not included: evaluation, mining, a teacher's vectors, checkpoints.",
    ]
