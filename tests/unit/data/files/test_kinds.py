from __future__ import annotations

import gzip
import json
import logging
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedwright.data import files
from embedwright.data.files import kinds as readers
from embedwright.data.files.kinds import (
    Quarantine,
    detect_kind,
    good_rows,
    parse_fields,
    read_beir,
    read_corpus,
    read_rows,
)
from embedwright.data.schema import DataError, Example, parse_example


def dump(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")


def good(i: int) -> dict[str, Any]:
    return {
        "query": f"question {i} naïve 漢字",
        "positives": [f"answer {i}"],
        "negatives": [f"wrong {i}", {"id": "d", "text": "w"}],
    }


Mutation = Callable[[bytes, dict[str, Any], random.Random], bytes]

MUTATIONS: dict[str, Mutation] = {
    "not UTF-8": lambda line, row, rng: line[:12] + b"\xff\xfe" + line[12:],
    "lone surrogate": lambda line, row, rng: dump(row | {"query": "x"}).replace(b'"x"', b'"\\ud800 tail"'),
    "NUL byte": lambda line, row, rng: line[:9] + b"\0" + line[9:],
    "NUL character": lambda line, row, rng: line.replace(b"question", b"ques\\u0000tion"),
    "not JSON": lambda line, row, rng: line[: rng.randrange(1, len(line) - 1)],
    "twice": lambda line, row, rng: line[:-1] + b', "query": "again"}',
    "expected a text": lambda line, row, rng: dump(row | {"query": rng.choice([1, True, [], {}])}),
    "expected a list": lambda line, row, rng: dump(row | {"negatives": "wrong"}),
    "is empty": lambda line, row, rng: dump(row | {"query": rng.choice(["", "  ", "\t"])}),
    "no positive": lambda line, row, rng: dump(row | {"positives": []}),
    "unknown key": lambda line, row, rng: dump(row | {"positive": "p"}),
    "nested too deep": lambda line, row, rng: b'{"query": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "NaN": lambda line, row, rng: line[:-1] + b', "score": NaN}',
    "digits": lambda line, row, rng: line[:-1] + b', "score": ' + b"9" * 5000 + b"}",
    "expected an object": lambda line, row, rng: rng.choice([b"[1]", b'"text"', b"7", b"null"]),
}


def test_thousands_of_bad_lines_among_good_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(3)
    lines: list[tuple[bytes, str | None]] = []  # the line, and what is wrong with it
    for i in range(4000):
        lines.append((dump(good(i)), None))
    for i in range(4000):
        reason = rng.choice(list(MUTATIONS))
        row = good(i)
        lines.append((MUTATIONS[reason](dump(row), row, rng), reason))
    rng.shuffle(lines)
    path = tmp_path / "mixed.txt"
    path.write_bytes(b"".join(line + b"\r\n" if i % 7 == 0 else line + b"\n" for i, (line, _) in enumerate(lines)))

    def parse(number: int, row: dict[str, Any]) -> tuple[int, Example]:
        return number, parse_example(row, default_task="t")

    with caplog.at_level(logging.WARNING), Quarantine(path, tmp_path / "q" / "bad.jsonl") as quarantine:
        read = list(good_rows(path, parse, quarantine))

    assert [number for number, _ in read] == [i for i, (_, reason) in enumerate(lines, start=1) if reason is None]
    for number, example in read:
        row = json.loads(lines[number - 1][0])
        assert example.query == row["query"]
        assert [p.text for p in example.positives + example.negatives] == [*row["positives"], row["negatives"][0], "w"]
    assert quarantine.count == 4000
    raw_lines = path.read_bytes().splitlines(keepends=True)
    assert len(raw_lines) == 8000
    expected = b"".join(raw for raw, (_, reason) in zip(raw_lines, lines, strict=True) if reason is not None)
    assert (tmp_path / "q" / "bad.jsonl").read_bytes() == expected
    assert [p.name for p in (tmp_path / "q").iterdir()] == ["bad.jsonl"]

    # The log: the first five with file, line and reason, then one line with the count.
    messages = [record.getMessage() for record in caplog.records]
    bad = [(i, reason) for i, (_, reason) in enumerate(lines, start=1) if reason is not None]
    assert len(messages) == 6
    for message, (number, reason) in zip(messages[:5], bad[:5], strict=True):
        assert message.startswith(f"{path}:{number}: ") and reason in message
    assert "4000 bad lines" in messages[5] and "bad.jsonl" in messages[5]


