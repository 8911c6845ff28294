"""Reads an ablation from its YAML file (docs/ablations.md): arms that differ from a base recipe by dotted overrides.

Overrides are put into the recipe's mapping before it is parsed, so a recipe's own errors name wrong keys and values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from embedwright.config import ConfigError, did_you_mean, load_yaml, validate
from embedwright.errors import InputError, error_prefix
from embedwright.training.parts import NotNegative, Part, Positive, PositiveNumber, Share, Text
from embedwright.training.recipe import Recipe, expand, leaves

SHARED = "shared-stages"  # the folder of the runs of the first stages, which no arm may have
SMOKE = "smoke"  # the folder of the smoke tests of all studies, which no study may have
_CHOSEN = {"name": "name", "seed": "seeds", "run.out": "--out"}  # keys that the study sets, and where to say them

SMOKE_STEPS = 2

Overrides = dict[str, Any]


class Budget(Part):
    """What one cell may take, its evaluation included: tokens, or seconds on this machine."""

    tokens: Positive | None = None
    seconds: PositiveNumber | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Budget:
        if (self.tokens is None) == (self.seconds is None):
            raise InputError("needs tokens or seconds, and not both")
        return self


class Rates(Part):
    """How the rate of each arm is chosen: a trial of each factor, on a seed of its own and at part of the length."""

    factors: Annotated[tuple[PositiveNumber, ...], Field(min_length=2)] = (0.33, 1.0, 3.0)
    seed: NotNegative = 100
    length: Annotated[Share, Field(gt=0)] = 0.5

    @model_validator(mode="after")
    def _has_the_default(self) -> Rates:
        if 1 not in self.factors or len(set(self.factors)) < len(self.factors):
            raise InputError("factors: need 1, the recipe's own rate, and different numbers")
        return self


class Paper(Part):
    """Published numbers that stand beside ours."""

    what: Text
    source: Text
    scores: dict[str, float]


class Smoke(Part):
    """The tiny cell that shows that the file runs. Its stages take two steps, unless `overrides` say otherwise."""

    overrides: Overrides = Field(default_factory=dict)
    arms: tuple[Text, ...] = ()
    seeds: Annotated[tuple[NotNegative, ...], Field(min_length=1)] = (1,)
    suite: Text | None = None


class Ablation(Part):
    """One study. `folder` is that of its file, which `base` and suites are relative to."""

    name: Annotated[Text, Field(pattern=r"^\w[\w.+=@-]*$")]
    base: Text
    baseline: Text
    arms: Annotated[dict[str, Overrides], Field(min_length=2)]
    seeds: Annotated[tuple[NotNegative, ...], Field(min_length=1)]
    suite: Text | None = None
    benchmark: Text | None = None
    budget: Budget | None = None
    shared_stages: NotNegative = 0
    rates: Rates | None = None
    paper: Paper | None = None
    equivalent: PositiveNumber | None = None
    pairs: tuple[tuple[Text, Text], ...] = ()  # further comparisons: an arm, and the arm that it is compared with
    run_on: Text | None = None
    smoke: Smoke = Smoke()

    @model_validator(mode="after")
    def _fits_together(self) -> Ablation:
        for name in self.arms:
            if not re.fullmatch(r"\w[\w.+=@-]*", name) or name == SHARED:
                raise InputError(f"arms: {name!r} also names a folder: letters, digits and .+=@-_, and not {SHARED!r}")
        for key, names in {
            "baseline": [self.baseline],
            "smoke.arms": self.smoke.arms,
            "paper.scores": self.paper.scores if self.paper else (),
            "pairs": [arm for pair in self.pairs for arm in pair],
        }.items():
            for name in names:
                if name not in self.arms:
                    raise InputError(f"{key}: {name!r} is no arm{did_you_mean(name, self.arms)}")
        if len(set(self.seeds)) < len(self.seeds) or (self.rates and self.rates.seed in self.seeds):
            raise InputError("seeds: need different numbers, and a tuning seed (rates.seed) that is none of them")
        if twice := [arm for arm, other in self.pairs if other in (arm, self.baseline)]:
            raise InputError(
                f"pairs: {twice[0]!r} needs another arm beside it, and not the baseline: all arms have that one"
            )
        if self.name == SMOKE:
            raise InputError(f"name: {SMOKE!r} is the folder of smoke tests: choose another name")
        if (self.suite is None) == (self.benchmark is None):
            raise InputError("needs suite or benchmark, and not both")
        return self


class Study:
    """An ablation with the recipes of its arms, all of them checked. Raises InputError with file and arm."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.said = validate(Ablation, load_yaml(file), str(file))
        base = file.parent / Path(self.said.base).expanduser()
        with error_prefix(f"{file}: base"):
            self.base = load_yaml(base)
        self.base.pop("provenance", None)  # it is of the base's values alone
        recipes = {arm: self.recipe(arm, self.said.seeds[0]) for arm in self.said.arms}
        _refuse_equal_arms(str(file), self.said.baseline, recipes)
        if self.said.shared_stages:
            self._check_shared(recipes)

    def suite(self, smoke: bool) -> str:
        """Returns the suite that cells are scored on: the path of one beside the study's file, or the name as it is.

        Raises InputError for the smoke test of a benchmark that names no suite.
        """
        if smoke and self.said.benchmark and not self.said.smoke.suite:
            raise InputError(f"{self.file}: smoke: needs a suite: a benchmark keeps results, and a smoke test may not")
        name = (smoke and self.said.smoke.suite) or self.said.suite or ""
        path = os.path.join(self.file.parent, expand(name))  # noqa: PTH118  keeps `./`, so that `dev` is no packaged name
        return path if Path(path).exists() else name

    def recipe(self, arm: str, seed: int, *, smoke: bool = False) -> Recipe:
        """Returns the whole recipe of an arm, before any budget; with `smoke`, cut to the size of a smoke test."""
        overrides = self.said.arms[arm]
        with error_prefix(f"{self.file}: arms.{arm}"):
            for key, where in _CHOSEN.items():
                if key in overrides:
                    raise InputError(f"{key} is chosen by the study: see {where}")
            tree = with_overrides(self.base, overrides)
            tree |= {"name": f"{self.said.name} {arm} seed {seed}", "seed": seed}
            tree["run"] = (tree.get("run") or {}) | {"out": "."}
            recipe = Recipe.parse(tree)
        if not smoke:
            return recipe
        for stage in tree["stages"]:
            if "optim" in stage:
                stage["optim"] |= {"steps": SMOKE_STEPS, "warmup_steps": 0}
        with error_prefix(f"{self.file}: smoke.overrides"):
            return Recipe.parse(with_overrides(tree, self.said.smoke.overrides))

    def _check_shared(self, recipes: Mapping[str, Recipe]) -> None:
        count = self.said.shared_stages
        fewest = min(len(recipe.stages) for recipe in recipes.values())
        if count >= fewest:
            raise InputError(f"{self.file}: shared_stages: {count} of {fewest} stages leaves none that differs")
        ours = shared_values(recipes[self.said.baseline], count)
        for arm, recipe in recipes.items():
            theirs = shared_values(recipe, count)
            if changed := [key for key in ours | theirs if ours.get(key) != theirs.get(key)]:
                raise InputError(
                    f"{self.file}: arms.{arm}: {changed[0]} is of the first {count} stages, which all arms share: "
                    "leave it to the base, or lower shared_stages"
                )


