"""Whole studies of a tiny model, cells in this process. Real processes that are killed: tests/crash/test_ablate.py."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_docs
import numpy as np
import pytest
import yaml

from embedwright.errors import InputError
from embedwright.evaluation.results import Result, Results, read_results, write_results
from embedwright.model.embedder import Embedder
from embedwright.studies.ablate import cell as ablate_cell
from embedwright.studies.ablate.study import ablate
from embedwright.studies.ablate.table import render
from embedwright.training.recipe import Recipe
from embedwright.training.run.signals import Interrupted
from embedwright.training.train import train

Make = Callable[..., Path]
FOUR = ["plain/seed-1", "warm/seed-1", "plain/seed-2", "warm/seed-2"]


def names(started: list[Path], out: Path) -> list[str]:
    return [str(folder.relative_to(out / "tiny")) for folder in started]


def results(out: Path) -> dict[str, dict[str, Any]]:
    found = {str(file.parent.relative_to(out)): json.loads(file.read_text()) for file in out.rglob("result.json")}
    return {name: {key: value for key, value in result.items() if key != "seconds"} for name, result in found.items()}


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch, started: list[Path]) -> list[Path]:
    """As `started`, for tests of what runs when: a cell trains nothing, and its score depends on its name."""

    def scored(folder: Path, spec: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
        random = np.random.default_rng(zlib.crc32(spec["name"].encode()))
        score = random.random(20)
        row = Result("docs", "retrieval", "nDCG@10", score.mean(), items={"score": score, "id": np.arange(20)})
        write_results(folder / "scores.json", Results("s", (row,), 1.0))
        return {"recipe": recipe.hash(), "seconds": {}, "tokens": 9, "scores": {"docs": row.value}, "mean": row.value}

    monkeypatch.setattr(ablate_cell, "train_and_score", scored)
    return started


def test_each_cell_is_a_run_that_is_scored_once(ablation: Make, started: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = ablate(ablation(), out)
    assert names(started, out) == FOUR and study["missing"] == [] and study["failed"] == {}
    assert [(cell["arm"], cell["seed"]) for cell in study["cells"]] == [
        ("plain", 1),
        ("plain", 2),
        ("warm", 1),
        ("warm", 2),
    ]
    assert study == json.loads((out / "tiny" / "study.json").read_text())
    assert len({cell["mean"] for cell in study["cells"]}) > 2
    mean = {arm: sum(cell["mean"] for cell in study["cells"] if cell["arm"] == arm) / 2 for arm in ("plain", "warm")}
    assert all(cell["details"]["sts"].keys() == {"cosine_pearson"} for cell in study["cells"])
    [row] = study["comparison"]["rows"]
    assert (row["candidate"], row["over"]) == ("warm", "seeds, items")
    assert row["difference"] == pytest.approx(100 * (mean["warm"] - mean["plain"]))

    text = make_docs.results(out)  # as it is shown once it lies in docs/results/ablations
    assert "## Study `tiny`" in text and "4 cells of seeds 1, 2, 0 trials" in text and render(study) in text

    # the same recipe by hand: the base with seed and override, trained and scored without the study
    tree = yaml.safe_load((tmp_path / "base.yaml").read_text())
    tree["seed"], tree["run"]["out"] = 2, str(tmp_path / "by-hand")
    tree["stages"][1]["temperature"] = 0.5
    model = train(Recipe.parse(tree))
    from scipy.stats import spearmanr

    rows = [json.loads(line) for line in (tmp_path / "suite" / "sts.jsonl").read_text().splitlines()]
    left, right = (model.encode([row[key] for row in rows]) for key in ("text1", "text2"))
    by_hand = spearmanr((left * right).sum(axis=1), [row["score"] for row in rows]).statistic
    [cell] = [cell for cell in study["cells"] if (cell["arm"], cell["seed"]) == ("warm", 2)]
    assert cell["mean"] == cell["scores"]["sts"] == pytest.approx(by_hand, abs=1e-6)

    folder = out / "tiny" / cell["folder"]
    written = read_results(folder / "scores.json")
    assert written.rows[0].value == cell["mean"] and len(written.rows[0].items["cosine"]) == 30
    assert written.about["seed"] == 2 and written.about["model"] == "tiny/warm/seed-2"
    assert Recipe.load(folder / "recipe.yaml").hash() == cell["recipe"] == Recipe.parse(tree).hash()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert cell["tokens"] == sum(record["tokens"] for record in records) and len(records) == 12
    assert cell["seconds"]["training"] == pytest.approx(sum(r["seconds"] + r["waited"] for r in records))
    assert cell["peak_mb"] == max(record["peak_mb"] for record in records) and cell["seconds"]["evaluation"] > 0


def test_what_is_done_is_not_run_again_and_a_changed_arm_runs_beside(
    ablation: Make, started: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ablate(ablation(), out, only=["warm/2", "plain/1"])
    assert names(started, out) == ["plain/seed-1", "warm/seed-2"]
    with pytest.raises(InputError, match=r"--only warn/2: tiny has no such cell \(did you mean 'warm/2'\?\)"):
        ablate(ablation(), out, only=["warn/2"])
    study = ablate(ablation(), out)
    assert names(started[2:], out) == ["warm/seed-1", "plain/seed-2"] and study["missing"] == []
    before = results(out)
    assert ablate(ablation(), out) == study and len(started) == 4

    arms = {"plain": {}, "warm": {"stages.second.temperature": 0.2}}
    changed = ablate(ablation(arms=arms), out)
    fresh = names(started[4:], out)
    assert [name.rpartition("-")[0] for name in fresh] == ["warm/seed-1", "warm/seed-2"] and len(started) == 6
    assert {name: result for name, result in results(out).items() if name in before} == before
    assert {cell["folder"] for cell in changed["cells"]} == {"plain/seed-1", "plain/seed-2", *fresh}
    assert ablate(ablation(), out)["cells"] == study["cells"] and len(started) == 6  # and back


def test_other_data_another_model_and_another_suite_are_other_cells(
    ablation: Make, started: list[Path], tmp_path: Path, tiny_decoder: Callable[..., Path]
) -> None:
    out, one = tmp_path / "out", ["plain/1"]
    ablate(ablation(), out, only=one)
    arms = {"plain": {"model.base": str(tiny_decoder("qwen3"))}, "warm": {}}
    ablate(ablation(arms=arms), out, only=one)
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"query": "a new one", "positives": ["tide"], "negatives": ["moon"]}) + "\n")
    ablate(ablation(), out, only=one)
    (tmp_path / "suite.yaml").write_text("tasks: [{name: some, kind: sts, path: suite/sts.jsonl, limit: 20}]\nname: s")
    ablate(ablation(suite="suite.yaml"), out, only=one)
    assert len(started) == len(set(started)) == 4


def test_a_cell_that_fails_is_named_and_ends_no_other(
    ablation: Make, started: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedwright.training.train import train as real

    def failing(recipe: Recipe) -> Any:
        if recipe.name == "tiny warm seed 1":
            raise RuntimeError("21 adapters never moved")
        return real(recipe)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("embedwright.training.train.train", failing)
        study = ablate(ablation(), out)
    assert study["missing"] == ["warm/1"] and len(study["cells"]) == 3 and len(started) == 4
    log = out / "tiny" / "warm" / "seed-1" / "log.txt"
    assert study["failed"] == {
        "tiny/warm/seed-1": f"failed (exit code 1): RuntimeError: 21 adapters never moved ({log})"
    }
    assert ablate(ablation(), out)["missing"] == [] and names(started[4:], out) == ["warm/seed-1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "no-suite"}, r"tiny\.yaml: suite: .*no-suite"),
        ({"arms": {"plain": {}, "b": {"stages.first.data.0.path": "gone.jsonl"}}}, r"arms\.b: .*gone\.jsonl"),
        ({"arms": {"plain": {}, "b": {"model.base": "/gone"}}}, r"arms\.b: .*/gone"),
        ({"run_on": "8 GPUs"}, r"not run: needs 8 GPUs, but this machine has \d GPUs; --anyway"),
    ],
)
def test_all_is_checked_before_the_first_cell(
    ablation: Make, started: list[Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ablate(ablation(**changes), tmp_path / "out")
    assert started == [] and not (tmp_path / "out").exists()


def test_a_file_for_another_machine_runs_here_if_asked(ablation: Make, started: list[Path], tmp_path: Path) -> None:
    study = ablate(ablation(run_on="8 GPUs"), tmp_path / "out", only=["plain/1"], anyway=True)
    assert len(started) == 1 and study["run_on"] == "8 GPUs"


def test_a_smoke_test_is_tiny_apart_and_without_numbers(ablation: Make, started: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = ablation(smoke={"overrides": {"stages.second.optim.steps": 3}}, run_on="8 GPUs", budget={"tokens": 9000})
    said: list[str] = []
    for _ in range(2):
        study = ablate(file, out, smoke=True, say=said.append)
        [cell] = study["cells"]
        assert study["smoke"] and (cell["arm"], cell["seed"]) == ("warm", 1)
    assert re.fullmatch(r"\[1/1\] tiny/warm/seed-1: done, \d+ s", said[-1])
    assert started == [out / "smoke" / "tiny" / "warm" / "seed-1"] * 2  # it begins anew
    recipe = Recipe.load(started[0] / "recipe.yaml")
    assert [stage.optim.steps for stage in recipe.stages] == [2, 3]
    with pytest.raises(InputError, match="smoke test"):
        read_results(started[0] / "scores.json")
    assert not any(key in cell for key in ("mean", "scores")) and not (out / "tiny").exists()


def test_trials_of_all_arms_come_first_then_whole_seeds_with_the_baseline_first(
    ablation: Make, untrained: list[Path], tmp_path: Path
) -> None:
    """Wherever it stops, no arm is ahead of the baseline, and no seed begins before the last one is whole."""
    out = tmp_path / "out"
    rates = {"factors": [1, 3], "seed": 9, "length": 0.5}
    arms = {"warm": {"stages.second.temperature": 0.5}, "plain": {}, "hot": {"stages.second.temperature": 0.9}}
    ablate(ablation(arms=arms, rates=rates, seeds=[2, 1]), out)
    found = names(untrained, out)
    trials = [f"{arm}/rate-{factor}/seed-9" for arm in arms for factor in (1, 3)]
    assert found[:6] == trials
    assert found[6:] == [f"{arm}/seed-{seed}" for seed in (1, 2) for arm in ("plain", "warm", "hot")]


def test_a_study_that_was_stopped_has_compared_what_it_has(
    ablation: Make, untrained: list[Path], tmp_path: Path
) -> None:
    """Seed 1 is whole and seed 2 has one arm: that arm is compared on two seeds and the other on one."""
    out, done = tmp_path / "out", list[str]()

    def say(line: str) -> None:
        done.append(line)
        if sum(line.startswith("[") for line in done) == 5:
            raise Interrupted("SIGTERM")

    arms = {"plain": {}, "warm": {"stages.second.temperature": 0.5}, "hot": {"stages.second.temperature": 0.9}}
    with pytest.raises(Interrupted):
        ablate(ablation(arms=arms), out, say=say)
    study = json.loads((out / "tiny" / "study.json").read_text())
    assert study["missing"] == ["hot/2"]
    mean = {(cell["arm"], cell["seed"]): 100 * cell["mean"] for cell in study["cells"]}
    rows = {row["candidate"]: row for row in study["comparison"]["rows"]}
    pairs = {seed: mean["warm", seed] - mean["plain", seed] for seed in (1, 2)}
    assert rows["warm"]["difference"] == pytest.approx(sum(pairs.values()) / 2) and "seeds" in rows["warm"]["over"]
    assert rows["hot"]["difference"] == pytest.approx(mean["hot", 1] - mean["plain", 1])
    assert rows["hot"]["over"] == "items"


def test_a_look_runs_nothing_and_writes_what_is_there(ablation: Make, untrained: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert ablate(ablation(), out, look=True)["cells"] == [] and untrained == []
    ablate(ablation(), out, only=["plain/1", "warm/1"])
    whole = (out / "tiny" / "study.json").read_bytes()
    (out / "tiny" / "study.json").unlink()
    study = ablate(ablation(), out, look=True)
    assert len(untrained) == 2 and (out / "tiny" / "study.json").read_bytes() == whole
    assert study["missing"] == ["plain/2", "warm/2"] and study["comparison"]["rows"][0]["over"] == "items"


def test_a_smaller_study_is_not_written_over_a_larger_one_unsaid(
    ablation: Make, untrained: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed file finds none of the older cells. A look ends there; a run names them first, then goes on."""
    out, only = tmp_path / "out", ["warm/1"]
    ablate(ablation(), out)
    file, saved = out / "tiny" / "study.json", (out / "tiny" / "study.json").read_bytes()
    changed = ablation(arms={"plain": {}, "warm": {"stages.second.temperature": 0.2}})
    with pytest.raises(InputError, match=r"study\.json has 4 cells.*knows 2.*warm/seed-1, warm/seed-2"):
        ablate(changed, out, look=True)
    assert file.read_bytes() == saved and "cells" not in caplog.text
    warned: list[bool] = []

    def say(line: str) -> None:
        warned.append("study.json has 4 cells" in caplog.text and "warm/seed-1, warm/seed-2" in caplog.text)

    assert len(ablate(changed, out, only=only, say=say)["cells"]) == 3
    assert warned and all(warned)


