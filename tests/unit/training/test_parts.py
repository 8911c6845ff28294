from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from trees import errors_of, put

from embedwright.config import ConfigError
from embedwright.model.pooling import Kind
from embedwright.training.parts import ModelPart
from embedwright.training.recipe import Recipe
from embedwright.training.stages import MaskedStage


def stage(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "data": [{"path": "docs.jsonl"}, {"path": "more.jsonl", "task": {"name": "more", "instruction": "Find more"}}],
        "in_batch_negatives": "all",
        "hard_negatives": 1,
        "loss": {
            "mask_above": 0.1,
            "dims": [64, 32],
            "distill": {"score_weight": 1.0, "temperature": 0.1, "vector_weight": 1.0, "teacher": ["t"]},
        },
        "mine": {"negatives": 2, "margin": 0.9},
        "optim": optim(),
    }


def masked() -> dict[str, Any]:
    text = [{"path": "docs.jsonl"}]
    return {"name": "masked", "kind": "mntp", "text": text, "mask_token": "_", "optim": optim()}


def optim() -> dict[str, Any]:
    return {"lr": 2e-5, "warmup_steps": 20, "steps": 300, "batch_queries": 64, "betas": [0.9, 0.999]}


def content() -> dict[str, Any]:
    return {
        "name": "laptop",
        "model": {"base": "smollm2-135m"},
        "tune": {},
        "stages": [stage("retrieval"), stage("generalist"), masked()],
        "run": {"out": "runs/laptop"},
        "eval": {"every": 100, "suites": ["dev"]},
    }


def errors(path: str, value: Any) -> list[str]:
    return errors_of(put(content(), path, value))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("stages.0.optim.lr", "fast", "number"),
        ("stages.0.optim.lr", -1e-4, "greater than 0"),
        ("stages.0.optim.steps", 0, "greater than or equal to 1"),
        ("stages.1.hard_negatives", -1, "greater than or equal to 0"),
        ("stages.1.temperature", 0, "greater than 0"),
        ("stages.1.sampling_alpha", 1.5, "less than or equal to 1"),
        ("stages.0.loss.mask_above", 3, "less than or equal to 2"),
        ("stages.0.loss.focal", -1, "greater than or equal to 0"),
        ("stages.0.loss.same_tower", "documents", "'none', 'queries' or 'both'"),
        ("stages.0.loss.dims.1", 0, "greater than or equal to 1"),
        ("stages.0.loss", {"dims": [64, 32, 64]}, "names one width twice"),
        ("stages.0.loss.distill", {}, "needs score_weight, vector_weight or similarity_weight"),
        (
            "stages.0.loss.distill",
            {"similarity_weight": 1.0},
            "a teacher and vector_weight or similarity_weight need each other",
        ),
        (
            "stages.0.loss.distill",
            {"score_weight": 1.0, "teacher": "t"},
            "a teacher and vector_weight or similarity_weight need each other",
        ),
        (
            "stages.0.loss.distill",
            {"vector_weight": 1.0, "teacher": "t", "temperature": 0.1},
            "temperature is of the scores",
        ),
        ("stages.0.loss.distill", {"vector_weight": 1.0, "teacher": ["t", "t"]}, "names one model twice"),
        *(
            (
                "stages.0.loss.distill",
                {"vector_weight": 1.0, "teacher": ["t", name]},
                f"{name} has no vectors to follow",
            )
            for name in ("bm25", "random", "previous")
        ),
        ("stages.0.data.0.weight", 0, "greater than 0"),
        ("stages.0.data", [], "at least 1 item"),
        ("stages", [], "at least 1 item"),
        ("model.pooling", "median", "'latent', 'mean', 'last'"),
        ("model.max_tokens", 4, "greater than or equal to 8"),
        ("tune.dropout", 1.0, "less than 1"),
        ("tune.method", "dora", "'lora', 'full' or 'qlora'"),
        ("run.precision", "fp16", "'fp32' or 'bf16'"),
        ("run", {}, "required"),
    ],
)
def test_a_wrong_value_names_its_key(path: str, value: Any, says: str) -> None:
    (line,) = errors(path, value)
    assert line.startswith(f"recipe: {path}") and says in line


