from __future__ import annotations

from pathlib import Path

import pytest
from suite_files import Words, labelled, one_task, write_beir, write_rows

from embedwright.evaluation.suite import evaluate, load_suite
from embedwright.evaluation.tasks import read_columns


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("kind: retrieval, metric: Recal@10", "retrieval has no metric 'Recal@10' .did you mean 'Recall@10'"),
        ("kind: pair, metric: f1", "pair has no metric 'f1'; it has cosine_ap"),
        ("kind: sts, chunk_tokens: 5", "'chunk_tokens' is for retrieval, not for sts"),
        ("kind: reranking, corpus_limit: 5", "'corpus_limit' is for retrieval, not for reranking"),
        ("kind: retrieval, candidates: bm25", "'candidates' is for reranking, not for retrieval"),
        ("kind: reranking, depth: 5", "'depth' is how many 'candidates'"),
        ("kind: sts, ignore_identical_ids: true", "'ignore_identical_ids' is for retrieval, not for sts"),
        ("kind: reranking, path: beir", "a BEIR folder needs `candidates`"),
        ("kind: reranking, path: beir, candidates: absent.trec", "no such file: .*absent.trec"),
        ("kind: reranking, path: rows.jsonl, candidates: bm25", "rows have their own candidates"),
        (
            "kind: reranking, path: labels.jsonl",
            "reranking reads a BEIR folder or rows with query, positive, negative",
        ),
    ],
)
def test_keys_that_do_not_fit_are_refused(tmp_path: Path, keys: str, message: str) -> None:
    write_beir(tmp_path / "beir")
    write_rows(tmp_path / "rows.jsonl", [{"query": "a", "positive": ["b"], "negative": ["c"]}])
    write_rows(tmp_path / "labels.jsonl", labelled(4))
    path = "" if "path" in keys else ", path: beir"
    with pytest.raises(ValueError, match=f"task 'x': {message}"):
        load_suite(one_task(tmp_path, f"{{name: x, {keys}{path}}}"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "a", "positive": ["b"]}, "no negative"),
        ({"query": "a", "positive": ["b", 7], "negative": []}, r"positive\[1\]: expected a text"),
        ({"query": "", "positive": ["b"], "negative": ["c"]}, "query is empty"),
    ],
)
def test_a_bad_row_of_reranking_is_named(tmp_path: Path, row: dict[str, object], message: str) -> None:
    write_rows(tmp_path / "x.jsonl", [{"query": "a", "positive": ["b"], "negative": ["c"]}, row])
    with pytest.raises(ValueError, match=f"x.jsonl:2: {message}"):
        evaluate(Words(), one_task(tmp_path, "{name: x, kind: reranking, path: x.jsonl}"))


def test_one_text_is_a_list_of_one(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "x.jsonl", [{"query": "a", "positive": "b", "negative": ["c", "d"]}])
    assert read_columns(file, "reranking") == [["a"], [["b"]], [["c", "d"]]]
