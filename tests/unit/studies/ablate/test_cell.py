"""Shared stages and rates: what a cell begins from, and which rate it takes. Plain cells: test_study.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import groups
import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError

from embedwright.errors import InputError
from embedwright.evaluation.suite import evaluate
from embedwright.model.embedder import Embedder
from embedwright.processes import OtherProcessError, start
from embedwright.studies.ablate import cell as ablate_cell
from embedwright.studies.ablate.study import ablate
from embedwright.training.recipe import Recipe
from embedwright.training.train import train

Make = Callable[..., Path]
TEXTS = ["how do tides work?", "the moon"]


def test_shared_stages_are_trained_once_a_seed_as_a_chain_of_runs_by_hand(
    ablation: Make, started: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out" / "tiny"
    arms = {"plain": {}, "warm": {"stages.second.temperature": 0.5}, "slow": {"stages.second.optim.lr": 1e-3}}
    study = ablate(ablation(shared_stages=1, arms=arms), tmp_path / "out")
    names = [str(folder.relative_to(out)) for folder in started]
    assert names[:2] == ["shared-stages/seed-1", "shared-stages/seed-2"] and len(names) == 8 == len(set(names))
    assert [shared["seed"] for shared in study["shared_stages"]] == [1, 2]
    assert all(0 < abs(shared["mean"]) <= 1 for shared in study["shared_stages"])
    assert {row["candidate"] for row in study["comparison"]["rows"]} == {"warm", "slow", "shared-stages"}
    assert len(study["cells"]) == 6

    tree = yaml.safe_load((tmp_path / "base.yaml").read_text())
    first, second = tree["stages"]
    tree["seed"] = 2
    run = {"run": tree["run"] | {"out": str(tmp_path / "one")}}
    train(Recipe.parse(tree | run | {"stages": [first]})).save(tmp_path / "model")
    second["temperature"] = 0.5
    rest = {"model": {"from": str(tmp_path / "model")}, "stages": [second]}
    by_hand = train(Recipe.parse(tree | rest | {"run": tree["run"] | {"out": str(tmp_path / "two")}}))
    cell = train(Recipe.load(out / "warm" / "seed-2" / "recipe.yaml"))  # it is done, and comes back as it is
    np.testing.assert_array_equal(cell.encode(TEXTS), by_hand.encode(TEXTS))
    kept = Embedder.load(out / "shared-stages" / "seed-2" / "model")
    assert not [folder for folder in out.rglob("model") if folder.parent.parent.name != "shared-stages"]
    [scored] = evaluate(kept, tmp_path / "suite").rows
    assert study["shared_stages"][1]["mean"] == pytest.approx(scored.value, abs=1e-6)
    np.testing.assert_array_equal(kept.encode(TEXTS), Embedder.load(tmp_path / "model").encode(TEXTS))

    ablate(ablation(shared_stages=1, arms=arms | {"warm": {"stages.second.temperature": 0.3}}), tmp_path / "out")
    assert [str(folder.relative_to(out))[:11] for folder in started[8:]] == ["warm/seed-1", "warm/seed-2"]
    shutil.copyfile(tmp_path / "pairs.jsonl", tmp_path / "others.jsonl")
    with (tmp_path / "others.jsonl").open("a") as file:
        file.write(json.dumps({"query": "a new one", "positives": ["tide"], "negatives": ["moon"]}) + "\n")
    changed = {"plain": {"stages.second.data.0.path": str(tmp_path / "others.jsonl")}}
    ablate(ablation(shared_stages=1, arms=arms | changed), tmp_path / "out")
    assert [str(folder.relative_to(out))[:12] for folder in started[10:]] == ["plain/seed-1", "plain/seed-2"]


def test_the_best_of_three_rates_is_taken_and_all_trials_are_kept(
    ablation: Make, started: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "tiny"
    file = ablation(rates={"factors": [0.01, 1, 3], "seed": 100, "length": 0.5})
    study = ablate(file, tmp_path / "out", only=["warm/1"])
    trials = {trial["rate"]: trial for trial in study["trials"]}
    assert [str(folder.relative_to(out)) for folder in started] == [
        *(f"warm/rate-{rate}/seed-100" for rate in ("0.01", "1", "3")),
        "warm/seed-1",
    ]
    best = max(trials.values(), key=lambda trial: trial["mean"])["rate"]
    assert len({trial["mean"] for trial in trials.values()}) == 3 and set(trials) == {0.01, 1, 3}
    [cell] = study["cells"]
    assert cell["rate"] == best
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())["stages"][1]["optim"]
    for folder, rate, steps in (("warm/seed-1", best, 6), ("warm/rate-3/seed-100", 3, 3)):
        recipe = Recipe.load(out / folder / "recipe.yaml")
        optim = recipe.stages[1].optim
        assert optim.lr == pytest.approx(base["lr"] * rate) and optim.steps == steps
        assert recipe.seed == (1 if steps == 6 else 100)
    assert study["missing"] == ["plain/1", "plain/2", "warm/2"]


def test_a_rate_that_really_diverges_loses(ablation: Make, started: list[Path], tmp_path: Path) -> None:
    file = ablation(rates={"factors": [1, 1e5], "seed": 100})
    study = ablate(file, tmp_path / "out", only=["warm/1"])
    assert [cell["rate"] for cell in study["cells"]] == [1] and "failed" in study["trials"][1]
    assert study["failed"] == {} and ablate(file, tmp_path / "out", only=["warm/1"]) == study and len(started) == 3


@pytest.mark.parametrize(
    "error",
    [
        FloatingPointError("gradient norm is inf"),
        OSError("no space left"),
        torch.OutOfMemoryError("full"),
        OtherProcessError("process 1: no space left"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 36 PB. Error 12"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_rate_that_fails_loses_once_and_its_arm_goes_on(
    ablation: Make, started: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A full disk or device says nothing about a rate: that trial is run again."""
    real = train

    def failing(recipe: Recipe) -> Any:
        if recipe.seed == 100 and recipe.stages[1].optim.lr > 2e-2:
            raise error
        return real(recipe)

    file = ablation(rates={"factors": [1, 3], "seed": 100, "length": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr("embedwright.training.train.train", failing)
        study = ablate(file, tmp_path / "out", only=["warm/1"])
    of_machine = not isinstance(error, FloatingPointError)
    assert [(cell["arm"], cell["rate"]) for cell in study["cells"]] == ([] if of_machine else [("warm", 1)])
    assert [trial.get("failed") for trial in study["trials"]] == [
        None, *([] if of_machine else ["FloatingPointError: gradient norm is inf"])
    ]  # fmt: skip
    assert bool(study["failed"]) == of_machine
    count = len(started)
    again = ablate(file, tmp_path / "out", only=["warm/1"])
    assert len(started) - count == (2 if of_machine else 0) and again["missing"] == ["plain/1", "plain/2", "warm/2"]


def test_an_arm_whose_rates_all_fail_is_named(
    ablation: Make, started: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(recipe: Recipe) -> Any:
        raise RuntimeError("it never moved")

    monkeypatch.setattr("embedwright.training.train.train", failing)
    file = ablation(rates={"factors": [1, 3], "seed": 100})
    for _ in range(2):
        study = ablate(file, tmp_path / "out", only=["warm/1"])
        said = "all its rates failed: x1 RuntimeError: it never moved; x3 RuntimeError: it never moved"
        assert study["failed"] == {"tiny/warm": said} and len(started) == 2


def test_among_equal_rates_the_default_is_taken(
    ablation: Make, started: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedwright.evaluation.results import Result, Results

    flat = Results("s", (Result("t", "sts", "spearman", 0.5),), 1.0)
    monkeypatch.setattr("embedwright.studies.ablate.cell.score", lambda model, spec, folder: flat)
    file = ablation(rates={"factors": [3, 1, 0.1], "length": 0.1})
    study = ablate(file, tmp_path / "out", only=["plain/1"])
    assert [cell["rate"] for cell in study["cells"]] == [1]


def test_a_smoke_test_runs_the_shared_stage_too(ablation: Make, started: list[Path], tmp_path: Path) -> None:
    file = ablation(shared_stages=1, rates={}, smoke={"arms": ["plain"], "seeds": [7], "suite": "tiny-suite.yaml"})
    tasks = "name: s\ntasks: [{name: some, kind: sts, path: suite/sts.jsonl, limit: 12}]"
    (tmp_path / "tiny-suite.yaml").write_text(tasks)
    ablate(file, tmp_path / "out", smoke=True)
    where = tmp_path / "out" / "smoke" / "tiny"
    assert started == [where / "shared-stages" / "seed-7", where / "plain" / "seed-7"]
    found: Any = json.loads((started[1] / "result.json").read_text())
    assert found["smoke"] and list(found["scores"]) == ["some"]


def test_a_benchmark_scores_cells_into_mteb_s_own_folder(
    ablation: Make, started: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mteb.mocks import MOCK_TASK_TEST_GRID

    from embedwright.evaluation.bench import names as bench

    mocks = {task.metadata.name: task for task in MOCK_TASK_TEST_GRID}
    tasks = tuple(mocks[name] for name in ("MockSTSTask", "MockRetrievalTask"))
    monkeypatch.setattr(bench, "choose", lambda name: bench.Chosen(name, tasks))
    file = ablation(suite=None, benchmark="Mocks", budget={"tokens": 4000})
    study = ablate(file, tmp_path / "out", only=["plain/1", "warm/1"])
    assert study["scored_on"] == "Mocks" and [cell["seed"] for cell in study["cells"]] == [1, 1]
    for cell in study["cells"]:
        folder = tmp_path / "out" / "tiny" / cell["folder"]
        [result] = (folder / "bench" / "results").glob("*/*/MockSTSTask.json")
        [scored] = json.loads(result.read_text())["scores"]["test"]
        assert cell["scores"]["MockSTSTask"] == pytest.approx(scored["main_score"])
        assert cell["mean"] == pytest.approx(np.mean([*cell["scores"].values()])) and len(cell["scores"]) == 2
    rows = {row["task"]: row for row in study["comparison"]["rows"]}
    assert rows["MockRetrievalTask"]["over"] == "items"  # items are kept across files, by split and subset
    assert json.loads((tmp_path / "out" / "tiny" / "budget.json").read_text())["arms"]["plain"]["fixed"] > 0


def test_data_of_a_benchmark_that_are_missing_end_the_command_before_the_first_cell(
    ablation: Make, started: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mteb

    def unreachable(task: Any, **_: Any) -> None:
        raise ConnectionError("no network")

    task = mteb.get_task("STS12")
    monkeypatch.setattr(type(task), "load_data", unreachable)
    monkeypatch.setattr("embedwright.evaluation.bench.run.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        InputError, match=r"tiny\.yaml: benchmark: the data set mteb/sts12-sts cannot be opened: no network"
    ):
        ablate(ablation(suite=None, benchmark="STS12"), tmp_path / "out")
    assert started == [] and not (tmp_path / "out").exists()


def test_an_unknown_benchmark_is_named(ablation: Make, started: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tiny\.yaml: benchmark: .*'NanoBIER'.*did you mean 'NanoBEIR'"):
        ablate(ablation(suite=None, benchmark="NanoBIER"), tmp_path / "out")


def test_all_processes_of_a_cell_encode_its_texts(
    tmp_path_factory: pytest.TempPathFactory, tiny_embedder: Callable[..., Embedder]
) -> None:
    folder = tmp_path_factory.mktemp("g")
    tiny_embedder("mean").save(folder / "model")
    found = groups.run(__file__, folder, {"scored": (1, 2)})
    [alone], (first, second) = found["scored"][1], found["scored"][2]
    assert first["vectors"] == second["vectors"]
    np.testing.assert_allclose(first["vectors"], alone["vectors"], atol=2e-6)
    assert sorted(first["encoded"] + second["encoded"]) == sorted(alone["encoded"]) == sorted(TEXTS)
    assert first["encoded"] and second["encoded"]
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["model"]


def scored(folder: Path) -> dict[str, Any]:
    """In one of the processes: rank 0 alone has the finished model."""
    encode, encoded = Embedder.encode, list[str]()

    def counted(self: Embedder, texts: list[str], **options: Any) -> Any:
        encoded.extend(texts)
        return encode(self, texts, **options)

    model: Any = Embedder.load(folder / "model") if start().is_rank_0 else None
    Embedder.encode = counted  # type: ignore[method-assign]
    vectors = ablate_cell.encoded_by_all(model, folder, lambda model: model.encode(TEXTS).tolist())
    return {"vectors": vectors, "encoded": encoded}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_cell_in_processes_of_its_own_is_the_run_of_this_process(
    ablation: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Nothing stands for the processes here."""
    monkeypatch.setattr("embedwright.studies.ablate.study.processes_of", lambda study, anyway: processes)
    study = ablate(ablation(), tmp_path / "out", only=["warm/1"])
    assert study["failed"] == {}
    [cell] = study["cells"]
    folder = tmp_path / "out" / "tiny" / "warm" / "seed-1"
    assert json.loads((folder / "environment.json").read_text())["processes"] == processes
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    recipe = Recipe.load(folder / "recipe.yaml").with_out(tmp_path / "here")
    seen: list[dict[str, Any]] = []
    model = train(recipe, on_step=seen.append)
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in seen], rel=1e-4)
    assert cell["mean"] == pytest.approx(evaluate(model, tmp_path / "suite").rows[0].value, abs=0.02)
