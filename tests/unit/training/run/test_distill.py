from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwright.config import ConfigError
from embedwright.model.embedder import Embedder
from embedwright.training.batches.sources import open_sources
from embedwright.training.recipe import Recipe
from embedwright.training.run import distill
from embedwright.training.run.distill import Teacher, teacher_of
from embedwright.training.run.start import start_model
from embedwright.training.train import train

ASKED = "Find its answer"


@pytest.fixture
def teacher(tiny_embedder: Callable[..., Embedder]) -> Embedder:
    return tiny_embedder("latent", seed=5)


@pytest.fixture
def recipe(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> Recipe:
    pairs = [{"query": f"q{i} tide", "positives": [f"p{i} the moon and {i}"], "negatives": ["a"]} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    stage = {
        "name": "s",
        "data": [{"path": str(tmp_path / "pairs.jsonl"), "task": {"name": "t", "instruction": ASKED}}],
        "in_batch_negatives": "none",
        "hard_negatives": 1,
        "temperature": 1.0,
        "loss": {"distill": {"vector_weight": 100.0, "teacher": "teacher"}},
        "optim": {"lr": 1e-2, "steps": 20, "batch_queries": 8},
    }
    content: dict[str, Any] = {
        "name": "distilled",
        "model": {"base": str(tiny_decoder("llama")), "pooling": "mean", "max_tokens": 40},
        "tune": {"rank": 8, "alpha": 16, "dropout": 0.0},
        "stages": [stage],
        "run": {"out": str(tmp_path / "run"), "tracker": "none"},
    }
    return Recipe.parse(content)


def test_a_text_is_encoded_under_the_instruction_behind_its_prefix(teacher: Embedder) -> None:
    asked = Teacher(teacher, {"Q: ": ASKED, "": None})
    found = asked([("", "the moon"), ("Q: ", "the moon"), ("", "a tide")])
    expected = [teacher.encode(["the moon"]), teacher.encode(["the moon"], task=ASKED), teacher.encode(["a tide"])]
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-6)
    assert np.abs(expected[0] - expected[1]).max() > 0.01


def test_a_stage_that_follows_no_vectors_opens_no_teacher(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "open_encoder", None)
    plain = recipe.stages[0].model_copy(update={"loss": type(recipe.stages[0].loss)()})
    assert teacher_of(plain, open_sources(recipe)[0], start_model(recipe).contract, 32) is None


def test_a_teacher_of_another_width_is_refused_before_the_first_step(
    recipe: Recipe, teacher: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Narrow:
        def encode(self, texts: list[str], task: str | None = None) -> Any:
            return teacher.encode(texts, task=task)[:, :16]

    monkeypatch.setattr(distill, "open_encoder", lambda name: Narrow())
    with pytest.raises(ConfigError, match="vectors of teacher have 16 numbers, the model's 32"):
        train(recipe)


@pytest.mark.parametrize("in_batch", ["none", "all"])
@pytest.mark.parametrize("batch_tokens", [40, 8192])
def test_a_student_comes_near_its_teacher(
    recipe: Recipe, teacher: Embedder, monkeypatch: pytest.MonkeyPatch, in_batch: str, batch_tokens: int
) -> None:
    monkeypatch.setattr(distill, "open_encoder", lambda name: teacher)
    stage = recipe.stages[0].model_copy(update={"in_batch_negatives": in_batch})
    run = recipe.run.model_copy(update={"batch_tokens": batch_tokens})
    recipe = recipe.model_copy(update={"stages": (stage,), "run": run})
    queries, passages = [f"q{i} tide" for i in range(20)], [f"p{i} the moon and {i}" for i in range(20)]

    def near(model: Embedder) -> float:
        own = np.concatenate([model.encode(queries, task=ASKED), model.encode(passages)])
        target = np.concatenate([teacher.encode(queries, task=ASKED), teacher.encode(passages)])
        return float((own * target).sum(1).mean())

    before, after = near(start_model(recipe)), near(train(recipe))
    assert after > before + 0.3, (before, after)