@pytest.mark.parametrize("reason", MUTATIONS)
def test_each_kind_of_damage_is_named(reason: str, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_bytes(MUTATIONS[reason](dump(good(1)), good(1), random.Random(1)))
    with Quarantine(path, tmp_path / "bad") as quarantine:
        assert not list(good_rows(path, lambda number, row: parse_example(row, default_task="t"), quarantine))
    assert quarantine.first_reason.startswith(f"{path}:1: ") and reason in quarantine.first_reason
    assert (tmp_path / "bad").read_bytes() == path.read_bytes()


def test_no_bad_line_leaves_no_quarantine_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a", "label": "x"}\n\n  \n{"text": "b", "label": "x"}')
    with Quarantine(path, tmp_path / "bad") as quarantine:
        assert list(good_rows(path, lambda number, row: (number, row["text"]), quarantine)) == [(1, "a"), (4, "b")]
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "misleading.parquet"])
def test_the_container_is_told_by_its_bytes(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = [{"query": "q1", "positive": "p1"}, {"query": "q2", "positive": "p2"}]
    text = b"".join(dump(row) + b"\n" for row in rows)
    if name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert [(number, row) for number, _, row in read_rows(path)] == list(enumerate(rows, start=1))
    assert detect_kind(path) == "pairs"


KINDS = {
    "example": {"query": "q", "positives": ["p"], "score": 3.0, "id": "a"},
    "pairs": {"query": "q", "positive": "p", "id": "a"},
    "labelled": {"text": "t", "label": "l"},
    "scored": {"text1": "a", "text2": "b", "score": 1},
    "pair-labelled": {"text1": "a", "text2": "b", "label": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_told_by_the_keys_behind_bad_lines(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.labeled.pairs.jsonl"
    path.write_bytes(
        b'nonsense\n{"text": "no label"}\n{"querry": "q", "positives": ["p"]}\n' + dump(KINDS[kind]) + b"\n"
    )
    assert detect_kind(path) == kind


def test_a_file_without_a_good_row_names_the_first_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"querry": "q", "positives": ["p"]}\n[]\n')
    with pytest.raises(DataError, match=r"x\.jsonl: no good row \(line 1: unknown key 'querry', did you mean 'query'"):
        detect_kind(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="it is empty"):
        detect_kind(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        next(read_rows(tmp_path / "absent.jsonl"))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("scored", {"score": 5.5}, "score 5.5 is not on the scale"),
        ("scored", {"score": "4"}, "score: expected a number"),
        ("scored", {"score": None}, "no score"),
        ("pair-labelled", {"label": 2}, "label: expected 0 or 1"),
        ("pair-labelled", {"label": "1"}, "label: expected 0 or 1"),
        ("labelled", {"label": 1.5}, "label: 1.5 names no class"),
        ("labelled", {"text": " "}, "text is empty"),
        ("pairs", {"negatives": ["n"]}, "unknown key 'negatives'"),
    ],
)
def test_a_bad_value_of_a_raw_kind(kind: readers.Kind, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_fields(KINDS[kind] | change, kind, default_id="f:1")


def test_raw_values_come_checked_and_with_an_id() -> None:
    assert parse_fields({"text": "t", "label": 3}, "labelled", default_id="f:1") == {
        "id": "f:1",
        "text": "t",
        "label": "3",
    }
    row = {"query": "q", "positive": "p", "id": 5, "positive_id": "d1"}
    assert parse_fields(row, "pairs", default_id="f:1") == row | {"id": "5"}


def test_a_bad_parquet_row_is_kept_as_json(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", "", None, "d"], "label": ["x", "y", "z", "w"]}), path)
    with Quarantine(path, tmp_path / "bad") as quarantine:
        rows = list(good_rows(path, lambda n, row: parse_fields(row, "labelled", default_id=str(n)), quarantine))
    assert [row["id"] for row in rows] == ["1", "4"]
    kept = [json.loads(line) for line in (tmp_path / "bad").read_bytes().splitlines()]
    assert kept == [{"text": "", "label": "y"}, {"text": None, "label": "z"}]


def test_a_parquet_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": texts, "label": ["x", "y", "z"]}), path)
    rows = [row for _, _, row in read_rows(path)]
    assert isinstance(rows[1], DataError) and "UTF-8" in str(rows[1])
    assert [rows[0], rows[2]] == [{"text": "good", "label": "x"}, {"text": "fine", "label": "z"}]


def test_a_cut_off_gzip_or_parquet_file_is_an_error_and_not_a_short_file(tmp_path: Path) -> None:
    rng = random.Random(0)
    zipped = gzip.compress(b"".join(dump({"text": str(rng.random()), "label": "x"}) + b"\n" for _ in range(1000)))
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(zipped[: len(zipped) // 2])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz:\d+: broken gzip stream"):
        list(read_rows(path))
    table = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a"]}), table)
    table.write_bytes(table.read_bytes()[:-6])
    with pytest.raises(DataError, match="broken Parquet file"):
        list(read_rows(table))


def test_a_line_beyond_the_limit_passes_through_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.rows, "MAX_LINE", 1 << 16)
    path = tmp_path / "x.jsonl"
    long = b'{"text": "' + b"a" * (8 << 20) + b'", "label": "x"}\n'
    path.write_bytes(b'{"text": "first", "label": "x"}\n' + long + b'{"text": "last", "label": "x"}\n')
    tracemalloc.start()
    with Quarantine(path, tmp_path / "bad") as quarantine:
        numbers = list(good_rows(path, lambda number, row: (number, row["text"]), quarantine))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers == [(1, "first"), (3, "last")]
    assert quarantine.count == 1 and (tmp_path / "bad").read_bytes() == long
    assert peak < 2 << 20  # the line alone has 8 MiB


# ---------------------------------------------------------------------------------------------------- BEIR


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
        ({"_id": "d1", "text": "again"}, "_id 'd1' twice"),
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
