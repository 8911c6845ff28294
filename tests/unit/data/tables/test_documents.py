"""Corpora on disk: the documents of `read_corpus` in its order, converted once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from embedwright.data.files.beir import read_corpus
from embedwright.data.schema import DataError
from embedwright.data.tables import documents as documents_module
from embedwright.data.tables.documents import open_corpus, write_documents


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(documents_module, "_ROWS", 7)  # many batches


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents(count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"_id": f"d{i}", "title": f"No. {i % 3}" * (i % 2), "text": f"text {i}"} for i in range(count)
    ]
    return [*rows, {"_id": "blank", "text": ""}, {"id": 7, "text": "two\nlines"}]


def test_a_table_has_the_documents_of_the_file_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", *documents(20))
    expected = list(read_corpus(path).items())
    table = open_corpus(path)
    assert list(table.items()) == list(table.items()) == expected and len(table) == 22
    assert [table[row] for row in range(22)] == expected


def test_it_is_converted_once_and_again_when_the_content_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c.jsonl", *documents(20))
    first, converted = open_corpus(path), documents_module._convert
    monkeypatch.setattr(documents_module, "_convert", lambda *_: pytest.fail("converted again"))
    again = open_corpus(path.rename(tmp_path / "other.jsonl").rename(path))
    assert again.identity == first.identity
    monkeypatch.setattr(documents_module, "_convert", converted)
    changed = open_corpus(write(path, *documents(3)))
    assert changed.identity != first.identity and len(changed) == 5 and len(first) == 22


def test_what_another_process_converts_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, convert = write(tmp_path / "c.jsonl", *documents(20)), documents_module._convert

    @contextmanager
    def waits(lock: Path) -> Iterator[None]:
        convert(path, lock.with_name(lock.name[1:].removesuffix(".lock")))  # by another process, while this one waits
        yield

    monkeypatch.setattr(documents_module, "locked", waits)
    monkeypatch.setattr(documents_module, "_convert", lambda *_: pytest.fail("converted again"))
    assert len(open_corpus(path)) == 22


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"_id": "a", "text": "x"}, {"_id": "b", "text": "y"}, {"_id": "a", "text": "z"}],
            r"c\.jsonl:3: id 'a' twice",
        ),
        ([{"_id": "a", "text": "x"}, {"_id": "b"}], r"c\.jsonl:2: no text"),
        ([{"text": "x"}], r"c\.jsonl:1: no id"),
    ],
)
def test_a_bad_line_is_an_error_and_leaves_nothing(rows: list[Any], said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", *rows)
    for read in (open_corpus, read_corpus):
        with pytest.raises(DataError, match=said):
            read(path)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_what_we_wrote_is_read_in_place(tmp_path: Path) -> None:
    rows = [(f"d{i}", f"text {i}" * (i % 3)) for i in range(20)]
    path = tmp_path / "c.arrow"
    assert write_documents(path, iter(rows)) == 20
    table = open_corpus(path)
    assert list(table.items()) == rows == list(read_corpus(path).items()) and table[19] == rows[19]
    assert table.files == [path] and not (tmp_path / "cache").exists()
    other = pa.table({"id": ["a"], "text": ["x"], "title": ["T"]})  # of others: a title goes in front
    with pa.ipc.new_file(str(tmp_path / "o.arrow"), other.schema) as writer:
        writer.write_table(other)
    assert list(open_corpus(tmp_path / "o.arrow").items()) == [("a", "T x")]


def test_an_id_that_is_written_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="document 3: id 'a' twice"):
        write_documents(tmp_path / "c.arrow", [("a", "x"), ("b", "y"), ("a", "z"), ("b", "z")])


def test_a_file_of_ours_without_documents_is_no_corpus(tmp_path: Path) -> None:
    assert write_documents(tmp_path / "c.arrow", []) == 0
    with pytest.raises(DataError, match=r"c\.arrow: no document"):
        open_corpus(tmp_path / "c.arrow")
