from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embedwright.processes import ALONE
from embedwright.training.batches.sources import open_sources
from embedwright.training.engine.optim import make_optimizer
from embedwright.training.engine.parallel import trained
from embedwright.training.recipe import Recipe
from embedwright.training.run.start import start_model
from embedwright.training.steps import Steps


@pytest.fixture
def recipe(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> Recipe:
    rows = [{"query": f"q{i} tide", "positives": [f"p{i} the moon {i}"]} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "name": "one",
        "data": [{"path": str(tmp_path / "pairs.jsonl")}],
        "in_batch_negatives": "all",
        "hard_negatives": 0,
        "optim": {"lr": 1e-2, "steps": 6, "batch_queries": 4},
    }
    model = {"base": str(tiny_decoder("llama")), "pooling": "mean", "max_tokens": 40}
    content = {"name": "small", "model": model, "tune": {"dropout": 0.2}, "stages": [stage]}
    return Recipe.parse(content | {"run": {"out": str(tmp_path / "run"), "tracker": "none"}})


def after_one_step(recipe: Recipe, step: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    model = start_model(recipe)
    steps = Steps(recipe, model, ALONE)
    optimizer = make_optimizer(model.network, recipe.tune, recipe.stages[0].optim)
    record, problem = steps.take(0, step, steps.batch(0, open_sources(recipe)[0], step, None), optimizer)
    assert problem is None
    return record, {name: tensor.detach().clone() for name, tensor in trained(model.network).items()}


def test_a_step_is_a_function_of_recipe_and_number(recipe: Recipe) -> None:
    (first, weights), (again, same), (other, _) = (after_one_step(recipe, step) for step in (3, 3, 4))
    measured = ("seconds", "peak_mb")
    assert all(first[key] == again[key] for key in first if key not in measured)
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert first["step"] == 4 and first["ids"] != other["ids"]


def test_a_loss_that_is_not_finite_updates_nothing(recipe: Recipe) -> None:
    model = start_model(recipe)
    steps = Steps(recipe, model, ALONE)
    optimizer = make_optimizer(model.network, recipe.tune, recipe.stages[0].optim)
    local = steps.batch(0, open_sources(recipe)[0], 0, None)
    with torch.no_grad():
        for tensor in trained(model.network).values():
            tensor.fill_(float("nan"))
    before = {name: tensor.detach().clone() for name, tensor in trained(model.network).items()}
    record, problem = steps.take(0, 0, local, optimizer)
    assert record["loss"] is None and record["grad_norm"] is None and problem == "the loss is nan"
    for name, tensor in trained(model.network).items():
        assert torch.equal(tensor.nan_to_num(7), before[name].nan_to_num(7)) and tensor.grad is None
