from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embedwright.errors import InputError
from embedwright.evaluation.results import Result, Results, read_results, render, table, write_results

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


def test_a_result_file_keeps_its_items_beside_it(tmp_path: Path) -> None:
    items = {"cosine": np.linspace(0, 1, 5, dtype=np.float32), "gold": np.arange(5)}
    with_items = replace(BASE, rows=(BASE.rows[0], replace(BASE.rows[1], items=items)), about={"model": "minilm"})
    write_results(tmp_path / "scores.json", with_items)
    found = read_results(tmp_path / "scores.json")
    assert (found, found.about) == (BASE, {"model": "minilm"})
    assert found.rows[0].items == {}
    assert {name: array.tolist() for name, array in found.rows[1].items.items()} == {
        name: array.tolist() for name, array in items.items()
    }
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scores.items.npz", "scores.json"]


def test_results_without_items_leave_none_of_earlier_ones_beside_them(tmp_path: Path) -> None:
    items = {"cosine": np.ones(2), "gold": np.ones(2)}
    write_results(tmp_path / "scores.json", replace(BASE, rows=(replace(BASE.rows[1], items=items),)))
    write_results(tmp_path / "scores.json", BASE)
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"suite": "x"}',
        '{"rows": [], "suite": "x", "seconds": 1, "about": []}',
        '{"rows": [{"x": 1}], "suite": "x", "seconds": 1}',
    ],
)
def test_another_file_is_no_result(tmp_path: Path, text: str) -> None:
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(InputError, match=r"scores\.json is not a result file"):
        read_results(tmp_path / "scores.json")


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


def test_results_of_before_data_were_kept_open(tmp_path: Path) -> None:
    saved = json.loads(BASE.to_json())
    for row in saved["rows"]:
        del row["data"]
    assert Results.from_json(json.dumps(saved)) == BASE


def test_a_kill_never_leaves_a_result_beside_the_items_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    write_results(tmp_path / "scores.json", BASE)
    monkeypatch.setattr("embedwright.evaluation.results.write_text", stops)
    items = {"cosine": np.ones(2), "gold": np.ones(2)}
    with pytest.raises(KeyboardInterrupt):
        write_results(tmp_path / "scores.json", replace(BASE, rows=(replace(BASE.rows[1], items=items),)))
    assert [file.name for file in tmp_path.iterdir()] == ["scores.items.npz"]
