"""What a row means, from the command that makes it to the stage that trains on it, through the commands in between."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fake_llm import Body, FakeLLM, Reply
from typer.testing import CliRunner

from embedwright.cli import main as cli
from embedwright.config import ConfigError
from embedwright.data.files.tasks import read_tasks, tasks_file
from embedwright.data.schema import Task
from embedwright.data.sources.catalog import find_task
from embedwright.demo import quickstart
from embedwright.encoders import open as opening
from embedwright.training.batches.blend import Row
from embedwright.training.batches.sources import is_mined, open_sources
from embedwright.training.recipe import Recipe

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("ra", "ne", "lo")]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exit_code:
        raise result.exception or AssertionError(result.output)
    return result.output


@pytest.fixture(autouse=True)
def teacher(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Instead of MiniLM: hashed words, which notes the instruction that it is given."""
    told: list[str | None] = []

    class Words:
        def encode(self, texts: list[str], task: str | None = None) -> np.ndarray:
            told.append(task)
            vectors = np.full((len(texts), 64), 0.01, np.float32)
            for row, text in enumerate(texts):
                for word in text.lower().split():
                    vectors[row, random.Random(word).randrange(64)] += 1
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    monkeypatch.setattr("embedwright.encoders.open.open_encoder", lambda name: Words())
    return told


@pytest.fixture
def server() -> Iterator[FakeLLM]:
    def words(seed: object, count: int = 12) -> str:
        return " ".join(random.Random(str(seed)).choices(WORDS, k=count))

    def reply(body: Body, n: int) -> Reply:
        prompt, seed = body["messages"][0]["content"], body["seed"]
        if '"verdict"' in prompt:
            return Reply('{"verdict": "negative"}')
        if '"tasks"' in prompt:
            return Reply(json.dumps({"tasks": [f"Given {words((seed, i), 4)}, find it" for i in range(20)]}))
        keys = dict.fromkeys(re.findall(r'"(\w+)"', prompt))
        return Reply(json.dumps({key: words((seed, key)) for key in keys}))

    with FakeLLM(reply) as fake:
        yield fake


def trained_rows(path: Path, **entry: Any) -> dict[str, Row]:
    """What `train` draws from the file, by id."""
    stage = {"name": "s", "data": [{"path": str(path), **entry}], "in_batch_negatives": "all", "hard_negatives": 1}
    stage |= {"optim": {"lr": 1e-3, "steps": 2, "batch_queries": 2}}
    recipe = Recipe.parse({"name": "r", "model": {"base": "b"}, "run": {"out": "o"}, "stages": [stage]})
    (sources,) = open_sources(recipe)
    rows = [source.row(i) for source in sources for i in range(len(source.rows))]
    return {row.example.id: row for row in rows}


def test_synthetic_rows_keep_their_tasks_to_the_training(tmp_path: Path, server: FakeLLM) -> None:
    made, cleaned, mined, judged = (tmp_path / f"{name}.jsonl" for name in ("made", "cleaned", "mined", "judged"))
    api = ("--base-url", server.url, "--model", "m")
    kinds = ("--types", "short-long,long-short,sts,bitext")
    run("synth", "--out", made, *api, "--count", "16", *kinds, "--licence", "mit")
    run("data", "clean", made, "--out", cleaned, "--licence", "MIT")  # by the licence of each row's task
    run("mine", cleaned, "--out", mined, "--negatives", "3", "--rule", "naive")
    run("data", "relabel", mined, "--out", judged, *api)
    before, after = trained_rows(made), trained_rows(judged)
    assert len(before) == 16 and before.keys() == after.keys()
    tasks = read_tasks(tasks_file(made))
    for id_, row in after.items():
        assert row.task == before[id_].task == tasks[row.example.task]
        assert row.task.instruction and row.task.licence == "mit" and row.task.source == "synthetic: m"
        assert row.task.symmetric == id_.startswith(("synthetic-sts", "synthetic-bitext"))
        assert row.example.positives == before[id_].example.positives
        assert row.example.negatives[: len(before[id_].example.negatives)] == before[id_].example.negatives
        assert len(row.example.negatives) == 3
    assert {row.task.family for row in after.values()} == {"retrieval", "classification", "sts", "pair"}
    asked = [prompt for prompt in server.prompts if '"verdict"' in prompt]
    assert asked and all("The task: " in prompt for prompt in asked)  # the judge is told the instruction, too


