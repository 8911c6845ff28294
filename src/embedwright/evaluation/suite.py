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
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StrictBool, model_validator

from embedwright.config import load_yaml, validate
from embedwright.data.files.beir import beir_files, read_beir
from embedwright.data.files.folders import data_files, is_beir, is_data, is_one_set, stem_of
from embedwright.data.files.quarantine import good_rows
from embedwright.data.files.rows import read_rows
from embedwright.data.schema import DataError, binary_of, label_of, number_of, text_of
from embedwright.encoders.protocol import Encoder, as_encoder, encode_finite
from embedwright.errors import InputError, MissingPackageError, NotFoundError
from embedwright.evaluation import metrics
from embedwright.evaluation.metrics import MAIN, Embeddings, Kind
from embedwright.evaluation.results import Result, Results

PACKAGED = Path(__file__).parent / "suites"

logger = logging.getLogger(__name__)
T = TypeVar("T")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SuiteTask(_Strict):
    """One data file or BEIR folder, and how to score it."""

    name: str
    kind: Kind
    path: Path
    train: Path | None = None  # classification only; without it, the file is split 50/50
    instruction: str = ""
    limit: PositiveInt | None = None  # takes the first rows only; in retrieval the first queries, with the whole corpus
    ignore_identical_ids: StrictBool = False  # retrieval only: the document with the query's own id is no hit

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> SuiteTask:
        if self.train is not None and self.kind != "classification":
            raise InputError(f"task {self.name!r}: 'train' is for classification, not for {self.kind}")
        if self.ignore_identical_ids and self.kind != "retrieval":
            raise InputError(f"task {self.name!r}: 'ignore_identical_ids' is for retrieval, not for {self.kind}")
        return self


