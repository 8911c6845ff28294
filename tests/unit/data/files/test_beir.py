from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from embedwright.data.files.beir import read_beir, read_corpus
from embedwright.data.schema import DataError


def dump(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def beir_folder(folder: Path, *, qrels: str = "q1\td1\t1\nq1\td2\t0\nq2\td2\t2\n", zipped: bool = False) -> Path:
    corpus = [
        {"_id": "d1", "title": "Tides", "text": "The moon."},
        {"_id": "d2", "title": "", "text": "Soup.", "metadata": {}},
    ]
    queries = [{"_id": "q1", "text": "why tides"}, {"_id": "q2", "text": "what soup"}]
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        text = b"".join(dump(row) + b"\n" for row in rows)
        file = folder / (f"{name}.jsonl.gz" if zipped else f"{name}.jsonl")
        file.write_bytes(gzip.compress(text) if zipped else text)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
def test_a_beir_folder(zipped: bool, tmp_path: Path) -> None:
    beir = read_beir(beir_folder(tmp_path / "b", zipped=zipped))
    assert beir.corpus == {"d1": "Tides The moon.", "d2": "Soup."}
    assert beir.queries == {"q1": "why tides", "q2": "what soup"}
    assert beir.qrels == {"q1": {"d1": 1, "d2": 0}, "q2": {"d2": 2}}


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("q1\td1\t1\nq9\td1\t1\n", r"test\.tsv:3: query 'q9' is not among the queries"),
        ("q1\td9\t1\n", r"test\.tsv:2: document 'd9' is not in the corpus"),
        ("q1\td1\tyes\n", r"test\.tsv:2: expected query id, document id and a whole number"),
        ("q1 d1 1\n", r"test\.tsv:2: expected query id"),
        ("q1\td1\t1\nq1\td1\t0\n", r"test\.tsv:3: another score"),
        ("", r"test\.tsv: no judgement"),
    ],
)
def test_bad_qrels_name_file_and_line(qrels: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_beir(beir_folder(tmp_path / "b", qrels=qrels))


def test_judgements_in_the_form_of_mteb_are_the_same(tmp_path: Path) -> None:
    """mteb's copies of BEIR on the hub have `qrels/test.jsonl` with these columns (card of mteb/scifact)."""
    folder = beir_folder(tmp_path / "b")
    expected = read_beir(folder)
    rows = [("q1", "d1", 1.0), ("q1", "d2", 0.0), ("q2", "d2", 2.0)]
    lines = [dump({"query-id": query, "corpus-id": document, "score": score}) for query, document, score in rows]
    (folder / "qrels" / "test.tsv").unlink()
    (folder / "qrels" / "test.jsonl").write_bytes(b"\n".join(lines))
    assert read_beir(folder) == expected == read_beir(folder, "test")
    for line, said in ((b'{"query-id": "q1", "score": 1}', "no corpus-id"), (lines[0].replace(b"1.0", b"0.5"), "0.5")):
        (folder / "qrels" / "test.jsonl").write_bytes(lines[0] + b"\n" + line)
        with pytest.raises(DataError, match=rf"test\.jsonl:2: .*{said}"):
            read_beir(folder)


def test_qrels_without_their_header_are_refused(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path / "b")
    (folder / "qrels" / "test.tsv").write_text("q1\t0\td1\t1\n")  # TREC's form
    with pytest.raises(DataError, match=r"test\.tsv:1: expected the header"):
        read_beir(folder)


def test_several_splits_must_be_told_apart(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path / "b")
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td1\t1\n")
    with pytest.raises(DataError, match=r"several splits \(dev, test\)"):
        read_beir(folder)
    assert read_beir(folder, "dev").qrels == {"q2": {"d1": 1}}
    with pytest.raises(FileNotFoundError, match=r"train\.tsv"):
        read_beir(folder, "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"_id": "d1", "text": "again"}, "id 'd1' twice"),
        ({"text": "x"}, "no id"),
        ({"_id": "d3"}, "no text"),
        ({"_id": "d3", "text": 5}, "text: expected a text, not int"),
    ],
)
def test_a_bad_line_of_a_corpus_is_an_error_with_its_line(line: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(dump({"_id": "d1", "text": "one"}) + b"\n" + dump(line) + b"\n")
    with pytest.raises(DataError, match=rf"corpus\.jsonl:2: {message}"):
        read_corpus(path)


def test_an_empty_document_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(dump({"id": 1, "text": " "}) + b"\n" + dump({"id": 2, "title": "T", "text": ""}))
    assert read_corpus(path) == {"1": "", "2": "T"}


def test_marks_and_left_overs_in_a_beir_folder(tmp_path: Path) -> None:
    """A byte order mark in each of the three files, and judgements that a killed process left half written."""
    folder = beir_folder(tmp_path / "set")
    plain = read_beir(folder)
    for file in (folder / "corpus.jsonl", folder / "queries.jsonl", *(folder / "qrels").iterdir()):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    (folder / "qrels" / ".test.0f1e2d.tsv").write_text("query-id\tcorpus-id\tscore\nq1")
    assert read_beir(folder) == plain
