from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from embedwright.config import ConfigError
from embedwright.data.schema import Example
from embedwright.data.tables.table import open_examples
from embedwright.mining.mine import mine
from embedwright.mining.pool import positives_of
from embedwright.model.embedder import Embedder
from embedwright.processes import ALONE
from embedwright.training import remine as refresh
from embedwright.training.batches.blend import Source
from embedwright.training.batches.sources import open_sources
from embedwright.training.recipe import Recipe
from embedwright.training.remine import refreshed
from embedwright.training.run.checkpoint import RunState
from embedwright.training.run.start import load_trained, start_model
from embedwright.training.train import train

ASKED = "Find its answer"
TEXTS = ["how do tides work?", "the moon", "a dog that does not mind"]
STATE = RunState(stage=0, step=0, recipe="r", data="d")


@pytest.fixture
def content(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> dict[str, Any]:
    """A stage of 9 steps over pairs, mined before its steps 0, 4 and 8, and over labelled rows that are not mined."""
    random = np.random.default_rng(0)
    words = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox"]

    def text(about: str) -> str:
        return " ".join([about, *random.choice(words, 4)])

    def write(name: str, rows: list[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    pairs = [{"query": text(f"q{i}"), "positives": [text(f"p{i}")], "negatives": ["came with it"]} for i in range(30)]
    labelled = [{"text": text(f"kind{i % 4}"), "label": f"kind {i % 4}"} for i in range(24)]
    stage = {
        "name": "retrieval",
        "data": [
            {"path": write("pairs.jsonl", pairs), "task": {"name": "pairs", "instruction": ASKED}},
            {"path": write("labels.jsonl", labelled), "task": {"name": "labels", "family": "classification"}},
        ],
        "in_batch_negatives": "none",
        "hard_negatives": 2,
        "temperature": 0.1,
        "optim": {"lr": 3e-2, "steps": 9, "batch_queries": 6},
    }
    return {
        "name": "refreshed",
        "model": {"base": str(tiny_decoder("llama")), "pooling": "mean", "max_tokens": 40},
        "tune": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "stages": [{"kind": "mine", "negatives": 3, "rule": "naive", "every": 4}, stage],
        "run": {"out": str(tmp_path / "run"), "checkpoint_every": 1, "keep": 99, "tracker": "none"},
    }


def opened(recipe: Recipe) -> list[Source]:
    return open_sources(recipe)[0]


def examples(source: Source) -> list[Example]:
    return [source.table[int(row)] for row in source.rows]


def negatives(folder: Path) -> list[tuple[str, ...]]:
    return [tuple(p.text for p in row.negatives) for row in open_examples(folder / "00.parquet")]


def mined_by(model: Embedder, source: Source) -> list[tuple[str, ...]]:
    """What the function of mining finds, on its own."""
    bare = [Example(e.id, e.task, e.query, e.positives) for e in examples(source)]
    found, _ = mine(bare, positives_of(bare), model, rule="naive", negatives=3, task=ASKED)
    return [tuple(p.text for p in row.negatives) for row in found]


def test_rows_keep_their_place_and_get_what_mining_finds(content: dict[str, Any]) -> None:
    recipe = Recipe.parse(content)
    model, before = start_model(recipe), opened(recipe)
    said: list[str] = []
    after = refreshed(recipe, recipe.stages[0], before, STATE, 0, model, ALONE, said.append)
    assert [e.query for e in examples(after[0])] == [e.query for e in examples(before[0])]
    assert [e.id for e in examples(after[0])] == [e.id for e in examples(before[0])]
    found = [tuple(p.text for p in e.negatives) for e in examples(after[0])]
    assert found == mined_by(model, before[0]) and all(len(some) == 3 for some in found)
    assert not any("came with it" in some for some in found)
    assert after[1].table is before[1].table  # of labelled rows any other may be an answer
    assert said == ["retrieval: mined 90 negatives for 30 rows of pairs"]
    for key in ("name", "sampling_weight", "task"):
        assert getattr(after[0], key) == getattr(before[0], key)
    assert model.network.training  # as it was found


def test_scored_pairs_below_the_threshold_keep_place_and_text(content: dict[str, Any], tmp_path: Path) -> None:
    pairs = [{"text1": f"a{i} moon", "text2": f"b{i} tide", "score": i % 6} for i in range(24)]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    content["stages"][0] |= {"teacher": "random"}
    content["stages"][0].pop("every")
    content["stages"][1] |= {"data": [{"path": str(tmp_path / "scored.jsonl"), "task": {"name": "pairs"}}]}
    for loss, count in (("cosent", 48), ("info_nce", 16)):
        content["stages"][1]["loss"] = {"scored": loss}
        content["run"]["out"] = str(tmp_path / loss)
        recipe = Recipe.parse(content)
        before = opened(recipe)
        after = refreshed(recipe, recipe.stages[0], before, STATE, 0, start_model(recipe), ALONE)
        old, new = examples(before[0]), examples(after[0])
        assert len(old) == len(new) == count
        for a, b in zip(old, new, strict=True):
            assert (a.id, a.positives, a.score) == (b.id, b.positives, b.score)
            assert len(b.negatives) == 3 if a.positives else b == a


def test_another_teacher_and_a_corpus_of_its_own(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_embedder: Callable[..., Embedder]
) -> None:
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"id": f"d{i}", "text": f"d{i} moon"}) + "\n" for i in range(9))
    )
    content["stages"][0] = {**content["stages"][0], "teacher": "somebody"}
    content["stages"][0].pop("every", None)
    content["stages"][1]["data"][0]["corpus"] = str(tmp_path / "corpus.jsonl")
    recipe = Recipe.parse(content)
    monkeypatch.setattr(refresh, "open_encoder", lambda name: {"somebody": tiny_embedder("mean", seed=3)}[name])
    after = refreshed(recipe, recipe.stages[0], opened(recipe), STATE, 0, start_model(recipe), ALONE)
    assert all(p.id is not None and p.id.startswith("d") for e in examples(after[0]) for p in e.negatives)