def test_documents_that_are_called_synthetic_are_mined_and_what_a_model_wrote_is_not(
    tmp_path: Path, server: FakeLLM
) -> None:
    documents = ({"title": f"title {WORDS[i]}", "text": f"{WORDS[i]} {WORDS[-i]}. {WORDS[i + 9]}"} for i in range(30))
    pairs, made = tmp_path / "pairs.jsonl", tmp_path / "made.jsonl"
    run("data", "pairs", write(tmp_path / "synthetic.jsonl", *documents), "--how", "title", "--out", pairs)
    api = ("--base-url", server.url, "--model", "m")
    run("synth", "--out", made, *api, "--count", "4", "--types", "short-long")
    stage = {"name": "s", "data": [{"path": str(pairs)}, {"path": str(made)}], "in_batch_negatives": "all"}
    stage |= {"hard_negatives": 1, "optim": {"lr": 1e-3, "steps": 2, "batch_queries": 2}}
    stages = [{"kind": "mine", "teacher": "bm25"}, stage]
    recipe = Recipe.parse({"name": "r", "model": {"base": "b"}, "run": {"out": "o"}, "stages": stages})
    (sources,) = open_sources(recipe)
    assert [(source.name[0], is_mined(source)) for source in sources] == [("0", True), ("1", False)]


def test_a_licence_that_is_not_allowed_takes_synthetic_rows_out(tmp_path: Path, server: FakeLLM) -> None:
    made = tmp_path / "made.jsonl"
    run("synth", "--out", made, "--base-url", server.url, "--model", "m", "--count", "3", "--licence", "cc-by-nc-4.0")
    with pytest.raises(ValueError, match="licence 3"):
        run("data", "clean", made, "--out", tmp_path / "out.jsonl", "--licence", "mit")
    assert not tasks_file(tmp_path / "out.jsonl").exists()


OWN: dict[str, Any] = {
    "name": "own",
    "hub": "someone/own",
    "rows": {"kind": "scored", "text1": "a", "text2": "b", "score": "s"},
    "family": "sts",
    "instructions": ["Find the same", "Find what is alike"],
    "symmetric": True,
    "target": {"v2": "passage"},
    "licence": "mit",
    "marks": dict.fromkeys(("columns", "source", "instructions", "samples", "target"), "guess"),
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_users_own_set_keeps_its_task_to_the_training(tmp_path: Path) -> None:
    rows = [{"a": f"first text number {i}", "b": f"second text number {i}", "s": 5} for i in range(8)]
    source = write(tmp_path / "raw.jsonl", *rows)
    built, cleaned, mined = (tmp_path / name for name in ("built.parquet", "cleaned.jsonl.gz", "mined.parquet"))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(OWN))
    run("data", "build", tmp_path / "own.yaml", "--source", source, "--out", built)
    run("data", "clean", built, "--out", cleaned, "--licence", "mit", "--repeats", "none")
    run("mine", cleaned, "--out", mined, "--negatives", "1", "--rule", "naive")
    trained = trained_rows(mined)
    assert len(trained) == 16 and {row.task.instruction for row in trained.values()} == set(OWN["instructions"])
    for row in trained.values():
        assert (row.task.family, row.task.symmetric, row.task.licence) == ("sts", True, "mit")
        assert row.task.source == "someone/own" and len(row.example.negatives) == 1 and row.example.score == 5
        (positive,) = row.example.positives
        assert positive.text.split()[1:] == row.example.query.split()[1:] and positive.text != row.example.query


@pytest.mark.parametrize(("form", "symmetric"), [("label", False), ("example", True)])
def test_a_set_trains_under_the_task_of_the_form_it_was_built_in(form: str, symmetric: bool, tmp_path: Path) -> None:
    """`emotion` has the form `example` in v2: rows of the form `label` must not take its symmetric task."""
    rows = [{"text": f"text {i}", "label": i % 6, "label_text": f"feeling {i % 6}"} for i in range(24)]
    out, cleaned = tmp_path / "emotion.jsonl", tmp_path / "cleaned.jsonl"
    run("data", "build", "emotion", "--source", write(tmp_path / "in.jsonl", *rows), "--out", out, "--form", form)
    run("data", "clean", out, "--out", cleaned)
    for path in (out, cleaned):
        (task,) = {row.task for row in trained_rows(path).values()}
        assert task.symmetric is symmetric and task.family == "classification" and "emotion" in task.instruction


