"""From plain documents to a step of training: `data pairs`, `data clean`, `mine`, `train`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_wordnet import TEXT as ON_FERRIES
from small_wordnet import write_wordnet
from typer.testing import CliRunner

from embedwright.cli.main import app
from embedwright.data.answers import id_within, ids_of
from embedwright.data.files.beir import read_corpus
from embedwright.data.files.tasks import read_tasks, tasks_file
from embedwright.data.schema import Example
from embedwright.data.tables.table import open_examples
from embedwright.mining.mine import mine
from embedwright.pairs.make import MEANINGS, WAYS, make_pairs
from embedwright.text import Contract
from embedwright.training.batches.blend import Row
from embedwright.training.batches.feed import batch_of_step
from embedwright.training.batches.make import make_batch
from embedwright.training.batches.sources import open_sources
from embedwright.training.recipe import Recipe
from embedwright.training.train import train

NAMES = ["Amber", "Birch", "Cedar", "Delta", "Ember", "Fjord", "Grove", "Haven", "Inlet", "Jewel", "Kite", "Larch"]
THINGS = ["boats", "maps", "songs", "tools", "wells", "mills", "coins", "books", "lamps", "ropes", "jars", "keys"]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code:
        raise result.exception or AssertionError(result.output)
    return result.output


def document(i: int) -> dict[str, object]:
    name, things, other = NAMES[i % 12], THINGS[(5 * i + i // 12) % 12], NAMES[(i + 5) % 12]
    text = (
        f"{ON_FERRIES} The {name} workshop {i} was founded by Ada {other} in 19{10 + i}, and it makes {things}. "
        f"Its old customers order {things} by the dozen from the {name} catalogue. "
        f"Nobody else in the valley near {other} sells them."
    )
    usage = f"a {name.lower()} of {things}"
    title = name.lower() if i % 3 else f"Who sells {things} in the valley?"
    links = {"see_also": f"d{i + 1}", "tags": ["craft", "trade"][i % 2]}
    return {"_id": f"d{i}", "title": title, "text": f'{text}; "{usage}"', **links}


def test_documents_become_a_trained_model(
    tmp_path: Path, tiny_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    source, made, cleaned, mined = (tmp_path / f"{name}.jsonl" for name in ("docs", "made", "cleaned", "mined"))
    source.write_text("".join(json.dumps(document(i)) + "\n" for i in range(36)))
    options = ["--licence", "mit", "--wordnet", write_wordnet(tmp_path / "wordnet")]
    counts = json.loads(run("data", "pairs", source, "--how", ",".join(WAYS), "--out", made, *options))
    assert {way: count["examples"] > 0 for way, count in counts["ways"].items()} == dict.fromkeys(WAYS, True)
    giving = {row.task for row in open_examples(made) if row.positives and row.negatives}
    assert giving == {f"docs-{kind}" for kind in ("bm25", "gloss", "gloss-usage", "swap", "classes")}
    for name in giving:
        task = read_tasks(tasks_file(made))[name]
        rows = [Row(row, task) for row in open_examples(made) if row.task == name and row.negatives]
        batch = make_batch(rows, Contract(eos_id=1), hard_negatives=2, in_batch="none", rng=np.random.default_rng(0))
        assert batch.masks.own_QC.any(axis=1).all(), name
    run("data", "clean", made, "--out", cleaned, "--licence", "mit", "--repeats", "none")
    run("mine", cleaned, "--out", mined, "--teacher", "bm25", "--negatives", "2", "--rule", "naive")
    tasks = read_tasks(tasks_file(mined))
    assert {name.removeprefix("docs-") for name in tasks} <= {*MEANINGS} and len(tasks) >= len(WAYS)
    assert all(task.licence == "mit" and task.instruction for task in tasks.values())
    before = {example.id: example for example in open_examples(made)}
    taught = [row for row in open_examples(cleaned) if row.task == "docs-bm25"]
    assert taught and all(row.positive_scores == before[row.id].positive_scores for row in taught)
    by_task: dict[bool, list[Example]] = {True: [], False: []}
    for row in open_examples(mined):
        by_task[row.task == "docs-summary"].append(row)
    assert all(len(row.negatives) == len(row.negative_scores or ()) >= 2 for row in by_task[False] if row.positives)
    assert by_task[True] and not any(row.negatives for row in by_task[True])  # one question, which all documents answer
    stage = {"name": "s", "data": [{"path": str(mined)}], "in_batch_negatives": "all", "hard_negatives": 2}
    stage |= {"loss": {"distill": {"score_weight": 1.0, "temperature": 3.0}}}
    stage |= {"optim": {"lr": 1e-3, "steps": 2, "batch_queries": 16}}
    recipe = {
        "name": "r",
        "model": {"base": str(tiny_decoder("llama")), "pooling": "mean", "max_tokens": 48},
        "stages": [stage],
    }
    train(
        Recipe.parse(recipe | {"run": {"out": str(tmp_path / "run"), "precision": "fp32"}, "tune": {"method": "full"}})
    )
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if "loss" in step] == [1, 2] and all(step["loss"] > 0 for step in steps)


def test_pairs_that_differ_in_one_word_reach_their_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cleaning leaves `swap` its negatives; CoSENT gets all scores of `lemma`, InfoNCE its pairs of 4 and above."""
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    source, made, cleaned = (tmp_path / f"{name}.jsonl" for name in ("docs", "made", "cleaned"))
    source.write_text("".join(json.dumps(document(i)) + "\n" for i in range(36)))
    run("data", "pairs", source, "--how", "swap", "--out", made)
    run("data", "clean", made, "--out", cleaned)
    before, after = ({row.id: row for row in open_examples(file)} for file in (made, cleaned))
    assert len(after) > 6 and all(len(row.negatives) == 1 and row == before[id_] for id_, row in after.items())

    run("data", "pairs", source, "--how", "lemma", "--out", made, "--wordnet", write_wordnet(tmp_path / "wordnet"))
    run("data", "clean", made, "--out", cleaned, "--repeats", "none")
    pairs = [json.loads(line) for line in made.read_text().splitlines()]
    other = {pair["id"]: (pair.get("positives") or pair["negatives"])[0]["text"] for pair in pairs}
    assert {pair["score"] for pair in pairs} == {5.0, 4.0, 2.5, 1.5}
    for loss, least in ({"scored": "cosent"}, 0), ({}, 4):
        taken = {pair["id"]: pair["score"] for pair in pairs if pair["score"] >= least}
        stage = {"name": "s", "data": [{"path": str(cleaned)}], "in_batch_negatives": "all", "hard_negatives": 0}
        stage |= {"loss": loss, "optim": {"lr": 1e-3, "steps": 1, "batch_queries": len(taken)}}
        recipe = Recipe.parse({"name": "r", "model": {"base": "b"}, "stages": [stage], "run": {"out": "o"}})
        batch = batch_of_step(recipe, 0, open_sources(recipe)[0], Contract(eos_id=1), 0)
        assert sorted(batch.ids) == sorted(taken)
        assert all(
            batch.candidates[c][1] == other[id_] for c, id_ in zip(batch.masks.positive_Q, batch.ids, strict=True)
        )
        if loss:
            assert batch.targets.score_Q is not None
            assert dict(zip(batch.ids, batch.targets.score_Q.tolist(), strict=True)) == taken


