"""Runs MTEB benchmarks and tasks on an encoder, into a folder of the layout that mteb and its leaderboard have.

    OUT/results/<org>__<model>/<revision>/<Task>.json        and model_meta.json, run_settings.jsonl, all by mteb
    OUT/results/<org>__<model>/<revision>/<Task>.items.npz   per-item scores (`items`)
    OUT/unfinished/<org>__<model>/<revision>/<Task>/         what a task needs to go on; removed with its result

A task is written once it is whole, so a run that was stopped goes on with the next one. Inside a task, mteb keeps the
subsets that are done, and the vectors of a large corpus are kept in shards.
"""

from __future__ import annotations

import logging
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import mteb
import numpy as np
from huggingface_hub import constants
from mteb.abstasks import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.cache import ResultCache
from mteb.results import TaskResult

from embedwright.errors import InputError, OutOfReachError, as_input_error
from embedwright.evaluation.bench.items import KINDS, remove_broken, write_items
from embedwright.evaluation.bench.names import Chosen
from embedwright.evaluation.mteb import MtebEncoder, instruction_of
from embedwright.evaluation.results import Result, Results, parts_scored, read_arrays
from embedwright.files import locked, remove_leftovers, whole_file, write_text
from embedwright.host import restored_rng

Say = Callable[[str], None]

_UNKNOWN_SIZE = 1_000_000  # characters of a task whose size mteb does not know


def score_tasks(model: Any, chosen: Chosen, say: Say) -> Results:
    """Scores a model that is in use elsewhere, such as one in training, on MTEB. Nothing stays on disk.

    Returns a row a task, and `about` with mteb's version, on which data and scores depend. Raises InputError if a task
    fails.
    """
    started = time.perf_counter()
    with restored_rng(), TemporaryDirectory() as folder:  # mteb seeds the generators that training draws from
        # a model that is cut over processes has no fingerprint
        bench = Bench(MtebEncoder(SimpleNamespace(encode=model.encode)), Path(folder))
        if failed := bench.run(chosen.tasks, say):
            raise InputError("; ".join(f"{chosen.name}: {name}: {reason}" for name, reason in failed.items()))
        rows = tuple(bench.row(task) for task in chosen.tasks)
    return Results(chosen.name, rows, time.perf_counter() - started, {"mteb": mteb.__version__})


