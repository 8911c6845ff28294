"""Pieces of files: all rows of all pieces are those of the file, under their own numbers."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from embedwright.data.files import pieces as pieces_module
from embedwright.data.files import rows as rows_module
from embedwright.data.files.pieces import Piece, pieces_of
from embedwright.data.files.rows import read_rows


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "_LARGE", 0)
    monkeypatch.setattr(pieces_module, "cores", lambda: 2)


def messy(rng: random.Random, lines: int) -> bytes:
    """JSON Lines with blank lines, Windows line ends, bad lines and long ones, and none at the end of the last."""
    ends = [b"\n", b"\r\n", b"\n\n", b"\n  \n"]
    made = [json.dumps({"text": "é" * rng.choice([1, 9, 300]), "i": i}).encode() for i in range(lines)]
    made[3], made[-2] = b"[1]", b'{"text": '
    return b"\xef\xbb\xbf" + b"".join(line + rng.choice(ends) for line in made).rstrip()


@pytest.mark.parametrize("size", [1, 50, 1000])
def test_the_rows_of_all_pieces_are_those_of_the_file(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces_module, "_BYTES", size)
    monkeypatch.setattr(rows_module, "MAX_LINE", 400)  # a longer one comes in parts that share one number
    path = tmp_path / "x.jsonl"
    path.write_bytes(messy(random.Random(size), 60))
    cut = pieces_of([path])
    assert len(cut) > 5 and [cut[0].start, cut[-1].end] == [0, path.stat().st_size]
    assert [repr(row) for piece in cut for row in piece.rows()] == [repr(row) for row in read_rows(path)]
    assert any(number > 60 for piece in cut for number, *_ in piece.rows())  # blank lines count


def test_other_formats_are_one_piece_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "_BYTES", 10)
    rows = [{"text": "one"}, {"text": "two"}]
    contents = {
        "array.json": json.dumps(rows).encode(),
        "x.jsonl.gz": gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'),
        "x.csv": b'"{text}"\none\ntwo\n',
        "object.json": b'{\n"text": "one"\n}\n',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / name for name in contents]
    assert pieces_of(files) == [Piece(file) for file in files]
    assert [row for _, _, row in pieces_of(files)[0].rows()] == rows
    assert pieces_of(files[:1]) == []  # one process reads it as soon as several


def test_small_data_and_a_single_core_need_no_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "x"}\n' * 9)
    monkeypatch.setattr(pieces_module, "_BYTES", 10)
    assert len(pieces_of([tmp_path / "x.jsonl"])) == 9
    monkeypatch.setattr(pieces_module, "cores", lambda: 1)
    assert pieces_of([tmp_path / "x.jsonl"]) == []
    monkeypatch.setattr(pieces_module, "cores", lambda: 2)
    monkeypatch.setattr(pieces_module, "_LARGE", 256 << 20)
    assert pieces_of([tmp_path / "x.jsonl"]) == []