def shared_values(recipe: Recipe, count: int) -> dict[str, Any]:
    """Lists what decides the first `count` stages of a recipe, by dotted key."""
    kept = recipe.model_dump(mode="json", include={"model", "tune"})
    kept |= {"stages": {s.name: s.model_dump(mode="json") for s in recipe.stages[:count]}, "run": {}}
    kept["run"]["precision"] = recipe.run.precision
    if recipe.eval.decides:
        kept["eval"] = recipe.eval.model_dump(mode="json")
    return dict(leaves(kept))


def _refuse_equal_arms(file: str, baseline: str, recipes: Mapping[str, Recipe]) -> None:
    seen: dict[str, str] = {}
    for arm in sorted(recipes, key=lambda arm: arm != baseline):
        content = recipes[arm].model_dump_json(exclude={"name"})
        if (other := seen.setdefault(content, arm)) != arm:
            raise ConfigError(f"{file}: arms.{arm}: is the same as {other}: it changes nothing")


# ---- overrides


def with_overrides(content: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the mapping of a recipe with the values at dotted keys replaced or added. `content` stays as it is.

    A number enters a list, and so does the name of a stage. `stages: [second, first]` takes stages by name, in order,
    each with the mining before it.
    """
    tree: dict[str, Any] = _unshared(content)
    for key, value in overrides.items():
        if key == "stages" and isinstance(value, list) and value and all(isinstance(name, str) for name in value):
            tree["stages"] = _picked(tree.get("stages") or [], value)
        else:
            _put(tree, key, _unshared(value))
    return tree


def _unshared(value: Any) -> Any:
    """Copies mappings and lists. An alias of YAML, which is one object in two places, becomes two objects."""
    if isinstance(value, Mapping):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _put(tree: Any, key: str, value: Any) -> None:
    *above, last = key.split(".")
    place = tree
    for part in above:
        inner = place[at] if (at := _place(place, part, key)) in _places(place) else None
        if inner is None and isinstance(place, dict):
            inner = place[at] = {}
        place = inner
    place[_place(place, last, key)] = value


def _places(place: Any) -> Any:
    return range(len(place)) if isinstance(place, list) else place


def _place(place: Any, part: str, key: str) -> Any:
    """Returns the index of `part` in a list, or the key itself in a mapping."""
    if isinstance(place, dict):
        return part
    if not isinstance(place, list):
        raise InputError(f"{key}: there is no {part!r} in {place!r}")
    if part.isdigit() and int(part) < len(place):
        return int(part)
    names = [str(entry["name"]) for entry in place if isinstance(entry, dict) and "name" in entry]
    for number, entry in enumerate(place):
        if isinstance(entry, dict) and str(entry.get("name")) == part:
            return number
    known = f"; known: {', '.join(names)}" if names else f", which has {len(place)} entries"
    raise InputError(f"{key}: no {part!r} in that list{did_you_mean(part, names)}{known}")


def _picked(stages: list[Any], names: list[str]) -> list[Any]:
    blocks: dict[str, list[Any]] = {}
    waiting: list[Any] = []
    for stage in stages:
        waiting.append(stage)
        if stage.get("kind", "train") != "mine":
            blocks[str(stage.get("name"))], waiting = waiting, []
    for name in names:
        if name not in blocks:
            raise InputError(f"stages: {name!r} is no stage{did_you_mean(name, blocks)}; known: {', '.join(blocks)}")
    return [stage for name in names for stage in blocks[name]]
