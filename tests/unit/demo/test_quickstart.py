"""`train --data`: what is held out, judged and trained on, against a plain reading of the user's rows."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwright.data.files.tasks import read_tasks, tasks_file, write_tasks
from embedwright.data.schema import Task
from embedwright.data.sources.catalog import find_task
from embedwright.demo import quickstart
from embedwright.demo.heldout import write_rows
from embedwright.evaluation.suite import evaluate, load_suite
from embedwright.pairs.make import make_pairs
from embedwright.training.batches.sources import open_sources
from embedwright.training.recipe import Recipe

HELDOUT, HELDOUT_ROWS = "queries held out, to score the model before and after", "rows of these queries"
LEAKS = "rows left out, since they repeat a held-out text"
LEAKED_NEGATIVES = "negatives left out, since they repeat a held-out text"
LACKING = "rows left out, since no hard negative was found for them"
SYLLABLES = ["ba", "be", "bi", "da", "de", "di", "fa", "fe", "fi", "ga", "ge", "gi", "ka", "ke", "ki", "la", "le", "li"]


class Teacher:
    """A random vector for each text: whatever the rules leave is mined."""

    def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        vectors = np.stack([np.random.default_rng(list(text.encode())).normal(size=64) for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Perfect:
    """All that answers a question lies on the question."""

    def __init__(self, question_of: dict[str, str]) -> None:
        self.question_of = {same(text): same(question) for text, question in question_of.items()}

    def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        return Teacher().encode([self.question_of.get(same(text), same(text)) for text in texts])


def same(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices(SYLLABLES, k=3)) for _ in range(count))


def prepared(
    folder: Path, rows: Sequence[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, Any]]:
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(quickstart, "open_encoder", lambda _: Teacher())
    quickstart.recipe_for(data, "base", folder / "run")
    return folder / "run" / "data", json.loads((folder / "run/data/report.json").read_text())


def texts_of(row: dict[str, Any]) -> list[str]:
    """All texts of a row, in whichever form its passages are."""
    passages = (*row["positives"], *row["negatives"])
    return [row["query"], *(p if isinstance(p, str) else p["text"] for p in passages)]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_of_a_held_out_question_are_judged_and_never_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 questions of 3 answers, in rows of their own and together; some answers are shared, some are negatives."""
    rng = random.Random(3)
    answers_of = {words(rng, 6): [words(rng, 8) for _ in range(3)] for _ in range(60)}
    questions = list(answers_of)
    for i in range(0, 60, 2):  # an answer to every second question is one to the next, too, in another look
        answers_of[questions[i + 1]][2] = answers_of[questions[i]][0].upper()
    rows: list[dict[str, Any]] = []
    for i, (question, right) in enumerate(answers_of.items()):
        wrong = {"negatives": [answers_of[questions[i - 7]][1], words(rng, 8)]}
        if i % 3:
            rows += [
                {"query": look, "positives": [text]} | wrong
                for look, text in zip((question, question.upper(), f" {question}"), right, strict=True)
            ]
        else:
            rows.append({"query": question, "positives": right} | wrong)
    folder, report = prepared(tmp_path, rows, monkeypatch)

    heldout = {same(row["text"]) for row in read(folder / "heldout/own/queries.jsonl")}
    assert len(heldout) == len(read(folder / "heldout/own/queries.jsonl")) == report[HELDOUT] == 6
    question_of = {
        text: question for question in questions if same(question) in heldout for text in answers_of[question]
    }
    barred = heldout | set(map(same, question_of))
    train = read(folder / "train.jsonl")
    assert not barred & {same(text) for row in train for text in texts_of(row)}
    asked = [row for row in rows if same(row["query"]) in heldout]
    others = [row for row in rows if row not in asked]
    leaking = [row for row in others if barred & set(map(same, [row["query"], *row["positives"]]))]
    told = {key: report[key] for key in ("rows read", HELDOUT_ROWS, LEAKS, LACKING, "rows to train on")}
    expected = {"rows read": len(rows), HELDOUT_ROWS: len(asked), LEAKS: len(leaking), LACKING: 0}
    assert told == expected | {"rows to train on": len(others) - len(leaking)} and leaking
    lost = [text for row in others if row not in leaking for text in row["negatives"] if same(text) in barred]
    assert report[LEAKED_NEGATIVES] == len(lost) > 0
    found = evaluate(Perfect(question_of), load_suite(folder / "heldout/suite.yaml"))
    assert found.rows[0].value == pytest.approx(1.0)


