"""From rows that `datasets` really loads, off local files and folders, to files of examples."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from stand_ins import beir, repository, write

from embedwright.data.files.tasks import read_tasks, tasks_file, write_tasks
from embedwright.data.labels import LabelRules
from embedwright.data.schema import DataError, Example, Task
from embedwright.data.sources import build as module
from embedwright.data.sources.build import build, label_file, open_table
from embedwright.data.sources.catalog import Entry, load_catalog
from embedwright.data.sources.convert import Table
from embedwright.data.tables.table import open_examples

REAL = os.environ.get("EMBEDWRIGHT_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="EMBEDWRIGHT_DATA is not set")
TEXTS = [{"text": f"text {i}", "label": i % 2, "label_text": "ab"[i % 2]} for i in range(8)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))


def read(path: Path) -> list[Example]:
    return list(open_examples(path))


# ---- where rows come from


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.parquet"])
@pytest.mark.parametrize("out", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_a_file_becomes_a_file_of_examples(tmp_path: Path, name: str, out: str) -> None:
    source = write(tmp_path / name, TEXTS)
    counts = build(load_catalog()["imdb"], tmp_path / "new" / out, source=source)
    assert counts == {"rows": 8, "examples": 8, "quarantined": 0}
    examples = read(tmp_path / "new" / out)
    assert [(e.id, e.task, e.query) for e in examples[:2]] == [
        ("imdb:1", "imdb", "text 0"),
        ("imdb:2", "imdb", "text 1"),
    ]
    assert [(e.positives[0].text, e.negatives[0].text) for e in examples[:2]] == [
        ("negative", "positive"),
        ("positive", "negative"),
    ]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {out, f"{out}.tasks.jsonl"}


def test_a_folder_is_loaded_as_a_repository_with_configs(tmp_path: Path) -> None:
    folder = repository(tmp_path / "set", en=("train", TEXTS), de=("train", TEXTS[:3]))
    counts = build(load_catalog()["amazon_counterfactual"], tmp_path / "out.jsonl", source=folder)
    assert counts == {"rows": 8, "examples": 8, "quarantined": 0}
    with pytest.raises(DataError, match=r"(?s)set: .*pair.*en"):
        build(load_catalog()["nq"], tmp_path / "out.jsonl", source=folder)


@pytest.mark.parametrize("limit", [None, 3])
def test_a_set_of_three_tables(tmp_path: Path, limit: int | None) -> None:
    counts = build(load_catalog()["scifact"], tmp_path / "out.jsonl", source=beir(tmp_path / "set"), limit=limit)
    made = limit or 5
    assert (counts["rows"], counts["examples"]) == (5, made)
    examples = read(tmp_path / "out.jsonl")
    drawn = [int(e.query.split()[1]) for e in examples]
    assert drawn == sorted(set(drawn)) and len(drawn) == made
    assert [(e.query, e.positives[0].text, e.positives[0].id) for e in examples] == [
        (f"question {i}", f"Title {i} body", f"d{i}") for i in drawn
    ]


def test_claims_and_their_pages(tmp_path: Path) -> None:
    claims = [
        {"uid": f"u{i}", "claim": f"claim {i}", "supporting_facts": [{"key": f"P{i}", "value": 0}]} for i in (0, 1)
    ]
    folder = repository(
        tmp_path / "set", corpus=("corpus", [{"_id": "1", "title": "P1", "text": "page 1"}]), default=("train", claims)
    )
    counts = build(load_catalog()["hover"], tmp_path / "out.jsonl", source=folder)
    assert counts == {"rows": 2, "page_without_text": 1, "no_positive": 1, "examples": 1, "quarantined": 0}
    assert [(e.query, e.positives[0].text) for e in read(tmp_path / "out.jsonl")] == [("claim 1", "P1 page 1")]


def test_one_file_a_label(tmp_path: Path) -> None:
    for name, lines in (("AskReddit.txt", ["why one", "why two"]), ("cats.txt", ["a cat", "", "two cats"])):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    (tmp_path / "readme.md").write_text("not data")
    counts = build(
        load_catalog()["reddit_s2s"], tmp_path / "out" / "out.jsonl", source=tmp_path, labels=LabelRules(negatives=1)
    )
    assert (counts["rows"], counts["examples"], counts["quarantined"]) == (5, 4, 1)
    (example, *_) = read(tmp_path / "out" / "out.jsonl")
    assert (example.query, example.positives[0].text) == ("why one", "why two")
    assert example.negatives[0].text in ("a cat", "two cats")


def test_the_name_of_a_json_file_is_a_label(tmp_path: Path) -> None:
    for site in ("unix.stackexchange.com", "math.stackexchange.com"):
        rows = [{"texts": [f"{site} {i}", "body"], "tags": ["x"], "meta": None} for i in range(2)]
        write(tmp_path / "in" / f"{site}.jsonl.gz", rows)
    counts = build(load_catalog()["stackexchange_p2p"], tmp_path / "out.jsonl", source=tmp_path / "in")
    assert (counts["examples"], counts["fewer_negatives"]) == (4, 4)
    first = read(tmp_path / "out.jsonl")[0]
    assert (first.query, first.positives[0].text) == ("math.stackexchange.com 0 body", "math.stackexchange.com 1 body")
    one = write(tmp_path / "one.jsonl", [{"texts": ["a", "b"]}])
    with pytest.raises(DataError, match="1 label without conflicts"):
        build(load_catalog()["stackexchange_p2p"], tmp_path / "none.jsonl", source=one)


def test_the_hub_is_asked_for_config_split_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is out of reach of the tests: what `load_dataset` is told, and what becomes of its refusal."""
    asked = []
    monkeypatch.setattr(module, "_load", lambda arguments, names: iter(asked.append(arguments) or [{"a": 1}]))
    entry = load_catalog()["amazon_counterfactual"]
    table = Table(entry.hub, entry.revision, entry.config, entry.split)
    assert list(open_table(table, source=None, streaming=True, names={})) == [(1, b"", {"a": 1})]
    where = {"path": "mteb/amazon_counterfactual", "revision": entry.revision, "name": "en", "split": "train"}
    assert asked == [where | {"streaming": True}]