def test_labels_have_the_task_of_their_form(tmp_path: Path) -> None:
    rows = write(tmp_path / "x.jsonl", *({"text": f"t{i}", "label": f"l{i % 3}"} for i in range(9)))
    for form, symmetric in (("label", False), ("example", True)):
        run("data", "labels", rows, "--out", tmp_path / "y.jsonl", "--form", form, "--task", "mine")
        (task,) = {row.task for row in trained_rows(tmp_path / "y.jsonl").values()}
        assert task == Task(name="mine", family="classification", symmetric=symmetric)
    run("data", "labels", rows, "--out", tmp_path / "y.jsonl", "--task", "emotion")
    (task,) = {row.task for row in trained_rows(tmp_path / "y.jsonl").values()}
    assert "emotion" in task.instruction  # of the catalogue


@pytest.mark.parametrize(("classes", "symmetric"), [(2, False), (4, True)])
@pytest.mark.parametrize("name", ["intents", "banking77"])  # of the catalogue, which has it in the form of two labels
def test_labelled_rows_mean_the_same_as_after_data_labels(
    tmp_path: Path, name: str, classes: int, symmetric: bool
) -> None:
    rows = ({"text": f"text {i}", "label": f"{WORDS[i % classes]}"} for i in range(24))
    raw, made, told = write(tmp_path / f"{name}.jsonl", *rows), tmp_path / "made.jsonl", tmp_path / "told.jsonl"
    run("data", "labels", raw, "--out", made)
    described = {"task": {"name": name, "instruction": "Find the intent", "in_batch_negatives": "none"}}
    for entry in ({}, described, {"task": described["task"] | {"symmetric": not symmetric, "family": "clustering"}}):
        (task,) = {row.task for row in trained_rows(raw, **entry).values()}
        (after,) = {row.task for row in trained_rows(made, **entry).values()}
        assert task == after.model_copy(update={"source": task.source, "licence": task.licence})
        assert task.symmetric is (symmetric if entry in ({}, described) else not symmetric)
    run("data", "clean", raw, "--out", tmp_path / "cleaned.jsonl", "--repeats", "none")
    assert {row.task for row in trained_rows(tmp_path / "cleaned.jsonl").values()} == {
        row.task for row in trained_rows(raw).values()
    }
    write(tasks_file(raw), {"name": name, "instruction": "Beside"})
    run("data", "labels", raw, "--out", told)
    for path in (raw, told):
        (task,) = {row.task for row in trained_rows(path).values()}
        assert (task.instruction, task.family, task.symmetric) == ("Beside", "classification", symmetric)
    stage = {"name": "s", "data": [{"path": str(raw), **described}], "in_batch_negatives": "all", "hard_negatives": 1}
    stage |= {"optim": {"lr": 1e-3, "steps": 2, "batch_queries": 2}}
    stages = [{"kind": "mine", "teacher": "bm25"}, stage]
    with pytest.raises(ConfigError, match="none of its data can be mined"):
        open_sources(Recipe.parse({"name": "r", "model": {"base": "b"}, "run": {"out": "o"}, "stages": stages}))


def test_rows_that_name_no_task_are_named_where_they_are_trained(tmp_path: Path) -> None:
    """Else the instruction of the recipe would be for a name that no row has after the first command."""
    pairs = write(
        tmp_path / "pairs.jsonl", *({"query": f"what is {i}", "positive": f"it is {i} {i}"} for i in range(6))
    )
    cleaned, mined = tmp_path / "cleaned.parquet", tmp_path / "mined.jsonl"
    run("data", "clean", pairs, "--out", cleaned, "--repeats", "none")
    run("mine", cleaned, "--out", mined, "--negatives", "1", "--rule", "naive")
    task = {"name": "own", "instruction": "Answer the question", "licence": "mit"}
    for path in (pairs, cleaned, mined):
        rows = trained_rows(path, task=task).values()
        assert {row.task for row in rows} == {Task(**task)} and {row.example.task for row in rows} == {"own"}