@pytest.mark.parametrize("beir", [True, False])
def test_a_folder_is_mined_from_its_corpus_or_else_from_its_answers(
    content: dict[str, Any], tmp_path: Path, beir: bool
) -> None:
    """A BEIR folder of two splits, of which training reads one, and a folder of files of rows."""
    folder = tmp_path / "folder"
    (folder / "qrels").mkdir(parents=True)
    answers, others = [f"answer {i} tide" for i in range(6)], [f"other {i} moon" for i in range(6)]
    if beir:
        for name, texts in (("corpus", answers + others), ("queries", [f"tide moon {i}" for i in range(6)])):
            rows = [json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)]
            (folder / f"{name}.jsonl").write_text("".join(rows))
        for split, numbers in (("train", range(4)), ("test", range(4, 6))):
            lines = ["query-id\tcorpus-id\tscore\n", *(f"d{i}\td{i}\t1\n" for i in numbers)]
            (folder / "qrels" / f"{split}.tsv").write_text("".join(lines))
    else:
        (folder / "qrels").rmdir()
        for name, numbers in (("a", range(3)), ("b", range(3, 6))):
            pairs = [json.dumps({"query": f"tide moon {i}", "positives": [answers[i]]}) + "\n" for i in numbers]
            (folder / f"{name}.jsonl").write_text("".join(pairs))
    content["stages"][0] = {"kind": "mine", "negatives": 20, "rule": "naive", "teacher": "bm25"}
    content["stages"][1]["data"] = [{"path": str(folder), "task": {"name": "pairs"}}]
    recipe = Recipe.parse(content)
    [after] = refreshed(recipe, recipe.stages[0], opened(recipe), STATE, 0, start_model(recipe), ALONE)
    assert len(after.rows) == (4 if beir else 6)
    pool = {*answers, *others} if beir else {*answers}
    for row in examples(after):
        assert {p.text for p in row.negatives} == pool - {p.text for p in row.positives}


@pytest.mark.parametrize("teacher", ["bm25", "random"])
def test_a_baseline_mines_by_its_name(content: dict[str, Any], teacher: str) -> None:
    content["stages"][0] = {"kind": "mine", "negatives": 3, "rule": "naive", "teacher": teacher}
    recipe = Recipe.parse(content)
    before = opened(recipe)
    after = refreshed(recipe, recipe.stages[0], before, STATE, 0, start_model(recipe), ALONE)
    bare = [Example(e.id, e.task, e.query, e.positives) for e in examples(before[0])]
    alone, _ = mine(bare, positives_of(bare), teacher, rule="naive", negatives=3)
    assert [e.negatives for e in examples(after[0])] == [e.negatives for e in alone]
    assert all(1 <= len(e.negatives) <= 3 for e in alone)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"teacher": "random"}, "no scores for rule 'perc'"),
        ({"teacher": "random", "rule": "naive", "every": 2}, "random does not change in the run"),
        ({"teacher": "bm25", "every": 2}, "bm25 does not change in the run"),
    ],
)
def test_a_baseline_is_not_asked_for_what_it_has_not(content: dict[str, Any], asked: dict[str, Any], said: str) -> None:
    content["stages"][0] = {"kind": "mine", "negatives": 3, **asked}
    with pytest.raises(ConfigError, match=said):
        Recipe.parse(content)


