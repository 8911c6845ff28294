"""What a recipe takes on this device: two real steps of each stage, on its largest batch. Nothing is written."""

from __future__ import annotations

import torch

from embedwright.host import own_random_numbers
from embedwright.processes import start
from embedwright.training.cost import GB
from embedwright.training.engine.optim import make_optimizer
from embedwright.training.lengths import sampled, stand_ins
from embedwright.training.plan import columns
from embedwright.training.recipe import Recipe
from embedwright.training.run.checks import check_reading, open_checked
from embedwright.training.run.distill import teacher_of
from embedwright.training.run.start import start_model
from embedwright.training.steps import Steps

LOOKED_AT_ROWS = 16_384  # of a stage, for its largest batch
HEAD = ["stage", "steps", "tokens a step", "largest", "peak GB", "seconds of the largest", "hours"]


@own_random_numbers()
def dry_run(recipe: Recipe) -> list[str]:
    """Measures memory and time, as lines of text. Neither reads nor writes `run.out`.

    The second step counts: it has the optimizer's state, and nothing is done for the first time. The hours take the
    seconds of a step to follow its tokens. All processes must call this; memory and seconds are the most of any of
    them. InputError as in `train`, FloatingPointError if a loss or gradient is not finite.
    """
    processes = start()
    sources = open_checked(recipe)
    model = start_model(recipe, processes)
    check_reading(recipe, sources, model)
    steps = Steps(recipe, model, processes)
    rows, hours, whole = [HEAD], 0.0, True
    for number, stage in enumerate(recipe.stages):
        tokenizer, contract = model.text_tokenizer, model.contract
        tokens = sampled(recipe, number, sources[number], tokenizer, contract, LOOKED_AT_ROWS)
        whole &= tokens.rows == stage.optim.steps * stage.optim.batch_queries
        teacher = teacher_of(stage, sources[number], contract, model.network.config.hidden_size)
        optimizer = make_optimizer(model.network, recipe.tune, stage.optim)
        batch = steps.batch(number, stand_ins(stage, sources[number]), tokens.largest_step, teacher)
        for _ in range(2):
            record, problem = steps.take(number, tokens.largest_step, batch, optimizer)
            if problem is not None:
                raise FloatingPointError(f"stage {stage.name}, step {record['step']}: {problem}")
        peak = processes.most(record["peak_mb"] or 0)
        seconds = processes.most(round(record["seconds"] * 1e4)) / 1e4
        stage_hours = stage.optim.steps * seconds * tokens.step / tokens.largest / 3600
        hours += stage_hours
        gigabytes = f"{peak * 2**20 / GB:.2f}" if peak else "?"
        counts = [f"{count:,.0f}" for count in (stage.optim.steps, tokens.step, tokens.largest)]
        rows.append([stage.name, *counts, gigabytes, f"{seconds:.3g}", f"{stage_hours:.2f}"])
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "this CPU"
    each = "" if processes.count == 1 else f", {processes.count} processes ({recipe.run.parallel})"
    return [
        f"dry run on {device}{each}: two steps of each stage on its largest batch"
        + ("" if whole else f" of {LOOKED_AT_ROWS:,} rows"),
        *columns(rows),
        f"all steps: {hours:.2f} hours. Not included: evaluation, mining, a teacher's vectors, checkpoints.",
    ]
