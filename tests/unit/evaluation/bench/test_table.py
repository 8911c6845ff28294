"""The table of a benchmark: mteb's own means, beside published scores that have a source."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mteb
import numpy as np
import pytest
from mteb.benchmarks import Benchmark
from mteb.results import TaskResult

from embedwright.evaluation.bench import table as bench_table
from embedwright.evaluation.bench.names import Chosen, choose
from embedwright.evaluation.bench.run import Bench
from embedwright.evaluation.bench.table import TASKS, TYPES, aggregate, lines, load_anchors, released_as
from embedwright.evaluation.mteb import MtebEncoder


class Nothing:
    def fingerprint(self) -> dict[str, str]:
        return {"weights": "none"}

    def encode(self, texts: Any, task: str | None = None) -> Any:
        raise AssertionError


@pytest.fixture(scope="module")
def v1() -> Chosen:
    return choose("MTEB(eng, v1)")


@pytest.fixture
def work(tmp_path: Path, v1: Chosen) -> Bench:
    """A folder with made-up results of all 56 tasks, as mteb writes them."""
    made = Bench(MtebEncoder(Nothing(), name="toys/made-up"), tmp_path)
    draws = np.random.default_rng(0)
    for task in v1.tasks:
        scores = {
            split: {
                subset: {task.metadata.main_score: (x := float(draws.random())), "main_score": x}
                for subset in task.hf_subsets
            }
            for split in task.eval_splits
        }
        made.cache.save_to_cache(TaskResult.from_task_results(task, scores, 1.0, None), made.meta)
    return made


def test_the_means_are_those_of_mteb(work: Bench, v1: Chosen) -> None:
    assert v1.benchmark is not None
    ours = aggregate({task.metadata.name: result for task in v1.tasks if (result := work.result(task))})
    loaded = work.cache.load_results(tasks=v1.benchmark, include_remote=False)
    theirs = v1.benchmark.get_score(loaded)["toys/made-up"]
    assert ours[TASKS] == pytest.approx(100 * theirs["Mean(Task)"], abs=1e-9)  # type: ignore[operator]
    assert ours[TYPES] == pytest.approx(100 * theirs["Mean(TaskType)"], abs=1e-9)  # type: ignore[operator]
    types = {name: value for name, value in theirs.items() if not name.startswith(("Mean", "Rank"))}
    assert {name: value for name, value in ours.items() if name not in (TASKS, TYPES)} == pytest.approx(
        {name: 100 * float(value or 0) for name, value in types.items()}
    )


def test_the_table_shows_tasks_means_and_anchors(work: Bench, v1: Chosen) -> None:
    shown = "\n".join(lines(v1, work))
    result = work.result(v1.tasks[0])
    assert result is not None and "56 of 56 tasks" in shown
    assert f"{100 * result.get_score():6.2f}" in shown
    grid = [line for line in shown.splitlines() if "NV-Embed-v2 [paper]" in line or "made-up" in line]
    assert len(grid) == 2 and "72.31" in grid[1] and "56.10" in shown
    assert "[paper] NV-Embed, arXiv 2405.17428" in shown and "[mteb]" in shown
    assert "difference" not in shown


def test_a_benchmark_that_is_not_whole_says_so(work: Bench, v1: Chosen) -> None:
    (work.folder / "SciFact.json").unlink()
    shown = "\n".join(lines(v1, work))
    assert "55 of 56 tasks" in shown and "toys/made-up, 55 tasks" in shown
    (work.folder / "STS12.json").write_text(
        json.dumps(json.loads((work.folder / "STS12.json").read_text()) | {"scores": {}})
    )
    assert "54 of 56 tasks" in "\n".join(lines(v1, work))


def test_nv_embed_stands_beside_its_published_scores(work: Bench, v1: Chosen) -> None:
    shown = lines(v1, work, "NV-Embed-v1")
    result = work.result(choose("SciFact").tasks[0])
    assert result is not None
    (row,) = [line for line in shown if line.startswith("  SciFact ")]
    assert "published  78.43" in row and f"difference {100 * result.get_score() - 78.43:+6.2f}" in row
    assert sum("published" in line for line in shown) == 56


def test_published_scores_of_other_subsets_or_splits_are_not_shown(work: Bench, v1: Chosen) -> None:
    shown = {}
    for split in ("test", "validation"):
        task = type(mteb.get_task("STS17"))().filter_languages(["eng"], hf_subsets=["en-en"])
        task._eval_splits = [split]
        score = {split: {"en-en": {"main_score": 0.5, task.metadata.main_score: 0.5}}}
        work.cache.save_to_cache(TaskResult.from_task_results(task, score, 1.0, None), work.meta)
        shown[split] = "\n".join(lines(Chosen("STS17", (task,)), work, "NV-Embed-v2"))
    assert "published" in shown["test"] and "published" not in shown["validation"]
    assert "50.00" in shown["validation"]
    every = mteb.get_task("STS17")
    scores = {"test": {subset: {"main_score": 0.5, "cosine_spearman": 0.5} for subset in every.hf_subsets}}
    work.cache.save_to_cache(TaskResult.from_task_results(every, scores, 1.0, None), work.meta)
    other = "\n".join(lines(Chosen("STS17", (every,)), work, "NV-Embed-v2"))
    assert "50.00" in other and "published" not in other and "[mteb]" not in other


def test_released_nv_embed_is_known_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "nvembed", "_name_or_path": "nvidia/NV-Embed-v2"}))
    monkeypatch.setattr(bench_table, "detect", lambda name: (SimpleNamespace(path=folder), "nvembed"))
    assert released_as(str(folder)) == "NV-Embed-v2"
    assert released_as("nvidia/NV-Embed-v1") == "NV-Embed-v1"
    monkeypatch.setattr(bench_table, "detect", lambda name: (SimpleNamespace(path=folder), "ours"))
    assert released_as(str(folder)) is None
    assert released_as("http://localhost/v1#nvidia/NV-Embed-v2") is None


def test_the_anchors_have_sources_and_are_of_known_benchmarks() -> None:
    anchors = load_anchors()
    known = {benchmark.name: benchmark for benchmark in mteb.get_benchmarks()}
    for name, models in anchors["benchmarks"].items():
        benchmark: Benchmark = known[name]
        types = {task.metadata.type for task in benchmark.tasks}
        for row in models.values():
            assert row["source"] in anchors["sources"]
            assert set(row["scores"]) <= {TASKS, TYPES, *types}
    assert anchors["benchmarks"]["MTEB(eng, v1)"]["NV-Embed-v2"]["scores"][TASKS] == 72.31


@pytest.mark.parametrize(("model", "means"), [("NV-Embed-v2", 72.31), ("NV-Embed-v1", 69.32)])
def test_the_published_tasks_give_the_papers_means(model: str, means: float, v1: Chosen) -> None:
    published = load_anchors()["tasks"][model]["scores"]
    assert set(published) == {task.metadata.name for task in v1.tasks}
    assert np.mean(list(published.values())) == pytest.approx(means, abs=0.02)
    paper = load_anchors()["benchmarks"]["MTEB(eng, v1)"][model]["scores"]
    by_type: dict[str, list[float]] = {}
    for task in v1.tasks:
        by_type.setdefault(task.metadata.type, []).append(published[task.metadata.name])
    for name, scores in by_type.items():
        assert np.mean(scores) == pytest.approx(paper[name], abs=0.15), name  # rounded reports
