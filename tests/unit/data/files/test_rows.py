"""The same rows in every format, under every name that people give such files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedwright.data.files.rows import read_rows
from embedwright.data.schema import DataError

ROWS: list[dict[str, Any]] = [{"text": 'a, "b"\nnew line; é', "label": "x"}, {"text": "[second]", "label": "y"}]
BOM = b"\xef\xbb\xbf"
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
CSV = 'text,label\r\n"a, ""b""\nnew line; é",x\r\n[second],y\r\n'.encode()


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def arrow(content: list[dict[str, Any]], stream: bool) -> bytes:
    table, sink = pa.Table.from_pylist(content), pa.BufferOutputStream()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet(content: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(content), sink)
    return sink.getvalue().to_pybytes()


FILES: dict[str, bytes] = {
    "x.jsonl": LINES,
    "bom.jsonl": BOM + LINES,
    "joined.jsonl": BOM + LINES.replace(b"\n", b"\n" + BOM, 1),  # two files with a mark each, put together
    "windows.jsonl": BOM + LINES.replace(b"\n", b"\r\n"),
    "x.jsonl.gz": gzip.compress(BOM + LINES),
    "wrong-name.jsonl": gzip.compress(LINES),
    "wrong-name.jsonl.gz": LINES,
    "x.jsonl.zst": zstd(LINES),
    "array.json": BOM + json.dumps(ROWS, indent=2).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "x.csv": CSV,
    "bom.csv": BOM + CSV,
    "x.csv.gz": gzip.compress(CSV),
    "semicolons.csv": BOM + 'text;label\n"a, ""b""\nnew line; é";x\n[second];y\n'.encode(),
    "x.tsv": 'text\tlabel\n"a, ""b""\nnew line; é"\tx\n[second]\ty\n'.encode(),
    "file.arrow": arrow(ROWS, stream=False),
    "stream.arrow": arrow(ROWS, stream=True),
    "parquet.jsonl": parquet(ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_opens_whatever_its_format(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert [row for _, _, row in read_rows(tmp_path / name)] == ROWS


def test_cells_of_csv_are_texts_but_for_scores_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id,text1,text2,score,label\n007,12,a,4.5,1\n8,b,c,,yes\n,d,e,nan,01\n1,f\n")
    assert [row for _, _, row in read_rows(path)] == [
        {"id": "007", "text1": "12", "text2": "a", "score": 4.5, "label": 1},
        {"id": "8", "text1": "b", "text2": "c", "label": "yes"},
        {"text1": "d", "text2": "e", "score": "nan", "label": "01"},
        {"id": "1", "text1": "f"},
    ]
    path.write_text("query,positive\na,b,c\nd,e\n")
    (_, _, bad), (number, _, good) = read_rows(path)
    assert isinstance(bad, DataError) and "more cells than the 2 columns" in str(bad)
    assert (number, good) == (3, {"query": "d", "positive": "e"})


REFUSED: dict[str, tuple[bytes, str]] = {
    "x.xlsx": (b"PK\x03\x04rest", "is a zip file .*save it as"),
    "x.pkl": (b"\x80\x04\x95rest", "is a pickle file, which could run any code"),
    "x.db": (b"SQLite format 3\0", "is an SQLite file: export"),
    "x.jsonl": ('{"text": "a"}'.encode("utf-16"), "is text in UTF-16: save it as UTF-8"),
    "x.jsonl.bz2": (b"BZh91AY", "is a bzip2 file: unpack it"),
    "one.json": (b'{\n  "data": [1]\n}\n', "one JSON object over several lines: write a row a line"),
    "cut.json": (b'[{"text": "a"}, {"text": }]', "not a JSON array: Expecting value: line 1 column 26"),
    "twice.json": (b'[{"text": "a", "text": "b"}]', "not a JSON array: key 'text' twice"),
    "tail.json": (b'[{"text": "a"}] []', "not a JSON array: Extra data: line 1"),
    "twice.csv": (b"text,text\na,b\n", "column 'text' twice"),
    "latin1.csv": ("text,label\né,x\n".encode("latin-1"), "not UTF-8"),
    "cut.jsonl.zst": (zstd(LINES * 50)[:-9], "broken zstd stream"),
    "cut.json.gz": (gzip.compress(json.dumps(ROWS).encode())[:-9], "broken gzip stream"),
    "cut.arrow": (arrow(ROWS, stream=True)[:60], "broken Arrow file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_said_to_be_what_it_is(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s){name}.*{message}"):
        list(read_rows(tmp_path / name))


def test_lines_that_begin_with_a_list_stay_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'["a"]\n{"text": "b"}\n')
    (_, _, bad), (number, _, good) = read_rows(path)
    assert "expected an object, not list" in str(bad) and (number, good) == (2, {"text": "b"})


def test_an_empty_file_and_an_empty_array_have_no_rows(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b""), ("b.json", b"[ ]\n"), ("c.csv", BOM), ("d.jsonl", BOM + b"\n")):
        (tmp_path / name).write_bytes(content)
        assert list(read_rows(tmp_path / name)) == []


def test_a_folder_and_a_missing_file_are_said_to_be_that(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder, and one file is expected"):
        list(read_rows(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl does not exist"):
        list(read_rows(tmp_path / "no.jsonl"))
