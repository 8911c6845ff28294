"""Evaluates any model with `encode` on a suite of tasks in local files, with one main number a task.

A suite is a YAML file, a packaged one by its name (`dev`), or a folder of data files:

    name: heldout
    tasks:
      - {name: docs, kind: retrieval, path: retrieval, instruction: "Given a summary, retrieve what it summarises"}
      - {name: modules, kind: classification, path: test.jsonl, train: train.jsonl, instruction: "Identify the module"}

Paths are relative to the YAML file and may begin with `${VARIABLE}`. `retrieval` reads a BEIR folder, `classification`
and `clustering` read rows of `{"text", "label"}`, `sts` of `{"text1", "text2", "score"}`, and `pair` of
`{"text1", "text2", "label"}` with a label of 0 or 1. `ignore_identical_ids: true` drops the document with the query's
own id from the hits, as mteb does for ArguAna, Quora, FiQA, FEVER, MS MARCO and their translations, and for no others.
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

from embedwright.config import load_yaml, validate
from embedwright.data.files.beir import beir_files
from embedwright.data.files.folders import is_beir, is_data, is_one_set, stem_of
from embedwright.encoders.protocol import Encoder, as_encoder
from embedwright.errors import InputError, MissingPackageError, NotFoundError
from embedwright.evaluation.about import about
from embedwright.evaluation.metrics import MAIN, Kind
from embedwright.evaluation.results import Result, Results
from embedwright.evaluation.tasks import COLUMNS, Strict, SuiteTask, rows_of, score, split_of
from embedwright.fingerprint import fingerprint_of

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
        model: An Embedder, a SentenceTransformer, or any object with `encode(texts, task=None)`.
        suite: A suite, the path of its YAML file or of a folder of data sets, or the packaged `dev`.
        name: What the results call the model. Default: the name of its class.
        progress: A function that gets a line before and after each task.

    Returns:
        One row a task, in the suite's order, with the items that its score comes from, and how the scores were made.
        `write_results` keeps all of it.

    Raises:
        FileNotFoundError: A file of the suite is missing.
        ValueError: A file has other content than its task needs. The message names suite, task and file.
        ImportError: The `[eval]` extra is not installed.
        TypeError: The model has no `encode`.
    """
    encoder = as_encoder(model)
    results = run_suite(encoder, suite, progress)
    return replace(results, about=about(name or type(model).__name__, fingerprint_of(encoder)))


def run_suite(model: Any, suite: Suite | Path | str, progress: Callable[[str], None] | None = None) -> Results:
    """Does what `evaluate` does, without saying how the scores were made.

    A run calls it: the weights of one that trains may be cut over processes, where they have no fingerprint.
    """
    if missing := [name for name in ("sklearn", "scipy", "pytrec_eval") if find_spec(name) is None]:
        raise MissingPackageError(f"evaluation needs {', '.join(missing)}: pip install 'embedwright[eval]'")
    encoder = as_encoder(model)
    suite = suite if isinstance(suite, Suite) else load_suite(suite)
    say = progress or logger.info
    rows = []
    started = time.perf_counter()
    for number, task in enumerate(suite.tasks, start=1):
        say(f"[{number}/{len(suite.tasks)}] {task.name} ({task.kind})")
        task_started = time.perf_counter()
        try:
            result = _result(encoder, task)
        except ValueError as error:
            raise InputError(f"suite {suite.name!r}, task {task.name!r}: {error}") from error
        rows.append(result)
        seconds = time.perf_counter() - task_started
        say(f"[{number}/{len(suite.tasks)}] {task.name}: {result.metric} {result.value:.4f} in {seconds:.1f} s")
    return Results(suite.name, tuple(rows), time.perf_counter() - started)


def _result(encoder: Encoder, task: SuiteTask) -> Result:
    scored, metric = score(encoder, task), MAIN[task.kind]
    details = {name: value for name, value in scored.values.items() if name != metric}
    return Result(task.name, task.kind, metric, scored.values[metric], details, scored.items_of(metric))


# ---------------------------------------------------------------------------------------------------- suites


def load_suite(suite: Path | str) -> Suite:
    """Opens the suite of a YAML file, of a folder, or of a packaged name, and checks all its paths.

    In a folder, every BEIR folder and every labelled, scored or pair-labelled file is a task without an instruction.
    The keys of the first row decide the kind. Labelled rows mean classification; clustering has the same keys and needs
    a YAML file. Raises FileNotFoundError and ValueError before anything is encoded.
    """
    packaged = sorted(file.stem for file in PACKAGED.glob("*.yaml"))
    path = PACKAGED / f"{suite}.yaml" if isinstance(suite, str) and suite in packaged else Path(suite).absolute()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_yaml(path)
    raise NotFoundError(f"no suite {str(suite)!r}: no such file or folder; packaged are: {', '.join(packaged)}")


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

    def resolve(written: Path) -> Path:
        path = suite_file.parent / re.sub(r"^\$\{(\w+)\}", variable, str(written))
        if not path.exists():
            raise NotFoundError(f"{where}: no such file: {path}")
        if task.kind not in _kinds(path):
            wants = "a BEIR folder" if task.kind == "retrieval" else f"rows with {', '.join(COLUMNS[task.kind])}"
            raise InputError(f"{where}: {task.kind} reads {wants}, and that is not what {path} holds")
        return path

    return task.model_copy(update={"path": resolve(task.path), "train": task.train and resolve(task.train)})


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
        return ["retrieval"]
    for row in rows_of(path, "test", lambda row, _: row):
        return [kind for kind, columns in COLUMNS.items() if columns.keys() <= row.keys()]
    return []
