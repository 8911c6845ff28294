"""The items of an MTEB task give mteb's own main score again, by code of scipy, sklearn and pytrec_eval alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from datasets import Dataset
from mteb._evaluators.text.summarization_evaluator import DeprecatedSummarizationEvaluator, SummarizationEvaluator
from mteb.mocks import MOCK_TASK_TEST_GRID
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, v_measure_score

from embedwright.evaluation.bench.items import KINDS, remove_broken
from embedwright.evaluation.bench.run import Bench
from embedwright.evaluation.mteb import MtebEncoder

TASKS = {task.metadata.name: task for task in MOCK_TASK_TEST_GRID}
NONE = {"MockMultilingualParallelBitextMiningTask"}


class Noise:
    """Vectors that depend on every letter of a text: no two scores are the same."""

    def fingerprint(self) -> dict[str, str]:
        return {"weights": "noise"}

    def encode(self, texts: Any, task: str | None = None) -> NDArray[np.float32]:
        rows = [np.random.default_rng(list(f"{text}".encode()) or [0]).normal(size=16) for text in texts]
        return np.array(rows, np.float32).reshape(len(texts), 16)


def of(file: Path) -> dict[str, NDArray[Any]]:
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def recomputed(arrays: dict[str, NDArray[Any]], kind: str, where: str) -> float:
    """The main score of one split and subset, from the items alone."""
    own = {name.removeprefix(f"{where}/"): array for name, array in arrays.items() if name.startswith(f"{where}/")}
    if kind == "sts":
        return float(spearmanr(own["cosine"], own["gold"])[0])
    if kind == "pair":
        return float(average_precision_score(own["gold"], own["cosine"]))
    if kind == "clustering":
        values = []
        for part in {name.rpartition("/")[0] for name in own}:
            gold, clusters = own[f"{part}/gold"], own[f"{part}/cluster"]
            for run, cluster in enumerate(clusters):
                rows = np.repeat(np.arange(len(gold)), own[f"{part}/times"][run]) if f"{part}/times" in own else ...
                values.append(v_measure_score(gold[rows], cluster[rows]))
        return float(np.mean(values))
    return float(own["score"].mean())


@pytest.mark.parametrize("name", TASKS)
def test_the_items_of_a_mock_task_give_its_main_score(name: str, tmp_path: Path) -> None:
    task = type(TASKS[name])()
    work = Bench(MtebEncoder(Noise()), tmp_path)
    assert work.run([task]) == {}
    file = work.folder / f"{name}.items.npz"
    kind = KINDS.get(task.metadata.type)
    if kind is None:
        assert not file.exists()
        return
    arrays, scores = of(file), json.loads((work.folder / f"{name}.json").read_text())["scores"]
    seen = 0
    for split, of_split in scores.items():
        for row in of_split:
            found = recomputed(arrays, kind, f"{split}/{row['hf_subset']}")
            assert found == pytest.approx(row["main_score"], abs=1e-5)
            seen += 1
    assert seen == len({tuple(name.split("/")[:2]) for name in arrays})
    assert not list(tmp_path.rglob("*predictions*"))


def test_the_ids_of_retrieval_are_the_queries(tmp_path: Path) -> None:
    work = Bench(MtebEncoder(Noise()), tmp_path)
    work.run([TASKS["MockRetrievalTask"]])
    arrays = of(work.folder / "MockRetrievalTask.items.npz")
    assert sorted(arrays["test/default/id"]) == ["q1", "q2"]


def test_identical_ids_and_the_first_result_are_left_out_as_mteb_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, field in enumerate(("ignore_identical_ids", "skip_first_result")):
        task = type(TASKS["MockRetrievalTask"])()
        monkeypatch.setattr(task, field, True, raising=False)
        task.load_data()
        if field == "ignore_identical_ids":  # a document with a query's id, which is first and is dropped
            data = task.dataset["default"]["test"]
            data["corpus"] = data["corpus"].map(lambda row: row | {"id": row["id"].replace("d", "q")})
            data["relevant_docs"] = {
                q: {d.replace("d", "q"): n for d, n in ds.items()} for q, ds in data["relevant_docs"].items()
            }
        work = Bench(MtebEncoder(Noise()), tmp_path / str(number))
        assert work.run([task]) == {}
        result = work.result(task)
        arrays = of(work.folder / "MockRetrievalTask.items.npz")
        assert result is not None
        for row in result.scores["test"]:
            assert arrays["test/default/score"].mean() == pytest.approx(row["main_score"], abs=1e-5)


def test_items_that_do_not_give_the_main_score_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = type(TASKS["MockSTSTask"])()
    real = task._calculate_scores
    monkeypatch.setattr(task, "_calculate_scores", lambda *a: real(*a) | {"cosine_spearman": 0.123})
    work = Bench(MtebEncoder(Noise()), tmp_path)
    assert work.run([task]) == {}
    assert not (work.folder / "MockSTSTask.items.npz").exists()
    assert "MockSTSTask, test/default" in caplog.text and "no items are kept" in caplog.text


@pytest.mark.parametrize("evaluator", [SummarizationEvaluator, DeprecatedSummarizationEvaluator])
def test_summaries_score_by_text_and_a_text_that_mteb_skips_has_no_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluator: Any
) -> None:
    task = type(TASKS["MockSummarizationTask"])()
    monkeypatch.setattr(task, "evaluator", evaluator, raising=False)
    task.load_data()
    rng = np.random.default_rng(0)
    texts = [f"text {i}" for i in range(5)]
    task.dataset["test"] = Dataset.from_dict(
        {
            "text": texts,
            "human_summaries": [[f"human {i}{j}" for j in range(3)] for i in range(5)],
            "machine_summaries": [[f"machine {i}{j}" for j in range(4)] for i in range(5)],
            "relevance": [[1, 1, 1, 1] if i == 2 else rng.permutation(4).tolist() for i in range(5)],
        }
    )
    monkeypatch.setattr(task, "load_data", lambda **_: None)
    work = Bench(MtebEncoder(Noise()), tmp_path)
    assert work.run([task]) == {}
    arrays, result = of(work.folder / "MockSummarizationTask.items.npz"), work.result(task)
    assert result is not None and arrays["test/default/id"].tolist() == [0, 1, 3, 4]
    assert arrays["test/default/score"].mean() == pytest.approx(result.get_score(), abs=1e-5)


def test_subsets_that_are_done_later_are_added(tmp_path: Path) -> None:
    whole = type(TASKS["MockMultilingualRetrievalTask"])()
    first = type(whole)().filter_languages(["eng"])
    assert first.hf_subsets == ["eng"]
    work = Bench(MtebEncoder(Noise()), tmp_path)
    assert work.run([first]) == {} and work.result(whole) is None
    assert work.run([whole]) == {} and work.result(whole) is not None
    alone = Bench(MtebEncoder(Noise()), tmp_path / "alone")
    alone.run([whole])
    both = [of(each.folder / "MockMultilingualRetrievalTask.items.npz") for each in (work, alone)]
    assert both[0].keys() == both[1].keys()
    assert all((both[0][name] == both[1][name]).all() for name in both[0])


def test_broken_json_goes(tmp_path: Path) -> None:
    for name, text in {"a.json": "{}", "b.json": '{"a": [1, 2', "c.json": ""}.items():
        (tmp_path / name).write_text(text)
    remove_broken(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_every_type_that_gives_items_is_of_mteb() -> None:
    assert set(KINDS) <= {task.metadata.type for task in mteb.get_tasks()}
