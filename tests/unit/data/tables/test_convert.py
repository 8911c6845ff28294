from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from embedwright.data.schema import DataError, Example, Passage
from embedwright.data.tables.table import open_documents, open_examples, write_examples

REAL = os.environ.get("EMBEDWRIGHT_DATA")


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_pairs(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "faq.jsonl", {"query": "a", "positive": "b"}, {"query": "c", "positive": "d", "id": "own"})
    assert list(open_examples(path, cache=cache)) == [
        Example("faq:1", "faq", "a", (Passage("b"),)),
        Example("own", "faq", "c", (Passage("d"),)),
    ]
    assert {e.task for e in open_examples(path, cache=cache, task="named")} == {"named"}


def test_scored_pairs_of_4_and_more_are_positives_in_both_directions_and_the_others_keep_their_score(
    tmp_path: Path, cache: Path
) -> None:
    scores = [0, 3.99, 4, 5]
    path = write(tmp_path / "sts.jsonl", *({"text1": f"a{s}", "text2": f"b{s}", "score": s} for s in scores))
    table = open_examples(path, cache=cache)
    b = {s: (Passage(f"b{s}"),) for s in scores}
    a = {s: (Passage(f"a{s}"),) for s in scores}
    assert list(table) == [
        Example("sts:1:ab", "sts", "a0", (), b[0], score=0.0),
        Example("sts:1:ba", "sts", "b0", (), a[0], score=0.0),
        Example("sts:2:ab", "sts", "a3.99", (), b[3.99], score=3.99),
        Example("sts:2:ba", "sts", "b3.99", (), a[3.99], score=3.99),
        Example("sts:3:ab", "sts", "a4", b[4], score=4.0),
        Example("sts:3:ba", "sts", "b4", a[4], score=4.0),
        Example("sts:4:ab", "sts", "a5", b[5], score=5.0),
        Example("sts:4:ba", "sts", "b5", a[5], score=5.0),
    ]
    assert table.report == {"rows": 4, "examples": 8, "below_threshold": 2, "quarantined": 0}
    assert table.positives_per_row().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    for name in ("again.jsonl", "again.parquet"):
        assert write_examples(tmp_path / name, table) == 8
        again = open_examples(tmp_path / name, cache=cache)
        assert list(again) == list(table) and again.has_score().all()
    assert (
        not open_examples(write(tmp_path / "x.jsonl", {"query": "a", "positive": "b"}), cache=cache).has_score().any()
    )


def test_pair_labelled_rows_of_one_text_become_one_example(tmp_path: Path, cache: Path) -> None:
    pairs = [
        ("q", "n1", 0),
        ("q", "p1", 1),
        ("lonely", "x", 0),
        ("q", "p2", 1),
        ("q", "n2", 0),
        ("q", "p1", 0),
        ("r", "p1", 1),
    ]
    path = write(tmp_path / "nli.jsonl", *({"text1": a, "text2": b, "label": label} for a, b, label in pairs))
    table = open_examples(path, cache=cache)
    assert list(table) == [
        Example("nli:1", "nli", "q", (Passage("p1"), Passage("p2")), (Passage("n1"), Passage("n2"))),
        Example("nli:7", "nli", "r", (Passage("p1"),)),
    ]
    assert table.report == {"rows": 7, "examples": 2, "no_positive": 1, "conflicting": 1, "quarantined": 0}


def test_labelled_rows(tmp_path: Path, cache: Path) -> None:
    rows = [{"text": f"{c}{i}", "label": c} for i in range(5) for c in "abc"] + [{"text": "d0", "label": "d"}]
    path = write(tmp_path / "intents.jsonl", *rows)
    table = open_examples(path, cache=cache, negatives=4, seed=1)
    assert table.report == {"rows": 16, "examples": 15, "singleton": 1, "quarantined": 0}
    for number, made in enumerate(table, start=1):
        assert made.id == f"intents:{number}" and made.positives[0].text[0] == made.query[0]
        assert len(made.negatives) == 4 and all(n.text[0] != made.query[0] for n in made.negatives)
    assert list(open_examples(path, cache=cache, negatives=4, seed=2)) != list(table)


def test_a_label_may_be_a_list(tmp_path: Path, cache: Path) -> None:
    rows = [{"text": f"t{i}", "label": [f"l{i % 2}", *(["both"] if i < 2 else [])]} for i in range(6)]
    made = list(open_examples(write(tmp_path / "x.jsonl", *rows), cache=cache, negatives=2))
    labels = {row["text"]: set(row["label"]) for row in rows}
    assert len(made) == 6 and all(labels[e.query] & labels[e.positives[0].text] for e in made)
    assert not any(labels[e.query] & labels[n.text] for e in made for n in e.negatives)


