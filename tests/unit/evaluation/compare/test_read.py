from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from embedwright.encoders import open as encoders
from embedwright.errors import InputError
from embedwright.evaluation.compare import read
from embedwright.evaluation.compare.bootstrap import agrees
from embedwright.evaluation.compare.compare import compare
from embedwright.evaluation.compare.read import read_candidates
from embedwright.evaluation.results import Result, Results, run_items_file, write_items, write_results

SCORE = np.linspace(0, 1, 8)


def results(suite: str = "dev", tasks: Sequence[str] = ("t",), model: str = "minilm", shift: float = 0.0) -> Results:
    rows = [
        Result(task, "retrieval", "nDCG@10", 0.5 + shift, items={"score": SCORE + shift, "id": np.arange(8)})
        for task in tasks
    ]
    return Results(suite, tuple(rows), 1.0, {"model": model})


def rows(candidate: read.Candidate, seed: int | None = None) -> dict[str, list[str]]:
    return {each.suite: [row.task for row in each.rows] for each in candidate.seeds[seed]}


def test_a_file_and_a_folder_of_files(tmp_path: Path) -> None:
    write_results(tmp_path / "a" / "dev.json", results())
    write_results(tmp_path / "a" / "more.json", results("more", ["u", "v"]))
    (tmp_path / "a" / "notes.json").write_text('{"x": 1}')
    write_results(tmp_path / "b.json", results(model="bm25"))
    first, second = read_candidates([str(tmp_path / "a"), str(tmp_path / "b.json")])
    assert (first.name, rows(first)) == ("minilm", {"dev": ["t"], "more": ["u", "v"]})
    assert (second.name, rows(second)) == ("bm25", {"dev": ["t"]})
    assert second.seeds[None][0].rows[0].items["score"].tolist() == SCORE.tolist()


def test_air_bench_has_a_file_a_set(tmp_path: Path) -> None:
    for name in ("qa_wiki_en", "qa_news_en"):
        write_results(tmp_path / "air-bench" / "m" / f"{name}.json", results("AIR-Bench dev", [name]))
    (tmp_path / "air-bench" / "m" / "model.json").write_text('{"model": "m"}')
    (candidate,) = read_candidates([str(tmp_path)])
    assert rows(candidate) == {"AIR-Bench dev": ["qa_news_en", "qa_wiki_en"]}
    write_results(tmp_path / "air-bench" / "m" / "again.json", results("AIR-Bench dev", ["qa_wiki_en"]))
    with pytest.raises(InputError, match="several results of suite AIR-Bench dev"):
        read_candidates([str(tmp_path)])


@pytest.mark.parametrize("second", [{"model": "b"}, {"fingerprint": {"weights": "new"}}])
def test_files_of_several_models_in_a_folder_are_no_candidate(tmp_path: Path, second: dict[str, Any]) -> None:
    first = {"model": "a", "fingerprint": {"weights": "old"}}
    write_results(tmp_path / "one.json", replace(results("one"), about=first))
    write_results(tmp_path / "two.json", replace(results("two"), about=first))
    assert rows(read_candidates([str(tmp_path)])[0]) == {"one": ["t"], "two": ["t"]}
    write_results(tmp_path / "two.json", replace(results("two"), about=first | second))
    with pytest.raises(InputError, match=r"results of several models.*one\.json \(a\), .*two\.json .*Name one file"):
        read_candidates([str(tmp_path)])


@pytest.mark.parametrize("given", [".", "dev.json"])
def test_items_that_are_cut_off_are_named(tmp_path: Path, given: str) -> None:
    write_results(tmp_path / "dev.json", results())
    file = tmp_path / "dev.items.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"dev\.items\.npz holds no items: score again"):
        read_candidates([str(tmp_path / given)])


def run(folder: Path, seed: int, name: str = "x", suites: Sequence[str] = ("dev",), **more: Any) -> Path:
    """A run's folder with two evaluations, of which the last one is better."""
    folder.mkdir(parents=True)
    recipe = {"name": name, "seed": seed, "run": {"out": str(folder)}, "provenance": {}, "stages": [], **more}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with (folder / "evaluations.jsonl").open("w") as file:
        for stage, shift in (("start", 0.0), ("retrieval", seed / 100)):
            for suite in suites:
                found = results(Path(suite).stem, shift=shift)
                write_items(run_items_file(folder, stage, 5, suite), found)
                record = {"stage": stage, "step": 5, "suite": suite, "results": json.loads(found.to_json())}
                file.write(json.dumps(record) + "\n")
    return folder


