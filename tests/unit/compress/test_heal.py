"""A pruned model trains by a recipe, and follows the model from before where the recipe names no teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from embedwright.cli.main import app
from embedwright.compress import heal
from embedwright.compress.heal import filled
from embedwright.config import ConfigError
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.model.formats.detect import history_of
from embedwright.training.recipe import Recipe


def stage(name: str, **more: Any) -> dict[str, Any]:
    task = {"name": "own", "instruction": "Find it", "licence": "MIT"}
    data = [{"path": "pairs.jsonl", "task": task}]
    optim = {"lr": 1e-2, "steps": 2, "batch_queries": 4}
    return {"name": name, "data": data, "in_batch_negatives": "all", "hard_negatives": 0, "optim": optim, **more}


ROOT = Path(__file__).parents[3]
FOLLOWS = {"loss": {"distill": {"vector_weight": 1.0}}}
RECIPE: dict[str, Any] = {
    "name": "short",
    "model": {"base": "smollm2-135m", "layers": 2, "max_tokens": 40},
    "tune": {"rank": 2, "alpha": 4},
    "stages": [stage("first", **FOLLOWS), stage("second")],
    "run": {"out": "elsewhere", "tracker": "none", "workers": 0, "save": "adapter"},
}


@pytest.fixture
def at(tmp_path: Path, tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_embedder("mean", "qwen3").save(tmp_path / "model", "bfloat16")
    rows = [{"query": f"q{i} tide", "positive": f"p{i} the moon pulls the sea {i}"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["compress", "model", "out", "--layers", "2", "--texts", "pairs.txt", *words])
    if result.exit_code:
        raise result.exception or AssertionError(result.output)
    return result.stdout


def test_what_a_run_fills_in(at: Path) -> None:
    plan = filled("recipe.yaml", "model", "big", at / "run")
    assert plan.model.from_ == "model" and plan.model.shortened is None
    assert (plan.run.out, plan.run.save) == (str(at / "run"), ("merged",))
    assert [part.loss.teachers for part in plan.stages] == [("big",), ()]
    named = {"loss": {"distill": {"similarity_weight": 0.5, "teacher": "minilm"}}}
    own = RECIPE | {
        "stages": [stage("first", **named)],
        "model": {"from": "another", "max_tokens": 30, "default_task": "Find"},
    }
    (at / "own.yaml").write_text(yaml.safe_dump(own | {"provenance": {"model.from": "guess"}}))
    plan = filled("own.yaml", "model", "big", at / "run")
    assert (
        plan.stages[0].loss.teachers == ("minilm",)
        and plan.model.shortened == 30
        and plan.model.default_task == "Find"
        and plan.provenance is None
    )
    without = {key: value for key, value in RECIPE.items() if key not in ("model", "run")}
    (at / "own.yaml").write_text(yaml.safe_dump(without))
    assert filled("own.yaml", "model", "big", at / "run").hash()
    assert filled(ROOT / "recipes" / "flagship" / "heal.yaml", "model", "big", at / "run").stages[0].loss.teachers == (
        "big",
    )


def test_a_pruned_model_is_healed_and_goes_on_after_a_stop(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (at / "pairs.txt").write_text("a tide\nthe moon\n")
    taught: list[tuple[str, ...]] = []
    train = heal.train

    def once(plan: Recipe, **listeners: Any) -> Any:
        taught.append(plan.stages[0].loss.teachers)

        def stopped(record: dict[str, Any]) -> None:
            if len(taught) == 1 and record["stage"] == "second":
                raise KeyboardInterrupt

        return train(plan, on_step=stopped)

    monkeypatch.setattr(heal, "train", once)
    assert CliRunner().invoke(app, ["compress", "model", "out", "--layers", "2", "--texts", "pairs.txt", "--heal",
                                    "recipe.yaml"]).exit_code  # fmt: skip
    pruned = Embedder.load("out.steps/1-layers", dtype="float32")
    begun = sorted((at / "out.steps" / "2-heal.run" / "checkpoints").iterdir())
    said = run("--heal", "recipe.yaml")
    assert begun and taught == [("model",), ("model",)]
    layers, healed = history_of(at / "out") or ()
    assert layers["step"] == "layers" and healed == {
        "step": "heal",
        "recipe": "short",
        "stages": "first 2 steps of 4, second 2 steps of 4",
        "teacher": "model",
        "data": "pairs.jsonl (MIT)",
    }
    assert "heal: recipe short, stages first 2 steps of 4" in said and "data pairs.jsonl (MIT)" in said
    healed = Embedder.load("out")
    assert healed.network.backbone.dtype == torch.bfloat16  # as it was stored, and not the recipe's default
    assert len(healed.network.backbone.layers) == 2 and healed.contract == pruned.contract
    assert abs(Embedder.load("out", dtype="float32").encode(["a tide"]) - pruned.encode(["a tide"])).max() > 1e-3
    assert not (at / "out.steps").exists() and not (at / "elsewhere").exists()


def test_the_recipe_of_the_page_heals_a_model(at: Path) -> None:
    """docs/compression.md has it for any pairs. It is run as it stands, but for its steps and its batch."""
    page = (ROOT / "docs" / "compression.md").read_text(encoding="utf-8")
    written = page.partition("```yaml\n")[2].partition("```")[0]
    assert filled(_file(at, written), "model", "model", at / "run").stages[0].optim.steps == 140
    short = written.replace("warmup_steps: 10, steps: 140, batch_queries: 32", "steps: 2, batch_queries: 4")
    assert short != written
    _file(at, short)
    (at / "pairs.jsonl").rename(at / "my_pairs.jsonl")
    (at / "pairs.txt").write_text("a tide\nthe moon\n")
    assert "heal: recipe heal, stages follow 2 steps of 4, teacher model" in run("--heal", "recipe.yaml")


def _file(at: Path, recipe: str) -> Path:
    (at / "recipe.yaml").write_text(recipe)
    return at / "recipe.yaml"


def test_a_done_step_is_taken_over_by_the_same_data_and_type_alone(at: Path) -> None:
    def known() -> dict[str, Any]:
        return heal.resume_facts(filled("recipe.yaml", "model", "model", at / "run"))

    first = known()
    assert known() == first
    (at / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"run": RECIPE["run"] | {"dtype": "float16"}}))
    assert known() != first
    (at / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (at / "pairs.jsonl").write_text((at / "pairs.jsonl").read_text().replace("tide", "moon"))
    assert known() != first


def test_a_recipe_may_say_the_type_of_the_weights(at: Path) -> None:
    (at / "pairs.txt").write_text("a tide\nthe moon\n")
    recipe = RECIPE | {"stages": [stage("only")], "run": {**RECIPE["run"], "dtype": "float16"}}
    (at / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run("--heal", "recipe.yaml")
    assert Embedder.load("out").network.backbone.dtype == torch.float16


def test_mistakes_in_a_recipe_are_named_before_the_first_step(at: Path) -> None:
    (at / "pairs.txt").write_text("a tide\n")
    for change, error, said in (
        ({"tune": {"adapters": "continue"}}, InputError, "tune.adapters"),
        ({"tune": {"method": "qlora"}}, ConfigError, "qlora"),
        ({"stages": [stage("only", loss={"distil": {}})]}, ConfigError, "did you mean 'distill'"),
        ({"stages": "none"}, ConfigError, "stages"),
    ):
        (at / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | change))
        with pytest.raises(error, match=said):
            run("--heal", "recipe.yaml")
        assert not (at / "out.steps").exists()
