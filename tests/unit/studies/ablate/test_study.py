"""Whole studies of a tiny model, cells in this process. Real processes that are killed: tests/crash/test_ablate.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedwright.errors import InputError
from embedwright.evaluation.results import read_results
from embedwright.studies.ablate.study import ablate
from embedwright.training.recipe import Recipe
from embedwright.training.train import train

Make = Callable[..., Path]
FOUR = ["plain/seed-1", "warm/seed-1", "plain/seed-2", "warm/seed-2"]


def names(started: list[Path], out: Path) -> list[str]:
    return [str(folder.relative_to(out / "tiny")) for folder in started]


def results(out: Path) -> dict[str, dict[str, Any]]:
    found = {str(file.parent.relative_to(out)): json.loads(file.read_text()) for file in out.rglob("result.json")}
    return {name: {key: value for key, value in result.items() if key != "seconds"} for name, result in found.items()}


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
    [row] = study["comparison"]["rows"]
    assert (row["candidate"], row["over"]) == ("warm", "seeds, items")
    assert row["difference"] == pytest.approx(100 * (mean["warm"] - mean["plain"]))

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
        ({"run_on": "8 GPUs"}, r"not run: needs 8 GPUs, and this machine has \d GPUs; --anyway"),
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
