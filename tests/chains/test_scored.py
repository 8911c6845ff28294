"""Scored pairs from a raw file to a step: CoSENT learns from all, InfoNCE draws what it would without the low ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from embedwright.cli import main as cli
from embedwright.model.embedder import Embedder
from embedwright.text import Contract
from embedwright.training.batches.batch import Batch
from embedwright.training.batches.feed import batch_of_step
from embedwright.training.batches.sources import open_sources
from embedwright.training.recipe import Recipe
from embedwright.training.train import train

TASK = {"name": "sts", "family": "sts", "instruction": "Retrieve similar text", "symmetric": True}
TEMPERATURE = 0.05


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def pairs() -> list[dict[str, Any]]:
    words = random.Random(0)

    def text(i: int, side: str) -> str:
        return f"{side}{i} " + " ".join(words.choices(["tide", "moon", "sea", "rise", "fall", "sun"], k=5))

    return [{"text1": text(i, "a"), "text2": text(i, "b"), "score": (i * 7 % 11) / 2} for i in range(20)]


@pytest.fixture
def files(pairs: list[dict[str, Any]], tmp_path: Path) -> dict[str, Path]:
    """The pairs as they come, cleaned, and cleaned and mined by the commands."""
    raw = write(tmp_path / "sts.jsonl", pairs)
    cleaned, mined = tmp_path / "cleaned" / "sts.jsonl", tmp_path / "mined" / "sts.parquet"
    mine = ["mine", cleaned, "--teacher", "random", "--rule", "naive", "--negatives", "2", "--out", mined]
    for command in (["data", "clean", raw, "--out", cleaned], mine):
        result = CliRunner().invoke(cli.app, [str(word) for word in command])
        assert result.exit_code == 0, result.output
    return {"raw": raw, "cleaned": cleaned, "mined": mined}


def recipe_of(file: Path, out: Path, queries: int, base: str = "b", **stage: Any) -> Recipe:
    optim = {"lr": 1e-3, "steps": 1, "batch_queries": queries}
    first = {"name": "s", "data": [{"path": str(file), "task": TASK}], "in_batch_negatives": "none"}
    first |= {"hard_negatives": 2, "temperature": TEMPERATURE, "optim": optim} | stage
    content = {"name": "r", "model": {"base": base, "pooling": "mean", "max_tokens": 64}, "stages": [first]}
    return Recipe.parse(content | {"tune": {"method": "full"}, "run": {"out": str(out), "tracker": "none"}})


@pytest.mark.parametrize("name", ["raw", "cleaned", "mined"])
def test_a_step_of_cosent_is_over_all_pairs_of_the_raw_file(
    name: str, files: dict[str, Path], pairs: list[dict[str, Any]], tiny_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    base = str(tiny_decoder("llama"))
    recipe = recipe_of(files[name], tmp_path / "run", 2 * len(pairs), base, loss={"scored": "cosent"})
    records: list[dict[str, Any]] = []
    train(recipe, on_step=records.append)

    model = Embedder.from_decoder(base, pooling="mean", max_tokens=64)
    a, b = (model.encode([pair[key] for pair in pairs], task=TASK["instruction"]) for key in ("text1", "text2"))
    cos = [float(x @ y) for x, y in zip(a, b, strict=True)] * 2  # each pair in both directions
    score = [pair["score"] for pair in pairs] * 2
    total = 0.0
    for i in range(len(cos)):
        for j in range(len(cos)):
            if score[i] > score[j]:
                total += float(np.exp((cos[j] - cos[i]) / TEMPERATURE))
    assert sum(s < 4 for s in score) > len(score) / 2
    assert records[0]["loss"] == pytest.approx(np.log(1 + total), rel=1e-4)


def test_info_nce_draws_the_same_from_all_pairs_as_from_the_positive_ones(
    files: dict[str, Path], pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    """What a file of scored pairs gave before it kept the others: a row for each direction of each positive pair."""
    both = [
        {"id": f"sts:{i}:{end}", "query": pair[f"text{k}"], "positives": [pair[f"text{3 - k}"]], "score": pair["score"]}
        for i, pair in enumerate(pairs, start=1)
        for k, end in ((1, "ab"), (2, "ba"))
        if pair["score"] >= 4
    ]
    assert 4 < len(both) < 2 * len(pairs)
    alone = write(tmp_path / "alone.jsonl", both)

    def drawn(file: Path, **stage: Any) -> list[Batch]:
        recipe = recipe_of(file, tmp_path, 3, **stage)
        [sources] = open_sources(recipe)
        return [batch_of_step(recipe, 0, sources, Contract(eos_id=1), step) for step in range(25)]

    def shown(batches: list[Batch]) -> list[Any]:
        return [
            (b.ids, b.queries, b.candidates, b.masks.positive_Q.tolist(), b.masks.negative_QC.tolist()) for b in batches
        ]

    expected = shown(drawn(alone, in_batch_negatives="all"))
    for name in ("raw", "cleaned"):
        assert shown(drawn(files[name], in_batch_negatives="all")) == expected
    mined = drawn(files["mined"])  # with negatives of its own, in-batch ones off
    assert [(b.ids, b.queries) for b in mined] == [(ids, queries) for ids, queries, *_ in expected]
    assert all((b.masks.own_QC.sum(axis=1) == 2).all() for b in mined)