def test_rows_are_the_same_streamed_or_not(tmp_path: Path) -> None:
    told = {"path": "json", "data_files": str(write(tmp_path / "in.jsonl.gz", TEXTS)), "split": "train"}
    told["cache_dir"] = str(tmp_path / "hub")
    whole, streamed = (list(module._load({**told, "streaming": streaming}, {})) for streaming in (False, True))
    assert whole == streamed == TEXTS


@pytest.mark.parametrize("name", ["banking77", "hover"])
def test_a_hub_out_of_reach_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConnectionError, match=r"(banking77|hover).*a local copy can be given as source"):
        build(load_catalog()[name], tmp_path / "out.jsonl", limit=3)
    assert list(tmp_path.iterdir()) == []


# ---- what is refused, warned of, counted


def test_a_set_without_a_commit_is_warned_of_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="nq: sentence-transformers/natural-questions is not pinned to a commit"):
        build(load_catalog()["nq"], tmp_path / "out.jsonl", strict=True)
    with caplog.at_level(logging.WARNING), pytest.raises(ConnectionError):
        build(load_catalog()["nq"], tmp_path / "out.jsonl")
    assert "nq: sentence-transformers/natural-questions is not pinned" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING), pytest.raises(ConnectionError):
        build(load_catalog()["scifact"], tmp_path / "out.jsonl", strict=True)
    source = write(tmp_path / "in.jsonl", [{"query": "q", "answer": "a"}])
    build(load_catalog()["nq"], tmp_path / "out.jsonl", source=source, strict=True)
    assert "pinned" not in caplog.text


def test_pages_without_a_commit_are_not_pinned_either(tmp_path: Path) -> None:
    entry = load_catalog()["hover"].model_copy(update={"revision": "0" * 40})
    pages = entry.rows.pages.model_copy(update={"revision": None})
    entry = entry.model_copy(update={"rows": entry.rows.model_copy(update={"pages": pages})})
    with pytest.raises(DataError, match="hover: mteb/hotpotqa is not pinned"):
        build(entry, tmp_path / "out.jsonl", strict=True)


def test_bad_rows_are_kept_and_forgotten_when_there_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "in.jsonl", [{"query": "q", "answer": "a"}, {"query": "", "answer": "b"}])
    with source.open("a") as file:
        file.write("{broken\n")
    out, kept = tmp_path / "out.jsonl", tmp_path / "out.jsonl.quarantine.jsonl"
    with caplog.at_level(logging.WARNING):
        counts = build(load_catalog()["nq"], out, source=source)
    assert counts == {"rows": 3, "examples": 1, "quarantined": 2}
    assert f"{source}:2: query is empty" in caplog.text and f"{source}:3: not JSON" in caplog.text
    assert kept.read_text().splitlines() == ['{"query": "", "answer": "b"}', "{broken"]
    build(load_catalog()["nq"], out, source=write(tmp_path / "in.jsonl", [{"query": "q", "answer": "a"}]))
    assert not kept.exists()


