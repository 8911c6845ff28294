"""The arithmetic by hand, and what is counted, against the tokens that runs report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedwright.errors import InputError
from embedwright.evaluation.suite import evaluate
from embedwright.model.embedder import Embedder
from embedwright.studies.ablate import cell as ablate_cell
from embedwright.studies.ablate.budget import Cost, TokenCounter, factors, scaled
from embedwright.studies.ablate.file import Study
from embedwright.studies.ablate.study import _Work, ablate
from embedwright.training.recipe import Recipe

Make = Callable[..., Path]


def test_the_arithmetic_by_hand(ablation: Make) -> None:
    """Both stages have 6 steps, 2 of them warm-up."""
    study = Study(ablation())
    stages = {arm: study.recipe(arm, 1).stages for arm in ("plain", "warm")}
    costs = {"plain": Cost(100, (10, 20)), "warm": Cost(160, (10, 50))}
    # (1000 - 100) / (6 * 10 + 6 * 20) = 5; (1000 - 160) / (6 * 10 + 6 * 50) = 2.333
    common, each = factors(1000, costs, stages, "plain", 0)
    assert common == 0 and each == {"plain": pytest.approx(5), "warm": pytest.approx(7 / 3)}
    steps = {arm: [(s.optim.steps, s.optim.warmup_steps) for s in scaled(stages[arm], each[arm])] for arm in each}
    assert steps == {"plain": [(30, 10), (30, 10)], "warm": [(14, 5), (14, 5)]}
    # shared: 30 steps of the first stage, 300 tokens; (1000 - 100 - 300) / 120 = 5; (1000 - 160 - 300) / 300 = 1.8
    common, each = factors(1000, costs, stages, "plain", 1)
    assert common == pytest.approx(5) and each == {"plain": pytest.approx(5), "warm": pytest.approx(1.8)}
    assert scaled(stages["warm"][1:], 1.8, lr=3.0)[0].optim.model_dump() == (
        stages["warm"][1].optim.model_dump() | {"steps": 10, "warmup_steps": 4, "lr": pytest.approx(3e-2)}
    )
    assert [part.optim.steps for part in scaled(stages["plain"], 0.01)] == [1, 1]
    with pytest.raises(InputError, match=r"arm warm: after .* 59\.0 are left for training, and a step .* takes 60\.0"):
        factors(219, costs, stages, "plain", 0)


def test_the_tokens_of_an_evaluation_are_those_that_the_model_reads(ablation: Make, tmp_path: Path) -> None:
    study = Study(ablation())
    recipe = study.recipe("plain", 1)
    counter = TokenCounter(recipe)
    evaluate(counter, study.suite(False))
    model = Embedder.from_decoder(str(recipe.model.base), pooling="mean", layers=1, max_tokens=40)
    rows = [json.loads(line) for line in (tmp_path / "suite" / "sts.jsonl").read_text().splitlines()]
    texts = {row[key] for row in rows for key in ("text1", "text2")}
    assert counter.total == sum(len(model.tokenize([text]).ids_T) for text in texts)


def test_a_budget_of_tokens_is_kept_and_written_before_the_first_cell(
    ablation: Make, started: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "tiny"
    budget = 6_000
    arms = {"plain": {}, "more": {"stages.second.hard_negatives": 0, "stages.first.optim.batch_queries": 8}}
    seen = []
    real = ablate_cell.train_and_score

    def trained(*args: Any) -> dict[str, Any]:
        seen.append(json.loads((out / "budget.json").read_text()))
        return real(*args)

    monkeypatch.setattr(ablate_cell, "train_and_score", trained)
    study = ablate(ablation(arms=arms, budget={"tokens": budget}), tmp_path / "out")
    written = json.loads((out / "budget.json").read_text())
    assert seen == [written] * 4 and written["budget"] == {"tokens": budget}
    for cell in study["cells"]:
        said = written["arms"][cell["arm"]]
        recipe = Recipe.load(out / cell["folder"] / "recipe.yaml")
        assert {s.name: s.optim.steps for s in recipe.stages} == {n: s["steps"] for n, s in said["stages"].items()}
        # less by no more than a step of each stage, and by what a sample of steps can be off
        left = budget - said["fixed"] - cell["tokens"]
        assert -0.03 * budget < left < sum(said["steps"]) + 0.03 * budget
    assert written["arms"]["plain"]["factor"] != written["arms"]["more"]["factor"]
    assert not (out / "plain" / "budget" / "lock").exists()  # no process was needed


def test_a_budget_of_seconds_is_measured_once(
    ablation: Make, started: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cell does not train: the budget may be far above what a busy machine takes to start."""

    def failing(*args: Any) -> dict[str, Any]:
        raise RuntimeError("it does not train")

    monkeypatch.setattr(ablate_cell, "train_and_score", failing)
    out = tmp_path / "out" / "tiny"
    file = ablation(budget={"seconds": 600.0})
    ablate(file, tmp_path / "out", only=["warm/1"])
    assert [folder.relative_to(out) for folder in started] == [
        Path("plain/budget"),
        Path("warm/budget"),
        Path("warm/seed-1"),
    ]
    said = json.loads((out / "budget.json").read_text())["arms"]["warm"]
    assert said["unit"] == "seconds" and said["fixed"] == pytest.approx(sum(said["seconds"].values()))
    [first, second] = said["steps"]
    assert first > 0 and second > 0
    assert said["factor"] == pytest.approx((600.0 - said["fixed"]) / (6 * first + 6 * second))
    recipe = yaml.safe_load((out / "warm" / "seed-1" / "recipe.yaml").read_text())
    assert [stage["optim"]["steps"] for stage in recipe["stages"]] == [int(6 * said["factor"])] * 2
    before = (out / "budget.json").read_bytes()
    ablate(file, tmp_path / "out", only=["warm/1"])
    assert [folder.name for folder in started[3:]] == ["seed-1"] and (out / "budget.json").read_bytes() == before


def test_tokens_are_not_read_as_seconds(ablation: Make, tmp_path: Path) -> None:
    """Where a study's budget changes its unit, what was measured in the other one is no measurement of it."""
    jobs = {}
    for unit, budget in (("tokens", 6000), ("seconds", 4.0)):
        work = _Work(Study(ablation(budget={unit: budget})), tmp_path / "out", smoke=False, look=False, processes=1)
        work.check()
        jobs[unit] = work.measurement("plain")
    assert jobs["tokens"].result and jobs["seconds"].result is None


def test_rows_that_are_left_out_are_warned_of_once_for_all_arms(
    ablation: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = ablation(
        budget={"tokens": 6000}, arms={"plain": {}, "b": {"model.pooling": "last"}, "c": {"stages.second.optim.lr": 1}}
    )
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    base["stages"][1]["in_batch_negatives"] = "none"
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    with (tmp_path / "pairs.jsonl").open("a") as rows:
        rows.write(json.dumps({"query": "a new one", "positives": ["tide"]}) + "\n")
    work = _Work(Study(file), tmp_path / "out", smoke=False, look=False, processes=1)
    work.check()
    assert all(work.measurement(arm).result for arm in ("plain", "b"))
    assert sum("have no negatives" in record.message for record in caplog.records) == 1
