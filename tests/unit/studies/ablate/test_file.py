from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedwright.errors import InputError
from embedwright.studies.ablate.file import Study, with_overrides

Make = Callable[..., Path]
TREE: dict[str, Any] = {
    "model": {"base": "b", "pooling": "latent"},
    "stages": [
        {"name": "one", "data": [{"path": "a"}, {"path": "b"}], "optim": {"lr": 1}},
        {"kind": "mine", "negatives": 3},
        {"name": "two", "data": [{"path": "c"}], "loss": None},
    ],
}


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [
        ("model.pooling", "mean", ["model", "pooling"]),
        ("stages.0.optim.lr", 2, ["stages", 0, "optim", "lr"]),
        ("stages.two.data.0.path", "x", ["stages", 2, "data", 0, "path"]),
        ("stages.1.negatives", 7, ["stages", 1, "negatives"]),
        ("stages.two.loss.focal", 1.0, ["stages", 2, "loss", "focal"]),
        ("eval.every", 5, ["eval", "every"]),
        ("stages.one.data", [{"path": "z"}], ["stages", 0, "data"]),
        ("stages.1", {"name": "three"}, ["stages", 1]),
    ],
)
def test_an_override_changes_one_place_and_the_base_stays(key: str, value: Any, where: list[Any]) -> None:
    before = yaml.safe_dump(TREE)
    found: Any = with_overrides(TREE, {key: value})
    assert yaml.safe_dump(TREE) == before
    wanted: Any = yaml.safe_load(before)
    place = wanted
    for part in where[:-1]:
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = {}
        place = place[part]
    place[where[-1]] = value
    assert found == wanted


def test_stages_are_taken_by_name_with_the_mining_before_them() -> None:
    one, mine, two = TREE["stages"]
    assert with_overrides(TREE, {"stages": ["two"]})["stages"] == [mine, two]
    found = with_overrides(TREE, {"stages": ["two", "one"], "stages.two.data.0.path": "x"})["stages"]
    assert found == [mine, two | {"data": [{"path": "x"}]}, one]