def test_an_answer_in_another_file_of_the_stage_is_no_negative(content: dict[str, Any], tmp_path: Path) -> None:
    """Two files of one task: every question of the first has further answers in the second, which are its corpus."""
    entry = content["stages"][1]["data"][0]
    first = [{"query": f"Question {i % 3}", "positives": [f"first {i}"], "negatives": ["x"]} for i in range(9)]
    second = [{"query": f"question  {i % 3}", "positives": [f"second {i}"], "negatives": ["x"]} for i in range(9)]
    for name, rows in (("first.jsonl", first), ("second.jsonl", second)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [text for row in (*first, *second) for text in row["positives"]]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"id": t, "text": t}) + "\n" for t in texts))
    content["stages"][1]["data"] = [
        entry | {"path": str(tmp_path / name), "corpus": str(tmp_path / "all.jsonl")}
        for name in ("first.jsonl", "second.jsonl")
    ]
    content["stages"][0]["negatives"] = 20
    recipe = Recipe.parse(content)
    after = refreshed(recipe, recipe.stages[0], opened(recipe), STATE, 0, start_model(recipe), ALONE)
    for source in after:
        for row in examples(source):
            others = {t for t in texts if int(t.split()[1]) % 3 != int(row.query.split()[1])}
            assert {p.text for p in row.negatives} == others


def test_each_refresh_is_by_the_model_of_its_step(content: dict[str, Any]) -> None:
    recipe = Recipe.parse(content)
    train(recipe)
    out = Path(recipe.run.out)
    folders = sorted((out / "mined" / "retrieval").iterdir())
    assert [folder.name for folder in folders] == ["0000000", "0000004", "0000008"]
    model = start_model(recipe)
    for folder in folders:
        if folder.name != "0000000":
            load_trained(model, load_file(out / "checkpoints" / f"00-{folder.name}" / "weights.safetensors"))
        assert negatives(folder) == mined_by(model, opened(recipe)[0]), folder.name
    assert negatives(folders[0]) != negatives(folders[1])


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("steps", [(4,), (5,), (4, 8), (1, 6, 8)])
def test_a_run_in_pieces_mines_and_ends_as_the_run_in_one(content: dict[str, Any], tmp_path: Path, steps: Any) -> None:
    whole, pieces = copy.deepcopy(content), copy.deepcopy(content)
    pieces["run"]["out"] = str(tmp_path / "pieces")

    def stop_at(step: int) -> Callable[[dict[str, Any]], None]:
        def on_step(record: dict[str, Any]) -> None:
            if record["step"] == step:
                raise Stop

        return on_step

    for step in steps:
        with pytest.raises(Stop):
            train(Recipe.parse(pieces), on_step=stop_at(step + 1))
    vectors = [train(Recipe.parse(tree)).encode(TEXTS) for tree in (pieces, whole)]
    assert np.array_equal(*vectors)
    for name in ("0000000", "0000004", "0000008"):
        found = [negatives(Path(tree["run"]["out"]) / "mined" / "retrieval" / name) for tree in (pieces, whole)]
        assert found[0] == found[1]


def test_what_was_mined_by_a_model_that_is_gone_cannot_be_mined_again(content: dict[str, Any]) -> None:
    recipe = Recipe.parse(content)
    state = RunState(stage=0, step=5, recipe="r", data="d")
    asked = (recipe, recipe.stages[0], opened(recipe))
    with pytest.raises(ConfigError, match="0000004 is gone, and the weights of step 4 that mined it are too"):
        refreshed(*asked, state, 4, start_model(recipe), ALONE)
    refreshed(*asked, RunState(0, 4, "r", "d"), 4, start_model(recipe), ALONE)
    refreshed(*asked, state, 4, start_model(recipe), ALONE)  # now it is there
    with pytest.raises(ConfigError, match="is gone"):  # of another run
        refreshed(*asked, RunState(0, 5, "other", "d"), 4, start_model(recipe), ALONE)