def test_a_look_counts_no_tokens_and_makes_no_folder(ablation: Make, untrained: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = ablate(ablation(budget={"tokens": 9000}), out, look=True)
    assert study["cells"] == [] and {path.name for path in out.rglob("*")} == {"tiny", "study.json"}


def test_a_look_without_the_counts_of_a_budget_loses_no_trial(
    ablation: Make, untrained: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    study = ablation(budget={"tokens": 9000}, rates={"factors": [1, 2], "seed": 9})
    assert len(ablate(study, out, only=["plain/1"])["trials"]) == 2
    for counts in out.glob("tiny/*/budget"):
        shutil.rmtree(counts)
    file = out / "tiny" / "study.json"
    saved = file.read_bytes()
    with pytest.raises(InputError, match=r"has 3 cells, of which this ablation knows 0: .* measured budget"):
        ablate(study, out, look=True)
    assert file.read_bytes() == saved


def test_a_cell_whose_scores_are_gone_is_missing_and_runs_again(
    ablation: Make, untrained: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ablate(ablation(), out)
    (out / "tiny" / "warm" / "seed-1" / "scores.json").unlink()
    (out / "tiny" / "study.json").unlink()
    assert ablate(ablation(), out, look=True)["missing"] == ["warm/1"]
    assert ablate(ablation(), out)["missing"] == [] and names(untrained[4:], out) == ["warm/seed-1"]


KEPT = ("study.json", "budget.json", "result.json", "scores.json", "scores.items.npz")


def test_a_study_goes_on_elsewhere_from_its_results_alone(
    ablation: Make, untrained: list[Path], tmp_path: Path
) -> None:
    """Only what `docs/results/ablations` keeps is copied. The trials are done, and so are seed 1 and its comparison."""
    out, other = tmp_path / "out", tmp_path / "other"
    keys: dict[str, Any] = {"shared_stages": 1, "budget": {"tokens": 9000}}
    keys["rates"] = {"factors": [1, 3], "seed": 9, "length": 0.5}
    file = ablation(**keys)
    ablate(file, out, only=["plain/1", "warm/1"])
    before = len(untrained)
    for path in out.rglob("*"):
        if path.name in KEPT:
            (other / path.relative_to(out)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, other / path.relative_to(out))
    assert {path.name for path in other.rglob("*") if path.is_file()} == {*KEPT}
    there = ablate(file, out, look=True)
    assert ablate(file, other, look=True) == there and len(untrained) == before
    changed = {"plain": {}, "warm": {"stages.second.temperature": 0.2}}
    (other / "tiny" / "study.json").unlink()  # a look would not make it smaller
    cut = ablate(ablation(arms=changed, **keys), other, look=True)
    assert [cell["arm"] for cell in cut["cells"]] == ["plain"]  # the results of another warm arm are none of this one
    file = ablation(**keys)
    study = ablate(file, other)
    new = [str(folder.relative_to(other / "tiny")) for folder in untrained[before:]]
    assert new == ["shared-stages/seed-2", "plain/seed-2", "warm/seed-2"]
    assert study["missing"] == [] and len(study["trials"]) == 4
    assert study == ablate(file, out) | {"cells": study["cells"], "shared_stages": study["shared_stages"]}


def test_a_cell_whose_shared_stage_has_only_its_result_says_so(
    ablation: Make, started: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    file = ablation(shared_stages=1)
    ablate(file, out, only=["plain/1"])
    shutil.rmtree(out / "tiny" / "shared-stages" / "seed-1" / "model")
    study = ablate(file, out, only=["warm/1"])
    assert "shared-stages/seed-1" in study["failed"]["tiny/warm/seed-1"]


def test_adapters_that_train_on_do_so_after_the_shared_stages_too(
    ablation: Make, started: list[Path], tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    model, out = tiny_embedder("mean"), tmp_path / "out"
    model.add_lora(2)
    model.save(tmp_path / "adapter")
    file = ablation(shared_stages=1)
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    base |= {"model": {"from": str(tmp_path / "adapter")}, "tune": {"adapters": "continue", "dropout": 0.0}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    assert ablate(file, out, only=["plain/1"])["failed"] == {}
    # equals one run of both stages: nothing here is drawn that follows from the number of a stage, such as dropout
    tree = base | {"seed": 1, "run": base["run"] | {"out": str(tmp_path / "whole"), "workers": 0}}
    train(Recipe.parse(tree))
    whole, rest = (
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "whole", out / "tiny" / "plain" / "seed-1")
    )
    assert rest == pytest.approx(whole[-len(rest) :], rel=1e-5)


def test_a_further_pair_of_arms_is_compared(ablation: Make, untrained: list[Path], tmp_path: Path) -> None:
    arms = {"plain": {}, "warm": {"stages.second.temperature": 0.5}, "hot": {"stages.second.temperature": 0.9}}
    study = ablate(ablation(arms=arms, pairs=[["hot", "warm"]]), tmp_path / "out")
    mean = {arm: sum(100 * cell["mean"] for cell in study["cells"] if cell["arm"] == arm) / 2 for arm in arms}
    [pair] = study["pairs"]
    [row] = pair["rows"]
    assert (pair["baseline"], row["candidate"]) == ("warm", "hot")
    assert row["difference"] == pytest.approx(mean["hot"] - mean["warm"])
    for pairs, message in (
        ([["hot", "cold"]], "pairs: 'cold' is no arm"),
        ([["hot", "plain"]], "pairs: 'hot' needs another arm"),
    ):
        with pytest.raises(InputError, match=message):
            ablate(ablation(arms=arms, pairs=pairs), tmp_path / "out")
