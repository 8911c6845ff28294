from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from mteb.mocks import MOCK_TASK_TEST_GRID
from safetensors.torch import load_file

from embedwright.config import ConfigError
from embedwright.errors import InputError
from embedwright.evaluation.bench import names as bench
from embedwright.evaluation.mteb import MtebEncoder
from embedwright.evaluation.results import Result, Results
from embedwright.training.recipe import Recipe
from embedwright.training.run import checks
from embedwright.training.run import scores as module
from embedwright.training.run.start import load_trained, merged, start_model
from embedwright.training.train import train

TEXTS = ["how do tides work?", "the moon", "a dog that does not mind"]


@pytest.fixture
def content(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> dict[str, Any]:
    pairs = [{"query": f"q{i} tide", "positives": [f"p{i} the moon and {i}"]} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    stage = {
        "data": [{"path": str(tmp_path / "pairs.jsonl")}],
        "in_batch_negatives": "all",
        "hard_negatives": 0,
        "temperature": 0.1,
        "optim": {"lr": 1e-2, "steps": 6, "batch_queries": 4},
    }
    return {
        "name": "judged",
        "model": {"base": str(tiny_decoder("llama")), "pooling": "mean", "max_tokens": 40},
        "tune": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "stages": [{"name": "first", **stage}, {"name": "second", **stage}],
        "run": {"out": str(tmp_path / "run"), "checkpoint_every": 1, "keep": 99, "tracker": "none"},
        "eval": {"suites": ["one", "two"], "every": 1},
    }


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> list[str]:
    """`evaluate` gives these scores in turn, two suites at each point: their mean counts."""
    asked: list[str] = []

    def fake(model: Any, suite: str, progress: Any = None) -> Results:
        asked.append(suite)
        value = scores[(len(asked) - 1) // 2] + (0.25 if suite == "one" else -0.25)
        items = {"cosine": np.array([value, 0.5]), "gold": np.array([1.0, 0.0])}
        return Results(str(suite), (Result("t", "sts", "spearman", value, items=items),), 0.0)

    monkeypatch.setattr(module, "score_suite", fake)
    monkeypatch.setattr(checks, "load_suite", lambda name: None)
    return asked


def points(content: dict[str, Any]) -> list[tuple[str, int]]:
    lines = (Path(content["run"]["out"]) / "evaluations.jsonl").read_text().splitlines()
    return list(dict.fromkeys((row["stage"], row["step"]) for row in map(json.loads, lines)))


def steps(content: dict[str, Any]) -> list[tuple[str, int]]:
    lines = (Path(content["run"]["out"]) / "metrics.jsonl").read_text().splitlines()
    return [(row["stage"], row["step"]) for row in map(json.loads, lines)]


def test_each_stage_ends_on_its_best_weights(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    content["eval"]["best"] = True
    #           start  1    2    3    4    5    6  |  1    2    3    4    5    6
    scripted(monkeypatch, [0.9, 0.1, 0.5, 0.4, 0.5, 0.2, 0.3, 0.1, 0.2, 0.3, 0.6, 0.1, 0.4])
    recipe = Recipe.parse(content)
    model = train(recipe)
    best = start_model(recipe)
    load_trained(best, load_file(Path(recipe.run.out) / "checkpoints" / "01-0000004" / "weights.safetensors"))
    np.testing.assert_array_equal(model.encode(TEXTS), merged(best).encode(TEXTS))
    first = load_file(Path(recipe.run.out) / "checkpoints" / "00-0000006" / "weights.safetensors")
    second = load_file(Path(recipe.run.out) / "checkpoints" / "01-0000001" / "weights.safetensors")
    # the second stage began with what the first had at step 4, the last of equals, and not at step 6: AdamW's first
    # step is as long as the learning rate in every number
    kept = load_file(Path(recipe.run.out) / "checkpoints" / "00-0000004" / "weights.safetensors")
    near, far = (max(float((second[n] - weights[n]).abs().max()) for n in second) for weights in (kept, first))
    assert near < 1.001e-2 < far


def test_each_record_has_its_items_whole_or_is_evaluated_again(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content["eval"] = {"suites": ["one", "a/two.yaml"], "every": 3}
    content["stages"] = content["stages"][:1]
    scores = [0.9, 0.1, 0.5]
    scripted(monkeypatch, scores)
    write = module.write_records

    def killed(file: Path, records: list[dict[str, Any]]) -> None:
        if file.name == "evaluations.jsonl" and len(records) == 4:  # the items of step 3 are there, its records not
            raise InterruptedError
        write(file, records)

    monkeypatch.setattr(module, "write_records", killed)
    with pytest.raises(InterruptedError):
        train(Recipe.parse(content))
    items = Path(content["run"]["out"]) / "items"
    assert points(content) == [("start", 0)] and (items / "first-3-one.npz").exists()
    monkeypatch.setattr(module, "write_records", write)
    (items / "first-3-one.npz").write_bytes(b"torn")
    asked = scripted(monkeypatch, scores[1:])
    train(Recipe.parse(content))
    assert points(content) == [("start", 0), ("first", 3), ("first", 6)] and len(asked) == 4
    found = {file.name: float(np.load(file)["t/cosine"][0]) for file in items.iterdir()}
    assert found == {
        f"{point}-{suite}.npz": scores[number] + add
        for number, point in enumerate(("start-0", "first-3", "first-6"))
        for suite, add in (("one", 0.25), ("a__two.yaml", -0.25))
    }


def test_what_a_run_without_a_checkpoint_left_is_forgotten(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.5] * 20)
    out = Path(content["run"]["out"])
    content["run"]["checkpoint_every"] = 5

    def stop(record: dict[str, Any]) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(Recipe.parse(content), on_step=stop)
    (out / "items" / "old-1-one.npz").write_bytes(b"of another recipe")
    (out / "nonfinite.jsonl").write_text("{}\n")
    train(Recipe.parse(content))
    assert not (out / "nonfinite.jsonl").exists()
    assert not (out / "items" / "old-1-one.npz").exists() and len(list((out / "items").iterdir())) == 26


def test_two_suites_with_one_file_name_are_refused(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.5] * 20)
    content["eval"]["suites"] = ["a/b", "a__b"]
    with pytest.raises(InputError, match=r"eval\.suites: two of a/b, a__b have one file name"):
        train(Recipe.parse(content))


def test_a_run_that_is_cut_off_at_the_border_ends_on_the_same_weights(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content["eval"]["best"] = True
    scores = [0.9, 0.1, 0.5, 0.4, 0.45, 0.2, 0.3, 0.1, 0.2, 0.3, 0.6, 0.1, 0.4]
    scripted(monkeypatch, scores)
    whole = train(Recipe.parse(content))
    content["run"]["out"] += "-again"

    left = [("second", 1), ("first", 6)]

    def stop(record: dict[str, Any]) -> None:
        if left and (record["stage"], record["step"]) == left[-1]:
            left.pop()
            raise InterruptedError

    asked = scripted(monkeypatch, scores)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            train(Recipe.parse(content), on_step=stop)
    model = train(Recipe.parse(content), on_step=stop)
    np.testing.assert_array_equal(model.encode(TEXTS), whole.encode(TEXTS))
    assert len(asked) == 2 * 13


def test_the_next_stage_may_evaluate_before_its_first_checkpoint(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content["eval"]["best"] = True
    content["run"] |= {"checkpoint_every": 5, "keep": 1}
    scores = [0.9, 0.1, 0.5, 0.4, 0.45, 0.2, 0.3, 0.1, 0.2, 0.3, 0.6, 0.1, 0.4]
    scripted(monkeypatch, scores)
    whole = train(Recipe.parse(content))
    content["run"]["out"] += "-again"

    def stop(record: dict[str, Any]) -> None:
        if (record["stage"], record["step"]) == ("second", 2):
            raise InterruptedError

    scripted(monkeypatch, scores)
    with pytest.raises(InterruptedError):
        train(Recipe.parse(content), on_step=stop)
    out = Path(content["run"]["out"])
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["01-0000000"]
    model = train(Recipe.parse(content))
    np.testing.assert_array_equal(model.encode(TEXTS), whole.encode(TEXTS))
    assert sorted(path.name for path in (out / "best").iterdir()) == ["first.safetensors", "second.safetensors"]
    shutil.rmtree(out / "best")  # a finished run needs it no more
    np.testing.assert_array_equal(train(Recipe.parse(content)).encode(TEXTS), whole.encode(TEXTS))


def test_a_stage_ends_when_it_gets_no_better(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    content["eval"]["patience"] = 2
    scripted(monkeypatch, [0.9, 0.3, 0.5, 0.5, 0.4, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    train(Recipe.parse(content))
    assert points(content) == [
        ("start", 0),
        *(("first", step) for step in range(1, 5)),
        *(("second", step) for step in range(1, 7)),
    ]
    assert steps(content) == [*(("first", step) for step in range(1, 5)), *(("second", step) for step in range(1, 7))]


def test_evaluations_behind_the_step_decide_nothing(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on from before its last evaluations decides as the one that was never broken."""
    content["eval"]["patience"] = 2
    content["stages"] = content["stages"][:1]
    scores = [0.9, 0.5, 0.4, 0.6, 0.5, 0.4, 0.7]
    scripted(monkeypatch, scores)
    train(Recipe.parse(content))
    assert steps(content)[-1] == ("first", 5)
    for late in sorted(Path(content["run"]["out"], "checkpoints").iterdir())[1:]:
        for file in late.iterdir():
            file.unlink()
        late.rmdir()
    asked = scripted(monkeypatch, scores)
    train(Recipe.parse(content))
    assert steps(content)[-1] == ("first", 5) and not asked


@pytest.mark.parametrize("eval_part", [{"best": True}, {"patience": 2, "suites": ["one"]}])
def test_a_choice_by_scores_needs_scores(content: dict[str, Any], eval_part: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="best and patience need suites, and every"):
        Recipe.parse(content | {"eval": eval_part})


def test_the_scores_are_part_of_the_recipe_only_where_they_decide(content: dict[str, Any]) -> None:
    plain = Recipe.parse(content | {"eval": {}}).hash()
    assert Recipe.parse(content).hash() == plain
    hashes = {
        Recipe.parse(content | {"eval": content["eval"] | more}).hash() for more in ({"best": True}, {"patience": 3})
    }
    assert len(hashes | {plain}) == 3


def test_a_task_of_mteb_is_a_suite_and_changes_nothing_in_training(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tasks = {task.metadata.name: task for task in MOCK_TASK_TEST_GRID}
    names = ["MockRetrievalTask", "MockMultilingualSTSTask", "MockClusteringTask"]
    chosen = bench.Chosen("Mocks", tuple(tasks[name] for name in names))
    monkeypatch.setattr(bench, "choose", lambda name: chosen)
    content["stages"] = content["stages"][:1]
    content["tune"]["dropout"] = 0.3  # drawn from the generators that mteb seeds
    losses = []
    for suites in ([], ["Mocks"]):
        content["eval"] = {"suites": suites, "every": 3} if suites else {}
        content["run"]["out"] = str(tmp_path / f"run{len(suites)}")
        model = train(Recipe.parse(content))
        lines = (Path(content["run"]["out"]) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]
    records = module.read_evaluations(Path(content["run"]["out"]))
    assert [(r["stage"], r["step"], r["suite"]) for r in records] == [
        ("start", 0, "Mocks"),
        ("first", 3, "Mocks"),
        ("first", 6, "Mocks"),
    ]
    rows = records[-1]["results"]["rows"]
    assert [(row["task"], row["kind"], row["metric"]) for row in rows] == [
        ("MockRetrievalTask", "retrieval", "ndcg_at_10"),
        ("MockMultilingualSTSTask", "sts", "cosine_spearman"),
        ("MockClusteringTask", "clustering", "v_measure"),
    ]
    plain = mteb.evaluate(MtebEncoder(model), [type(task)() for task in chosen.tasks], cache=None, co2_tracker=False)  # type: ignore[arg-type]
    assert [row["value"] for row in rows] == pytest.approx([r.get_score() for r in plain.task_results], abs=1e-6)


def test_what_a_benchmark_lacks_stops_the_run_before_its_first_step(content: dict[str, Any]) -> None:
    content["eval"] = {"suites": ["NanoSciFactRetrieval"]}
    with pytest.raises(InputError, match="mteb/NanoSciFactRetrieval cannot be opened"):
        train(Recipe.parse(content), on_step=lambda record: pytest.fail("a step was done"))
