"""The command as a user calls it: `main` with its arguments, what it prints, and its exit code."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

from embedwright.cli import main as cli
from embedwright.data.tables.table import open_examples
from embedwright.demo import docstrings
from embedwright.evaluation.results import read_results
from embedwright.model.embedder import Embedder
from embedwright.training import steps
from embedwright.training import train as loop
from embedwright.training.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SYLLABLES = ["ba", "ko", "mi", "tu", "re", "sa", "no", "li", "ge", "vu", "da", "pe"]


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Command:
    """`command("eval", model, suite)`: exit code, standard output, and standard error with the warnings logged."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "error" if name == "TRANSFORMERS_VERBOSITY" else "1")  # so that main leaves none
    monkeypatch.delenv("EMBEDWRIGHT_DEBUG", raising=False)

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["embedwright", *map(str, arguments)])
        caplog.clear()
        capsys.readouterr()
        try:
            with caplog.at_level(logging.WARNING, logger="embedwright"):
                cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Answer(code, out, err + caplog.text)

    return call


class WordTeacher:
    """Texts that share words are alike."""

    def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        vectors = np.full((len(texts), 256), 1e-3, np.float32)
        for i, text in enumerate(texts):
            for word in text.split():
                vectors[i, sum(ord(c) * 7**k for k, c in enumerate(word)) % 256] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own_pairs(count: int) -> list[dict[str, str]]:
    """Query and answer share two words that no other pair has."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(SYLLABLES, 3)) for _ in range(60)]

    def text(i: int) -> str:
        return " ".join(random.permutation([f"own{i}", f"name{i}", *random.choice(words, 6)]))

    return [{"query": text(i), "positive": text(i)} for i in range(count)]


def write_recipe(folder: Path, base: Path) -> Path:
    """Two stages of two steps, with everything that they read, below `folder`."""
    pairs = own_pairs(24)
    rows = [
        {"query": p["query"], "positives": [p["positive"]], "negatives": [pairs[i - 5]["positive"]]}
        for i, p in enumerate(pairs)
    ]
    labelled = [{"text": p["query"], "label": f"kind {i % 3}"} for i, p in enumerate(pairs)]
    scored = [{"text1": p["query"], "text2": pairs[i % 9]["positive"], "score": i % 6} for i, p in enumerate(pairs)]
    write(folder / "suite" / "sts.jsonl", scored)
    optim = {"lr": 1e-2, "steps": 2, "batch_queries": 4}

    def stage(name: str, data: Path, in_batch: str) -> dict[str, Any]:
        task = {"name": name, "instruction": "Find it", "licence": "none"}
        rest = {"in_batch_negatives": in_batch, "hard_negatives": 1, "temperature": 0.1, "optim": optim}
        return {"name": name, "data": [{"path": str(data), "task": task}], **rest}

    recipe = {
        "name": "tiny",
        "model": {"base": str(base), "latents": 8, "heads": 4, "multiple": 1, "max_tokens": 64},
        "tune": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "stages": [
            stage("retrieval", write(folder / "examples.jsonl", rows), "all"),
            stage("generalist", write(folder / "labels.jsonl", labelled), "none"),
        ],
        "run": {"out": str(folder / "unset"), "checkpoint_every": 1, "tracker": "none"},
        "eval": {"suites": [str(folder / "suite")]},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture
def recipe(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> Path:
    return write_recipe(tmp_path, tiny_decoder("llama"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_embedder: Callable[..., Embedder]) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_embedder("latent").save(folder)
    return folder


# ---- a recipe, and what comes after it


def test_a_recipe_is_trained_evaluated_searched_and_examined(command: Command, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    answer = command("train", recipe, "--out", out)
    assert answer.code == 0, answer.err
    assert not (tmp_path / "unset").exists()
    assert "4/4 steps" in answer.err and "generalist: loss" in answer.err
    header = next(line for line in answer.out.splitlines() if "retrieval 2" in line)
    assert header.index("start 0") < header.index("retrieval 2") < header.index("generalist 2")
    model = out / "model"
    assert f"model: {model}" in answer.out
    assert (model / "README.md").read_text().startswith("---\n") and "| generalist | 2 |" in (
        out / "README.md"
    ).read_text()

    answer = command("eval", model, tmp_path / "suite", "--out", tmp_path / "new" / "results.json")
    assert answer.code == 0, answer.err
    assert (tmp_path / "new" / "results.items.npz").exists() and len(list((out / "items").iterdir())) == 3
    saved_rows = json.loads((tmp_path / "new" / "results.json").read_text())["rows"]
    last = json.loads((out / "evaluations.jsonl").read_text().splitlines()[-1])["results"]["rows"]
    assert [row["value"] for row in saved_rows] == pytest.approx([row["value"] for row in last], abs=1e-4)

    documents = [p["positive"] for p in own_pairs(12)]
    corpus = write(tmp_path / "corpus.jsonl", [{"_id": f"d{i}", "text": t} for i, t in enumerate(documents)])
    answer = command("encode", model, corpus, tmp_path / "vectors")
    assert answer.code == 0, answer.err
    assert "12/12 texts" in answer.err and list((tmp_path / "vectors").glob("shard-*.arrow"))

    assert command("index", model, corpus, tmp_path / "index").code == 0
    answer = command("search", model, tmp_path / "index", documents[7], documents[2], "--k", "2")
    assert answer.code == 0, answer.err
    query, best, _, other, other_best, _ = answer.out.splitlines()
    assert (query, other) == (documents[7], documents[2])
    assert best.split()[:2] == ["1.0000", "d7"] and other_best.split()[:2] == ["1.0000", "d2"]

    answer = command("doctor", model)
    assert answer.code == 0, answer.err
    assert "ok  through sentence-transformers" in answer.out and "BAD" not in answer.out


def test_an_interrupted_run_exits_75_says_so_and_goes_on(
    command: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate, calls = steps.accumulate, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return accumulate(*args, **kwargs)

    monkeypatch.setattr(steps, "accumulate", interrupted)
    answer = command("train", recipe, "--out", tmp_path / "run")
    assert answer.code == 75
    assert "run the same command again" in answer.err
    assert command("train", recipe, "--out", tmp_path / "run").code == 0
    assert len(calls) == 5  # four steps, one of them twice


def test_a_dry_run_measures_and_leaves_no_files(command: Command, recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    answer = command("train", recipe, "--out", tmp_path / "run", "--dry-run")
    assert answer.code == 0, answer.err
    lines = [line.split() for line in answer.out.splitlines()]
    assert [line[:2] for line in lines[2:4]] == [["retrieval", "2"], ["generalist", "2"]]
    assert all(float(number) > 0 for line in lines[2:4] for number in line[2:6])
    assert lines[4][:2] == ["all", "steps:"]
    assert sorted(tmp_path.rglob("*")) == before

    (tmp_path / "labels.jsonl").unlink()
    refused = [command("train", recipe, "--out", tmp_path / "run", *more) for more in ([], ["--dry-run"])]
    assert [answer.code for answer in refused] == [2, 2] and refused[0].err == refused[1].err != ""
    for more in (["--dry-run", "--plan"], ["--dry-run", "--processes", "2"], ["--processes", "2"]):
        assert command("train", recipe, *more).code == 2
    answer = command("train", "--data", write(tmp_path / "p.jsonl", own_pairs(4)), "--out", tmp_path / "o", "--dry-run")
    assert answer.code == 2 and not (tmp_path / "o").exists()


def test_a_model_of_an_older_run_is_never_named_as_the_result(command: Command, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert command("train", recipe, "--out", out).code == 0
    weights = {file.name: file.read_bytes() for file in (out / "model").glob("*.safetensors")}
    assert command("train", recipe, "--out", out).code == 0  # the same run, finished again
    assert {file.name: file.read_bytes() for file in (out / "model").glob("*.safetensors")} == weights != {}
    shutil.rmtree(out / "checkpoints")
    for arguments in ((recipe,), ("--data", tmp_path / "examples.jsonl")):
        answer = command("train", *arguments, "--out", out)
        assert answer.code == 2 and "is of an older run" in answer.err and not (out / "checkpoints").exists()


def test_the_table_has_the_tasks_of_every_suite(command: Command, recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "suite", tmp_path / "second")
    (tmp_path / "second" / "sts.jsonl").rename(tmp_path / "second" / "another.jsonl")
    tree = yaml.safe_load(recipe.read_text())
    tree["stages"] = tree["stages"][:1]
    tree["eval"]["suites"].append(str(tmp_path / "second"))
    recipe.write_text(yaml.safe_dump(tree))
    answer = command("train", recipe, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    table = answer.out[answer.out.index("start 0") :]
    assert "sts" in table and "another" in table


# ---- a user's own pairs


def test_own_pairs_are_prepared_trained_and_resumed(
    command: Command, tmp_path: Path, tiny_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def teacher(name: str) -> WordTeacher:
        opened.append(name)
        return WordTeacher()

    monkeypatch.setattr("embedwright.demo.quickstart.open_encoder", teacher)
    data, out = write(tmp_path / "pairs.jsonl", own_pairs(66)), tmp_path / "run"
    arguments = ["train", "--data", data, "--base", tiny_decoder("llama"), "--out", out, "--teacher", "small"]
    answer = command(*arguments)
    assert answer.code == 0, answer.err
    assert opened == ["small"]
    assert "66 rows read" in answer.err and "6 queries held out" in answer.err and "15/15 steps" in answer.err
    header = next(line for line in answer.out.splitlines() if "start 0" in line)
    assert header.index("start 0") < header.index("retrieval 10") < header.index("generalist 5")
    assert Embedder.load(out / "model").encode(["a text"]).shape == (1, 32)
    heldout = {json.loads(line)["text"] for line in (out / "data/heldout/own/queries.jsonl").read_text().splitlines()}
    train = {json.loads(line)["query"] for line in (out / "data/train.jsonl").read_text().splitlines()}
    assert len(heldout) == 6 and not heldout & train
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}

    answer = command(*arguments)
    assert answer.code == 0, answer.err
    assert f"model: {out / 'model'} " in answer.out and "start 0" in answer.out and "15/15" not in answer.err
    assert opened == ["small"] and before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}

    write(data, own_pairs(70))
    answer = command(*arguments)
    assert answer.code == 2
    assert str(out) in answer.err and "other data" in answer.err


def test_own_pairs_that_are_too_few_or_have_no_negatives_are_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Constant:
        def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
            return np.ones((len(texts), 4), np.float32)

    monkeypatch.setattr("embedwright.demo.quickstart.open_encoder", lambda _: Constant())
    few = write(tmp_path / "few.jsonl", own_pairs(15))
    answer = command("train", "--data", few, "--out", tmp_path / "few")
    assert answer.code == 2 and "few.jsonl: 14 pairs" in answer.err
    alike = write(tmp_path / "alike.jsonl", own_pairs(60))
    answer = command("train", "--data", alike, "--out", tmp_path / "alike")
    assert answer.code == 2 and "alike.jsonl: 0 pairs" in answer.err


# ---- data


def test_check_names_the_bad_lines_each_time(command: Command, tmp_path: Path) -> None:
    good = {"query": "tides", "positives": ["rise and fall"]}
    file = write(tmp_path / "examples.jsonl", [good, {"query": "the moon", "positives": []}, good])
    with file.open("a") as stream:
        stream.write("{broken\n")
    for _ in range(2):
        answer = command("data", "check", file)
        assert answer.code == 2
        assert f"{file}:2: no positive" in answer.err and f"{file}:4: not JSON" in answer.err
        report = json.loads(answer.out)
        assert (report["examples"], report["quarantined"], report["tasks"]) == (2, 2, {"examples": 2})
    kept = Path(answer.err.split("kept unchanged in ")[-1].split("\n")[0])
    assert kept.read_text().endswith("{broken\n")
    assert command("data", "check", write(tmp_path / "good.jsonl", [good])).code == 0


def test_data_is_checked_cleaned_and_exported(command: Command, tmp_path: Path) -> None:
    held = write(tmp_path / "test" / "held.jsonl", [{"text": "how do tides work", "label": "x", "id": "h1"}])
    rows = [
        {"query": f"question {i} of {i * i}", "positives": [f"answer {i}"], "negatives": ["no", "n"]} for i in range(4)
    ]
    rows += [rows[0], {"query": "work tides do how", "positives": ["the moon"]}]
    rows += [{"query": "Wie entstehen die Gezeiten?", "positives": ["Durch die Anziehungskraft des Mondes."]}]
    rows += [{**rows[1], "task": "closed"}]
    file = write(tmp_path / "train.jsonl", rows)
    licences = tmp_path / "licences.yaml"
    licences.write_text("train: CC-BY-4.0\nclosed: CC-BY-NC-4.0\n")

    answer = command("data", "check", file, "--against", tmp_path / "test", "--leaks", tmp_path / "found.jsonl")
    assert answer.code == 1 and f"texts of {held} are in it" in answer.err
    report = json.loads(answer.out)
    assert report["rows_removed"] == {"repeated_exact": 1, "leaked": 1}
    assert report["leaks"] == {str(held): {"query bm25": 1}}
    (line,) = map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())
    assert (line["row"], line["rule"], line["evaluation_row"], line["score"]) == (6, "bm25", "h1", 1.0)
    assert command("data", "check", file, "--against", held, "--bm25", "0").code == 0

    out = tmp_path / "out" / "clean.jsonl"
    options = ["--language", "en", "--not-licence", "*-NC-*", "--licences", licences, "--min-chars", "2"]
    answer = command("data", "clean", file, "--out", out, "--against", held, *options)
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    assert report["rows_removed"] == {"licence": 1, "language": 1, "repeated_exact": 1, "leaked": 1}
    assert (report["examples"], report["kept"], report["passages_cut"]) == (8, 4, {"length": 4})
    left = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["query"] for row in left] == [row["query"] for row in rows[:4]]
    assert all(row["negatives"] == ["no"] for row in left)
    assert len((tmp_path / "out" / "clean.jsonl.leaks.jsonl").read_text().splitlines()) == 1
    assert command("data", "clean", file, "--out", out, "--repeats", "none").code == 0
    assert len(out.read_text().splitlines()) == 8

    answer = command("data", "export", out, "--out", tmp_path / "st.parquet", "--negatives", "2")
    assert answer.code == 0 and json.loads(answer.out)["rows"] == 6
    assert pq.read_schema(tmp_path / "st.parquet").names == ["anchor", "positive", "negative_1", "negative_2"]


def test_labels_become_examples(command: Command, tmp_path: Path) -> None:
    file = write(tmp_path / "labels.jsonl", [{"text": f"text {i}", "label": f"l{i % 3}"} for i in range(9)])
    out = tmp_path / "new" / "examples.jsonl"
    answer = command("data", "labels", file, "--out", out, "--task", "kinds", "--negatives", "2")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["examples"] == 9
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["task"] for row in rows} == {"kinds"} and {len(row["negatives"]) for row in rows} == {2}
    pairs = write(tmp_path / "pairs.jsonl", own_pairs(3))
    answer = command("data", "labels", pairs, "--out", tmp_path / "none.jsonl")
    assert answer.code == 2 and str(pairs) in answer.err


def test_labels_take_a_form_words_and_a_closed_list(command: Command, tmp_path: Path) -> None:
    file = write(tmp_path / "labels.jsonl", [{"text": f"text {i}", "label": [i % 3]} for i in range(9)])
    out, words = tmp_path / "examples.jsonl", tmp_path / "words.yaml"
    words.write_text("0: none\n1: one\n2: two\n")
    answer = command("data", "labels", file, "--out", out, "--form", "label", "--words", words, "--seed", "4")
    assert answer.code == 0, answer.err
    assert {json.loads(line)["positives"][0] for line in out.read_text().splitlines()} == {"none", "one", "two"}
    answer = command("data", "labels", file, "--out", out, "--label", "0", "--label", "1", "--form", "example")
    assert json.loads(answer.out) == {"rows": 9, "unseen": 3, "fewer_negatives": 6, "examples": 6, "quarantined": 0}


def test_the_catalogue_is_listed(command: Command) -> None:
    whole = command("data", "list").out.splitlines()
    assert len(whole) == 44 and whole[0].startswith("name ")
    some = command("data", "list", "--family", "clustering", "--version", "v1").out.splitlines()
    assert [line.split()[0] for line in some[1:]][::6] == ["arxiv_p2p", "twenty_newsgroups"] and len(some) == 8
    assert "| msmarco | Given a web search query" in command("data", "list", "--markdown").out


def test_a_set_is_built_by_name_or_from_a_file_of_ones_own(command: Command, tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": i % 6} for i in range(30)]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    build = ["data", "build", "emotion", "--source", source, "--out", out, "--limit", 24, "--negatives", 3]
    answer = command(*build, "--label", 0, "--label", 1, "--seed", 1)
    assert answer.code == 0, answer.err
    counts = json.loads(answer.out)
    assert (counts["rows"], counts["not_drawn"], counts["examples"]) == (30, 6, 24 - counts["unseen"])
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert {len(row["negatives"]) for row in made} == {3} and {row["positives"][0]["text"][:4] for row in made} == {
        "text"
    }
    assert command(*build, "--form", "label").code == 0
    assert "joy" in out.read_text() and "not_drawn" in answer.out

    entry = {"name": "own", "family": "retrieval", "instructions": ["Find it"], "target": {"v2": "passage"}}
    entry |= {"hub": "someone/own", "rows": {"kind": "pairs", "query": "text", "positive": ["text", "more.0"]}}
    entry["marks"] = dict.fromkeys(("columns", "source", "instructions", "samples", "target"), "guess")
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(entry))
    write(source, [{"text": "a", "more": ["b"]}])
    answer = command("data", "build", file, "--source", source, "--out", out)
    assert answer.code == 0 and json.loads(out.read_text())["positives"] == ["a b"]
    answer = command("data", "build", file, "--out", out, "--strict")
    assert answer.code == 2 and "own: someone/own is not pinned" in answer.err
    file.write_text(yaml.safe_dump(entry | {"instruction": "x"}))
    answer = command("data", "build", file, "--out", out)
    assert answer.code == 2 and "instruction: unknown key; did you mean 'instructions'?" in answer.err


def test_an_adapter_is_merged_into_its_base_once(command: Command, saved: Path, tmp_path: Path) -> None:
    model = Embedder.load(saved).add_lora(2)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    model.save(tmp_path / "adapter")
    answer = command("merge", tmp_path / "adapter", tmp_path / "merged")
    assert answer.code == 0 and "largest difference from the adapter's vectors" in answer.out
    assert float(answer.out.split()[-1]) < 1e-5
    vectors = Embedder.load(tmp_path / "merged").encode(["tides", "the moon"])
    np.testing.assert_allclose(vectors, model.encode(["tides", "the moon"]), atol=1e-5)
    again = command("merge", tmp_path / "merged", tmp_path / "twice")
    assert again.code == 2 and "no LoRA adapters to merge" in again.err
    assert not (tmp_path / "twice").exists()


def test_models_of_one_base_are_souped_and_scored(
    command: Command, saved: Path, tmp_path: Path, tiny_embedder: Callable[..., Embedder]
) -> None:
    model = tiny_embedder("latent")
    model.network.head.latents.data += 0.1
    model.save(tmp_path / "b")
    scored = [{"text1": f"a text {i}", "text2": f"text {i * i}", "score": i % 4} for i in range(12)]
    suite = write(tmp_path / "suite" / "sts.jsonl", scored).parent
    parts, out = [saved, tmp_path / "b"], tmp_path / "soup"
    answer = command("merge", *parts, out, "--weights", "3,1", "--suite", suite)
    assert answer.code == 0, answer.err
    assert f"{out}: average of 2 models" in answer.out
    header, row = answer.out.splitlines()[-2:]
    assert header.split()[-3:] == [str(path) for path in (*parts, out)]
    assert row.split()[:2] == ["sts", "cosine_spearman"]
    found, before = (Embedder.load(path).network.head.latents for path in (out, saved))
    np.testing.assert_allclose(found.detach(), before.detach() + 0.025, rtol=0, atol=1e-6)
    again = command("merge", *parts, tmp_path / "arc", "--how", "slerp")
    assert again.code == 0 and "slerp of 2 models" in again.out and Embedder.load(tmp_path / "arc")


@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        (2, ["--weights", "1,2,3"], "weights: 3 for 2 models"),
        (2, ["--weights", "a,b"], "--weights a,b: numbers with commas between them"),
        (2, ["--how", "mean"], "'mean' is not one of 'average', 'slerp'"),
        (3, ["--how", "slerp"], "slerp is between two models, not 3"),
        (2, ["--suite", "absent"], "no suite 'absent'"),
        (1, ["--weights", "1"], "--weights are for several models"),
        (1, ["--how", "slerp"], "--how slerp is for several models"),
        (1, [], "no LoRA adapters to merge"),
        (0, [], "Missing argument 'MODEL...'"),
    ],
)
def test_what_cannot_be_merged(
    command: Command, saved: Path, tmp_path: Path, models: int, options: list[str], said: str
) -> None:
    answer = command("merge", *[saved] * models, tmp_path / "out", *options)
    assert answer.code == 2 and said in answer.err and list(tmp_path.iterdir()) == []


def test_mine_writes_examples_with_negatives(command: Command, saved: Path, tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", own_pairs(12))
    out = tmp_path / "new" / "mined.jsonl"
    answer = command("mine", pairs, "--out", out, "--teacher", saved, "--rule", "naive", "--negatives", 3, "--depth", 9)
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    assert (report["queries"], report["negatives"]) == (12, 36)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    positives = {row["query"]: row["positives"] for row in rows}
    assert len(positives) == 12 and all(len(row["negatives"]) == 3 for row in rows)
    assert all(row["negatives"][0] not in row["positives"] for row in rows)


def test_mine_with_two_teachers_keeps_vectors_and_counts_scores(
    command: Command, saved: Path, tmp_path: Path, tiny_embedder: Callable[..., Embedder]
) -> None:
    tiny_embedder("mean").save(tmp_path / "other")
    pairs, kept = write(tmp_path / "pairs.jsonl", own_pairs(12)), tmp_path / "vectors"
    options = ["--teacher", saved, "--teacher", tmp_path / "other", "--ensemble", "intra-sample", "--depth", 9]
    options += ["--rule", "naive", "--vectors", kept, "--report", tmp_path / "report", "--task", "Find it"]
    for out in ("first.jsonl", "second.parquet"):
        answer = command("mine", pairs, "--out", tmp_path / out, *options)
        assert answer.code == 0, answer.err
    assert len(list(kept.iterdir())) == 2
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["teachers"], report["ensemble"], sum(report["scores"]["positives"])) == (2, "intra-sample", 24)
    first, second = (list(open_examples(tmp_path / out, task="own")) for out in ("first.jsonl", "second.parquet"))
    assert first == second
    nowhere = command("mine", pairs, "--out", tmp_path / "x.jsonl", "--teacher", "http://127.0.0.1:9/v1")
    assert nowhere.code == 2 and "say which model of that server" in nowhere.err


# ---- refusals


def test_several_models_are_scored_side_by_side_each_into_its_file(
    command: Command, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "runs" / "near")
    write(tmp_path / "held" / "sts.jsonl", [{"text1": f"a {i}", "text2": f"b {i * i}", "score": i} for i in range(6)])
    answer = command("eval", saved, "runs/near", "held", "--out", "results")
    assert answer.code == 0, answer.err
    header, row = answer.out.splitlines()[-2:]
    assert header.split() == ["task", "metric", str(saved), "runs/near"]
    assert row.split()[:2] == ["sts", "cosine_spearman"] and row.split()[2] == row.split()[3]
    near = tmp_path / "results" / "runs__near"
    assert sorted(file.name for file in near.iterdir()) == ["held.items.npz", "held.json"]
    found = read_results(near / "held.json")
    facts = Embedder.load(saved).fingerprint()
    assert (found.about["model"], found.about["fingerprint"]) == ("runs/near", facts)
    assert found.about["command"] == f"embedwright eval {saved} runs/near held --out results"
    assert found.rows[0].items["gold"].tolist() == list(range(6))
    assert len(list((tmp_path / "results").iterdir())) == 2

    write(tmp_path / "held" / "triples.jsonl", [{"query": "moon", "positive": ["a moon"], "negative": ["a dog"]}])
    answer = command("eval", "bm25", saved, "held")
    assert answer.code == 0 and "sts: BM25 only ranks, and has no score for sts" in answer.err
    rows = {line.split()[0]: line.split()[1:3] for line in answer.out.splitlines()[-2:]}
    assert rows == {"triples": ["MAP@1000", "1.0000"], "sts": ["cosine_spearman", "-"]}

    answer = command("eval", saved, "runs/near", "held", "--out", "scores.json")
    assert answer.code == 2 and "2 models: name a folder" in answer.err
    answer = command("eval", "runs/near", "./runs/near", "held", "--out", "results")
    assert answer.code == 2 and "one name" in answer.err
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize("model", ["./absent", "some/absent/model"])
def test_a_model_that_is_absent_is_named(command: Command, tmp_path: Path, model: str) -> None:
    write(tmp_path / "held" / "sts.jsonl", [{"text1": "a", "text2": "b", "score": 1}])
    answer = command("eval", model, tmp_path / "held")
    assert answer.code == 2 and f"{model} does not exist" in answer.err and "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "absent.yaml"], "absent.yaml: no such recipe file"),
        (["train"], "give a recipe file, or --data"),
        (["train", "--data", "pairs.jsonl"], "--data needs --out"),
        (["train", "laptop", "--plan", "--base", "other"], "--base is for --data"),
        (["train", "laptop", "--plan", "--layers", "2"], "--layers is for --data"),
        (["train", "laptop", "--plan", "--instruction", "Find"], "--instruction is for --data"),
        (["train", "laptop", "--plan", "--teacher", "bm25"], "--teacher is for --data"),
        (["trian"], "No such command 'trian'"),
        (["train", "--ot", "x"], "No such option"),
        (["mine", "pairs.jsonl"], "Missing option '--out'"),
        (["mine", "absent.jsonl", "--out", "x.jsonl"], "absent.jsonl"),
        (["data", "check", "absent.jsonl"], "absent.jsonl"),
        (["data", "build", "wikipedia", "--out", "x"], "no data set 'wikipedia'; known: docstrings"),
        (["doctor", "./absent"], "./absent does not exist"),
    ],
)
def test_bad_input_exits_2_and_says_what_is_wrong(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = command(*arguments)
    assert answer.code == 2
    assert said in answer.err and "Traceback" not in answer.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["a file below a file", "a folder that cannot be written", "what is there already"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "./absent", "./absent", "--out"],
        ["merge", "./absent"],
        ["export", "./absent"],
        ["encode", "./absent", "./absent"],
        ["index", "./absent", "./absent"],
        ["mine", "./absent", "--out"],
        ["data", "labels", "./absent", "--out"],
        ["data", "clean", "./absent", "--out"],
        ["data", "export", "./absent", "--out"],
        ["data", "relabel", "./absent", "--out"],
        ["data", "build", "./absent", "--out"],
        ["data", "build", "docstrings", "--out"],
        ["train", "./absent", "--out"],
        ["synth", "--base-url", "http://127.0.0.1:1/v1", "--model", "m", "--count", "1", "--out"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_where_it_cannot_write_a_command_does_no_work(
    command: Command, place: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else that is given exists, so an answer about the place came first."""
    files = arguments[-1] == "--out" and arguments[0] not in ("train", "eval") and "docstrings" not in arguments
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    out = tmp_path / "file" / "out"
    if place == "a folder that cannot be written":
        out = tmp_path / "new" / "out"
        monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root, who may
    elif place == "what is there already":
        out = tmp_path / ("full" if files else "file")
    answer = command(*arguments, out)
    assert answer.code == 2 and str(out) in answer.err
    assert any(word in answer.err for word in ("cannot be written", "is a folder", "not an empty folder"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "note"]


def test_a_wrong_rule_is_refused_with_the_known_ones(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedwright.encoders.open.open_encoder", lambda _: WordTeacher())
    pairs = write(tmp_path / "pairs.jsonl", own_pairs(3))
    answer = command("mine", pairs, "--out", tmp_path / "x.jsonl", "--rule", "percent")
    assert answer.code == 2
    assert "'percent' is not one of 'naive', 'shift', 'abs', 'margin', 'perc'" in answer.err
    assert not (tmp_path / "x.jsonl").exists()


def test_an_unknown_key_comes_with_the_nearest(command: Command, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("hard_negatives", "hard_negative"))
    answer = command("train", recipe)
    assert answer.code == 2
    assert f"{recipe}: stages.0.hard_negative: unknown key; did you mean 'hard_negatives'?" in answer.err


def test_a_base_that_is_no_decoder_is_refused(command: Command, recipe: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    save_file({"embeddings.word_embeddings.weight": torch.ones(3, 4)}, encoder / "model.safetensors")
    tree = yaml.safe_load(recipe.read_text())
    tree["model"]["base"] = str(encoder)
    recipe.write_text(yaml.safe_dump(tree))
    answer = command("train", recipe, "--out", tmp_path / "run")
    assert answer.code == 2
    assert f"base {encoder} is a 'bert' model, not a decoder-only language model" in answer.err


def test_what_fails_in_a_run_exits_1(command: Command, monkeypatch: pytest.MonkeyPatch, recipe: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FloatingPointError("stage retrieval, step 3: loss is nan")

    monkeypatch.setattr(loop, "train", fail)
    answer = command("train", recipe)
    assert answer.code == 1 and "Traceback" in answer.err
    assert answer.err.endswith("FloatingPointError: stage retrieval, step 3: loss is nan\n")


FAULTS = [TypeError, ValueError, KeyError, FileNotFoundError, BrokenPipeError, ImportError, RuntimeError]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_ours_does_not_look_like_bad_input(
    fault: type[Exception], command: Command, monkeypatch: pytest.MonkeyPatch, recipe: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault("a mistake of the program")

    monkeypatch.setattr(loop, "train", fail)
    answer = command("train", recipe)
    assert answer.code == 1 and "Traceback" in answer.err and "a mistake of the program" in answer.err


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs of every wrong kind, and good ones."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "folder").mkdir()
    (folder / "folder" / "x.bin").write_bytes(bytes(range(256)))
    (folder / "empty.jsonl").write_text("")
    (folder / "binary.jsonl").write_bytes(bytes(range(1, 256)))
    (folder / "binary.yaml").write_bytes(bytes(range(1, 256)))
    (folder / "cut.parquet").write_bytes(b"PAR1....PAR1")
    write(folder / "pairs.jsonl", own_pairs(40))
    write(folder / "examples.jsonl", [{"query": "q", "positives": ["p"], "negatives": ["n"]}])
    for place in ("", "held"):
        write(folder / place / "labels.jsonl", [{"text": f"text {i}", "label": f"l{i % 3}"} for i in range(9)])
    return folder


# Commands that read a file, which is `{}`; `OUT` is a new place.
READERS = [
    "train {}",
    "train --data {} --out OUT",
    "demo --recipe {}",
    "eval minilm {}",
    "encode minilm {} OUT",
    "mine {} --out OUT",
    "mine pairs.jsonl --corpus {} --out OUT",
    "data build {} --out OUT",
    "data build emotion --source {} --out OUT",
    "data check {}",
    "data check pairs.jsonl --against {}",
    "data clean {} --out OUT",
    "data clean pairs.jsonl --licences {} --out OUT",
    "data export {} --out OUT.parquet",
    "data labels {} --out OUT",
    "data labels labels.jsonl --words {} --out OUT",
    "data relabel {} --out OUT --base-url http://127.0.0.1:1/v1 --model m",
    "synth --out OUT --base-url http://127.0.0.1:1/v1 --model m --count 6 --prompts {}",
]
# Commands that open a model, which is `{}`.
OPENERS = [
    "eval {} held",
    "encode {} pairs.jsonl OUT",
    "index {} pairs.jsonl OUT",
    "search {} folder query",
    "export {} OUT",
    "merge {} OUT",
    "merge {} {} OUT",
    "doctor {}",
    "mine pairs.jsonl --teacher {} --out OUT",
    "train --data pairs.jsonl --base {} --out OUT",
    "train --data pairs.jsonl --teacher {} --out OUT",
    "data relabel examples.jsonl --cross-encoder {} --threshold 0.5 --out OUT",
]
VALUES = [
    "nosuch",
    "train",
    "train --data pairs.jsonl",
    "train --data pairs.jsonl --out empty.jsonl",
    "train --data pairs.jsonl --out OUT --layers 0",
    "mine pairs.jsonl",
    "mine pairs.jsonl --out folder",
    "mine pairs.jsonl --out empty.jsonl/x",
    "mine pairs.jsonl --out OUT --rule x",
    "mine pairs.jsonl --out OUT --margin nan",
    "mine pairs.jsonl --out OUT --negatives 0",
    "mine pairs.jsonl --out OUT --depth 0",
    "mine pairs.jsonl --out OUT --vectors empty.jsonl",
    "mine pairs.jsonl --out OUT --teacher ftp://x#m",
    "synth --out OUT --base-url nourl --model m --count 2",
    "synth --out OUT --base-url http://127.0.0.1:1/v1 --model m --count 0",
    "synth --out OUT --base-url http://127.0.0.1:1/v1 --model m --count 2 --types x",
    "synth --out OUT --base-url http://127.0.0.1:1/v1 --model m --count 2 --timeout 0",
    "synth --out OUT --base-url http://127.0.0.1:1/v1 --model m --count 2 --timeout nan",
    "data list --family x",
    "data build nosuch --out OUT",
    "data build emotion --out OUT",  # no network
    "data build emotion --source labels.jsonl --out folder",
    "data build emotion --source labels.jsonl --out OUT --negatives -1",
    "data check pairs.jsonl --leaks folder",
    "data check pairs.jsonl --against pairs.jsonl --bm25 nan",
    "data clean pairs.jsonl --out folder",
    "data clean pairs.jsonl --out OUT --min-chars -1",
    "data clean pairs.jsonl --out OUT --language klingon",
    "data export examples.jsonl --out OUT --negatives -1",
    "data export examples.jsonl --out OUT --task nosuch",
    "data labels labels.jsonl --out OUT --negatives 0",
    "data relabel examples.jsonl --out OUT",
    "data relabel examples.jsonl --out OUT --base-url http://127.0.0.1:1/v1 --model m --timeout 0",
    "eval minilm nosuch",
    "encode minilm pairs.jsonl empty.jsonl",
    "search minilm nosuch query",
    "merge a b OUT --weights x,y",
    "merge minilm OUT --suite nosuch",
    "export minilm OUT",
]


@pytest.mark.parametrize("given", ["nosuch", "folder", "empty.jsonl", "binary.jsonl", "binary.yaml", "cut.parquet"])
def test_a_file_that_cannot_be_read_is_bad_input(given: str, command: Command, odd: Path) -> None:
    refused(command, odd, [line.replace("{}", given) for line in READERS], given)


@pytest.mark.parametrize("given", ["no/such", "./nosuch", "folder", "empty.jsonl"])
def test_a_model_that_cannot_be_opened_is_bad_input(given: str, command: Command, odd: Path) -> None:
    refused(command, odd, [line.replace("{}", given) for line in OPENERS], given)


def test_a_value_that_cannot_be_is_bad_input(command: Command, odd: Path) -> None:
    refused(command, odd, VALUES)


def refused(command: Command, folder: Path, lines: Sequence[str], named: str = "") -> None:
    """Each of these ends with 2 and one line of ours; this or a warning names what was given."""
    wrong = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in lines:
            answer = command(*(word.replace("OUT", str(folder / "new" / "out")) for word in line.split()))
            ours = [said for said in answer.err.splitlines() if said.startswith("embedwright: ")]
            if answer.code != 2 or "Traceback" in answer.err or len(ours) != 1 or Path(named).stem not in answer.err:
                wrong.append((line, answer.code, ours or answer.err[-200:]))
            shutil.rmtree(folder / "new", ignore_errors=True)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("arguments", [["--help"], ["data", "--help"], ["train", "--help"], []])
def test_help_lists_what_there_is(command: Command, arguments: list[str]) -> None:
    answer = command(*arguments)
    assert (answer.code, answer.err) == (0 if arguments else 2, "")
    assert (
        "Usage:" in answer.out
        and ("--data" if "train" in arguments else "check" if "data" in arguments else "doctor") in answer.out
    )


# ---- the recipes that come with the package


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_packaged_recipe_loads(file: Path) -> None:
    recipe = Recipe.load(file)
    assert recipe.name == file.stem
    names = {entry.task.name: entry.task for s in recipe.stages for entry in s.data if hasattr(entry.task, "name")}
    assert all(task.instruction and task.licence for task in names.values())


def test_the_laptop_recipe_trains_on_the_instructions_that_its_suite_asks_with() -> None:
    recipe = Recipe.load(next(file for file in RECIPES if file.stem == "laptop"))
    asked = {task["name"]: task["instruction"] for task in docstrings.SUITE}
    for stage in recipe.stages:
        for entry in stage.data:
            assert not isinstance(entry.task, str | None)
            assert entry.task.instruction == asked[entry.task.name]
    assert all(Path(entry.path).is_relative_to(recipe.run.out) for s in recipe.stages for entry in s.data)
    assert Path(recipe.eval.suites[0]) == Path(recipe.run.out) / "data" / "heldout" / "suite.yaml"


def test_a_demo_that_makes_nothing_better_fails_with_a_sentence(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedwright.demo.demo.run", lambda _: ["docs nDCG@10"])
    answer = command("demo")
    assert answer.code == 1 and answer.err.strip() == "embedwright: not better than before training: docs nDCG@10"
    monkeypatch.setattr("embedwright.demo.demo.run", lambda _: [])
    assert command("demo").code == 0
