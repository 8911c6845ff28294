from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwright.data.files import table as table_module
from embedwright.data.files.table import BATCH_ROWS, ExampleTable, open_documents, open_examples, write_examples
from embedwright.data.schema import DataError, Example, Passage


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def example(i: int) -> Example:
    return Example(
        id=f"e{i}",
        task=f"task {i % 3}",
        query=f"query {i} 漢字",
        positives=(Passage(f"p{i}"), Passage(f"q{i}", f"d{i}")),
        negatives=tuple(Passage(f"n{i}.{k}") for k in range(i % 4)),
        positive_scores=(0.1, 1 / 3) if i % 2 else None,
        negative_scores=tuple(float(k) for k in range(i % 4)) if i % 5 == 0 else None,
        score=i / 7 if i % 3 else None,
        language="en" if i % 2 else None,
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_examples_come_back_as_they_were_written(name: str, tmp_path: Path, cache: Path) -> None:
    examples = [example(i) for i in range(2 * BATCH_ROWS + 17)]
    assert write_examples(tmp_path / name, iter(examples)) == len(examples)
    table = open_examples(tmp_path / name, cache=cache)
    assert len(table) == len(examples)
    assert list(table) == examples
    for i in (0, BATCH_ROWS - 1, BATCH_ROWS, len(examples) - 1, -1, -len(examples), np.int64(300)):
        assert table[i] == examples[i]
    for i in (len(examples), -len(examples) - 1):
        with pytest.raises(IndexError, match=str(i)):
            table[i]
    assert table.report == {"rows": len(examples), "examples": len(examples), "quarantined": 0}


def test_the_same_examples_give_the_same_gzip_bytes(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_examples(tmp_path / name, [example(i) for i in range(50)])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert (tmp_path / "a.jsonl.gz").read_bytes()[4:8] == bytes(4)  # the header's time, which both may share by chance


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_a_write_that_fails_leaves_the_old_file(name: str, tmp_path: Path) -> None:
    def broken() -> Any:
        yield example(1)
        raise RuntimeError("the source ended early")

    write_examples(tmp_path / name, [example(0)])
    before = (tmp_path / name).read_bytes()
    with pytest.raises(RuntimeError):
        write_examples(tmp_path / name, broken())
    assert (tmp_path / name).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_rows_by_task(tmp_path: Path, cache: Path) -> None:
    write_examples(tmp_path / "x.jsonl", [example(i) for i in range(700)])
    rows = open_examples(tmp_path / "x.jsonl", cache=cache).rows_by_task()
    assert list(rows) == ["task 0", "task 1", "task 2"]
    for k, numbers in enumerate(rows.values()):
        assert numbers.dtype == np.int64
        assert numbers.tolist() == list(range(k, 700, 3))


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


def test_bad_lines_are_counted_on_every_opening(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = ['{"query": "q"', '{"text": "another kind", "label": "x"}', '{"query": "", "positive": "p"}']
    path = write(tmp_path / "x.jsonl", bad[0], {"query": "a", "positive": "b"}, *bad[1:])
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            table = open_examples(path, cache=cache)
        assert table.report == {"rows": 1, "examples": 1, "quarantined": 3} and len(table) == 1
        assert table.quarantine.read_text() == "".join(f"{line}\n" for line in bad)
        assert "3 bad lines" in caplog.text and str(table.quarantine) in caplog.text
        assert f"{path}:1: not JSON" in caplog.text and f"{path}:4: query is empty" in caplog.text


def test_the_second_opening_reads_the_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.jsonl", {"query": "a", "positive": "b"})
    first = open_examples(path, cache=cache)
    monkeypatch.setattr(table_module, "_convert", lambda *_: pytest.fail("converted again"))
    assert list(open_examples(path, cache=cache)) == list(first)
    assert open_examples(str(path), cache=cache).fingerprint == first.fingerprint


def test_the_fingerprint_follows_content_task_seed_and_negatives(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"query": "a", "positive": "b"})
    prints = [
        open_examples(path, cache=cache, **change).fingerprint
        for change in ({}, {"task": "t"}, {"seed": 1}, {"negatives": 3})
    ]  # type: ignore[arg-type]
    write(path, {"query": "a", "positive": "B"})
    prints.append(open_examples(path, cache=cache).fingerprint)
    assert len(set(prints)) == 5 and all(len(bytes.fromhex(text)) == 32 for text in prints)


def test_a_damaged_cache_file_is_made_again(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"query": "a", "positive": "b"})
    arrow = open_examples(path, cache=cache).arrow
    whole = arrow.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"x" * 100):
        arrow.unlink()  # the table that is open keeps its mapping
        arrow.write_bytes(damaged)
        assert list(open_examples(path, cache=cache)) == [Example("x:1", "x", "a", (Passage("b"),))]
        assert arrow.read_bytes() == whole


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.jsonl", {"query": "a", "positive": "b"})
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "by-env"))
    assert open_examples(path).arrow.parent == tmp_path / "by-env" / "data"
    monkeypatch.delenv("EMBEDWRIGHT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_examples(path).arrow.parent == tmp_path / "home" / ".cache" / "embedwright" / "data"


def test_what_cannot_be_opened(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        open_examples(tmp_path / "absent.jsonl", cache=cache)
    with pytest.raises(DataError, match="no good row"):
        open_examples(write(tmp_path / "bad.jsonl", "nonsense", "[]"), cache=cache)
    with pytest.raises(DataError, match=r"no example \(.*empty\.jsonl:1: query is empty"):
        open_examples(write(tmp_path / "empty.jsonl", {"query": "", "positive": "p"}), cache=cache)
    assert not list(cache.rglob("*.arrow*"))


def _open_many(path: Path, cache: Path, start: Any, results: Any) -> None:
    convert, converted = table_module._convert, 0

    def counted(*job: Any) -> None:
        nonlocal converted
        converted += 1
        convert(*job)

    table_module._convert = counted
    start.wait()
    results.put((Counter(e.query for e in open_examples(path, cache=cache)), converted))


def test_of_processes_that_open_at_once_one_converts_and_all_get_the_whole_table(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "x.jsonl", *({"query": f"q{i}", "positive": "p"} for i in range(3000)))
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    workers = [context.Process(target=_open_many, args=(path, cache, start, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    found = [results.get(timeout=30) for _ in workers]
    assert all(rows == Counter(f"q{i}" for i in range(3000)) for rows, _ in found)
    assert sum(converted for _, converted in found) == 1
    for worker in workers:
        worker.join()
    assert len(list(cache.rglob("*"))) == 2  # the folder `data` and one Arrow file


def _convert_for_ever(path: Path, cache: Path, at_work: Any) -> None:
    def stuck(*job: Any) -> None:
        at_work.set()
        time.sleep(600)

    table_module._convert = stuck
    open_examples(path, cache=cache)


def test_a_process_waits_for_one_that_converts_and_converts_itself_once_that_one_is_killed(
    tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path / "x.jsonl", *({"query": f"q{i}", "positive": "p"} for i in range(9)))
    context = multiprocessing.get_context("fork")
    at_work, start, results = context.Event(), context.Event(), context.Queue()
    first = context.Process(target=_convert_for_ever, args=(path, cache, at_work))
    second = context.Process(target=_open_many, args=(path, cache, start, results))
    start.set()
    first.start()
    assert at_work.wait(30)
    second.start()
    second.join(0.5)
    assert second.is_alive() and results.empty()
    first.kill()
    rows, converted = results.get(timeout=30)
    second.join()
    assert len(rows) == 9 and converted == 1
    assert sorted(file.suffix for file in cache.rglob("*")) == ["", ".arrow"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists the mappings of a process")
def test_the_table_is_mapped_and_not_loaded(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "x.jsonl", *({"query": f"q{i}", "positive": "p"} for i in range(1000)))
    open_examples(path, cache=cache)
    table = open_examples(path, cache=cache)
    assert table[999].query == "q999"
    assert str(table.arrow) in Path("/proc/self/maps").read_text()


REAL = os.environ.get("EMBEDWRIGHT_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="EMBEDWRIGHT_DATA is not set")


def real(name: str, cache: Path) -> ExampleTable:
    return open_examples(Path(str(REAL)) / name, cache=cache)


@needs_data
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
    table = real(name, cache)
    assert (table.report["rows"], len(table), table.quarantined) == (rows, examples, 0)


@needs_data
def test_reading_a_row_of_a_real_set_is_fast_enough_for_training(cache: Path) -> None:
    table = real("train/foldoc.pairs.jsonl.gz", cache)
    start = time.perf_counter()
    for i in range(0, len(table), 11):
        table[i]
    assert (time.perf_counter() - start) / (len(table) / 11) < 1e-3  # measured: 30 microseconds


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