def test_runs_of_one_recipe_are_seeds_of_one_candidate(tmp_path: Path) -> None:
    given = [run(tmp_path / f"a{seed}", seed) for seed in (3, 1)]
    given += [run(tmp_path / f"b{seed}", seed, "y", ("dev", "more/air.yaml"), layers=4) for seed in (1, 3)]
    given += [run(tmp_path / "again", 3)]
    first, second, again = read_candidates([str(path) for path in given])
    assert [first.name, second.name, again.name] == ["a3 (seeds 1, 3)", "b1 (seeds 1, 3)", "again"]
    assert rows(second, 1) == {"dev": ["t"], "air": ["t"]}
    assert [first.seeds[seed][0].rows[0].value for seed in (1, 3)] == [0.51, 0.53]  # the last evaluation
    assert first.seeds[3][0].rows[0].items["score"].tolist() == (SCORE + 0.03).tolist()
    assert again.seeds.keys() == {3}


def test_runs_at_different_points_are_no_seeds_of_one_candidate(tmp_path: Path) -> None:
    """Of two stages: one run has ended, another is in its last stage, a third in its first."""
    stages, given = [{"name": "first"}, {"name": "retrieval"}], []
    for seed, (stage, step) in enumerate([("retrieval", 5), ("retrieval", 4), ("first", 5)], start=1):
        for early in (False, True):
            more = {"eval": {"patience": 3}} if early else {}
            file = (
                run(tmp_path / f"{'early' if early else 'run'}{seed}", seed, stages=stages, **more)
                / "evaluations.jsonl"
            )
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            lines[-1] |= {"stage": stage, "step": step}
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            given.append(file.parent)
    assert [each.name for each in read_candidates([str(path) for path in given])] == [
        "run1",
        "early1 (seeds 1, 2)",  # it stopped by its scores, which may be at any step
        "run2",
        "run3, unfinished: first 5",
        "early3, unfinished: first 5",
    ]


def test_a_run_without_an_evaluation_says_so(tmp_path: Path) -> None:
    (run(tmp_path / "a", 1) / "evaluations.jsonl").write_text("")
    with pytest.raises(InputError, match="a is a run without an evaluation"):
        read_candidates([str(tmp_path / "a")])
    (run(tmp_path / "b", 1) / "recipe.yaml").write_text("seed: 1\nstages: [first]\n")
    with pytest.raises(InputError, match=r"recipe\.yaml is no recipe of a run"):
        read_candidates([str(tmp_path / "b")])


def test_a_study_has_a_candidate_an_arm_the_baseline_first(tmp_path: Path) -> None:
    cells = []
    for arm in ("mean", "latent"):
        for seed in (1, 2):
            cells.append({"folder": f"{arm}/seed-{seed}", "arm": arm, "seed": seed})
            write_results(tmp_path / arm / f"seed-{seed}" / "scores.json", results(shift=seed / 10))
    (tmp_path / "study.json").write_text(json.dumps({"study": "pooling", "baseline": "latent", "cells": cells}))
    latent, mean = read_candidates([str(tmp_path)])
    assert [latent.name, mean.name] == ["latent (seeds 1, 2)", "mean (seeds 1, 2)"]
    assert mean.seeds[2][0].rows[0].value == 0.7


def test_mteb_results_are_read_as_mteb_writes_them(tmp_path: Path) -> None:
    import mteb
    from mteb.cache import ResultCache
    from mteb.models.model_meta import ModelMeta
    from mteb.results import TaskResult

    meta = ModelMeta.create_empty({"name": "org/m", "revision": "abc"})
    cache, made = ResultCache(tmp_path / "out"), {}
    for name, subsets in (("SciFact", ["default"]), ("STS22.v2", ["en", "de"])):
        task = mteb.get_task(name)
        scores: Any = {"test": {subset: {"main_score": 0.5 + place / 10} for place, subset in enumerate(subsets)}}
        made[name] = TaskResult.from_task_results(task, scores, evaluation_time=1.0)
        cache.save_to_cache(made[name], meta)
    file = cache.get_task_result_path("SciFact", meta)
    np.savez(file.with_name("SciFact.items.npz"), **{"test/default/score": SCORE, "test/default/id": np.arange(8)})
    unfinished = ResultCache(tmp_path / "out" / "unfinished")
    unfinished.save_to_cache(made["SciFact"], ModelMeta.create_empty({"name": "org/m", "revision": "half"}))

    (candidate,) = read_candidates([str(tmp_path / "out")])
    assert (candidate.name, rows(candidate)) == ("org/m (abc)", {f"mteb {mteb.__version__}": ["STS22.v2", "SciFact"]})
    sts, retrieval = candidate.seeds[None][0].rows
    assert sts.value == pytest.approx(made["STS22.v2"].get_score())
    assert [(row.kind, row.metric) for row in (sts, retrieval)] == [
        ("STS", "cosine_spearman"),
        ("Retrieval", "ndcg_at_10"),
    ]
    assert (sts.items, retrieval.items["test/default/score"].tolist()) == ({}, SCORE.tolist())
    # of another version of mteb: another suite, so nothing is mixed
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"mteb_version": "2.0.0"}))
    assert [*rows(read_candidates([str(tmp_path / "out")])[0])] == [f"mteb {mteb.__version__}", "mteb 2.0.0"]
    # another revision
    cache.save_to_cache(made["SciFact"], ModelMeta.create_empty({"name": "org/m", "revision": "def"}))
    with pytest.raises(InputError, match=r"several models: name one of .*/abc, .*/def"):
        read_candidates([str(tmp_path / "out")])
    file.write_text("{}")
    with pytest.raises(InputError, match=r"SciFact\.json is no MTEB result"):
        read_candidates([str(file.parent)])


