from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from numpy.typing import NDArray

from embedwright.evaluation.tasks import SuiteTask
from embedwright.studies.report import hits as report_hits
from embedwright.studies.report.hits import example_hits, shortened


class Hashed:
    """Random unit vectors, the same for the same text and instruction."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        self.texts += texts
        rows = [np.random.default_rng(zlib.crc32(f"{task}|{text}".encode())).normal(size=8) for text in texts]
        return np.array([row / np.linalg.norm(row) for row in rows], dtype=np.float32)


QRELS = {f"q{i}": {f"d{i}": 1, f"d{i + 7}": 2, f"d{i + 1}": 0} for i in range(6)} | {"q6": {"d1": 0}, "q7": {"q7": 1}}


@pytest.fixture
def task(tmp_path: Path) -> SuiteTask:
    corpus = [{"_id": f"d{i}", "text": f"text {i}"} for i in range(30)] + [{"_id": "q7", "text": "its own"}]
    for name, rows in {"corpus": corpus, "queries": [{"_id": q, "text": f"question {q}"} for q in QRELS]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qrels").mkdir()
    lines = [f"{q}\t{d}\t{score}\n" for q, own in QRELS.items() for d, score in own.items()]
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n")
    return SuiteTask(name="t", kind="retrieval", path=tmp_path, instruction="Find it", ignore_identical_ids=True)


def test_hits_scores_and_ranks_are_those_of_an_exact_search(task: SuiteTask) -> None:
    found = example_hits(Hashed(), task)
    assert [example["query"] for example in found["examples"]] == [f"question q{i}" for i in range(6)]
    assert (found["documents"], found["queries"]) == ("31 documents", 6)  # q6 has no right document, q7 itself alone
    texts = {f"d{i}": f"text {i}" for i in range(30)} | {"q7": "its own"}
    documents = dict(zip(texts, Hashed().encode(list(texts.values())), strict=True))
    run = {}
    for q, example in zip(QRELS, found["examples"], strict=False):
        query = Hashed().encode([f"question {q}"], task="Find it")[0]
        run[q] = {d: float(vector @ query) for d, vector in documents.items()}
        best = sorted(run[q].items(), key=lambda item: -item[1])
        shown = [best[hit["rank"] - 1] for hit in example["hits"]]
        assert [(hit["text"], hit["right"]) for hit in example["hits"]] == [
            (texts[d], QRELS[q].get(d, 0) > 0) for d, _ in shown
        ]
        assert [hit["score"] for hit in example["hits"]] == pytest.approx([score for _, score in shown], abs=1e-6)
        assert [hit["rank"] for hit in example["hits"]][:5] == [1, 2, 3, 4, 5]
        assert sum(hit["right"] for hit in example["hits"]) == 2  # those beyond the fifth are shown, too
    theirs = pytrec_eval.RelevanceEvaluator(QRELS, {"recip_rank"}).evaluate(run)
    assert [1 / example["first"] for example in found["examples"]] == pytest.approx(
        [theirs[f"q{i}"]["recip_rank"] for i in range(6)]
    )


def test_a_query_may_find_itself_unless_the_task_says_so(task: SuiteTask) -> None:
    found = example_hits(Hashed(), task.model_copy(update={"ignore_identical_ids": False}))
    assert "question q7" in [example["query"] for example in found["examples"]]


def test_of_a_large_corpus_a_part_is_searched_with_all_right_documents(
    task: SuiteTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_hits, "DOCUMENTS", 4)
    encoder = Hashed()
    found = example_hits(encoder, task)
    right = {f"text {d[1:]}" for q in list(QRELS)[:6] for d, score in QRELS[q].items() if score}
    searched = [text for text in encoder.texts if not text.startswith("question")]
    assert right <= set(searched) and len(searched) <= len(right) + 4
    assert found["documents"] == f"{len(searched)} of 31 documents"


def test_a_long_text_is_cut() -> None:
    assert shortened("a\n b  c") == "a b c"
    assert shortened("x" * 999, 10) == "x" * 9 + "…"
