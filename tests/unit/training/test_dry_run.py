"""A dry run takes real steps of a tiny recipe and writes nothing. The command that starts it: e2e/test_cli.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embedwright.errors import NotFoundError
from embedwright.model.embedder import Embedder
from embedwright.training import dry_run as module
from embedwright.training.dry_run import HEAD, dry_run
from embedwright.training.recipe import Recipe
from embedwright.training.run import distill
from embedwright.training.steps import Steps
from embedwright.training.train import train


@pytest.fixture
def content(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> dict[str, Any]:
    rows = [{"query": f"q{i} tide", "positives": [f"p{i} the moon" + " rises" * i]} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "data": [{"path": str(tmp_path / "pairs.jsonl"), "task": {"name": "own"}}],
        "in_batch_negatives": "all",
        "hard_negatives": 0,
        "optim": {"lr": 1e-2, "steps": 4, "batch_queries": 3},
    }
    return {
        "name": "small",
        "model": {"base": str(tiny_decoder("llama")), "pooling": "mean", "max_tokens": 40},
        "stages": [{"name": "one", **stage}, {"kind": "mine"}, {"name": "two", **stage, "hard_negatives": 2}],
        "run": {"out": str(tmp_path / "run"), "tracker": "none"},
    }


def test_it_takes_two_steps_of_each_stage_on_the_largest_batch_and_writes_nothing(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[dict[str, Any]] = []

    def take(self: Steps, *args: Any) -> Any:
        made = steps_take(self, *args)
        records.append(made[0] | {"seconds": 1800.0})
        return records[-1], made[1]

    steps_take = Steps.take
    monkeypatch.setattr(Steps, "take", take)
    random, before = torch.get_rng_state(), sorted(tmp_path.rglob("*"))
    first, *table, last = dry_run(Recipe.parse(content))
    assert sorted(tmp_path.rglob("*")) == before and torch.equal(torch.get_rng_state(), random)
    assert first == "dry run on this CPU: two steps of each stage on its largest batch"
    assert [row.split()[0] for row in table] == [HEAD[0], "one", "two"]
    monkeypatch.undo()
    content["stages"] = content["stages"][:1]
    seen: list[dict[str, Any]] = []
    train(Recipe.parse(content), on_step=seen.append)
    most = max(seen, key=lambda record: record["tokens"])
    ones = [record for record in records if record["stage"] == "one"]
    assert [(record["step"], record["ids"], record["tokens"]) for record in ones] == 2 * [
        (most["step"], most["ids"], most["tokens"])
    ]
    mean = sum(record["tokens"] for record in seen) / 4
    hours = 4 * 0.5 * mean / most["tokens"]  # half an hour a step
    assert table[1].split()[1:4] == ["4", f"{mean:,.0f}", str(most["tokens"])]
    assert table[1].split()[5:] == ["1.8e+03", f"{hours:.2f}"]
    assert f"{ones[1]['peak_mb'] * 2**20 / 1e9:.2f}" == table[1].split()[4]
    assert records[2]["tokens"] > 1.3 * ones[0]["tokens"]  # with documents in the place of negatives
    assert last.startswith("all steps: ") and "Not included: evaluation, mining" in last


def test_a_teacher_takes_part_and_keeps_nothing(
    content: dict[str, Any], tmp_path: Path, tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distill, "open_encoder", lambda name: tiny_embedder("mean", name))
    content["stages"] = content["stages"][:1]
    follows = {"vector_weight": 1.0, "similarity_weight": 1.0, "teacher": ["llama", "qwen3"]}  # 64 numbers in all
    content["stages"][0]["loss"] = {"distill": follows}
    assert dry_run(Recipe.parse(content))[2].split()[0] == "one"
    assert not (tmp_path / "cache" / "teachers").exists()


def test_of_many_steps_it_looks_at_some(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOKED_AT_ROWS", 6)
    assert dry_run(Recipe.parse(content))[0].endswith("its largest batch of 6 rows")


def test_what_train_refuses_it_refuses(content: dict[str, Any]) -> None:
    content["eval"] = {"suites": ["no/such.yaml"], "every": 1}
    with pytest.raises(NotFoundError, match=r"recipe small: eval\.suites\.0: .*no/such\.yaml"):
        dry_run(Recipe.parse(content))


def test_a_loss_that_is_not_finite_ends_it(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedwright.training.steps.accumulate", lambda *_, **__: (float("nan"), 9))
    with pytest.raises(FloatingPointError, match=r"stage one, step \d: the loss is nan"):
        dry_run(Recipe.parse(content))