def mteb_folder(folder: Path, tasks: dict[str, dict[str, float]]) -> str:
    """MTEB results without items: by task, the main score of each subset."""
    folder.mkdir(parents=True)
    (folder / "model_meta.json").write_text(json.dumps({"name": folder.name, "revision": "r"}))
    for task, found in tasks.items():
        parts = [{"main_score": value, "hf_subset": subset} for subset, value in found.items()]
        saved = {"task_name": task, "mteb_version": "2.0", "scores": {"test": parts}}
        (folder / f"{task}.json").write_text(json.dumps(saved))
    return str(folder)


def test_an_aggregate_counts_once(tmp_path: Path) -> None:
    import mteb

    parts = [part.metadata.name for part in mteb.get_task("CQADupstackRetrieval").metadata.tasks]
    given = []
    for name, dup, ant in (("a", 0.3, 0.5), ("b", 0.4, 0.3)):
        tasks = {task: {"default": dup} for task in ("CQADupstackRetrieval", *parts)}
        given.append(mteb_folder(tmp_path / name, tasks | {"ArguAna": {"default": ant}}))
    mean = compare(read_candidates(given), draws=20).rows[-1]
    assert (mean.metric, mean.baseline, mean.score) == ("2 tasks", pytest.approx(40), pytest.approx(35))
    # without the aggregate, its parts are tasks like any other
    for folder in given:
        (Path(folder) / "CQADupstackRetrieval.json").unlink()
    assert compare(read_candidates(given), draws=20).rows[-1].metric == f"{1 + len(parts)} tasks"


def test_other_subsets_and_a_score_that_is_no_number_are_left_out_by_name(tmp_path: Path) -> None:
    one = mteb_folder(
        tmp_path / "a",
        {"STS17": {"en-en": 0.9}, "ArguAna": {"default": 0.5}, "SciFact": {"default": 0.5}},
    )
    other = mteb_folder(
        tmp_path / "b",
        {"STS17": {"en-en": 0.9, "ko-ko": 0.3}, "ArguAna": {"default": np.nan}, "SciFact": {"default": 0.6}},
    )
    for given in ([one, other], [other, one]):
        compared = compare(read_candidates(given), draws=20)
        assert [row.task for row in compared.rows] == ["SciFact"]
        text = " ".join(compared.left_out)
        assert "STS17 is of other data: only one side has test/ko-ko" in text
        assert "ArguAna has a score that is no number" in text
        compared.to_json()


class Noise:
    """Vectors that depend on every letter of a text."""

    def fingerprint(self) -> dict[str, str]:
        return {"weights": "noise"}

    def encode(self, texts: Any, task: str | None = None) -> np.ndarray[Any, Any]:
        rows = [np.random.default_rng([*str(text).encode()]).normal(size=16) for text in texts]
        return np.array(rows, np.float32).reshape(len(texts), 16)


