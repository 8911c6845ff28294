"""What each kind of task keeps of its items: the main score comes out of them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score, v_measure_score
from suite_files import PAIRS, SCORED, SUITE, Words, labelled, one_task, write_beir, write_rows

from embedwright.evaluation.kinds import score
from embedwright.evaluation.metrics import halves
from embedwright.evaluation.results import Result
from embedwright.evaluation.suite import evaluate
from embedwright.evaluation.tasks import SuiteTask


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Result]:
    """Scores of data that is neither solved nor at chance."""
    noisy = labelled(40)
    train = labelled(60, offset=100)
    for rows in (noisy, train):  # each third row about tides or rust has another label
        for number in range(1, len(rows), 3):
            rows[number]["label"] = ("moon", "tide", "rust")[number % 4 % 3]
    write_beir(tmp_path / "retrieval")
    write_rows(tmp_path / "topics.jsonl", noisy)
    write_rows(tmp_path / "test.jsonl", noisy)
    write_rows(tmp_path / "train.jsonl.gz", train)
    write_rows(tmp_path / "sts.jsonl", [*SCORED, {"text1": "a b c", "text2": "a b q", "score": 4.5}])
    write_rows(tmp_path / "pair.jsonl", [*PAIRS, {"text1": "a b c", "text2": "a b q", "label": 0}])
    (tmp_path / "suite.yaml").write_text(SUITE)
    return {row.task: row for row in evaluate(Words(), tmp_path / "suite.yaml").rows}


def test_a_mean_is_that_of_its_items(found: dict[str, Result]) -> None:
    docs, modules = found["docs"], found["modules"]
    assert docs.items["id"].tolist() == ["q0", "q1", "q2", "q3"] and docs.items["score"].tolist()[:3] == [1, 1, 1]
    assert modules.items["id"].tolist() == list(range(40)) and len(set(modules.items["score"])) > 1
    for row in (docs, modules):
        assert np.mean(row.items["score"]) == pytest.approx(row.value, abs=1e-12) and 0 < row.value < 1


def test_a_correlation_and_an_average_precision_come_out_of_cosines_and_gold(found: dict[str, Result]) -> None:
    sts, pair = (found[name] for name in ("sts", "pair"))
    assert spearmanr(sts.items["gold"], sts.items["cosine"])[0] == pytest.approx(sts.value, abs=1e-12)
    assert average_precision_score(pair.items["gold"], pair.items["cosine"]) == pytest.approx(pair.value, abs=1e-12)
    assert sts.value < 1 and pair.value < 1 and sts.items["gold"].tolist() == [5, 3.2, 1, 0, 4.5]


def test_a_v_measure_comes_out_of_the_clusters_of_each_seed(found: dict[str, Result]) -> None:
    topics = found["topics"]
    assert topics.items["cluster"].shape == (3, 40)
    again = [v_measure_score(topics.items["gold"], cluster_N) for cluster_N in topics.items["cluster"]]
    assert np.mean(again) == pytest.approx(topics.value, abs=1e-12) and 0 < topics.value < 1


def test_rows_of_a_file_that_is_split_keep_their_place_in_it(tmp_path: Path) -> None:
    rows = labelled(31)
    write_rows(tmp_path / "one.jsonl", rows)
    (result,) = evaluate(Words(), one_task(tmp_path, "{name: x, kind: classification, path: one.jsonl}")).rows
    assert result.items["id"].tolist() == halves([row["label"] for row in rows])[1]


def test_another_main_metric_has_its_own_items(tmp_path: Path) -> None:
    write_beir(tmp_path / "beir")
    write_rows(tmp_path / "test.jsonl", labelled(30))
    write_rows(tmp_path / "sts.jsonl", SCORED)

    def result(keys: str) -> Result:
        (row,) = evaluate(Words(), one_task(tmp_path, f"{{name: x, {keys}}}")).rows
        return row

    recall = result("kind: retrieval, path: beir, metric: Recall@10")
    assert (recall.metric, recall.value) == ("Recall@10", 1.0) and "nDCG@10" in recall.details
    assert recall.items["score"].tolist() == [1, 1, 1, 1]
    reciprocal = result("kind: retrieval, path: beir, metric: MRR@10")
    assert np.mean(reciprocal.items["score"]) == pytest.approx(reciprocal.value, abs=1e-12) and reciprocal.value < 1
    pearson = result("kind: sts, path: sts.jsonl, metric: cosine_pearson")
    assert pearsonr(pearson.items["gold"], pearson.items["cosine"])[0] == pytest.approx(pearson.value, abs=1e-6)
    f1 = result("kind: classification, path: test.jsonl, metric: f1")
    assert f1.metric == "f1" and f1.items == {}  # no mean of rows


@pytest.mark.parametrize("kind", ["retrieval", "reranking", "sts", "pair", "classification", "clustering"])
def test_a_digest_tells_other_data_apart_and_leaves_the_instruction_out(tmp_path: Path, kind: Any) -> None:
    """Equal numbers of rows, one text or one judgement other; other documents or queries."""
    write_beir(tmp_path / "beir")
    write_beir(tmp_path / "judged")
    qrels = tmp_path / "judged" / "qrels" / "test.tsv"
    qrels.write_text(qrels.read_text().replace("\t1\n", "\t2\n", 1))
    rows = {"sts": SCORED, "pair": PAIRS}.get(kind, labelled(31))
    write_rows(tmp_path / "one.jsonl", rows)
    write_rows(
        tmp_path / "text.jsonl", [*rows[:-1], {key: f"{v}!" if "text" in key else v for key, v in rows[-1].items()}]
    )
    file = "beir" if kind in ("retrieval", "reranking") else "one.jsonl"
    more = {"candidates": "bm25"} if kind == "reranking" else {}

    def data(path: str, **keys: Any) -> str:
        scored = score(Words(), SuiteTask(name="x", kind=kind, path=tmp_path / path, **more | keys))
        assert scored is not None
        return scored.data

    assert data(file) == data(file, instruction="Find it") != ""
    others = {
        "retrieval": [("beir", {"corpus_limit": 4}), ("beir", {"limit": 2}), ("judged", {})],
        "reranking": [("beir", {"limit": 2}), ("judged", {})],
    }.get(kind, [("text.jsonl", {})])
    assert len({data(file), *(data(path, **keys) for path, keys in others)}) == 1 + len(others)