def test_negatives_of_a_teacher_that_was_trained_on_are_mined_again(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped before its first checkpoint finds them in its folder when it begins anew."""
    content["stages"][0] = {"kind": "mine", "negatives": 3, "rule": "naive", "teacher": "./t"}
    recipe = Recipe.parse(content)
    asked = (recipe, recipe.stages[0], opened(recipe))
    model, opens = start_model(recipe), list[str]()

    class Teacher:
        def encode(self, texts: list[str], task: str | None = None) -> np.ndarray:
            return np.random.default_rng([len(opens), len(texts)]).normal(size=(len(texts), 8)).astype(np.float32)

    monkeypatch.setattr(refresh, "open_encoder", lambda name: opens.append(name) or Teacher())

    def found(**teachers: str) -> list[tuple[str, ...]]:
        state = RunState(0, 0, "r", "d", facts={"teacher": {f"./{name}": print for name, print in teachers.items()}})
        refreshed(*asked, state, 0, model, ALONE)
        return negatives(folder)

    folder = Path(recipe.run.out) / "mined" / "retrieval" / "0000000"
    before = found(t="one", another="x")
    assert found(t="one", another="y") == before and opens == ["./t"]
    assert found(t="two") != before and opens == ["./t"] * 2


def test_rows_without_negatives_wait_for_the_mining(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"query": f"q{i}", "positives": [f"p{i} a"]}) + "\n" for i in range(9))
    )
    recipe = Recipe.parse(content)
    before = opened(recipe)
    assert len(before[0].rows) == 9
    plain = copy.deepcopy(content)
    del plain["stages"][0]
    with pytest.raises(ConfigError, match="none of its 9 rows has negatives of its own"):
        opened(Recipe.parse(plain))
    after = refreshed(recipe, recipe.stages[0], before, STATE, 0, start_model(recipe), ALONE)
    assert all(e.negatives for e in examples(after[0]))


def test_data_that_cannot_be_mined_is_refused(content: dict[str, Any]) -> None:
    content["stages"][1]["data"] = content["stages"][1]["data"][1:]
    with pytest.raises(ConfigError, match=r"stages\.retrieval: none of its data can be mined"):
        opened(Recipe.parse(content))


@pytest.mark.parametrize("by", ["the file of tasks", "the recipe"])
def test_a_task_without_an_instruction_is_mined_without_one(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Training reads its rows so. The catalogue has an instruction under that name."""
    entry = content["stages"][1]["data"][0]
    rows = Path(entry["path"]).rename(tmp_path / "nq.jsonl")
    entry |= {"path": str(rows), "task": {"name": "nq", "instruction": ""}}
    if by == "the file of tasks":
        del entry["task"]
        (tmp_path / "nq.jsonl.tasks.jsonl").write_text(json.dumps({"name": "nq", "licence": "mit"}) + "\n")
    recipe = Recipe.parse(content)
    asked: set[str | None] = set()

    class Teacher:
        def encode(self, texts: list[str], task: str | None = None) -> np.ndarray:
            asked.add(task)
            return np.random.default_rng(0).normal(size=(len(texts), 8)).astype(np.float32)

    monkeypatch.setattr(refresh, "_teacher", lambda name, model: Teacher())
    before = opened(recipe)
    refreshed(recipe, recipe.stages[0], before, STATE, 0, start_model(recipe), ALONE)
    assert before[0].row(0).task.instruction == "" and asked == {"", None}


def test_wordings_of_one_set_are_mined_each_under_its_own(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`data build` describes a set of two wordings in a file beside its rows. Synthetic rows are not mined."""
    path = Path(content["stages"][1]["data"][0]["path"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"task": f"own.{i % 2}"}) + "\n" for i, row in enumerate(rows)))
    del content["stages"][1]["data"][0]["task"]

    def describe(source: str) -> None:
        tasks = [{"name": f"own.{i}", "instruction": f"Wording {i}", "source": source} for i in range(2)]
        path.with_name(f"{path.name}.tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))

    describe("someone/own")
    recipe = Recipe.parse(content)
    asked: dict[str, str | None] = {}

    class Teacher:
        def encode(self, texts: list[str], task: str | None = None) -> np.ndarray:
            asked.update(dict.fromkeys(texts, task))
            return np.random.default_rng(0).normal(size=(len(texts), 8)).astype(np.float32)

    model, before = start_model(recipe), opened(recipe)
    monkeypatch.setattr(refresh, "_teacher", lambda name, model: Teacher())
    after = refreshed(recipe, recipe.stages[0], before, STATE, 0, model, ALONE)
    assert all(len(row.negatives) == 3 for row in examples(after[0]))
    assert {asked[row["query"]] for row in rows[::2]} == {"Wording 0"}
    assert {asked[row["query"]] for row in rows[1::2]} == {"Wording 1"}
    assert after[0].row(1).task.instruction == "Wording 1"
    describe("synthetic: m")
    with pytest.raises(ConfigError, match="none of its data can be mined"):
        opened(recipe)