def test_what_bench_writes_is_compared_item_by_item(tmp_path: Path) -> None:
    from mteb.mocks import MOCK_TASK_TEST_GRID

    from embedwright.evaluation.bench.run import Bench
    from embedwright.evaluation.mteb import MtebEncoder

    kinds = ("RetrievalTask", "MultilingualRerankingTask", "STSTask", "MultilingualPairClassificationTask")
    names = {
        f"Mock{kind}" for kind in (*kinds, "ClassificationTask", "ClusteringTask", "MultilingualClusteringFastTask")
    }
    tasks = [type(task)() for task in MOCK_TASK_TEST_GRID if task.metadata.name in names]
    assert len(tasks) == len(names)
    work = Bench(MtebEncoder(Noise()), tmp_path)
    assert work.run(tasks) == {}
    (candidate,) = read_candidates([str(tmp_path)])
    (results,) = candidate.seeds[None]
    assert {row.task: agrees(row) for row in results.rows} == dict.fromkeys(names, True)
    assert {row.difference for row in compare([candidate, candidate], draws=20).rows} == {0}


def test_a_run_and_bench_are_compared_in_the_tasks_that_both_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mteb
    from mteb.mocks import MOCK_TASK_TEST_GRID

    from embedwright.evaluation.bench.run import Bench, Chosen, score_tasks
    from embedwright.evaluation.mteb import MtebEncoder

    names = ["MockSTSTask", "MockMultilingualRerankingTask", "MockRetrievalTask"]
    tasks = {task.metadata.name: type(task)() for task in MOCK_TASK_TEST_GRID if task.metadata.name in names}
    monkeypatch.setattr("mteb.get_task", tasks.__getitem__)
    work = Bench(MtebEncoder(Noise()), tmp_path / "bench")
    assert work.run([tasks[name] for name in names[:2]]) == {}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: x\nseed: 1\n")
    with (folder / "evaluations.jsonl").open("w") as file:
        for suite, own in (("One", names[:1]), ("Two", names)):  # both benchmarks have the first task
            found = score_tasks(Noise(), Chosen(suite, tuple(tasks[name] for name in own)), lambda line: None)
            write_items(run_items_file(folder, "start", 0, suite), found)
            record = {"stage": "start", "step": 0, "suite": suite, "results": json.loads(found.to_json())}
            file.write(json.dumps(record) + "\n")
    given = read_candidates([str(tmp_path / "bench"), str(folder)])
    assert all(agrees(row) for each in given for results in next(iter(each.seeds.values())) for row in results.rows)
    compared = compare(given, draws=20)
    assert sorted(row.task for row in compared.rows if row.task in names) == sorted(names[:2])
    assert [row.difference for row in compared.rows] == pytest.approx([0] * len(compared.rows), abs=0.01)
    assert all(row.over for row in compared.rows if row.task in names)
    assert compared.left_out == (f"run: mteb {mteb.__version__}/{names[2]} is of run alone",)


def test_a_model_is_scored_on_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Letters:
        def encode(self, texts: list[str], task: str | None = None) -> np.ndarray[Any, Any]:
            return np.array([[1.0, text.count("a"), len(text)] for text in texts], dtype=np.float32)

    pairs = [{"text1": "a" * (i + 1), "text2": "a" * (i * i % 7) + "b", "score": i % 5} for i in range(12)]
    suite = tmp_path / "own"
    suite.mkdir()
    (suite / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    monkeypatch.setattr(encoders, "open_encoder", lambda name: Letters())
    lines: list[str] = []
    (candidate,) = read_candidates(["some/model"], str(suite), lines.append)
    assert (candidate.name, rows(candidate)) == ("some/model", {"own": ["sts"]})
    assert candidate.seeds[None][0].rows[0].items["cosine"].shape == (12,)
    assert lines
    write_results(tmp_path / "own.json", candidate.seeds[None][0])
    again, same = read_candidates([str(tmp_path / "own.json"), "some/model"], str(suite))
    assert [again.name, same.name] == ["some/model", "some/model #2"]
    assert again.seeds[None][0].rows == same.seeds[None][0].rows


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for model in ("a", "b"):
        write_results(tmp_path / "scores" / model / "dev.json", results(model=model))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"scores has results of several models: name one of .*scores/a, .*scores/b"):
        read_candidates([str(tmp_path / "scores")])
    with pytest.raises(InputError, match="empty holds no results; to score a model, give a --suite"):
        read_candidates([str(tmp_path / "empty")])
    with pytest.raises(InputError, match="minilm is no result file or folder; to score a model, give a --suite"):
        read_candidates(["minilm"])
    with pytest.raises(InputError, match="--suite dev is for models"):
        read_candidates([str(tmp_path / "scores" / "a")], "dev")
    (tmp_path / "study.json").write_text('{"cells": [{}]}')
    with pytest.raises(InputError, match=r"study\.json is no record of a study"):
        read_candidates([str(tmp_path)])