# ---- types


def fields(part: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a recipe with its annotation, as Python has it after `Annotated` is taken off."""
    for name, field in part.model_fields.items():
        yield from below(field.annotation, f"{path}{field.alias or name}")


def below(annotation: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation is MaskedStage:
            path = path.replace("stages.0", "stages.2")  # the masked one of `content`
        yield from fields(annotation, f"{path}.")
        return
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        yield from below(inner[0], f"{path}.0")
    elif typing.get_origin(annotation) is typing.Annotated:
        yield from below(inner[0], path)
    elif inner and typing.get_origin(annotation) not in (typing.Literal, dict):
        for one in inner:
            yield from below(one, path.replace("data.0.task", "data.1.task"))
    else:
        yield path, annotation


KEYS = [(path, kind) for path, kind in fields(Recipe) if not path.startswith("run.tracker")]
MAY_BE_EMPTY = ("task.instruction", "licence", "task.source")
BAD: dict[Any, tuple[Any, ...]] = {
    int: (True, "3", 3.0, 3.5, math.inf, math.nan, -1, [3]),
    float: (True, "3", "0.5", "inf", "nan", math.inf, -math.inf, math.nan, [0.5]),
    bool: (1, 0, "true", "yes", "on", None),
    str: (1, 1.5, True, "", "  ", ["a"]),
}


@pytest.mark.parametrize(("path", "kind"), [(path, kind) for path, kind in KEYS if kind in BAD])
def test_a_value_of_another_type_is_refused_in_one_line_with_its_key(path: str, kind: type) -> None:
    for value in BAD[kind]:
        if path.endswith(MAY_BE_EMPTY) and isinstance(value, str) and not value.strip():
            continue
        found = errors(path, value)
        assert len(found) == 1 and found[0].startswith(f"recipe: {path}"), (path, value, found)


def test_every_kind_of_key_is_looked_at() -> None:
    kinds = {kind for path, kind in KEYS}
    assert set(BAD) <= kinds and len([path for path, kind in KEYS if kind in BAD]) > 50


@pytest.mark.parametrize("spelt", ["2e-5", "2E-05", "2.e-5", "+2e-5"])
def test_a_float_without_a_dot_is_a_float(spelt: str) -> None:
    assert Recipe.parse(put(content(), "stages.0.optim.lr", spelt)).stages[0].optim.lr == 2e-5
    assert errors("stages.0.optim.lr", "2e999")[0].startswith("recipe: stages.0.optim.lr")


def test_whole_numbers_are_numbers_too() -> None:
    assert Recipe.parse(put(content(), "stages.0.optim.clip", 2)).stages[0].optim.clip == 2.0


@pytest.mark.parametrize("path", ["tune", "run", "eval", "stages.0.loss", "stages.0.optim", "model", "stages"])
@pytest.mark.parametrize("value", [None, 3, "x", [3], [None]])
def test_a_part_that_is_no_mapping_is_named(path: str, value: Any) -> None:
    found = errors(path, value)
    assert len(found) == 1 and found[0].startswith(f"recipe: {path}")


@pytest.mark.parametrize("value", [3, None, "mine", ["kind"]])
def test_a_stage_that_is_no_mapping_is_named(value: Any) -> None:
    tree = content()
    tree["stages"] = [{"kind": "mine"}, value]
    with pytest.raises(ConfigError, match=r"^recipe: stages\.1: expected a mapping"):
        Recipe.parse(tree)


def test_a_recipe_knows_every_pooling() -> None:
    """The recipe writes the names again: it is read without torch."""
    assert ModelPart.model_fields["pooling"].annotation == Kind
