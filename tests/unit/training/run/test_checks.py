from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedwright.training.recipe import Recipe
from embedwright.training.run import start
from embedwright.training.run.checks import open_suite
from embedwright.training.train import train


@pytest.fixture
def content(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> dict[str, Any]:
    """Two stages: what is wrong is in the second, which a run would reach after hours."""
    rows = [{"query": f"q{i}", "positives": [f"p{i}"], "negatives": [f"n{i}"]} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def stage(name: str) -> dict[str, Any]:
        data = [{"path": str(tmp_path / "pairs.jsonl"), "task": {"name": name}}]
        optim = {"lr": 1e-3, "steps": 1, "batch_queries": 2}
        return {"name": name, "data": data, "in_batch_negatives": "all", "hard_negatives": 1, "optim": optim}

    return {
        "name": "r",
        "model": {"base": str(tiny_decoder("llama")), "pooling": "mean", "max_tokens": 20},
        "stages": [stage("one"), stage("two")],
        "run": {"out": str(tmp_path / "out"), "tracker": "none"},
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mine": {"teacher": "/no/such/model"}}, r"stages\.two\.mine\.teacher: .*does not exist"),
        (
            {"loss": {"distill": {"vector_weight": 1.0, "teacher": "./absent"}}},
            r"stages\.two\.loss\.distill\.teacher: .*does not exist",
        ),
        ({"mine": {"teacher": "qwen3-embedding:./absent"}}, r"stages\.two\.mine\.teacher: .*does not exist"),
    ],
)
def test_a_teacher_that_is_not_there_is_named_before_a_model_is_made(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(start.Embedder, "from_decoder", lambda *_, **__: pytest.fail("a model was made"))
    content["stages"][1] |= change
    with pytest.raises(FileNotFoundError, match=rf"^recipe r: {says}"):
        train(Recipe.parse(content))
    assert not Path(content["run"]["out"]).exists()


@pytest.mark.parametrize("suite", ["nosuch", "/no/such/folder", "${EMBEDWRIGHT_TEST_UNSET}/suite"])
def test_a_suite_that_is_not_there_is_named_before_a_model_is_made(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, suite: str
) -> None:
    monkeypatch.setattr(start.Embedder, "from_decoder", lambda *_, **__: pytest.fail("a model was made"))
    content["eval"] = {"suites": [suite]}
    with pytest.raises(ValueError, match=r"^recipe r: eval\.suites\.0: "):
        train(Recipe.parse(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss": {"dims": [32]}}, r"stages\.two\.loss\.dims: 32 is not below the model's 32"),
        ({"task": "Find " * 30}, r"stages\.two: task 'two': .*leave no token to pool"),
    ],
)
def test_what_the_model_cannot_do_is_named_before_the_first_step(
    content: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    if "task" in change:
        content["stages"][1]["data"][0]["task"]["instruction"] = change["task"]
    else:
        content["stages"][1] |= change
    with pytest.raises(ValueError, match=says):
        train(Recipe.parse(content), on_step=lambda record: pytest.fail("a step was done"))
    assert not Path(content["run"]["out"]).exists()


def test_a_suite_may_be_a_benchmark_or_task_of_mteb() -> None:
    for name in ("NanoBEIR", "MTEB(eng, v2)", "STS12"):
        assert open_suite(name).name == name
    with pytest.raises(FileNotFoundError, match=r"no suite 'NanoBIER'.*knows no benchmark or task.*'NanoBEIR'"):
        open_suite("NanoBIER")
    with pytest.raises(FileNotFoundError, match=r"no suite 'def-mini' \(did you mean 'dev-mini'\?\)"):
        open_suite("def-mini")
    with pytest.raises(FileNotFoundError) as refused:
        open_suite("runs/STS12")
    assert "mteb" not in str(refused.value)