def test_documents_of_one_source_are_never_each_others_negatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `data pairs`, `mine` and a batch, in rows of other ways, too; without sources, the same documents are."""
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    names = [f"z{chr(97 + i % 26)}{chr(97 + i // 26)}z" for i in range(36)]  # one in any eight words of its document

    def sold(i: int) -> dict[str, object]:
        kinds = [THINGS[(i + k) % 12] for k in range(8)]
        text = " ".join(f"People of {names[i]} sell {kind} and {names[i]} jars." for kind in kinds)
        return {"_id": f"d{i}", "text": text, "source": f"p{i // 6}", "tags": f"t{i % 6}", "links": f"d{(i + 7) % 36}"}

    documents = [sold(i) for i in range(36)]
    ways = ["crops", "sentence", "classes", "see-also", "crops,sentence,classes,see-also"]

    def sources(text: str) -> set[str]:
        return {str(documents[i]["source"]) for i, name in enumerate(names) if name in text}

    def met(name: str, rows: list[dict[str, object]]) -> tuple[set[bool], set[bool]]:
        """Returns whether a mined negative, and one of the batch, was of the query's own source."""
        of_id = {str(row["_id"]): str(documents[int(str(row["_id"])[1:])]["source"]) for row in rows}
        found, shared = set[bool](), set[bool]()
        for way in ways:
            given, made, mined = (tmp_path / f"{part}-{name}-{way}.jsonl" for part in ("docs", "made", "mined"))
            given.write_text("".join(json.dumps(row) + "\n" for row in rows))
            run("data", "pairs", given, "--how", way, "--out", made, "--negatives", "1", "--name", "d")
            run("mine", made, "--out", mined, "--teacher", "bm25", "--negatives", "3", "--rule", "naive")
            tasks, own = read_tasks(tasks_file(mined)), list(open_examples(mined))
            assert sum(len(row.negatives) for row in own) > 36, way
            asked = [of_id[row.id.split(":")[1]] for row in own]
            for row, source in zip(own, asked, strict=True):
                found |= {source in sources(passage.text) for passage in row.negatives}
            batch = make_batch(
                [Row(row, tasks[row.task]) for row in own],
                Contract(eos_id=1),
                hard_negatives=3,
                in_batch="all",
                rng=np.random.default_rng(0),
            )
            for source, negative_C in zip(asked, batch.masks.negative_QC, strict=True):
                shared |= {source in sources(batch.candidates[c][1]) for c in np.flatnonzero(negative_C)}
        return found, shared

    assert met("with", documents) == ({False}, {False})
    without = [{key: value for key, value in row.items() if key != "source"} for row in documents]
    assert met("without", without) == ({False, True}, {False, True})