def test_a_masked_phase_is_a_stage_of_its_own() -> None:
    one, mine, two = TREE["stages"]
    masked = {"name": "masked", "kind": "mntp", "text": [{"path": "t"}]}
    tree = TREE | {"stages": [masked, one, mine, two]}
    for names, stages in (
        (["one"], [one]),
        (["two"], [mine, two]),
        (["masked", "one"], [masked, one]),
        (["one", "two", "masked"], [one, mine, two, masked]),
    ):
        assert with_overrides(tree, {"stages": names})["stages"] == stages


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("stages.tow.name", r"no 'tow' in that list \(did you mean 'two'\?\); known: one, two"),
        ("stages.7.name", r"no '7' in that list"),
        ("stages.one.data.2.path", r"no '2' in that list, which has 2 entries"),
        ("model.pooling.kind", r"there is no 'kind' in 'latent'"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(key: str, says: str) -> None:
    with pytest.raises(InputError, match=rf"^{key}: {says}"):
        with_overrides(TREE, {key: 1})
    with pytest.raises(InputError, match=r"^stages: 'tow' is no stage \(did you mean 'two'\?\); known: one, two"):
        with_overrides(TREE, {"stages": ["tow"]})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": {"plain": {}, "b": {"model.poling": "last"}}}, r"arms\.b: .*model\.poling: .*did you mean 'pooling'"),
        ({"arms": {"plain": {}, "b": {"modle.pooling": "last"}}}, r"arms\.b: .*modle: .*did you mean 'model'"),
        ({"arms": {"plain": {}, "b": {"model.pooling": "lst"}}}, r"arms\.b: recipe: model\.pooling"),
        ({"arms": {"plain": {}, "b": {}}}, r"arms\.b: is the same as plain: it changes nothing"),
        ({"arms": {"plain": {}, "b": {"model.pooling": "mean"}}}, r"arms\.b: is the same as plain"),
        ({"arms": {"plain": {}, "b": {"seed": 3}}}, r"arms\.b: seed is chosen by the study: see seeds"),
        ({"arms": {"plain": {}, "b": {"run.out": "x"}}}, r"run\.out is chosen by the study: see --out"),
        ({"arms": {"plain": {}, "../b": {"seed": 3}}}, r"'\.\./b' also names a folder"),
        ({"arms": {"plain": {}}}, r"arms"),
        ({"baseline": "plan"}, r"baseline: 'plan' is no arm \(did you mean 'plain'\?\)"),
        ({"paper": {"what": "w", "source": "s", "scores": {"wrm": 1}}}, r"paper\.scores: 'wrm' is no arm .*'warm'"),
        ({"smoke": {"arms": ["wrm"]}}, r"smoke\.arms: 'wrm' is no arm"),
        ({"smoke": {"overrides": {"stages.9.optim.lr": 1}}, "seeds": [1, 1]}, r"seeds: need different numbers"),
        ({"rates": {"seed": 2}}, r"a tuning seed .*that is none of them"),
        ({"rates": {"factors": [0.3, 3]}}, r"factors: need 1, the recipe's own rate"),
        ({"benchmark": "NanoBEIR"}, r"needs suite or benchmark, and not both"),
        ({"suite": None}, r"needs suite or benchmark"),
        ({"budget": {"tokens": 1, "seconds": 1}}, r"budget: .*needs tokens or seconds, and not both"),
        ({"base": "gone.yaml"}, r"base: .*gone\.yaml does not exist"),
        ({"name": "smoke"}, r"name: 'smoke' is the folder of smoke tests"),
        (
            {
                "shared_stages": 1,
                "arms": {
                    "plain": {"eval.suites": ["dev"], "eval.every": 2, "eval.best": True},
                    "b": {"eval.suites": ["dev"], "eval.every": 2},
                },
            },
            r"arms\.b: eval\..* is of the first 1 stages, which all arms share",
        ),
        ({"sweets": 1}, r"sweets: unknown key"),
        ({"shared_stages": 2}, r"shared_stages: 2 of 2 stages leaves none"),
        (
            {"shared_stages": 1, "arms": {"plain": {}, "b": {"stages.first.temperature": 0.5}}},
            r"arms\.b: stages\.first\.temperature is of the first 1 stages, which all arms share",
        ),
        ({"shared_stages": 1, "arms": {"plain": {}, "b": {"model.pooling": "last"}}}, r"arms\.b: model\.pooling is of"),
        ({"shared_stages": 1, "arms": {"plain": {}, "b": {"tune.rank": 3}}}, r"arms\.b: tune\.rank is of"),
    ],
)
def test_a_mistake_is_named_with_file_and_key(ablation: Make, changes: dict[str, Any], says: str) -> None:
    file = ablation(**changes)
    with pytest.raises(InputError, match=says) as error:
        Study(file)
    assert str(error.value).startswith(str(file))


def test_the_recipe_of_an_arm_is_the_base_with_overrides_and_seed(ablation: Make) -> None:
    study = Study(ablation(arms={"plain": {}, "b": {"stages": ["second"], "stages.second.optim.lr": "3e-4"}}))
    plain, other = study.recipe("plain", 5), study.recipe("b", 6)
    assert (plain.seed, other.seed) == (5, 6) and [stage.name for stage in plain.stages] == ["first", "second"]
    assert other.stages == (
        plain.stages[1].model_copy(update={"optim": plain.stages[1].optim.model_copy(update={"lr": 3e-4})}),
    )
    assert study.suite(False) == str(study.file.parent / "suite")
    smoke = study.recipe("plain", 1, smoke=True)
    assert [(stage.optim.steps, stage.optim.warmup_steps) for stage in smoke.stages] == [(2, 0), (2, 0)]


def test_the_smoke_test_of_a_benchmark_needs_a_suite(ablation: Make) -> None:
    with pytest.raises(InputError, match=r"tiny\.yaml: smoke: needs a suite"):
        Study(ablation(suite=None, benchmark="NanoBEIR")).suite(smoke=True)


def test_a_wrong_override_of_the_smoke_test_is_named(ablation: Make) -> None:
    study = Study(ablation(smoke={"overrides": {"stages.first.optim.stepps": 3}}))
    with pytest.raises(InputError, match=r"tiny\.yaml: smoke\.overrides: .*did you mean 'steps'"):
        study.recipe("plain", 1, smoke=True)
