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

from embedwright.data.schema import Example, Passage
from embedwright.data.tables import table as table_module
from embedwright.data.tables.table import BATCH_ROWS, ExampleTable, open_examples, write_examples
from embedwright.errors import InputError


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


def test_a_row_has_scores_of_a_teacher_where_positives_and_negatives_have(tmp_path: Path, cache: Path) -> None:
    write_examples(tmp_path / "x.jsonl", rows := [example(i) for i in range(40)])
    found = open_examples(tmp_path / "x.jsonl", cache=cache).has_teacher_scores()
    assert found.tolist() == [bool(row.positive_scores and row.negative_scores) for row in rows] and found.any()


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
    monkeypatch.setattr(table_module, "convert", lambda *_: pytest.fail("converted again"))
    assert list(open_examples(path, cache=cache)) == list(first)
    assert open_examples(str(path), cache=cache).fingerprint == first.fingerprint


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


def _open_many(path: Path, cache: Path, start: Any, results: Any) -> None:
    real_convert, converted = table_module.convert, 0

    def counted(*job: Any) -> None:
        nonlocal converted
        converted += 1
        real_convert(*job)

    table_module.convert = counted
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

    table_module.convert = stuck
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
def test_reading_a_row_of_a_real_set_is_fast_enough_for_training(cache: Path) -> None:
    table = real("train/foldoc.pairs.jsonl.gz", cache)
    start = time.perf_counter()
    for i in range(0, len(table), 11):
        table[i]
    assert (time.perf_counter() - start) / (len(table) / 11) < 1e-3  # measured: 30 microseconds


def test_bad_tasks_beside_the_data_are_no_damage(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are named before a conversion, and each time: what is converted is not made again for them."""
    folder = tmp_path / "set"
    for name in ("a", "b"):
        write(folder / f"{name}.jsonl", {"query": name, "positive": "b"})
    arrow = open_examples(folder, cache=cache).arrow
    written = arrow.stat().st_mtime_ns
    monkeypatch.setattr(table_module, "convert", lambda *_: pytest.fail("converted"))
    for bad, said in (
        ('{"name": "t", "family": "sts"}', "task 't' is another in"),
        ('{"name": ', "b.jsonl.tasks.jsonl:1: not JSON"),
        ('{"name": "t", "familly": "sts"}', "familly"),
    ):
        write(folder / "a.jsonl.tasks.jsonl", {"name": "t"})
        write(folder / "b.jsonl.tasks.jsonl", bad)
        for data in (folder, folder / "b.jsonl") if "another" not in said else (folder,):
            with pytest.raises(InputError, match=said):
                open_examples(data, cache=cache)
    assert arrow.stat().st_mtime_ns == written and "damaged" not in caplog.text