class Bench:
    """The results of one encoder in one folder, and the work that is under way there."""

    def __init__(self, encoder: MtebEncoder, out: Path) -> None:
        self.encoder, self.out = encoder, out
        self.meta = cast(Any, encoder.mteb_model_meta)  # mteb's types allow none
        self.cache = ResultCache(out)
        self.folder = self.cache.get_task_result_path("x", self.meta).parent
        self.work = out / "unfinished" / self.folder.parent.name / self.folder.name

    def result(self, task: AbsTask) -> TaskResult | None:
        """Returns the result of all that a task asks for; None while a split or subset is missing."""
        found = self.cache.load_task_result(task.metadata.name, self.meta)
        if found is None or found.get_missing_evaluations(task):
            return None
        return found.validate_and_filter_scores(task)

    def row(self, task: AbsTask) -> Result:
        """Returns the result of a task that is done, as a row of a suite's results."""
        found, kind = self.result(task), task.metadata.type
        assert found is not None
        data = parts_scored(found.scores)
        whole = read_arrays(self.folder / f"{task.metadata.name}.items.npz")
        items = {name: array for name, array in whole.items() if "/".join(name.split("/")[:2]) in data.split(", ")}
        main, value = task.metadata.main_score, found.get_score()
        return Result(task.metadata.name, KINDS.get(kind, kind), main, value, {}, items, data)

    def others(self) -> dict[str, list[str]]:
        """Returns the tasks of each other revision of a model of this name, which are left as they are."""
        found: dict[str, list[str]] = {}
        for path in self.cache.get_cache_paths(models=[str(self.meta.name)], include_remote=False):
            if path.parent != self.folder:
                found.setdefault(path.parent.name, []).append(path.stem)
        return found

    def run(self, tasks: Sequence[AbsTask], say: Say = lambda line: None) -> dict[str, str]:
        """Runs the tasks that have no result. Returns the reason of each that failed, by its name; others are kept."""
        units: dict[str, list[AbsTask]] = {}
        for task in tasks:  # two benchmarks may ask for other subsets of one task
            units.setdefault(task.metadata.name, []).append(task)
        todo = {name: some for name, some in units.items() if not all(map(self.result, some))}
        sizes = {name: sum(map(size, some)) for name, some in todo.items()}
        with self._writing():
            remove_leftovers(self.folder)  # left by killed processes; mteb would read them as results
        say(f"{len(units)} tasks, {len(units) - len(todo)} of them done before")
        watch, failed = _Watch(sizes, len(units), say), dict[str, str]()
        for name in sorted(todo, key=lambda name: sizes[name]):  # the small ones first: a mistake shows early
            try:
                for task in todo[name]:
                    self._run(task)
            except Exception as error:  # whatever it is, the other tasks go on
                logging.getLogger(__name__).debug("%s failed", name, exc_info=True)
                failed[name] = f"{'' if isinstance(error, InputError) else f'{type(error).__name__}: '}{error}"
                watch.done(name, "failed")
            else:
                found: Any = self.result(todo[name][0])
                watch.done(name, f"{todo[name][0].metadata.main_score} {found.get_score():.4f}")
        with suppress(OSError):  # tasks that failed, or of another command or model, are unfinished
            for folder in (self.work, self.work.parent, self.work.parent.parent):
                folder.rmdir()
        return failed

    def _run(self, task: AbsTask) -> None:
        """Gets the result of a task that has none. Waits for another command that is at it.

        Raises InputError if mteb ends without the result of a split or subset.
        """
        with locked(self.work / f".{task.metadata.name}.lock"):
            if self.result(task) is None:
                self._evaluate(task)
        if self.result(task) is None:
            found = self.cache.load_task_result(task.metadata.name, self.meta)
            missing = found.get_missing_evaluations(task) if found else {split: ["all"] for split in task.eval_splits}
            parts = "; ".join(f"{split}: {', '.join(subsets)}" for split, subsets in sorted(missing.items()))
            raise InputError(f"mteb ended without the results of {parts}")

    def _evaluate(self, task: AbsTask) -> None:
        """Runs one task in a folder of its own, and puts the whole result into the folder of results."""
        name = task.metadata.name
        work, parts = self.work / name, task.metadata.tasks if isinstance(task, AbsTaskAggregate) else []
        for part in parts:
            self._run(part)
        if hasattr(task, "max_documents_per_cluster"):  # its subsets share one generator: all anew, or others are drawn
            shutil.rmtree(work, ignore_errors=True)
        remove_broken(work)
        staged = ResultCache(work)
        inside = staged.get_task_result_path(name, self.meta).parent
        for known in (task, *parts):  # subsets that another benchmark has asked for, and the parts of an aggregate
            file = self.folder / f"{known.metadata.name}.json"
            if file.is_file() and not (inside / file.name).is_file():
                _copy(file, inside / file.name)
        self.encoder.vectors = work / "vectors"
        if not parts:
            instruction_of(task.metadata)  # raises for a task that is not about text, before its data are fetched
            _load(task)
        predictions = work / "predictions"
        # mteb's generators go on from task to task of a process: each task starts as it does in a new process
        task.rng_state, task.np_rng = random.Random(task.seed), np.random.default_rng(task.seed)
        try:
            model: Any = self.encoder  # mteb's protocol names each option of `encode`
            with _quiet():
                mteb.evaluate(
                    model,
                    task,
                    cache=staged,
                    prediction_folder=predictions,
                    show_progress_bar=False,
                    co2_tracker=False,
                )
            if not parts and (result := staged.load_task_result(name, self.meta)):
                with self._writing():
                    write_items(self.folder / f"{name}.items.npz", task, result, predictions)
        finally:
            if not parts:
                task.unload_data()
        shutil.rmtree(work / "vectors", ignore_errors=True)  # first: what is large does not outlive the result
        self._publish(inside, name)
        shutil.rmtree(work)

    def _writing(self) -> AbstractContextManager[None]:
        """Returns a lock on the folder of results: who has it knows that no other command writes there."""
        return locked(self.work / ".lock")

    def _publish(self, inside: Path, name: str) -> None:
        with self._writing():
            settings = self.folder / "run_settings.jsonl"
            before = settings.read_text(encoding="utf-8") if settings.is_file() else ""
            others = [line for line in before.splitlines() if f'"task": "{name}"' not in line]
            own = (inside / settings.name).read_text(encoding="utf-8").splitlines()
            write_text(settings, "".join(f"{line}\n" for line in [*others, *own]))
            _copy(inside / "model_meta.json", self.folder / "model_meta.json")
            _copy(inside / f"{name}.json", self.folder / f"{name}.json")


