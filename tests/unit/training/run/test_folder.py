from __future__ import annotations

import getpass
import json
import logging
import platform
import subprocess
from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from embedwright.evaluation.results import Result, Results, run_items_file, write_items
from embedwright.model.interop.card import model_card
from embedwright.text import Contract
from embedwright.training.batches.blend import Source, rows_at
from embedwright.training.batches.sources import data_fingerprint, open_sources
from embedwright.training.recipe import Recipe
from embedwright.training.run import folder
from embedwright.training.run.folder import card_facts, data, describe_run, environment

ONE = {
    "name": "one",
    "instruction": "Find one: “ä” 漢字 🙂",
    "licence": "MIT",
    "source": "org/set",
    "in_batch_negatives": "none",
}


CARD: dict[str, Any] = {  # what a model says of itself
    "contract": Contract(max_tokens=8, eos_id=1),
    "form": "ours",
    "pooling": "latent",
    "attention": "bidirectional",
    "dimensions": 8,
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(n: int, *, negatives: int = 1, **more: Any) -> list[dict[str, Any]]:
    made = (
        {"query": f"q{i}", "positives": [f"p{i}"], "negatives": [f"n{i}.{k}" for k in range(negatives)]}
        for i in range(n)
    )
    return [row | more for row in made]


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two stages over two files: one of two tasks, and rows of which some have no negatives."""
    monkeypatch.setenv("EMBEDWRIGHT_TEST_DATA", str(tmp_path))
    write(tmp_path / "a.jsonl", *rows(12), *rows(6, task="two"))
    write(tmp_path / "b.jsonl", *rows(5), *rows(3, negatives=0))
    a = {"path": "${EMBEDWRIGHT_TEST_DATA}/a.jsonl", "weight": 0.5, "task": {"name": "plain", "licence": "CC0"}}
    b = {"path": "${EMBEDWRIGHT_TEST_DATA}/b.jsonl", "task": ONE}

    def stage(name: str, *entries: dict[str, Any], lr: float, steps: int) -> dict[str, Any]:
        optim = {"lr": lr, "steps": steps, "batch_queries": 4}
        return {"name": name, "data": entries, "in_batch_negatives": "all", "hard_negatives": 1, "optim": optim}

    return {
        "name": "größe",
        "model": {"base": "org/some-decoder"},
        "stages": [stage("first", a, b, lr=2e-5, steps=9), stage("second", a | {"weight": 3.0}, b, lr=1e-7, steps=3)],
        "run": {"out": str(tmp_path / "run"), "tracker": ["wandb", "tensorboard"]},
    }


@pytest.fixture
def recipe(content: dict[str, Any]) -> Recipe:
    return Recipe.parse(content)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


# ---- the three files


def test_the_recipe_loads_again_as_the_same(recipe: Recipe, content: dict[str, Any], out: Path) -> None:
    keys = recipe.values_by_key()
    full = Recipe.parse(content | {"provenance": dict.fromkeys(keys, "paper: section 3, “eq. 2”")})
    for each in (recipe, full, full.model_copy(update={"run": full.run.model_copy(update={"tracker": ()})})):
        describe_run(out, each, open_sources(each))
        again = Recipe.load(out / "recipe.yaml")
        assert again == each and again.hash() == recipe.hash()
    assert "größe" in (out / "recipe.yaml").read_text(encoding="utf-8")
    assert f"batch_tokens: {recipe.run.batch_tokens}" in (out / "recipe.yaml").read_text()  # a default, said


def test_the_environment_is_that_of_this_process(recipe: Recipe, out: Path) -> None:
    describe_run(out, recipe, open_sources(recipe))
    found = json.loads((out / "environment.json").read_text())
    assert found == environment()
    assert found["packages"]["torch"] == torch.__version__ and found["packages"]["numpy"] == version("numpy")
    assert found["python"] == platform.python_version() and found["threads"] == torch.get_num_threads()
    assert found["processes"] == 1 and found["device"]
    text = json.dumps(found)
    names = {getpass.getuser(), platform.node(), str(Path.home()), Path.home().name} - {"", "/"}
    assert not [name for name in names if name in text]


def test_the_number_of_processes_and_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(folder, "PACKAGES", ("torch", "no-such-package"))
    found = environment()
    assert found["processes"] == 4 and found["packages"] == {"torch": torch.__version__, "no-such-package": None}


def test_the_commit_is_that_of_a_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("init")
    except FileNotFoundError:
        pytest.skip("git is missing")
    file = tmp_path / "file.py"
    file.write_text("x = 1\n")
    git("add", "file.py")
    git("commit", "-m", "one")
    git("tag", "-a", "v1", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert folder._commit(tmp_path) == head
    file.write_text("x = 2\n")
    assert folder._commit(tmp_path) == head  # as the process began
    folder._commit.cache_clear()
    assert folder._commit(tmp_path) == f"{head}-dirty"
    inner = tmp_path / "lib" / "site-packages"  # of an environment that lies in somebody's repository
    inner.mkdir(parents=True)
    assert folder._commit(inner) is None
    monkeypatch.setenv("PATH", "")
    folder._commit.cache_clear()
    assert folder._commit(tmp_path) is None


def test_the_data_is_what_can_be_drawn(recipe: Recipe, content: dict[str, Any], out: Path) -> None:
    sources = open_sources(recipe)
    describe_run(out, recipe, sources)
    found = json.loads((out / "data.json").read_text())
    assert found == data(recipe, sources) and found["fingerprint"] == data_fingerprint(sources)
    first = found["stages"][0]
    assert [stage["stage"] for stage in found["stages"]] == ["first", "second"]
    a, b = (content["stages"][0]["data"][i]["path"] for i in (0, 1))
    tasks = [(s["path"], s["task"], s["family"], s["licence"]) for s in first["sources"]]
    assert tasks == [(a, "plain", "retrieval", "CC0"), (a, "two", "retrieval", ""), (b, "one", "retrieval", "MIT")]
    assert [(s["rows"], s["rows_in_file"]) for s in first["sources"]] == [(12, 18), (6, 18), (5, 8)]
    prints = [s["fingerprint"] for s in first["sources"]]
    assert prints == [source.table.fingerprint for source in sources[0]] and len(set(prints)) == 2
    for stage, own in zip(recipe.stages, sources, strict=True):
        assert shares(stage.name, found) == pytest.approx(drawn(own, stage.name), abs=2e-3)
    assert shares("first", found) != shares("second", found)
    assert str(Path(recipe.run.out).parent) not in (out / "data.json").read_text()  # the variable stays one


def shares(stage: str, found: dict[str, Any]) -> list[float]:
    (own,) = (each["sources"] for each in found["stages"] if each["stage"] == stage)
    return [source["share"] for source in own]


def drawn(sources: list[Source], stage: str) -> list[float]:
    """The share of each source, counted."""
    counts: Counter[str] = Counter()
    tagged = [replace(s, task=s.task.model_copy(update={"source": s.name}), tasks={}) for s in sources]
    for row in rows_at(tagged, 0, batch_queries=4000, batching="blended", seed=0, stage=stage):
        counts[row.task.source] += 1
    return [counts[source.name] / 4000 for source in sources]


def test_many_tasks_of_one_kind_are_counted(tmp_path: Path, content: dict[str, Any]) -> None:
    made = [row | {"task": f"t{i}"} for i, row in enumerate(rows(4))]
    path = write(tmp_path / "made.jsonl", *made)
    tasks = [{"name": f"t{i}", "instruction": f"Find {i}", "licence": ["MIT", "", "CC0", "MIT"][i]} for i in range(4)]
    write(tmp_path / "made.jsonl.tasks.jsonl", *tasks)
    content["stages"] = [content["stages"][0] | {"data": [{"path": str(path)}]}]
    recipe = Recipe.parse(content)
    ((source,),) = (stage["sources"] for stage in data(recipe, open_sources(recipe))["stages"])
    assert (source["task"], source["licence"], source["rows"]) == ("4 tasks, t0 the first", "CC0, MIT", 4)


# ---- again and again


def test_a_run_that_goes_on_alike_touches_nothing(recipe: Recipe, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = open_sources(recipe)
    caplog.clear()
    describe_run(out, recipe, sources)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert sorted(path.name for path in before) == ["data.json", "environment.json", "recipe.yaml"]
    with caplog.at_level(logging.INFO):
        describe_run(out, recipe, sources)
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()} and not caplog.records


def test_what_changed_is_named_and_what_was_said_is_kept(
    recipe: Recipe, out: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = open_sources(recipe)
    describe_run(out, recipe, sources)
    caplog.clear()
    first = (out / "environment.json").read_bytes()
    for processes in ("2", "4"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        with caplog.at_level(logging.WARNING):
            describe_run(out, recipe, sources)
    assert (out / "environment.1.json").read_bytes() == first
    said = [json.loads((out / f"environment{n}.json").read_text())["processes"] for n in (".1", ".2", "")]
    assert said == [1, 2, 4]
    assert [record.message.partition("environment.json ")[2] for record in caplog.records] == [
        "is not as before (processes: 1 -> 2): what it said is kept in environment.1.json",
        "is not as before (processes: 2 -> 4): what it said is kept in environment.2.json",
    ]
    caplog.clear()
    describe_run(out, recipe.model_copy(update={"name": "other"}), sources)
    assert f"recipe.yaml is not as before (name: {recipe.name} -> other)" in caplog.text
    assert Recipe.load(out / "recipe.1.yaml") == recipe
    caplog.clear()
    (out / "data.json").write_bytes(b"\x00{")
    describe_run(out, recipe.model_copy(update={"name": "other"}), sources)
    assert "data.json is not as before (it was damaged)" in caplog.text
    assert (out / "data.1.json").read_bytes() == b"\x00{"
    assert json.loads((out / "data.json").read_text()) == data(recipe, sources)


def test_a_kill_at_any_moment_loses_nothing(recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, other = open_sources(recipe), recipe.model_copy(update={"name": "other"})
    describe_run(out, recipe, sources)

    def die_at(number: int, patch: pytest.MonkeyPatch) -> None:
        calls = iter(range(100))

        def dying(function: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                if next(calls) == number:
                    raise KeyboardInterrupt
                return function(*arguments, **options)

            return call

        for name in ("replace", "write_text"):
            patch.setattr(Path, name, dying(getattr(Path, name)))

    for number in range(3):  # the old file moved away, the new one written aside, and moved into its place
        with monkeypatch.context() as patch:
            die_at(number, patch)
            with pytest.raises(KeyboardInterrupt):
                describe_run(out, other, sources)
        assert recipe in [Recipe.load(file) for file in out.glob("recipe*.yaml")]
        describe_run(out, other, sources)
        assert Recipe.load(out / "recipe.yaml") == other
        describe_run(out, recipe, sources)


# ---- the facts of a model card


def evaluated(stage: str, step: int, suite: str = "dev", **scores: float) -> dict[str, Any]:
    found = [{"task": t, "kind": "sts", "metric": "spearman", "value": v, "details": {}} for t, v in scores.items()]
    return {"stage": stage, "step": step, "suite": f"x/{suite}.yaml", "results": {"suite": suite, "rows": found}}


def test_the_facts_of_a_card(recipe: Recipe) -> None:
    evaluations = [
        evaluated("start", 0, docs=0.1, code=0.2),
        evaluated("first", 9, docs=0.9, code=0.9),
        evaluated("second", 2, docs=0.8, code=0.9),
        evaluated("second", 2, "late", news=0.9),
        evaluated("second", 3, docs=0.5, code=0.6),
        evaluated("second", 3, "late", news=0.7),
    ]
    facts = card_facts(recipe, open_sources(recipe), evaluations)
    assert json.loads(json.dumps(facts)) == facts  # plain values
    text = model_card(**CARD | facts)
    assert "datasets:\n- org/set" in text and "| docs | spearman | 0.1000 | 0.5000 |" in text
    assert "| b.jsonl | one | MIT | org/set | 5 |" in text and "| first | 9 | 4 | 2.0e-05 | in_batch_negatives" in text
    assert (facts["name"], facts["base"]) == ("größe", "org/some-decoder")
    assert [(s["name"], s["steps"], s["batch"]) for s in facts["stages"]] == [("first", 9, 4), ("second", 3, 4)]
    losses = "in_batch_negatives all, hard_negatives 1, batching blended, temperature 0.02"
    assert [(s["lr"], s["losses"]) for s in facts["stages"]] == [(2e-5, losses), (1e-7, losses)]
    assert facts["commands"] == ["embedwright train recipe.yaml"]
    assert facts["data"] == [
        {"path": "a.jsonl", "task": "plain", "licence": "CC0", "source": "", "rows": 12},
        {"path": "a.jsonl", "task": "two", "licence": "", "source": "", "rows": 6},
        {"path": "b.jsonl", "task": "one", "licence": "MIT", "source": "org/set", "rows": 5},
    ]
    told = [(s["suite"], s["task"], s["metric"], s["after"], s["before"]) for s in facts["scores"]]
    assert told == [
        ("dev", "docs", "spearman", 0.5, 0.1),
        ("dev", "code", "spearman", 0.6, 0.2),
        ("late", "news", "spearman", 0.7, None),
    ]


def test_scores_have_intervals_where_the_run_keeps_their_items(recipe: Recipe, out: Path) -> None:
    random = np.random.default_rng(0)
    score = random.uniform(size=300)
    evaluations = [evaluated("start", 0, docs=0.1), evaluated("second", 3, docs=float(score.mean()), code=0.6)]
    items = {"score": score, "id": np.arange(300)}
    row = Result("docs", "sts", "spearman", float(score.mean()), items=items)
    write_items(run_items_file(out, "second", 3, "x/dev.yaml"), Results("dev", (row,), 0.0))
    docs, code = card_facts(recipe, open_sources(recipe), evaluations)["scores"]
    expected = stats.ttest_1samp(score, 0).confidence_interval(0.95)
    low, high = map(float, docs["95 % interval"].split(" to "))
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=2e-3)
    assert "95 % interval" not in code and docs["before"] == 0.1


def test_the_scores_are_those_of_the_weights_that_a_run_ends_on(content: dict[str, Any]) -> None:
    content["eval"] = {"suites": ["dev"], "every": 1, "best": True}
    recipe = Recipe.parse(content)
    values = [0.1, 0.7, 0.7, 0.3]
    evaluations = [evaluated("first", 1, docs=0.99), *(evaluated("second", i, docs=v) for i, v in enumerate(values))]
    facts = card_facts(recipe, open_sources(recipe), evaluations)
    assert [score["after"] for score in facts["scores"]] == [0.7]
    assert card_facts(recipe, open_sources(recipe), evaluations[:1])["scores"] == []  # nothing of the last stage


def test_commands_score_the_model_again_and_need_no_suite(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content["eval"] = {"suites": ["dev", "${SUITES}/own.yaml", "gone/own.yaml", "NanoBEIR"]}
    monkeypatch.delenv("EMBEDWRIGHT_DATA", raising=False)
    commands = card_facts(Recipe.parse(content), [[], []], [])["commands"]
    assert [command.removeprefix("embedwright ") for command in commands[1:]] == [
        *("eval MODEL dev", "eval MODEL own.yaml", "eval MODEL own.yaml", "bench MODEL NanoBEIR"),
    ]


def test_a_card_names_no_folder(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "my-decoder").mkdir()
    content["model"]["base"] = str(tmp_path / "my-decoder")
    teacher = {"teacher": str(tmp_path / "my-decoder"), "vector_weight": 0.5}
    content["stages"][1]["loss"] = {"focal": 2.0, "distill": teacher}
    recipe = Recipe.parse(content)
    facts = card_facts(recipe, open_sources(recipe), [])
    chosen = facts["stages"][1]["losses"].partition("temperature 0.02, ")[2]
    assert chosen == "loss.focal 2.0, loss.distill.vector_weight 0.5, loss.distill.teacher my-decoder"
    assert facts["base"] == "my-decoder" and str(tmp_path) not in json.dumps(facts) and "$" not in json.dumps(facts)
