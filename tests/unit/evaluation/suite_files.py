"""Small data of every kind of task, and an encoder that needs no weights."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Words:
    """An encoder whose text is the sum of its words' random vectors; it keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], str | None]] = []

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        self.calls.append((list(texts), task))
        words = [
            [np.random.default_rng(zlib.crc32(word.encode())).normal(size=24) for word in t.split()] for t in texts
        ]
        sums_NE = np.stack([np.sum(vectors, axis=0) for vectors in words])
        return (sums_NE / np.linalg.norm(sums_NE, axis=1, keepdims=True)).astype(np.float32)


class Looked:
    """An encoder that looks its texts' vectors up; it has seen `texts`."""

    def __init__(self, vector_of: Mapping[str, NDArray[np.float32]]) -> None:
        self.vector_of, self.texts = vector_of, list[str]()

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        self.texts += texts
        return np.stack([self.vector_of[text] for text in texts])


def write_set(
    folder: Path, queries: Mapping[str, str], corpus: Mapping[str, str], qrels: Mapping[str, Mapping[str, int]]
) -> Path:
    """A BEIR folder of these texts and judgements, by id."""
    for name, texts in (("queries", queries), ("corpus", corpus)):
        write_rows(folder / f"{name}.jsonl", [{"_id": id_, "text": text} for id_, text in texts.items()])
    (folder / "qrels").mkdir(exist_ok=True)
    judged = [f"{query}\t{doc}\t{score}\n" for query, docs in qrels.items() for doc, score in docs.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    return folder


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_beir(folder: Path) -> Path:
    write_rows(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": f"tide word{i}"} for i in range(6)])
    write_rows(folder / "queries.jsonl.gz", [{"_id": f"q{i}", "text": f"word{i}"} for i in range(5)])
    (folder / "qrels").mkdir()
    header = "query-id\tcorpus-id\tscore\n"
    # q3 asks for a document that shares no word with it, q4 is not judged.
    (folder / "qrels/test.tsv").write_text(header + "q0\td0\t1\nq1\td1\t1\nq2\td2\t1\nq3\td5\t1\n")
    (folder / "qrels/train.tsv").write_text(header + "q4\td4\t1\n")
    return folder


def labelled(count: int, offset: int = 0) -> list[dict[str, Any]]:
    words = ("moon", "tide", "rust")
    return [{"text": f"{words[i % 3]} {words[i % 3]} noise{i + offset}", "label": words[i % 3]} for i in range(count)]


SCORED = [
    {"text1": "a b c", "text2": "a b c", "score": 5},
    {"text1": "a b c", "text2": "a b z", "score": 3.2},
    {"text1": "a b c", "text2": "a y z", "score": 1.0, "source": "extra keys do no harm"},
    {"text1": "a b c", "text2": "x y z", "score": 0},
]
PAIRS = [{"text1": row["text1"], "text2": row["text2"], "label": int(row["score"] > 2)} for row in SCORED]

SUITE = """
name: heldout
tasks:
  - {name: docs, kind: retrieval, path: retrieval, instruction: Find it}
  - {name: topics, kind: clustering, path: topics.jsonl, instruction: Name the topic}
  - {name: modules, kind: classification, path: test.jsonl, train: train.jsonl.gz, instruction: Name the module}
  - {name: sts, kind: sts, path: sts.jsonl, instruction: Same meaning}
  - {name: pair, kind: pair, path: pair.jsonl}
"""


def one_task(tmp_path: Path, task: str) -> Path:
    file = tmp_path / "one.yaml"
    file.write_text(f"name: one\ntasks:\n  - {task}\n")
    return file
