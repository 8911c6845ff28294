"""What must fit together within a stage. Types and bounds of all keys: test_parts.py."""

from __future__ import annotations

from typing import Any

import pytest
from trees import errors_of, put

from embedwright.config import ConfigError
from embedwright.data.schema import Task
from embedwright.training.recipe import Recipe


def stage(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "data": [{"path": "docs.jsonl"}, {"path": "more.jsonl", "task": {"name": "more", "instruction": "Find more"}}],
        "in_batch_negatives": "all",
        "hard_negatives": 1,
        "loss": {"mask_above": 0.1, "dims": [64, 32], "distill": {"score_weight": 1.0, "temperature": 0.1}},
        "mine": {"negatives": 2, "margin": 0.9},
        "optim": {"lr": 2e-5, "warmup_steps": 20, "steps": 300, "batch_queries": 64},
    }


def content() -> dict[str, Any]:
    return {
        "name": "laptop",
        "model": {"base": "smollm2-135m"},
        "stages": [stage("retrieval"), stage("generalist")],
        "run": {"out": "runs/laptop"},
    }


def errors(path: str, value: Any) -> list[str]:
    return errors_of(put(content(), path, value))


def test_the_same_rows_twice_in_a_stage_are_refused() -> None:
    twice = [{"path": "a.jsonl", "task": "x"}, {"path": "b.jsonl"}, {"path": "a.jsonl", "task": "x", "weight": 2.0}]
    (line,) = errors("stages.1.data", twice)
    assert line.startswith("recipe: stages.1: ") and "data.2 has the path and task of data.0" in line
    twice[2]["task"] = "y"
    Recipe.parse(put(content(), "stages.1.data", twice))


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", ".", "..", "start", "a\nb"])
def test_a_stage_cannot_be_called_what_is_no_folder(name: str) -> None:
    (line,) = errors("stages.0.name", name)
    assert line.startswith("recipe: stages.0.name: ")


def test_a_description_of_a_task_has_one_line_for_each_mistake() -> None:
    (line,) = errors("stages.0.data.1.task", {"name": "x", "famly": "sts"})
    assert line.endswith("famly: unknown key; did you mean 'family'?") and "data.1.task" in line
    (line,) = errors("stages.0.data.1.task.symmetric", "no")
    assert "symmetric" in line
    found = Recipe.parse(put(content(), "stages.0.data.1.task", {"name": "x"})).stages[0].data[1].task
    assert found == Task(name="x")


def test_warm_up_must_end_before_the_last_step() -> None:
    Recipe.parse(put(content(), "stages.0.optim.warmup_steps", 299))
    for steps in (300, 301):
        with pytest.raises(ConfigError, match=rf"stages\.0\.optim: .*warmup_steps={steps} must be below steps=300"):
            Recipe.parse(put(content(), "stages.0.optim.warmup_steps", steps))


def test_a_loss_that_has_nothing_to_work_on_is_refused() -> None:
    for loss in ({"hardness": 5.0}, {"distill": {"score_weight": 1.0}}):
        tree = put(put(content(), "stages.0.loss", loss), "stages.0.mine", None)
        Recipe.parse(tree)
        with pytest.raises(ConfigError, match=r"stages\.0: .*loss\.\w+.* hard_negatives is 0"):
            Recipe.parse(put(tree, "stages.0.hard_negatives", 0))