class Suite(_Strict):
    """A named set of tasks, whose names differ."""

    name: str
    tasks: tuple[SuiteTask, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Suite:
        names = [task.name for task in self.tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"two tasks are named {twice[0]!r}")
        return self


def evaluate(model: Any, suite: Suite | Path | str, *, progress: Callable[[str], None] | None = None) -> Results:
    """Scores a model on every task of a suite.

    Retrieval puts a task's instruction on the queries only; the other kinds put it on every text, as mteb does. Within
    a task, equal texts are encoded once. The same embeddings give the same numbers.

    Args:
        model: An Embedder, a SentenceTransformer, or any object with `encode(texts, task=None)`.
        suite: A suite, the path of its YAML file or of a folder of data sets, or the packaged `dev`.
        progress: A function that gets a line before and after each task.

    Returns:
        One row a task, in the suite's order.

    Raises:
        FileNotFoundError: A file of the suite is missing.
        ValueError: A file has other content than its task needs. The message names suite, task and file.
        ImportError: The `[eval]` extra is not installed.
        TypeError: The model has no `encode`.
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
            details = _scores(encoder, task)
        except ValueError as error:
            raise InputError(f"suite {suite.name!r}, task {task.name!r}: {error}") from error
        value, seconds = details.pop(MAIN[task.kind]), time.perf_counter() - task_started
        rows.append(Result(task.name, task.kind, MAIN[task.kind], value, details))
        say(f"[{number}/{len(suite.tasks)}] {task.name}: {MAIN[task.kind]} {value:.4f} in {seconds:.1f} s")
    return Results(suite.name, tuple(rows), time.perf_counter() - started)


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
            wants = "a BEIR folder" if task.kind == "retrieval" else f"rows with {', '.join(_COLUMNS[task.kind])}"
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
        beir_files(path, _split(path))  # raises if another part is missing
        return ["retrieval"]
    for row in _rows(path, "test", lambda row, _: row):
        return [kind for kind, columns in _COLUMNS.items() if columns.keys() <= row.keys()]
    return []


def _split(folder: Path) -> str | None:
    """Returns the split of a BEIR folder to evaluate on: `test`, if it has one."""
    return "test" if any(folder.glob("qrels/test.tsv*")) else None


# ---------------------------------------------------------------------------------------------------- tasks


def _scores(encoder: Encoder, task: SuiteTask) -> dict[str, float]:
    if task.kind == "retrieval":
        return _retrieval(encoder, task)
    if task.kind == "classification":
        return _classification(encoder, task)
    *texts, gold = _read(task.path, task.kind, task.limit)
    _refuse_one_label(gold, task.path)
    vectors_NE = _encode(encoder, [text for column in texts for text in column], task.instruction or None)
    if task.kind == "clustering":
        return metrics.clustering(vectors_NE, gold)
    left_NE, right_NE = np.split(vectors_NE, 2)
    return metrics.sts(left_NE, right_NE, gold) if task.kind == "sts" else metrics.pair(left_NE, right_NE, gold)


def _retrieval(encoder: Encoder, task: SuiteTask) -> dict[str, float]:
    beir = read_beir(task.path, _split(task.path))
    queries = dict(islice(((id_, text) for id_, text in beir.queries.items() if id_ in beir.qrels), task.limit))
    query_QE = _encode(encoder, list(queries.values()), task.instruction)
    corpus_CE = _encode(encoder, list(beir.corpus.values()))
    own = sum(beir.corpus.get(query) == text for query, text in queries.items())
    if own and not task.ignore_identical_ids:
        logger.warning(
            "%s: %d queries are documents too, under their own ids, and find themselves first; mteb leaves these out "
            "for ArguAna, Quora and some others, and so does ignore_identical_ids: true in a suite file",
            *(task.path, own),
        )
    ids, corpus_ids = list(queries), list(beir.corpus)
    return metrics.retrieval(query_QE, ids, corpus_CE, corpus_ids, beir.qrels, task.ignore_identical_ids)


def _classification(encoder: Encoder, task: SuiteTask) -> dict[str, float]:
    texts, labels = _read(task.path, task.kind, task.limit)
    if task.train:
        train_texts, train_labels = _read(task.train, task.kind, split="train")
    else:
        train, test = metrics.halves(labels)
        train_texts, train_labels = [texts[row] for row in train], [labels[row] for row in train]
        texts, labels = [texts[row] for row in test], [labels[row] for row in test]
    _refuse_one_label(train_labels, task.train or task.path)
    draws = metrics.few_shot(train_labels)
    drawn = sorted(set().union(*draws))  # the other training rows are not used, so they are not encoded
    place = {row: number for number, row in enumerate(drawn)}
    vectors_NE = _encode(encoder, [train_texts[row] for row in drawn] + texts, task.instruction or None)
    train_NE, test_NE = np.split(vectors_NE, [len(drawn)])
    places = [[place[row] for row in draw] for draw in draws]
    return metrics.classification(train_NE, [train_labels[row] for row in drawn], test_NE, labels, places)


# Rows may have other keys. A file of a folder is of the first kind whose keys it has.
_COLUMNS: dict[Kind, dict[str, Callable[[object, str], Any]]] = {
    "sts": {"text1": text_of, "text2": text_of, "score": number_of},
    "pair": {"text1": text_of, "text2": text_of, "label": binary_of},
    "classification": {"text": text_of, "label": label_of},
    "clustering": {"text": text_of, "label": label_of},
}


def _read(path: Path, kind: Kind, limit: int | None = None, split: str = "test") -> list[list[Any]]:
    """Reads the columns of `kind` in the first `limit` rows. A bad row is an error: without it, the test changes."""
    checks = _COLUMNS[kind]
    rows = _rows(path, split, lambda row, _: [check(row.get(key), key) for key, check in checks.items()])
    return [list(column) for column in zip(*islice(rows, limit), strict=True)] or [[] for _ in checks]


def _rows(path: Path, split: str, parse: Callable[[dict[str, Any], str], T]) -> Iterator[T]:
    """Parses each row of a data set. DataError names file and line of a bad one."""
    for file in data_files(path, split):
        yield from good_rows(read_rows(file), parse, stem_of(file), None, file)


def _refuse_one_label(gold: Sequence[Any], file: Path) -> None:
    """Raises DataError if there is one label only: every metric would be 0, 1 or undefined for any model."""
    if len(set(gold)) < 2:
        raise DataError(f"{file}: {len(gold)} rows, all of one label or score (a `limit` on a sorted file does that)")


def _encode(encoder: Encoder, texts: Sequence[str], task: str | None = None) -> Embeddings:
    """Encodes texts to float32 (N, E), each distinct text once."""
    place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    vectors_NE = encode_finite(encoder, list(place), task)
    return vectors_NE if len(place) == len(texts) else vectors_NE[[place[text] for text in texts]]
