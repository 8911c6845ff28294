from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedwright.processes import ALONE
from embedwright.training.batches.sources import open_sources
from embedwright.training.engine.optim import make_optimizer
from embedwright.training.engine.parallel import trainable_parameters
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
    return record, {name: tensor.detach().clone() for name, tensor in trainable_parameters(model.network).items()}


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
        for tensor in trainable_parameters(model.network).values():
            tensor.fill_(float("nan"))
    before = {name: tensor.detach().clone() for name, tensor in trainable_parameters(model.network).items()}
    record, problem = steps.take(0, 0, local, optimizer)
    assert record["loss"] is None and record["grad_norm"] is None and problem == "the loss is nan"
    for name, tensor in trainable_parameters(model.network).items():
        assert torch.equal(tensor.nan_to_num(7), before[name].nan_to_num(7)) and tensor.grad is None


# ---- what a GPU is waited for


class Waits(TorchDispatchMode):
    """Notes operations whose result the host needs, so that a GPU's whole queue is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        by_truth = name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:])
        )
        unsized = name == "repeat_interleave" and "output_size" not in kwargs
        if by_truth or unsized or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim"):
            self.found.append(name)
        return func(*args, **kwargs)


class Reads(TorchFunctionMode):
    """Notes the ways of reading a tensor that are no operation."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in ("tolist", "cpu", "numpy"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


ALL = {"mask_above": 0.1, "hardness": 5.0, "focal": 0.5, "spread_out": 0.1, "dims": [8]}


@pytest.mark.parametrize(
    ("in_batch", "loss", "budget"),
    [("all", {}, 8192), ("all", ALL | {"same_tower": "both"}, 40), ("none", {}, 40), ("none", ALL, 40)],
    ids=["one forward", "GradCache", "by queries", "GradCache, no in-batch negatives"],
)
def test_a_step_reads_two_numbers_back_however_it_is_split(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, in_batch: str, loss: dict[str, Any], budget: int
) -> None:
    """The loss and the gradient's norm. Every tenth step two more, of the pooling block, when those are there."""
    tree = recipe.model_dump(mode="json")
    tree["model"] |= {"pooling": "latent", "latents": 4, "heads": 2, "multiple": 1}
    tree["stages"][0] |= {"in_batch_negatives": in_batch, "loss": loss, "hard_negatives": 1}
    tree["run"] |= {"batch_tokens": budget, "precision": "bf16"}
    rows = [{"query": f"q{i} tide", "positives": [f"p{i} the moon"], "negatives": [f"n{i} sea"]} for i in range(20)]
    Path(tree["stages"][0]["data"][0]["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.parse(tree)
    model = start_model(recipe)
    steps, sources = Steps(recipe, model, ALONE), open_sources(recipe)[0]
    optimizer = make_optimizer(model.network, recipe.tune, recipe.stages[0].optim)
    monkeypatch.setattr(optimizer, "step", lambda: None)  # on a CPU it reads its own count, which lies there
    calls: list[int] = []
    model.network.head.register_forward_hook(lambda *_: calls.append(1))
    for step, reads in ((0, 4), (3, 2)):
        local = steps.batch(0, sources, step, None)
        calls.clear()
        with Waits() as waits, Reads(waits.found):
            _, problem = steps.take(0, step, local, optimizer)
        assert problem is None and (len(calls) > 1) == (budget == 40)
        assert len(waits.found) == reads and set(waits.found) <= {"_local_scalar_dense", "tolist"}, waits.found