@pytest.mark.parametrize("ways", [["sentence", "swap"], ["swap"]])
def test_no_passage_that_holds_a_sentence_word_for_word_stands_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ways: list[str]
) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    given, made = tmp_path / "docs.jsonl", tmp_path / "made.jsonl"
    given.write_text(json.dumps(document(1)) + "\n")
    make_pairs(given, made, ways, per_document=6)
    tasks, own = read_tasks(tasks_file(made)), list(open_examples(made))
    rows = [Row(row, tasks[row.task]) for row in own]
    batch = make_batch(rows, Contract(eos_id=1), hard_negatives=1, in_batch="all", rng=np.random.default_rng(0))
    for row, negative_C in zip(own, batch.masks.negative_QC, strict=True):
        against = {batch.candidates[c][1] for c in np.flatnonzero(negative_C)}
        assert against == {passage.text for passage in row.negatives} and not any(row.query in one for one in against)
    assert sum(len(row.negatives) for row in own) > 2


@pytest.mark.parametrize("way", ["crops", "sentence", "see-also"])
def test_a_document_with_a_source_is_no_negative_of_its_own_rows_when_its_corpus_is_mined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    given, made = tmp_path / "docs.jsonl", tmp_path / "made.jsonl"
    rows = [document(i) | {"source": f"p{i // 2}"} for i in range(12)]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_pairs(given, made, [way])
    mined, _ = mine(list(open_examples(made)), read_corpus(given), "bm25", rule="naive", negatives=12)
    assert len(mined) > 5
    for row in mined:
        ids = {id_within(id) for passage in row.negatives for id in ids_of(passage)}
        assert len(ids) > 5 and row.id.split(":")[1] not in ids
