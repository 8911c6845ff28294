"""`train`: all stages of a recipe, in order, resuming by itself from the newest checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from embedwright.host import restored_rng
from embedwright.model.embedder import Embedder
from embedwright.model.interop.card import card_of, facts, inherited, model_card
from embedwright.model.verify import probe
from embedwright.processes import start
from embedwright.training.batches.blend import Source
from embedwright.training.batches.feed import LocalBatch, Made, ahead, batch_of_step
from embedwright.training.batches.sources import data_fingerprint, source_fingerprints
from embedwright.training.engine.optim import make_optimizer
from embedwright.training.engine.parallel import trainable_parameters
from embedwright.training.masked.batch import MaskedBatch
from embedwright.training.recipe import Recipe
from embedwright.training.remine import refresh_every, refreshed
from embedwright.training.run import watch
from embedwright.training.run.checkpoint import (
    RunState,
    keep_newest,
    restore_optimizer,
    restore_weights,
    save_checkpoint,
)
from embedwright.training.run.checks import check_fits_model, open_checked, teachers
from embedwright.training.run.distill import Teacher, projection_to, teacher_of
from embedwright.training.run.folder import card_facts, describe_run
from embedwright.training.run.heldout import measured_once
from embedwright.training.run.resume import find_resume_point, open_folder
from embedwright.training.run.save import save_end, save_stage
from embedwright.training.run.scores import Scores
from embedwright.training.run.signals import Interrupted, StopRequest, stop_on_signal
from embedwright.training.run.start import (
    contents_of,
    load_trained,
    model_error_prefix,
    origin_fingerprint,
    start_model,
)
from embedwright.training.run.track import Tracker
from embedwright.training.run.watch import MovedWeights, NonFinite, stuck, warn_if_inert
from embedwright.training.stages import START, Stage
from embedwright.training.steps import Steps

logger = logging.getLogger(__name__)

OnStep = Callable[[dict[str, Any]], None]
OnEvaluation = Callable[[str], None]


@restored_rng()
def train(recipe: Recipe, *, on_step: OnStep | None = None, on_evaluation: OnEvaluation | None = None) -> Embedder:
    """Trains an embedder: runs every stage of a recipe that is not done yet. Resumes from the newest checkpoint.

    Args:
        recipe: What to run. `run.out` is the folder that the run fills; docs/runs.md lists its files.
        on_step: Called with the record of each step. With several processes, in rank 0 alone.
        on_evaluation: Called with lines of progress. With several processes, in rank 0 alone.

    Returns:
        The embedder in float32 with its adapters merged, on the device that trained it. It is on the CPU if that
        device lacks the room or if several processes trained. Processes other than rank 0 get the model as trained.

    Raises:
        ConfigError: The folder holds a run with another recipe, model, teacher or data; or `tune.method` needs a
            package that is missing.
        Interrupted: SIGTERM or SIGINT stopped the run, after a checkpoint. It is a KeyboardInterrupt.
        FloatingPointError: Three steps in a row were not finite. A checkpoint from before them is kept.
        RuntimeError: Some weights did not move.
    """
    processes = start(recipe.run.timeout_minutes)
    out = recipe.out
    with processes.together():
        sources = open_checked(recipe)
        with model_error_prefix(recipe):
            origin = origin_fingerprint(recipe.model)
        facts_of = {
            "recipe": recipe.decisive(),
            "data": source_fingerprints(recipe, sources),
            "model": {"files": origin},
        }
        facts_of["teacher"] = contents_of(name for _, name in teachers(recipe))
        state = RunState(0, 0, recipe.hash(), data_fingerprint(sources), origin, facts_of)
    state, checkpoint = find_resume_point(recipe, state, processes)
    with processes.together():
        model = start_model(recipe, processes)
        check_fits_model(recipe, sources, model)
        before = [card_of(recipe.model.from_)] if recipe.model.from_ else []  # its folder may go while this trains
    open_folder(out, processes)
    steps = Steps(recipe, model, processes)
    if checkpoint is not None:
        with processes.together():
            restore_weights(checkpoint, trainable_parameters(model.network))
    log: AbstractContextManager[Tracker | None] = nullcontext()
    with processes.together():
        if processes.is_rank_0:
            # a run that was killed right after a checkpoint could not remove older ones
            keep_newest(out / "checkpoints", recipe.run.keep)
            describe_run(out, recipe, sources)
            names, at = [stage.name for stage in recipe.stages], (state.stage, state.step)
            log = Tracker(out, recipe.run.tracker, names, at, recipe.model_dump(mode="json"))

    # called in rank 0 only, which has the items of the scores
    def card(stages: int, saved: Embedder, path: str) -> str:
        so_far = recipe.model_copy(update={"stages": recipe.stages[:stages]})
        known, told = facts(saved.network, saved.text_tokenizer), card_facts(so_far, sources[:stages], scores.records)
        base = known["base"] or (before[0].name if before else told["base"])
        return inherited(model_card(path=path, **known | told | {"base": base}), before)

    with stop_on_signal() as stop_requested, log as tracker:
        scores = Scores(recipe.eval, out, model, processes)
        listeners = _Listeners(tracker, on_step, on_evaluation) if processes.is_rank_0 else _Listeners()
        run = _Run(steps, scores, listeners, stop_requested, card)
        if checkpoint is None:
            scores.forget()
            run.evaluate(START, 0)
        for number in range(state.stage, len(recipe.stages)):
            begin = replace(state, stage=number, step=state.step if number == state.stage else 0)
            run.stage(sources[number], begin, checkpoint if begin.step else None)

    return save_end(recipe, model, processes, partial(card, len(recipe.stages)))


@dataclass(frozen=True)
class _Listeners:
    """Who hears of a run's progress. Only rank 0 has any."""

    tracker: Tracker | None = None
    on_step: OnStep | None = None
    on_evaluation: OnEvaluation | None = None


