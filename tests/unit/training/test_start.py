from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from embedwright.training.recipe import Recipe
from embedwright.training.start import finish, start_model


@pytest.fixture
def content(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> dict[str, Any]:
    pairs = [{"query": f"q{i} tide", "positives": [f"p{i} the moon and {i}"]} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    stage = {
        "name": "first",
        "data": [{"path": str(tmp_path / "pairs.jsonl")}],
        "in_batch_negatives": "all",
        "hard_negatives": 0,
        "temperature": 0.1,
        "optim": {"lr": 1e-2, "steps": 2, "batch_queries": 4},
    }
    return {
        "name": "started",
        "seed": 7,
        "model": {"base": str(tiny_decoder("llama")), "latents": 8, "heads": 4, "multiple": 1, "max_tokens": 40},
        "tune": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "stages": [stage],
        "run": {"out": str(tmp_path / "run"), "tracker": "none"},
    }


def test_the_start_follows_the_seed_alone(content: dict[str, Any]) -> None:
    tree = content

    def weights() -> dict[str, nn.Parameter]:
        torch.rand(np.random.default_rng().integers(1, 9))
        return dict(start_model(Recipe.parse(tree)).network.named_parameters())

    first, again = weights(), weights()
    assert all(torch.equal(first[n], again[n]) for n in first)
    tree["seed"] = 8
    other = weights()
    differ = {n for n in first if not torch.equal(first[n], other[n])}
    assert any("lora_A" in n for n in differ) and any(n.startswith("head.") for n in differ)
    assert all("lora_A" in n or n.startswith("head.") for n in differ)


def test_adapters_that_nothing_reached_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="21 LoRA adapters are still zero after training"):
        finish(start_model(Recipe.parse(content)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_are_those_of_the_recipe(content: dict[str, Any], precision: str) -> None:
    tree = content | {"tune": {"rank": 3, "alpha": 12, "dropout": 0.25}}
    tree["run"]["precision"] = precision
    network = start_model(Recipe.parse(tree)).network
    layer = network.backbone.layers[1].mlp.up_proj
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout.default.p) == (3, 4, 0.25)
    # under autocast the small adapters are cast, not every input
    assert network.mixed == (precision == "bf16") and layer.cast_input_dtype_enabled != network.mixed
