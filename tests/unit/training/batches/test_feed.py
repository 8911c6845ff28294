from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwright.text import Contract
from embedwright.training.batches.batch import Batch
from embedwright.training.batches.blend import Source
from embedwright.training.batches.feed import batch_of_step
from embedwright.training.batches.sources import open_sources
from embedwright.training.recipe import Recipe

CONTRACT = Contract(eos_id=1)
PREFIX = "Instruct: Find it\nQuery: "


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(data: list[dict[str, Any]], queries: int = 8, **stage: Any) -> tuple[Recipe, list[Source]]:
    optim = {"lr": 1e-3, "steps": 50, "batch_queries": queries}
    base = {"name": "s", "data": data, "in_batch_negatives": "all", "hard_negatives": 2, "optim": optim}
    content = {"name": "r", "seed": 5, "model": {"base": "b"}, "run": {"out": "o"}, "stages": [base | stage]}
    recipe = Recipe.parse(content)
    return recipe, open_sources(recipe)[0]


# ---- rows without their instruction


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[..., list[Batch]]:
    """`pairs(share, symmetric=False)`: 50 batches of 8 rows, each row with three positives and five negatives."""
    rows = [
        {"query": f"q{i}", "positives": [f"p{i}{k}" for k in "abc"], "negatives": [f"n{i}{k}" for k in range(5)]}
        for i in range(37)
    ]
    file = write(tmp_path / "pairs.jsonl", rows)

    def batches(share: float, symmetric: bool = False, seed: int = 5) -> list[Batch]:
        task = {"name": "own", "instruction": "Find it", "symmetric": symmetric}
        recipe, sources = opened([{"path": file, "task": task}], without_instruction=share)
        recipe = recipe.model_copy(update={"seed": seed})
        return [batch_of_step(recipe, 0, sources, CONTRACT, step) for step in range(50)]

    return batches


def texts(batch: Batch) -> list[list[str]]:
    return [[text for _, text in side] for side in (batch.queries, batch.candidates)]


def test_a_share_of_rows_has_no_instruction_and_the_same_texts_are_drawn(pairs: Callable[..., list[Batch]]) -> None:
    plain, some, all_ = (pairs(share) for share in (0.0, 0.3, 1.0))
    assert {prefix for batch in plain for prefix, _ in batch.queries} == {PREFIX}
    assert {prefix for batch in all_ for prefix, _ in batch.queries} == {""}
    bare = [[prefix == "" for prefix, _ in batch.queries] for batch in some]
    assert np.mean(bare) == pytest.approx(0.3, abs=0.05) and len(set(map(tuple, bare))) > 30  # by row and step
    for before, after, none in zip(plain, some, all_, strict=True):
        assert texts(before) == texts(after) == texts(none) and before.ids == after.ids
        for name in ("positive_Q", "negative_QC", "own_QC"):
            np.testing.assert_array_equal(getattr(before.masks, name), getattr(after.masks, name))
    assert [batch.queries for batch in pairs(0.3)] == [batch.queries for batch in some]
    assert bare != [[prefix == "" for prefix, _ in batch.queries] for batch in pairs(0.3, seed=6)]


def test_a_row_of_a_symmetric_task_leaves_it_out_on_both_sides(pairs: Callable[..., list[Batch]]) -> None:
    for batch in pairs(0.5, symmetric=True):
        for i, (prefix, _) in enumerate(batch.queries):
            own = [int(batch.masks.positive_Q[i]), *np.flatnonzero(batch.masks.own_QC[i])]
            assert {batch.candidates[c][0] for c in own} == {prefix}


def test_a_text_with_and_without_its_prefix_is_one_answer(tmp_path: Path) -> None:
    """All rows have one positive: under both prefixes it is two candidates, and neither is a negative of any query."""
    rows = [{"query": f"q{i}", "positives": ["the answer"], "negatives": [f"n{i}"]} for i in range(8)]
    task = {"name": "own", "instruction": "Find it", "symmetric": True}
    file = write(tmp_path / "one.jsonl", rows)
    recipe, sources = opened([{"path": file, "task": task}], without_instruction=0.5)
    seen = set()
    for step in range(20):
        batch = batch_of_step(recipe, 0, sources, CONTRACT, step)
        answers = [c for c, (_, text) in enumerate(batch.candidates) if text == "the answer"]
        seen.add(len(answers))
        assert not batch.masks.negative_QC[:, answers].any()
        assert batch.masks.negative_QC.sum(axis=1).tolist() == [8] * 8  # its own negative, and those of the others
    assert 2 in seen