def test_a_beir_folder_is_trained_on_its_train_split(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "beir"
    write(
        folder / "corpus.jsonl",
        {"_id": "d1", "title": "T", "text": "one"},
        {"_id": "d2", "text": "two"},
        {"_id": "d0", "text": ""},
    )
    write(folder / "queries.jsonl", *({"_id": f"q{i}", "text": f"query {i}"} for i in range(4)))
    header = "query-id\tcorpus-id\tscore"
    write(folder / "qrels" / "test.tsv", header, "q3\td1\t1")
    write(folder / "qrels" / "train.tsv", header, "q1\td1\t1", "q1\td2\t2", "q2\td1\t0", "q0\td0\t1")
    table = open_examples(folder, cache=cache)
    assert list(table) == [Example("q1", "beir", "query 1", (Passage("T one", "d1"), Passage("two", "d2")))]
    assert table.report == {"rows": 3, "examples": 1, "document_without_text": 1, "no_positive": 2, "quarantined": 0}
    (folder / "qrels" / "train.tsv").write_text(f"{header}\nq1\td7\t1\n")
    with pytest.raises(DataError, match=r"train\.tsv:2: document 'd7'"):
        open_examples(folder, cache=cache)


def test_documents_by_id_come_from_the_corpus(tmp_path: Path, cache: Path) -> None:
    corpus = write(tmp_path / "docs.jsonl", {"_id": "d1", "title": "", "text": "one"}, {"_id": "d2", "text": "two"})
    rows = [
        {"query": "q", "positives": [{"id": "d1"}], "negatives": [{"id": "d2"}]},
        {"query": "r", "positives": [{"id": "d9"}]},
    ]
    path = write(tmp_path / "x.jsonl", *rows)
    table = open_examples(path, corpus=corpus, cache=cache)
    assert list(table) == [Example("x:1", "x", "q", (Passage("one", "d1"),), (Passage("two", "d2"),))]
    assert table.quarantined == 1 and table.quarantine.read_text() == json.dumps(rows[1]) + "\n"
    write(corpus, {"_id": "d1", "text": "changed"}, {"_id": "d2", "text": "two"})
    assert open_examples(path, corpus=corpus, cache=cache)[0].positives[0].text == "changed"
    with pytest.raises(DataError, match="no corpus is given"):
        open_examples(path, cache=cache)


def test_the_fingerprint_follows_content_task_seed_and_negatives(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"query": "a", "positive": "b"})
    prints = [
        open_examples(path, cache=cache, **change).fingerprint
        for change in ({}, {"task": "t"}, {"seed": 1}, {"negatives": 3})
    ]  # type: ignore[arg-type]
    write(path, {"query": "a", "positive": "B"})
    prints.append(open_examples(path, cache=cache).fingerprint)
    assert len(set(prints)) == 5 and all(len(bytes.fromhex(text)) == 32 for text in prints)


def test_what_cannot_be_opened(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        open_examples(tmp_path / "absent.jsonl", cache=cache)
    with pytest.raises(DataError, match="no good row"):
        open_examples(write(tmp_path / "bad.jsonl", "nonsense", "[]"), cache=cache)
    with pytest.raises(DataError, match=r"no example \(.*empty\.jsonl:1: query is empty"):
        open_examples(write(tmp_path / "empty.jsonl", {"query": "", "positive": "p"}), cache=cache)
    assert not list(cache.rglob("*.arrow*"))


@pytest.mark.skipif(not REAL, reason="EMBEDWRIGHT_DATA is not set")
@pytest.mark.parametrize(
    ("name", "rows", "examples"),
    [
        ("train/perlfaq.pairs.jsonl.gz", 300, 300),
        ("train/foldoc.pairs.jsonl.gz", 11084, 11084),
        ("train/review-sentiment.labeled.jsonl.gz", 11517, 11517),
        ("train/sts12-13.scored.jsonl.gz", 5342, 2 * 5342),
        ("dev/clinc150-val.labeled.jsonl.gz", 3000, 3000),
        ("dev/vitaminc.pairs.jsonl.gz", 4000, 2350),
        ("dev/squadshifts-amazon", 1000, 1000),
    ],
)
def test_real_sets_convert_without_a_bad_line(name: str, rows: int, examples: int, cache: Path) -> None:
    table = open_examples(Path(str(REAL)) / name, cache=cache)
    assert (table.report["rows"], len(table), table.quarantined) == (rows, examples, 0)


def test_a_link_has_its_own_name(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache keeps a file under its hash, and a link with its name."""
    write(tmp_path / "5f2a90ae", {"query": "a", "positive": "b"})
    (tmp_path / "nq.jsonl").symlink_to(tmp_path / "5f2a90ae")
    (example,) = open_examples(tmp_path / "nq.jsonl", cache=cache)
    assert (example.task, example.id) == ("nq", "nq:1")


def test_documents_become_rows_without_a_query(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"id": 7, "title": "T", "text": "body"}\n{"title": "none"}\n{"text": "x"}\n')
    table = open_documents(tmp_path / "d.jsonl")
    assert list(table) == [Example("7", "d", "", (Passage("T body"),)), Example("d:3", "d", "", (Passage("x"),))]
    assert table.first_positives().to_pylist() == ["T body", "x"]
    assert table.report == {"rows": 2, "examples": 2, "quarantined": 1}
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.txt").write_text("one\ntwo")
    pages = open_documents(tmp_path / "pages")
    assert [(row.id, row.positives[0].text) for row in pages] == [("a.txt", "one\ntwo")]
    (tmp_path / "pages" / "a.txt").rename(tmp_path / "pages" / "b.txt")
    assert open_documents(tmp_path / "pages")[0].id == "b.txt", "another name is another row"
    assert open_documents(tmp_path / "d.jsonl").fingerprint == table.fingerprint != pages.fingerprint
    with pytest.raises(DataError, match=r"empty\.txt: no example"):
        (tmp_path / "empty.txt").write_text("\n")
        open_documents(tmp_path / "empty.txt")
