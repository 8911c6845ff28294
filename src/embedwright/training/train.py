"""`train`: all stages of a recipe, in order, resuming by itself from the newest checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from embedwright import threads
from embedwright.config import ConfigError
from embedwright.files import remove_leftovers, write_text
from embedwright.host import own_random_numbers
from embedwright.model.adapters import fourbit
from embedwright.model.embedder import Embedder
from embedwright.model.interop.card import facts, model_card
from embedwright.model.verify import probe
from embedwright.training.batches.blend import Source
from embedwright.training.batches.sources import data_fingerprint, open_sources, source_fingerprints
from embedwright.training.engine import parallel as many
from embedwright.training.engine.parallel import Processes
from embedwright.training.engine.step import Share, make_optimizer
from embedwright.training.parts import START, StagePart
from embedwright.training.recipe import Recipe, leaves
from embedwright.training.remine import refresh_every, refreshed
from embedwright.training.run.checkpoint import (
    RunState,
    keep_newest,
    newest,
    read_state,
    read_weights,
    restore_optimizer,
    save_checkpoint,
)
from embedwright.training.run.checks import check_names, check_reading
from embedwright.training.run.distill import Teacher, teacher_of
from embedwright.training.run.folder import card_facts, describe_run
from embedwright.training.run.scores import Scores
from embedwright.training.run.signals import Interrupted, StopRequest, stop_on_signal
from embedwright.training.run.start import (
    finish,
    load_trained,
    naming_the_model,
    origin_fingerprint,
    start_model,
    whole_model,
)
from embedwright.training.run.track import Tracker
from embedwright.training.run.watch import MovedWeights, NonFinite, stuck, warn_if_inert
from embedwright.training.steps import Steps

logger = logging.getLogger(__name__)

OnStep = Callable[[dict[str, Any]], None]
OnEvaluation = Callable[[str], None]


@own_random_numbers()
def train(recipe: Recipe, *, on_step: OnStep | None = None, on_evaluation: OnEvaluation | None = None) -> Embedder:
    """Run every stage that is not done yet and return the embedder, adapters merged, in float32 (of qlora on the CPU).

    Below `run.out` it leaves what docs/runs.md lists. `on_step` gets each step's record, `on_evaluation` a line of
    progress; of many processes, in the first one. ConfigError where the run in that folder is of another recipe or of
    other data, or where a package that `tune.method` needs is missing. Interrupted (a KeyboardInterrupt) on SIGTERM or
    SIGINT, FloatingPointError where three steps in a row are not finite, RuntimeError where weights stand still: each
    after a good checkpoint.
    """
    if recipe.tune.method == "qlora" and (lacks := fourbit.missing()):
        raise ConfigError(f"recipe {recipe.name}: tune.method is qlora, and {lacks}")
    processes = many.start()
    out = Path(recipe.run.out)
    sources = open_sources(recipe)
    check_names(recipe)
    with naming_the_model(recipe):
        origin = origin_fingerprint(recipe.model)
    facts_of = {"recipe": recipe.decisive(), "data": source_fingerprints(recipe, sources), "model": {"files": origin}}
    state = RunState(0, 0, recipe.hash(), data_fingerprint(sources), origin, facts_of)
    checkpoint = _newest(out / "checkpoints", processes)
    if checkpoint is not None:
        state = _continue(checkpoint, state, out)
    model = start_model(recipe, processes)
    check_reading(recipe, sources, model)
    out.mkdir(parents=True, exist_ok=True)
    if processes.first:
        remove_leftovers(out)
    if checkpoint is not None:
        load_trained(model, read_weights(checkpoint))
        if processes.first:  # a run that was killed after its newest checkpoint had no time to
            keep_newest(out / "checkpoints", recipe.run.keep)
    steps = Steps(recipe, model, processes)
    names = [stage.name for stage in recipe.stages]
    log: AbstractContextManager[Tracker | None] = nullcontext()
    if processes.first:
        describe_run(out, recipe, sources)
        at = (state.stage, state.step)
        log = Tracker(out, recipe.run.tracker, names, at, recipe.model_dump(mode="json"))
    with stop_on_signal() as stop_requested, log as tracker:
        scores = Scores(recipe.eval, out, model, processes)
        run = _Run(steps, tracker, scores, stop_requested, on_step, on_evaluation)
        if checkpoint is None:
            scores.forget()
            run.evaluate(START, 0)
        for number in range(state.stage, len(recipe.stages)):
            begin = replace(state, stage=number, step=state.step if number == state.stage else 0)
            run.stage(recipe.stages[number], sources[number], begin, checkpoint if begin.step else None)
    model = finish(whole_model(recipe, model, processes))
    if processes.first:
        known = facts(model.network, model.text_tokenizer) | card_facts(recipe, sources, scores.records)
        write_text(out / "README.md", model_card(known.pop("name"), path="model", **known))
    return model


class _Run:
    """What stays the same from step to step."""

    def __init__(
        self,
        steps: Steps,
        tracker: Tracker | None,
        scores: Scores,
        stop_requested: StopRequest,
        on_step: OnStep | None,
        say: OnEvaluation | None,
    ) -> None:
        self.steps, self.tracker, self.scores, self.stop_requested = steps, tracker, scores, stop_requested
        self.recipe, self.model, self.processes = steps.recipe, steps.model, steps.processes
        self.on_step = on_step if self.processes.first else None
        self.say = say if self.processes.first else None
        self.out = Path(self.recipe.run.out)
        self.nonfinite = NonFinite(self.out / "nonfinite.jsonl", self.processes)

    def stage(self, stage: StagePart, sources: list[Source], state: RunState, resumed: Path | None) -> None:
        recipe, network, scores = self.recipe, self.model.network, self.scores
        optimizer = make_optimizer(network, recipe.tune, stage.optim)
        if resumed is not None:
            restore_optimizer(resumed, optimizer)
        moved = MovedWeights(network, optimizer, self.processes)
        width = network.config.hidden_size
        teacher = teacher_of(stage, sources, self.model.contract, width)
        records: list[dict[str, Any]] = []
        every, last = recipe.eval.every, stage.optim.steps
        with closing(self.shares(stage, sources, state, teacher)) as shares:
            for step, share, waited in _with_waits(shares):
                if step and every and step % every == 0:  # here, so that a resumed run does it too
                    self.evaluate(stage.name, step)
                    if scores.gave_up(stage.name, step):
                        last = step
                        break
                record = self.step(stage, share, state.stage, step, optimizer) | {"waited": waited}
                records.append(record)
                self.report(stage, records)
                done = step + 1
                stops = bool(self.processes.most(self.stop_requested.signal is not None))
                if stops or done == stage.optim.steps or done % recipe.run.checkpoint_every == 0:
                    self.save(replace(state, step=done), optimizer)
                if stops:
                    raise Interrupted(f"{self.stop_requested.signal or 'signal'} after stage {stage.name}, step {done}")
        moved.check()
        warn_if_inert(records)
        probe.check(network)
        self.evaluate(stage.name, last)
        if recipe.eval.best:
            load_trained(self.model, scores.best_weights(stage.name))
            probe.check(network)
        if recipe.eval.decides:  # the stage ended on other weights than those of its last checkpoint
            self.save(replace(state, stage=state.stage + 1, step=0), None)

    def evaluate(self, stage: str, step: int) -> None:
        for record in self.scores.evaluate(stage, step, self.say):
            if self.tracker is not None:
                self.tracker.evaluation(record)

    def shares(
        self, stage: StagePart, sources: list[Source], state: RunState, teacher: Teacher | None
    ) -> Generator[tuple[int, Share], None, None]:
        """(step, its share of texts) in order, `run.workers` steps ahead of their use, tokenised in threads; but never
        ahead of a step after which negatives are mined."""
        for begin in range(0, stage.optim.steps, every := refresh_every(stage)):
            steps = range(max(begin, state.step), min(begin + every, stage.optim.steps))
            if not steps:
                continue
            # called after the last step before it has finished: the weights of that step do the mining
            now = self.mined(stage, sources, state, begin)
            yield from self.drawn(stage, now, state.stage, steps, teacher)

    def mined(self, stage: StagePart, sources: list[Source], state: RunState, begin: int) -> list[Source]:
        if stage.mine is None:
            return sources
        return refreshed(self.recipe, stage, sources, state, begin, self.model, self.processes, self.say)

    def drawn(
        self, stage: StagePart, sources: list[Source], number: int, steps: range, teacher: Teacher | None
    ) -> Generator[tuple[int, Share], None, None]:
        workers = self.recipe.run.workers

        def share(step: int) -> Share:
            return self.steps.share(number, sources, step, teacher)

        if workers == 0:
            yield from ((step, share(step)) for step in steps)
            return
        with ThreadPoolExecutor(workers, initializer=threads.free) as pool:
            waiting: list[tuple[int, Future[Share]]] = []
            try:
                for step in steps:
                    waiting.append((step, pool.submit(share, step)))
                    if len(waiting) > workers:
                        first, future = waiting.pop(0)
                        yield first, future.result()
                for first, future in waiting:
                    yield first, future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def step(
        self, stage: StagePart, share: Share, number: int, step: int, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        record, problem = self.steps.take(number, step, share, optimizer)
        if problem is None:
            self.nonfinite.fine()
        else:
            self.nonfinite.note(stage.name, step + 1, problem, share.batch.ids)
        return record

    def report(self, stage: StagePart, records: list[dict[str, Any]]) -> None:
        if self.tracker is not None:
            self.tracker.step(records[-1])
        if self.on_step is not None:
            self.on_step(records[-1])
        if stuck(records) and not stuck(records[:-1]):
            logger.warning(
                "stage %s, step %d: the loss is that of telling nothing apart, log(candidates)",
                stage.name,
                records[-1]["step"],
            )

    def save(self, state: RunState, optimizer: torch.optim.Optimizer | None) -> None:
        moved, keep = many.trained(self.model.network), self.recipe.run.keep
        save_checkpoint(self.out / "checkpoints", state, moved, optimizer, keep, self.processes)


def _with_waits(shares: Iterator[tuple[int, Share]]) -> Iterator[tuple[int, Share, float]]:
    """With the seconds that each was waited for: about zero where tokenisation keeps ahead."""
    asked = time.perf_counter()
    for step, share in shares:
        yield step, share, round(time.perf_counter() - asked, 4)
        asked = time.perf_counter()


def _newest(folder: Path, processes: Processes) -> Path | None:
    """The same in all processes: the first one clears up before the others look."""
    if not processes.first:
        processes.wait()
    found = newest(folder)
    if processes.first:
        processes.wait()
    return found


def _changes(before: Any, after: Any) -> str:
    old, new = dict(leaves(before)), dict(leaves(after))
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    return ", ".join([f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys[:5]] + ["..."] * (len(keys) > 5))


def _continue(checkpoint: Path, state: RunState, out: Path) -> RunState:
    found = read_state(checkpoint)
    for what in ("recipe", "data", "model"):
        if getattr(found, what) != getattr(state, what):
            raise ConfigError(
                f"{out} holds a run of another {what} ({_changes(found.facts.get(what), state.facts.get(what))}): "
                "choose another run.out, or remove that folder"
            )
    logger.info("resuming %s at stage %d, step %d", out, found.stage, found.step)
    return found
