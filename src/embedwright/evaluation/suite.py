"""Evaluates any model with `encode` on a suite of tasks in local files, with one main number a task.

A suite is a YAML file, a packaged one by its name (`dev`), or a folder of data files:

    name: heldout
    tasks:
      - {name: docs, kind: retrieval, path: retrieval, instruction: "Given a summary, retrieve what it summarises"}
      - {name: modules, kind: classification, path: test.jsonl, train: train.jsonl, instruction: "Identify the module"}

Paths are relative to the YAML file and may begin with `${VARIABLE}`. docs/evaluation.md says what each kind reads, and
what the keys of a task do.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from embedwright.config import did_you_mean, load_yaml, validate
from embedwright.data.files.beir import beir_files
from embedwright.data.files.folders import is_beir, is_data, is_one_set, stem_of
from embedwright.encoders.protocol import as_encoder
from embedwright.errors import InputError, InputTypeError, MissingPackageError, NotFoundError
from embedwright.evaluation.about import about
from embedwright.evaluation.kinds import score
from embedwright.evaluation.metrics import Kind
from embedwright.evaluation.results import Result, Results
from embedwright.evaluation.tasks import COLUMNS, Strict, SuiteTask, rows_of, split_of
from embedwright.fingerprint import fingerprint_of

RANKED: tuple[Kind, ...] = ("retrieval", "reranking")  # the kinds that read a BEIR folder
BM25 = "bm25"  # a baseline by name, which ranks without vectors
PACKAGED = Path(__file__).parent / "suites"

logger = logging.getLogger(__name__)


class Suite(Strict):
    """A named set of tasks, whose names differ."""

    name: str
    tasks: tuple[SuiteTask, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Suite:
        names = [task.name for task in self.tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"two tasks are named {twice[0]!r}")
        return self


def evaluate(
    model: Any,
    suite: Suite | Path | str,
    *,
    name: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Results:
    """Scores a model on every task of a suite.

    Retrieval puts a task's instruction on the queries only; the other kinds put it on every text, as mteb does. Within
    a task, equal texts are encoded once. The same embeddings give the same numbers.

    Args:
        model: An Embedder, a SentenceTransformer, or any object with `encode(texts, task=None)`. `"bm25"` ranks by
            BM25; it has scores for retrieval and reranking only, and no rows for the other kinds.
        suite: A suite, the path of its YAML file or of a folder of data sets, or the name of a packaged one.
        name: What the results call the model. Default: the name of its class.
        progress: A function that gets a line before and after each task.

    Returns:
        One row a task, in the suite's order, with the items that its score comes from, and how the scores were made.
        `write_results` keeps all of it.

    Raises:
        FileNotFoundError: A file of the suite is missing.
        ValueError: A file has other content than its task needs. The message names suite, task and file.
        ImportError: The `[eval]` extra is not installed.
        TypeError: The model has no `encode`, or is a name other than `bm25`.
    """
    results = run_suite(model, suite, progress)
    if isinstance(model, str):
        return replace(results, about=about(model))
    return replace(results, about=about(name or type(model).__name__, fingerprint_of(as_encoder(model))))


def run_suite(model: Any, suite: Suite | Path | str, progress: Callable[[str], None] | None = None) -> Results:
    """Does what `evaluate` does, without saying how the scores were made.

    A run calls it: the weights of one that trains may be cut over processes, where they have no fingerprint.
    """
    if missing := [name for name in ("sklearn", "scipy", "pytrec_eval") if find_spec(name) is None]:
        raise MissingPackageError(f"evaluation needs {', '.join(missing)}: pip install 'embedwright[eval]'")
    if isinstance(model, str) and model != BM25:  # a str has an `encode` of its own
        raise InputTypeError(f"{model!r} is a name: open the model first (`Embedder.load`), or give 'bm25'")
    encoder = None if isinstance(model, str) else as_encoder(model)
    suite = suite if isinstance(suite, Suite) else load_suite(suite)
    say = progress or logger.info
    rows = []
    started = time.perf_counter()
    for number, task in enumerate(suite.tasks, start=1):
        where = f"[{number}/{len(suite.tasks)}] {task.name}"
        say(f"{where} ({task.kind})")
        task_started = time.perf_counter()
        try:
            scored = score(encoder, task)
        except ValueError as error:
            raise InputError(f"suite {suite.name!r}, task {task.name!r}: {error}") from error
        if scored is None:
            say(f"{where}: BM25 only ranks, and has no score for {task.kind}")
            continue
        value, seconds = scored.values[task.main], time.perf_counter() - task_started
        details = {name: value for name, value in scored.values.items() if name != task.main}
        items = scored.items_of(task.main)
        rows.append(Result(task.name, task.kind, task.main, value, details, items, scored.data))
        say(f"{where}: {task.main} {value:.4f} in {seconds:.1f} s")
    if not rows:
        raise InputError(f"suite {suite.name!r} has neither retrieval nor reranking, all that BM25 has scores for")
    return Results(suite.name, tuple(rows), time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------------- suites


def is_suite(name: str) -> bool:
    """Returns whether a name is that of a packaged suite, or of a file or folder that is there."""
    return name in _packaged() or Path(name).exists()


def _packaged() -> list[str]:
    return sorted(file.stem for file in PACKAGED.glob("*.yaml"))


def load_suite(suite: Path | str) -> Suite:
    """Opens the suite of a YAML file, of a folder, or of a packaged name, and checks all its paths.

    In a folder, every BEIR folder and every labelled, scored or pair-labelled file is a task without an instruction.
    The keys of the first row decide the kind. Labelled rows mean classification; clustering has the same keys and needs
    a YAML file. Raises FileNotFoundError and ValueError before anything is encoded.
    """
    packaged = _packaged()
    path = Path(suite).absolute()
    if str(suite) in packaged and (isinstance(suite, str) or not path.exists()):
        path = PACKAGED / f"{suite}.yaml"
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_yaml(path)
    near = did_you_mean(str(suite), packaged)
    raise NotFoundError(f"no suite {str(suite)!r}{near}: no such file or folder; packaged are: {', '.join(packaged)}")


def _from_yaml(file: Path) -> Suite:
    written = validate(Suite, load_yaml(file), str(file))
    return written.model_copy(update={"tasks": tuple(_resolved(task, file) for task in written.tasks)})


def _resolved(task: SuiteTask, suite_file: Path) -> SuiteTask:
    """Returns the task with absolute paths, and checks that each holds data of the task's kind."""
    where = f"{suite_file}: task {task.name!r}"

    def variable(match: re.Match[str]) -> str:
        if not os.environ.get(match[1]):
            raise InputError(f"{where}: set the environment variable {match[1]}")
        return str(Path(os.environ[match[1]]).absolute())  # relative to the working folder, not to the suite file

    def there(written: Path) -> Path:
        path = suite_file.parent / re.sub(r"^\$\{(\w+)\}", variable, str(written))
        if not path.exists():
            raise NotFoundError(f"{where}: no such file: {path}")
        return path

    def data(written: Path) -> Path:
        path = there(written)
        if task.kind not in _kinds(path):
            rows = f"rows with {', '.join(COLUMNS[task.kind])}" if task.kind in COLUMNS else ""
            beir = "a BEIR folder" if task.kind in RANKED else ""
            wants = " or ".join(filter(None, (beir, rows)))
            raise InputError(f"{where}: {task.kind} reads {wants}, and that is not what {path} holds")
        return path

    path = data(task.path)
    if task.kind == "reranking" and (task.candidates is None) == (path.is_dir() and is_beir(path)):
        raise InputError(
            f"{where}: a BEIR folder needs `candidates`: a file of them, or bm25"
            if task.candidates is None
            else f"{where}: rows have their own candidates; `candidates` is for a BEIR folder"
        )
    candidates = there(task.candidates) if isinstance(task.candidates, Path) else task.candidates
    train = task.train and data(task.train)
    return task.model_copy(update={"path": path, "train": train, "candidates": candidates})


def _from_folder(folder: Path) -> Suite:
    tasks = []
    for path in [folder] if is_one_set(folder) else sorted(folder.glob("[!.]*")):
        kinds = _kinds(path) if (is_one_set(path) if path.is_dir() else is_data(path)) else []
        if kinds:
            tasks.append(SuiteTask(name=stem_of(path), kind=kinds[0], path=path))
        else:
            logger.warning("%s is not evaluation data, and no task of the suite", path)
    if not tasks:
        raise InputError(f"{folder} holds no BEIR folder and no labelled, scored or pair-labelled file")
    return Suite(name=folder.name, tasks=tuple(tasks))


def _kinds(path: Path) -> list[Kind]:
    """Returns the kinds of task that can read `path`: for a file, those whose keys its first row has."""
    if path.is_dir() and is_beir(path):
        beir_files(path, split_of(path))  # raises if another part is missing
        return [*RANKED]
    for row in rows_of(path, "test", lambda row, _: row):
        return [kind for kind, columns in COLUMNS.items() if columns.keys() <= row.keys()]
    return []
