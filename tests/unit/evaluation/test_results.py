from __future__ import annotations

import json

import pytest

from embedwright.evaluation.results import Result, Results, render, table

BASE = Results(
    "heldout",
    (
        Result("docs", "retrieval", "nDCG@10", 0.5, {"Recall@10": 0.75, "MRR@10": 0.4, "Recall@100": 1.0}),
        Result("sts", "sts", "cosine_spearman", 0.8125, {"cosine_pearson": 0.7}),
    ),
    12.5,
)
TUNED = Results(
    "heldout",
    (
        Result("docs", "retrieval", "nDCG@10", 0.625, {"Recall@10": 0.7, "MRR@10": 0.5, "Recall@100": 1.0}),
        Result("topics", "clustering", "v_measure", 0.25),
    ),
    9.0,
)


def test_json_gives_the_same_results_back() -> None:
    assert Results.from_json(BASE.to_json()) == BASE
    assert json.loads(BASE.to_json())["rows"][1]["details"] == {"cosine_pearson": 0.7}


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Results("x", (Result("sts", "sts", "cosine_spearman", float("nan")),), 1.0).to_json()


def test_table_has_a_row_a_task_and_recall_below_retrieval() -> None:
    assert table({"base": BASE, "tuned": TUNED}) == [
        {"task": "docs", "metric": "nDCG@10", "base": 0.5, "tuned": 0.625},
        {"task": "docs", "metric": "Recall@10", "base": 0.75, "tuned": 0.7},
        {"task": "sts", "metric": "cosine_spearman", "base": 0.8125, "tuned": None},
        {"task": "topics", "metric": "v_measure", "base": None, "tuned": 0.25},
    ]
    assert table({}) == []


def test_render_aligns() -> None:
    assert render(table({"a": BASE, "b": TUNED})).splitlines() == [
        "task    metric                a       b",
        "docs    nDCG@10          0.5000  0.6250",
        "docs    Recall@10        0.7500  0.7000",
        "sts     cosine_spearman  0.8125       -",
        "topics  v_measure             -  0.2500",
    ]
    assert render([]) == ""