def test_a_described_file_keeps_its_description(tmp_path: Path) -> None:
    """Rows without a task have the file's name, and the file beside describes it: the name goes on with it."""
    pairs = write(tmp_path / "pairs.jsonl", *({"query": f"what is {i}", "positive": f"it is {i}"} for i in range(6)))
    task = Task(name="pairs", instruction="Answer", licence="mit", in_batch_negatives="same_task")
    write(tasks_file(pairs), task.model_dump())
    out, exported = tmp_path / "out.jsonl", tmp_path / "st.parquet"
    run("data", "clean", pairs, "--out", out, "--repeats", "none", "--licence", "mit")
    assert {row.task for row in trained_rows(out).values()} == {task}
    run("data", "export", pairs, "--out", exported)
    assert read_tasks(tasks_file(exported)) == {"pairs": task}


def test_a_file_that_is_called_as_a_set_of_the_catalogue_has_its_task_everywhere(
    tmp_path: Path, server: FakeLLM, teacher: list[str | None]
) -> None:
    pairs = write(tmp_path / "nq.jsonl", *({"query": f"what is {i}", "positive": f"it is {i} {i}"} for i in range(6)))
    cleaned, mined, judged = (tmp_path / name for name in ("cleaned.jsonl", "mined.parquet", "judged.jsonl"))
    run("data", "clean", pairs, "--out", cleaned, "--repeats", "none")
    for source, out in ((pairs, tmp_path / "at_once.jsonl"), (cleaned, mined)):
        teacher.clear()
        run("mine", source, "--out", out, "--negatives", "1", "--rule", "naive")
        assert "Given a question, retrieve passages that answer the question" in teacher
    run("data", "relabel", mined, "--out", judged, "--base-url", server.url, "--model", "m")
    (task,) = {row.task for row in trained_rows(pairs).values()}
    assert task == find_task("nq")
    for path in (cleaned, tmp_path / "at_once.jsonl", mined, judged):
        assert {row.task for row in trained_rows(path).values()} == {task} and read_tasks(tasks_file(path)) == {
            "nq": task
        }


def test_no_tasks_of_an_older_file_stay_beside_a_new_one(tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", {"query": "a b", "positive": "c d"})
    out = tmp_path / "out.jsonl"
    write(tasks_file(out), {"name": "out", "instruction": "of other rows"})
    run("data", "clean", pairs, "--out", out)
    assert not tasks_file(out).exists()


def test_two_descriptions_of_one_name_are_refused(tmp_path: Path, server: FakeLLM) -> None:
    rows = write(tmp_path / "rows.jsonl", {"query": "q", "positives": ["p"], "negatives": ["n"], "task": "t"})
    write(tasks_file(rows), {"name": "t", "instruction": "one"})
    other = write(tmp_path / "other.jsonl", {"name": "t", "instruction": "two"})
    api = ("--base-url", server.url, "--model", "m")
    with pytest.raises(ValueError, match=r"'t' is another in .*other\.jsonl than in .*'one' and 'two'"):
        run("data", "relabel", rows, "--out", tmp_path / "out.jsonl", "--tasks", other, *api)


def test_a_prepared_run_is_refused_under_another_instruction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would train under the new one, and mine and judge under the old."""
    monkeypatch.setattr(quickstart, "open_encoder", lambda name: opening.open_encoder(name))
    words = random.Random(0)
    texts = [" ".join(words.choices(WORDS, k=6)) for _ in range(80)]
    pairs = [{"query": texts[i], "positive": texts[40 + i]} for i in range(40)]
    data, out = write(tmp_path / "pairs.jsonl", *pairs), tmp_path / "run"
    first = quickstart.recipe_for(data, "b", out, instruction="Find one")
    assert quickstart.recipe_for(data, "b", out, instruction="Find one") == first
    asked = "another instruction .*'Find one', now 'Find two'"
    for change, message in (({"instruction": "Find two"}, asked), ({"teacher": "t"}, "another teacher")):
        with pytest.raises(ValueError, match=message):
            quickstart.recipe_for(data, "b", out, **{"instruction": "Find one"} | change)