class _Run:
    """What stays the same from step to step."""

    def __init__(
        self,
        steps: Steps,
        scores: Scores,
        listeners: _Listeners,
        stop_requested: StopRequest,
        card: Callable[[int, Embedder, str], str],
    ) -> None:
        self.steps, self.scores, self.listeners, self.stop_requested = steps, scores, listeners, stop_requested
        self.card = card
        self.recipe, self.model, self.processes = steps.recipe, steps.model, steps.processes
        self.out = self.recipe.out
        self.nonfinite = NonFinite(self.out / watch.FILE, self.processes)

    def stage(self, sources: list[Source], state: RunState, resumed: Path | None) -> None:
        """Runs a stage from `state` to its end. `resumed` has the optimizer of one that began."""
        recipe, scores, stage = self.recipe, self.scores, self.recipe.stages[state.stage]
        part = self.steps.part(state.stage)
        with self.processes.together():
            teacher = teacher_of(stage, sources, self.model.contract)
        optimizer = make_optimizer(
            part, recipe.tune, stage.optim, projection_to(teacher, recipe, state.stage, self.model)
        )
        if resumed is not None:
            with self.processes.together():
                restore_optimizer(resumed, optimizer)
        moved = MovedWeights(part, optimizer, self.processes)
        if state.step == 0:
            self.measure(state.stage, sources, 0)
        records: list[dict[str, Any]] = []
        every, last = recipe.eval.every, stage.optim.steps
        with closing(self.batches(sources, state, teacher)) as batches:
            for step, local, waited in _with_waits(batches):
                if step and every and step % every == 0:  # here, so that a resumed run does it too
                    self.evaluate(stage.name, step)
                    if scores.gave_up(stage.name, step):
                        last = step
                        break
                records.append(self.step(local, state.stage, step, optimizer) | {"waited": waited})
                self.report(stage, records)
                done = step + 1
                stops = bool(self.processes.all_max(self.stop_requested.signal is not None))
                if stops or done == stage.optim.steps or done % recipe.run.checkpoint_every == 0:
                    self.save(replace(state, step=done), optimizer)
                if stops:
                    raise Interrupted(f"{self.stop_requested.signal or 'signal'} after stage {stage.name}, step {done}")
        moved.check()
        warn_if_inert(records)
        self.probe()
        self.evaluate(stage.name, last)
        if recipe.eval.best:
            with self.processes.together():
                best = scores.best_weights(stage.name)
            load_trained(self.model, best)
            self.probe()
        self.measure(state.stage, sources, last)
        if stage.save:  # before a checkpoint that is past this stage: until then, a killed run ends the stage again
            save_stage(recipe, self.model, self.processes, stage.name, partial(self.card, state.stage + 1))
        if recipe.eval.decides:  # the stage ended on other weights than those of its last checkpoint
            self.save(replace(state, stage=state.stage + 1, step=0), None)

    def probe(self) -> None:
        """Probes the network. Raises ProbeError in all processes."""
        network = self.model.network
        # a sharded network's forward needs all processes, and all get the same result
        with nullcontext() if network.sharded else self.processes.together():
            probe.check(network)

    def evaluate(self, stage: str, step: int) -> None:
        for record in self.scores.evaluate(stage, step, self.listeners.on_evaluation):
            if self.listeners.tracker is not None:
                self.listeners.tracker.evaluation(record)

    def measure(self, number: int, sources: list[Source], step: int) -> None:
        """Measures the loss of a masked phase on its held-out documents, once at each point. Others have none."""
        stage = self.recipe.stages[number]
        if not getattr(stage, "heldout", 0):
            return
        found = measured_once(self.out, stage.name, step, lambda: self.steps.heldout(number, sources), self.processes)
        if found is not None and self.listeners.on_evaluation is not None:
            self.listeners.on_evaluation(
                f"{stage.name}, step {step}: masked loss {found['loss']:.3f}, accuracy {found['accuracy']:.1%} over "
                f"{found['masked']:,} masked tokens in {found['documents']} held-out documents"
            )

    def batches(
        self, sources: list[Source], state: RunState, teacher: Teacher | None
    ) -> Generator[tuple[int, LocalBatch | MaskedBatch], None, None]:
        """Yields each step of a stage with its local batch, in order, made `run.workers` steps ahead of their use.

        Where a stage mines again, no batch is made ahead of the step after which it mines. A teacher has encoded the
        texts of all steps up to there before the first of them.
        """
        recipe, model, stage = self.recipe, self.model, self.recipe.stages[state.stage]
        now = sources

        def make(step: int) -> LocalBatch | MaskedBatch:
            return self.steps.batch(state.stage, now, step, teacher)

        for begin in range(0, stage.optim.steps, every := refresh_every(stage)):
            end = min(begin + every, stage.optim.steps)
            steps = range(max(begin, state.step), end)
            if not steps:
                continue
            if stage.mine is not None:  # the step before has finished, so the current weights do the mining
                say = self.listeners.on_evaluation
                now = refreshed(recipe, stage, sources, state, begin, model, self.processes, say)
            if teacher is not None:  # a resumed run prepares the same texts, so its vectors are bit-identical
                of_all = (batch_of_step(recipe, state.stage, now, model.contract, step) for step in range(begin, end))
                teacher.prepare(of_all, self.processes, self.stop_if_asked)
            yield from ahead(make, steps, recipe.run.workers)

    def stop_if_asked(self) -> None:
        if self.processes.all_max(self.stop_requested.signal is not None):
            raise Interrupted(f"{self.stop_requested.signal or 'signal'} while a teacher encoded: its vectors are kept")

    def step(
        self, local: LocalBatch | MaskedBatch, number: int, step: int, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Takes a step and returns its record; counts steps that are not finite."""
        record, problem = self.steps.take(number, step, local, optimizer)
        if problem is None:
            self.nonfinite.fine()
        else:
            self.nonfinite.note(record["stage"], step + 1, problem, local.ids)
        return record

    def report(self, stage: Stage, records: list[dict[str, Any]]) -> None:
        if self.listeners.tracker is not None:
            self.listeners.tracker.step(records[-1])
        if self.listeners.on_step is not None:
            self.listeners.on_step(records[-1])
        if stuck(records) and not stuck(records[:-1]):
            logger.warning(
                "stage %s, step %d: the loss is at chance, log(number of candidates)",
                stage.name,
                records[-1]["step"],
            )

    def save(self, state: RunState, optimizer: torch.optim.Optimizer | None) -> None:
        moved, keep = trainable_parameters(self.model.network), self.recipe.run.keep
        save_checkpoint(self.out / "checkpoints", state, moved, optimizer, keep, self.processes)


def _with_waits(batches: Iterator[tuple[int, Made]]) -> Iterator[tuple[int, Made, float]]:
    """Adds the seconds that each batch was waited for: about zero where tokenisation keeps ahead."""
    asked = time.perf_counter()
    for step, local in batches:
        yield step, local, round(time.perf_counter() - asked, 4)
        asked = time.perf_counter()