def size(task: AbsTask) -> int:
    """Returns about how many characters a task has to encode, by mteb's statistics of its data."""
    if isinstance(task, AbsTaskAggregate):
        return sum(map(size, task.metadata.tasks))
    found = 0
    for split, of_split in (task.metadata.descriptive_stats or {}).items():
        if split in task.eval_splits:
            subsets = of_split.get("hf_subset_descriptive_stats") or {}
            found += sum(_characters(subsets[name]) for name in task.hf_subsets if name in subsets) or _characters(
                of_split
            )
    return found or _UNKNOWN_SIZE


def _characters(stats: Any) -> int:
    texts = (value.get("total_text_length") or 0 for value in stats.values() if isinstance(value, dict))
    return int(stats.get("number_of_characters") or sum(texts))


class _Watch:
    """Says how far a benchmark is. The time left goes by the characters of the tasks."""

    def __init__(self, sizes: dict[str, int], total: int, say: Say) -> None:
        self.left, self.total, self.say = dict(sizes), total, say
        self.started, self.all = time.monotonic(), sum(sizes.values())

    def done(self, name: str, state: str) -> None:
        del self.left[name]
        rest, passed = sum(self.left.values()), time.monotonic() - self.started
        left = f", about {_clock(passed * rest / max(self.all - rest, 1))} left" if rest else ""
        self.say(f"[{self.total - len(self.left)}/{self.total}] {name}: {state}{left}")


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def check_data(tasks: Sequence[AbsTask]) -> None:
    """Loads the data of each task, and lets go of it. Raises OutOfReachError for the first that are not there."""
    for task in tasks:
        if isinstance(task, AbsTaskAggregate):
            check_data(task.metadata.tasks)
            continue
        try:
            _load(task)
        finally:
            task.unload_data()


def _load(task: AbsTask) -> None:
    """Loads a task's data: as mteb does, else from the snapshot of its commit in the hub's cache.

    Without a network, `datasets` opens what it has prepared before, and does not look into the hub's cache. Raises
    OutOfReachError, which says what is missing, and how to bring it.
    """
    dataset, revision = task.metadata.dataset["path"], task.metadata.dataset["revision"]
    place = Path(constants.HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}"
    snapshot = place / "snapshots" / revision
    with _quiet():
        try:
            task.load_data()
            return
        except (OSError, ValueError) as error:  # for what cannot be reached, datasets raises many kinds of these
            if not snapshot.is_dir():
                raise OutOfReachError(
                    f"the data set {dataset} cannot be opened: {str(error).splitlines()[0][:200]}. Where there is a "
                    f"network, `hf download {dataset} --repo-type dataset --revision {revision}` brings it to the "
                    f"hub's cache there: copy the folder {place.name} to {place.parent}"
                ) from error
        own = {**task.metadata.dataset, "path": str(snapshot)}
        task.metadata = task.metadata.model_copy(update={"dataset": own})  # until `unload_data`
        with as_input_error(snapshot):
            task.load_data()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings of mteb and sklearn about its own tasks, which no user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _copy(source: Path, target: Path) -> None:
    with whole_file(target) as temp:
        shutil.copyfile(source, temp)
