"""Turns a budget of tokens or seconds into steps, once for each arm, so that a cell is a plain recipe.

All stages of an arm are scaled by one factor: their steps and their warm-up, and nothing else. The evaluation is part
of the budget; so are the shared stages, whose length is that of the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedwright.errors import InputError
from embedwright.text import Contract, TextTokenizer, tokenize
from embedwright.training.batches.blend import Source
from embedwright.training.lengths import sampled
from embedwright.training.parts import OptimPart
from embedwright.training.recipe import Recipe
from embedwright.training.run.start import tokenizer_and_contract
from embedwright.training.stages import Stage


@dataclass(frozen=True)
class Cost:
    """What an arm takes, in the budget's unit: `fixed` for its start and evaluation, and a step of each stage."""

    fixed: float
    steps: tuple[float, ...]


def factors(
    budget: float, costs: Mapping[str, Cost], stages: Mapping[str, Sequence[Stage]], baseline: str, shared: int
) -> tuple[float, dict[str, float]]:
    """Returns the factor of the first `shared` stages, and that of the other stages of each arm.

    Raises InputError for an arm whose budget does not last for one step of each stage.
    """
    common = 0.0
    if shared:
        common = _factor(budget - costs[baseline].fixed, costs[baseline].steps, stages[baseline], baseline)
    first = scaled(stages[baseline][:shared], common)
    spent = sum(part.optim.steps * cost for part, cost in zip(first, costs[baseline].steps, strict=False))
    each = {
        arm: _factor(budget - cost.fixed - spent, cost.steps[shared:], stages[arm][shared:], arm)
        for arm, cost in costs.items()
    }
    return common, each


def _factor(left: float, costs: Sequence[float], stages: Sequence[Stage], arm: str) -> float:
    whole = sum(cost * stage.optim.steps for cost, stage in zip(costs, stages, strict=True))
    factor = left / whole
    if any(factor * stage.optim.steps < 1 for stage in stages):
        least = max(whole / stage.optim.steps for stage in stages)
        raise InputError(
            f"budget: arm {arm}: after its start and evaluation {left:,.1f} are left for training, and a step of each "
            f"stage in its proportion takes {least:,.1f}: raise the budget"
        )
    return factor


def scaled(stages: Sequence[Stage], factor: float, lr: float = 1.0) -> tuple[Stage, ...]:
    """Scales the steps and the warm-up of stages by `factor` (at least one step is left), and their rates by `lr`."""
    return tuple(stage.model_copy(update={"optim": _scaled(stage.optim, factor, lr)}) for stage in stages)


def unshared(recipe: Recipe, shared: int, factor: float, rate: float, saved: Path | None) -> Recipe:
    """Returns the recipe of a cell: the stages after the shared ones, which begin from the model of these."""
    stages = scaled(recipe.stages[shared:], factor, rate)
    content = recipe.model_dump(mode="json") | {"stages": [stage.model_dump(mode="json") for stage in stages]}
    if shared:
        content["model"] = {"from": str(saved)}
    return Recipe.parse(content)


def _scaled(optim: OptimPart, factor: float, lr: float) -> OptimPart:
    steps = max(1, math.floor(optim.steps * factor + 1e-9))
    warmup = min(round(optim.warmup_steps * factor), steps - 1)
    return OptimPart(**optim.model_dump() | {"steps": steps, "warmup_steps": warmup, "lr": optim.lr * lr})


def tokens_of_steps(recipe: Recipe, sources: Sequence[Sequence[Source]]) -> tuple[float, ...]:
    """Returns the mean number of tokens of a step of each stage, from a sample of its steps."""
    tokenizer, contract = tokenizer_and_contract(recipe.model)
    own = TextTokenizer(tokenizer.backend_tokenizer)
    return tuple(sampled(recipe, number, some, own, contract).step for number, some in enumerate(sources))


class TokenCounter:
    """An encoder that counts the tokens it is given, as the model of a recipe reads them. Its vectors are random."""

    def __init__(self, recipe: Recipe) -> None:
        tokenizer, self.contract = tokenizer_and_contract(recipe.model)
        self.tokenizer = TextTokenizer(tokenizer.backend_tokenizer)
        self.random, self.total = np.random.default_rng(0), 0

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        contract: Contract = self.contract
        read = tokenize(self.tokenizer, contract, list(texts), contract.prefix(task))
        self.total += sum(len(text.ids) for text in read)
        vectors_NE: NDArray[np.float32] = self.random.standard_normal((len(texts), 4), dtype=np.float32)
        return vectors_NE


def as_written(stages: Sequence[Stage]) -> dict[str, Any]:
    """Lists steps, warm-up and rate of each stage by its name."""
    return {stage.name: stage.optim.model_dump(include={"steps", "warmup_steps", "lr"}) for stage in stages}
