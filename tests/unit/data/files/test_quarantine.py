from __future__ import annotations

import json
import logging
import random
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedwright.data import files
from embedwright.data.files.kinds import parse_fields
from embedwright.data.files.quarantine import Quarantine, good_rows
from embedwright.data.files.rows import read_rows
from embedwright.data.schema import Example, parse_example


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

    def parse(row: dict[str, Any], row_id: str) -> tuple[int, Example]:
        return int(row_id.removeprefix("mixed:")), parse_example(row, default_task="t")

    with caplog.at_level(logging.WARNING), Quarantine(path, tmp_path / "q" / "bad.jsonl") as quarantine:
        read = list(good_rows(read_rows(path), parse, "mixed", quarantine))

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
        assert not list(
            good_rows(read_rows(path), lambda row, _: parse_example(row, default_task="t"), "x", quarantine)
        )
    assert quarantine.reasons[0].startswith(f"{path}:1: ") and reason in quarantine.reasons[0]
    assert (tmp_path / "bad").read_bytes() == path.read_bytes()


def test_no_bad_line_leaves_no_quarantine_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a", "label": "x"}\n\n  \n{"text": "b", "label": "x"}')
    with Quarantine(path, tmp_path / "bad") as quarantine:
        read = list(good_rows(read_rows(path), lambda row, row_id: (row_id, row["text"]), "a", quarantine))
    assert read == [("a:1", "a"), ("a:4", "b")]
    assert not (tmp_path / "bad").exists()


def test_a_bad_parquet_row_is_kept_as_json(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", "", None, "d"], "label": ["x", "y", "z", "w"]}), path)
    with Quarantine(path, tmp_path / "bad") as quarantine:
        rows = list(good_rows(read_rows(path), partial(parse_fields, "labelled"), "x", quarantine))
    assert [row["id"] for row in rows] == ["x:1", "x:4"]
    kept = [json.loads(line) for line in (tmp_path / "bad").read_bytes().splitlines()]
    assert kept == [{"text": "", "label": "y"}, {"text": None, "label": "z"}]


def test_a_line_beyond_the_limit_passes_through_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.rows, "MAX_LINE", 1 << 16)
    path = tmp_path / "x.jsonl"
    long = b'{"text": "' + b"a" * (8 << 20) + b'", "label": "x"}\n'
    path.write_bytes(b'{"text": "first", "label": "x"}\n' + long + b'{"text": "last", "label": "x"}\n')
    tracemalloc.start()
    with Quarantine(path, tmp_path / "bad") as quarantine:
        read = list(good_rows(read_rows(path), lambda row, row_id: (row_id, row["text"]), "x", quarantine))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == [("x:1", "first"), ("x:3", "last")]
    assert quarantine.count == 1 and (tmp_path / "bad").read_bytes() == long
    assert peak < 2 << 20  # the line alone has 8 MiB