def test_a_query_that_is_a_document_too_is_no_hit_and_pairs_hold_in_both_directions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(4)
    pairs = [(words(rng, 6), words(rng, 6)) for _ in range(60)]
    rows = [{"query": q, "positives": [p]} for a, b in pairs for q, p in ((a, b), (b, a))]
    folder, report = prepared(tmp_path, rows, monkeypatch)
    assert report[HELDOUT] == 12 and report[LEAKS] > 0
    found = evaluate(Perfect(dict(pairs)), load_suite(folder / "heldout/suite.yaml"))
    assert found.rows[0].value == pytest.approx(1.0)


def test_of_scored_pairs_those_train_that_reach_the_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    rows = [{"text1": words(rng, 6), "text2": words(rng, 6), "score": i % 2 * 5} for i in range(80)]
    folder, report = prepared(tmp_path, rows, monkeypatch)
    low = {text for row in rows if row["score"] == 0 for text in (row["text1"], row["text2"])}
    assert report["rows read"] == report["rows left out, since their score is too low for an answer"] == 80
    train = read(folder / "train.jsonl")
    assert len(train) >= 60 and not low & {text for row in train for text in texts_of(row)}


def opened(recipe: Recipe) -> dict[str, Task]:
    """The tasks of all rows that a run draws in its first stage, by name."""
    (first, _) = open_sources(recipe)
    rows = (source.row(i) for source in first for i in range(len(source.rows)))
    return {row.example.task: row.task for row in rows}


def test_rows_keep_their_tasks_and_only_others_become_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `data pairs` writes them, with rows that name no task, a public task, and one that nobody describes."""
    told: set[str | None] = set()

    class Noting(Teacher):
        def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
            told.add(task)
            return super().encode(texts)

    monkeypatch.setattr(quickstart, "open_encoder", lambda _: Noting())
    rng = random.Random(4)
    documents = [{"title": words(rng, 4), "text": words(rng, 9)} for _ in range(50)]
    write_rows(tmp_path / "docs.jsonl", documents)
    data = tmp_path / "pairs.jsonl"
    make_pairs(tmp_path / "docs.jsonl", data, ["title"], licence="MIT")
    tasks = opened(quickstart.recipe_for(data, "base", tmp_path / "described"))
    assert tasks == read_tasks(tasks_file(data)) and tasks["docs-title"].instruction in told
    suite = (tmp_path / "described/data/heldout/suite.yaml").read_text()
    assert tasks["docs-title"].instruction in suite and quickstart.INSTRUCTION not in suite

    pair = ({"query": words(rng, 4), "positives": [words(rng, 9)]} for _ in range(120))
    rows = [row | ({"task": task} if task else {}) for task in ("", "odd", "nq") for row in islice(pair, 40)]
    write_rows(tmp_path / "mixed.jsonl", [*read(data), *rows])
    tasks_file(data).rename(tasks_file(tmp_path / "mixed.jsonl"))
    recipe = quickstart.recipe_for(tmp_path / "mixed.jsonl", "base", tmp_path / "mixed", instruction="Find it")
    odd = {name: Task(name=name, instruction="Find it") for name in ("own", "odd")}
    assert opened(recipe) == tasks | odd | {"nq": find_task("nq")}
    assert recipe == quickstart.recipe_for(tmp_path / "mixed.jsonl", "base", tmp_path / "mixed", instruction="Find it")


def test_a_description_of_the_file_is_that_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "open_encoder", lambda _: Teacher())
    rng, data = random.Random(5), tmp_path / "mine1.jsonl"
    write_rows(data, ({"query": words(rng, 5), "positive": words(rng, 6)} for _ in range(40)))
    task = Task(name="mine1", family="sts", symmetric=True, licence="CC-BY-NC-4.0", instruction="Find the same")
    write_tasks(tasks_file(data), [task])
    assert opened(quickstart.recipe_for(data, "base", tmp_path / "run")) == {"mine1": task}


def test_rows_that_answer_themselves_alone_cannot_be_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    rows = [{"query": text, "positives": [text.upper()]} for text in (words(rng, 6) for _ in range(40))]
    with pytest.raises(ValueError, match="no query has an answer besides its own text"):
        prepared(tmp_path, rows, monkeypatch)


def test_questions_on_one_long_passage_are_no_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(6)
    passages = [words(rng, 80) for _ in range(40)]
    rows = [{"query": words(rng, 4), "positives": [passages[i // 2]]} for i in range(80)]
    _, report = prepared(tmp_path, [*rows, rows[0]], monkeypatch)
    assert (report["rows read"], report["exact duplicates left out"], report["near duplicates left out"]) == (81, 1, 0)
    assert report[HELDOUT] == 8