def test_bad_rows_of_a_folder_are_kept_as_json(tmp_path: Path) -> None:
    folder = repository(
        tmp_path / "set", pair=("train", [{"query": "q", "answer": "a"}, {"query": None, "answer": "b"}])
    )
    assert build(load_catalog()["nq"], tmp_path / "out.jsonl", source=folder)["quarantined"] == 1
    kept = (tmp_path / "out.jsonl.quarantine.jsonl").read_text()
    assert json.loads(kept) == {"query": None, "answer": "b"}


def test_nothing_is_written_where_nothing_comes_out(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("of before")
    source = write(tmp_path / "in.jsonl", [{"premise": "a", "hypothesis": "b", "label": 1}])
    with pytest.raises(DataError, match=r"nli: no example \({'rows': 1, 'no_positive': 1}\)"):
        build(load_catalog()["nli"], out, source=source)
    with pytest.raises(DataError, match=r"no example \(.*in.jsonl:1: no column 'query'"):
        build(load_catalog()["nq"], out, source=source)
    assert out.read_text() == "of before"


@pytest.mark.parametrize(
    ("name", "source", "options", "error", "said"),
    [
        ("nq", "absent", {}, FileNotFoundError, "absent does not exist"),
        ("fiqa", "in.jsonl", {}, DataError, "several tables"),
        ("nq", "in.jsonl", {"labels": LabelRules("label")}, DataError, "its rows have no labels"),
        ("reddit_s2s", None, {}, DataError, "on no hub: give a local copy as source, from https://github.com"),
        ("reddit_s2s", ".", {}, FileNotFoundError, r"no file \*.txt"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, name: str, source: str | None, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    write(tmp_path / "in.jsonl", [{"query": "q", "answer": "a"}])
    path = None if source is None else tmp_path / source
    with pytest.raises(error, match=said):
        build(load_catalog()[name], tmp_path / "out.jsonl", source=path, **options)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_broken_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "in" / "default" / "train").mkdir(parents=True)
    (tmp_path / "in" / "default" / "train" / "0.parquet").write_bytes(b"PAR1 but no more")
    entry = load_catalog()["stackexchange"]
    with pytest.raises(DataError, match=r"0\.parquet: "):
        build(entry, tmp_path / "out.jsonl", source=tmp_path / "in")
    odd = entry.model_copy(update={"files": "*.csv"})
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"x\.csv: expected a file of \.parquet"):
        build(odd, tmp_path / "out.jsonl", source=tmp_path)


def test_the_same_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": f"t{i}", "label": f"l{i % 5}"} for i in range(60)])
    entry = load_catalog()["massive_intent"]
    outs = []
    for number, seed in enumerate((3, 3, 4)):
        build(entry, tmp_path / f"{number}.jsonl.gz", source=source, seed=seed, limit=30)
        outs.append((tmp_path / f"{number}.jsonl.gz").read_bytes())
    assert outs[0] == outs[1] != outs[2]


# ---- labels of a file


@pytest.mark.parametrize("rules", [LabelRules("label"), LabelRules(known=["a"])])
def test_what_is_asked_of_labels_is_refused_for_a_set_without_any(tmp_path: Path, rules: LabelRules) -> None:
    with pytest.raises(DataError, match="paq: its rows have no labels"):
        build(load_catalog()["paq"], tmp_path / "out.jsonl", labels=rules)


def test_a_labelled_file_becomes_what_training_makes_of_it(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": f"l{i % 4}", "id": f"own{i}"} for i in range(40)]
    source = write(tmp_path / "kinds.labeled.jsonl", rows)
    counts = label_file(source, tmp_path / "out.jsonl", labels=LabelRules(negatives=3), seed=5)
    assert counts == {"rows": 40, "examples": 40, "quarantined": 0}
    assert read(tmp_path / "out.jsonl") == list(open_examples(source, negatives=3, seed=5))


@pytest.mark.parametrize("form", ["label", "example"])
@pytest.mark.parametrize("name", [None, "mine"])
def test_what_the_file_of_tasks_says_stays_but_for_what_the_form_decides(
    tmp_path: Path, form: Any, name: str | None
) -> None:
    source = write(tmp_path / "intents.jsonl", [{"text": f"t{i}", "label": f"l{i % 2}"} for i in range(8)])
    said = {"family": "clustering", "instruction": "I", "licence": "cc-by-nc-4.0", "source": "s"}
    task = Task.model_validate(said | {"name": "intents", "symmetric": True, "in_batch_negatives": "none"})
    write_tasks(tasks_file(source), [task])
    label_file(source, tmp_path / "out.jsonl", labels=LabelRules(form), task=name)
    found = task.model_copy(update={"name": name or "intents"})
    assert read_tasks(tasks_file(tmp_path / "out.jsonl")) == {found.name: found}
    write_tasks(tasks_file(source), [task.model_copy(update={"symmetric": False})])
    label_file(source, tmp_path / "out.jsonl", labels=LabelRules(form), task=name)
    found = found.model_copy(update={"symmetric": form == "example"})
    assert read_tasks(tasks_file(tmp_path / "out.jsonl")) == {found.name: found}


def test_labels_may_be_lists(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": [f"l{i % 3}", *(["x"] if i < 6 else [])]} for i in range(12)]
    label_file(
        write(tmp_path / "many.jsonl", rows), tmp_path / "out.jsonl", task="many", labels=LabelRules(negatives=2)
    )
    labels_of = {row["text"]: set(row["label"]) for row in rows}
    for example in (examples := read(tmp_path / "out.jsonl")):
        assert labels_of[example.query] & labels_of[example.positives[0].text]
        assert not any(labels_of[example.query] & labels_of[n.text] for n in example.negatives)
    assert len(examples) == 12 and examples[0].task == "many"


def test_form_words_and_known_labels(tmp_path: Path) -> None:
    source = write(tmp_path / "s.jsonl", [{"text": f"t{i}", "label": i % 3} for i in range(9)])
    options: dict[str, Any] = {"words": {0: "bad", "1": "good"}}
    counts = label_file(source, tmp_path / "out.jsonl", labels=LabelRules(known=["0", "1"]), **options)
    assert counts == {"rows": 9, "unseen": 3, "examples": 6, "quarantined": 0}
    assert {e.positives[0].text for e in read(tmp_path / "out.jsonl")} == {"bad", "good"}
    label_file(source, tmp_path / "out.jsonl", labels=LabelRules("example", known=["0", "1"]), **options)
    assert {e.positives[0].text[0] for e in read(tmp_path / "out.jsonl")} == {"t"}
    with pytest.raises(DataError, match=r"p.jsonl: rows are not"):
        label_file(write(tmp_path / "p.jsonl", [{"query": "q", "positive": "p"}]), tmp_path / "out.jsonl")


# ---- real data


def own(rows: dict[str, Any], target: str) -> Entry:
    marks = dict.fromkeys(("columns", "source", "instructions", "samples", "target"), "guess")
    content = {"name": "real", "rows": rows, "family": "retrieval", "instructions": ["Find it"], "marks": marks}
    return Entry.model_validate(content | {"target": {"v2": target}})


@needs_data
def test_real_pairs(tmp_path: Path) -> None:
    source = Path(str(REAL)) / "train" / "perlfaq.pairs.jsonl.gz"
    entry = own({"kind": "pairs", "query": "query", "positive": "positive"}, "passage")
    counts = build(entry, tmp_path / "out.jsonl", source=source)
    assert counts["rows"] == counts["examples"] == 300
    examples = read(tmp_path / "out.jsonl")
    assert examples[5].positives == list(open_examples(source))[5].positives


@needs_data
def test_a_real_set_as_a_file_and_as_a_set_of_the_catalogue(tmp_path: Path) -> None:
    source = Path(str(REAL)) / "dev" / "clinc150-val.labeled.jsonl.gz"
    counts = label_file(source, tmp_path / "out.jsonl", labels=LabelRules(negatives=2))
    table = open_examples(source, negatives=2)
    assert counts == table.report
    assert read(tmp_path / "out.jsonl")[::50] == list(table)[::50]
    drawn = build(own({"kind": "labelled", "text": "text", "label": "label"}, "example"), tmp_path / "d.jsonl",
                  source=source, limit=1000)  # fmt: skip
    assert drawn["not_drawn"] == 2000
    assert drawn["examples"] + drawn.get("conflicting", 0) + drawn.get("singleton", 0) == 1000


@needs_data
def test_a_real_binary_set_takes_the_words_of_its_labels(tmp_path: Path) -> None:
    source = Path(str(REAL)) / "train" / "review-sentiment.labeled.jsonl.gz"
    counts = label_file(source, tmp_path / "out.jsonl", words={"negative": "a bad review", "positive": "a good one"})
    found = Counter(e.positives[0].text for e in read(tmp_path / "out.jsonl"))
    assert found.keys() == {"a bad review", "a good one"} and sum(found.values()) == counts["examples"] > 11_000
