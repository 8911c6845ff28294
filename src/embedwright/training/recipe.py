"""`Recipe`: everything a run is, from one YAML file. Frozen; unknown keys are refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from embedwright.config import ConfigError, did_you_mean, load_yaml, validate
from embedwright.errors import InputError, NotFoundError
from embedwright.training.parts import EvalPart, Flag, ModelPart, NotNegative, Part, RunPart, Text, TunePart
from embedwright.training.stages import ContrastiveStage, MaskedStage

PACKAGED = Path(__file__).parents[1] / "recipes"
KINDS = ("train", "mine", "mntp")  # of a stage in the file
SOURCES = ("paper", "released code", "sister model", "guess")  # of a recipe's values, the surest first


def _kind_of(stage: Any) -> str:
    kind = stage.get("kind") if isinstance(stage, dict) else getattr(stage, "kind", None)
    return "MaskedStage" if kind == "mntp" else "ContrastiveStage"


# one branch is chosen first: pydantic would report the mistakes that a stage makes as one of the other kind as well
StageOfKind = Annotated[
    Annotated[ContrastiveStage, Tag("ContrastiveStage")] | Annotated[MaskedStage, Tag("MaskedStage")],
    Discriminator(_kind_of),
]


class Recipe(Part):
    """One run, with all of its stages."""

    name: Text
    """Names the run in logs and in the model card."""
    seed: Annotated[NotNegative, Field(lt=2**63)] = 0
    """Seeds the order of rows, new weights and dropout."""
    strict: Flag = False
    """A missing instruction or licence is an error."""
    model: ModelPart
    tune: TunePart = TunePart()
    stages: Annotated[tuple[StageOfKind, ...], Field(min_length=1)]
    run: RunPart
    eval: EvalPart = EvalPart()
    provenance: dict[str, str] | None = None
    """Where each value comes from: dotted key to `paper`, `released code`, `sister model` or `guess`, and a note."""

    @model_validator(mode="after")
    def _provenance_is_complete(self) -> Recipe:
        if self.provenance is None:
            return self
        keys = set(self.values_by_key())
        optional = {f"stages.{stage.name}.optim.{key}" for stage in self.stages for key in stage.optim.added}
        if missing := sorted(keys - optional - set(self.provenance)):
            raise InputError(f"provenance: says nothing of {missing[0]}")
        for key, said in self.provenance.items():
            if key not in keys:
                raise InputError(f"provenance: no value {key!r}{did_you_mean(key, keys)}")
            if said.partition(":")[0] not in SOURCES:
                raise InputError(f"provenance.{key}: {said!r} is none of {', '.join(SOURCES)}")
        return self

    @model_validator(mode="after")
    def _four_bits_fit(self) -> Recipe:
        if self.tune.method == "qlora" and self.model.from_:
            raise InputError("tune.method: qlora holds a decoder (model.base) in 4 bits; use lora for model.from")
        if self.tune.method == "qlora" and self.run.parallel == "fsdp":
            raise InputError("run.parallel: fsdp cannot shard the 4-bit weights of tune.method: qlora; use ddp")
        return self

    @model_validator(mode="after")
    def _masked_phase_is_whole(self) -> Recipe:
        if self.run.parallel == "fsdp" and any(isinstance(stage, MaskedStage) for stage in self.stages):
            raise InputError("run.parallel: fsdp shards the embedding that a stage of kind: mntp needs whole; use ddp")
        return self

    @model_validator(mode="after")
    def _what_is_frozen_is_there(self) -> Recipe:
        if self.tune.freeze and self.model.base and self.model.pooling != "latent":
            raise InputError(f"tune.freeze: pooling {self.model.pooling} has no latents: leave it out")
        return self

    @model_validator(mode="after")
    def _adapters_are_there(self) -> Recipe:
        if self.tune.adapters == "continue" and not (self.model.from_ and self.tune.method == "lora"):
            raise InputError("tune.adapters: continue trains the adapters of model.from on, by method lora alone")
        return self

    @model_validator(mode="after")
    def _what_is_saved_is_there(self) -> Recipe:
        if "adapter" in self.run.save and self.tune.method == "full":
            raise InputError("run.save: tune.method full trains no adapters: leave adapter out, or tune by lora")
        if not self.run.save and (keeps := [stage.name for stage in self.stages if stage.save]):
            raise InputError(f"stages.{keeps[0]}.save keeps the forms of run.save, but run.save names none")
        return self

    @model_validator(mode="after")
    def _stage_names_differ(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise InputError(f"stages need different names, got {names}")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a YAML file, or a packaged recipe by its name: `laptop`.

        FileNotFoundError, or ConfigError that names the file, the key and the nearest key.
        """
        return _parsed(read_recipe(path), str(path))

    @classmethod
    def parse(cls, content: dict[str, Any], where: str = "recipe") -> Recipe:
        """Parses a mapping. Errors as in `load`, in front of them `where`."""
        return _parsed(content, where)

    def values_by_key(self) -> dict[str, Any]:
        """Lists the values that make the model, by dotted key: stages by their names, a list of data as one value."""
        values: dict[str, Any] = {}
        for part in ("model", "tune"):
            values |= {f"{part}.{key}": value for key, value in getattr(self, part).model_dump().items()}
        for stage in self.stages:
            values[f"stages.{stage.name}.{stage.reads}"] = stage.data
            chosen = stage.chosen()
            left_out = {"without_instruction", "loss", "sampling_alpha", "mine"}  # at their defaults
            fields = stage.model_dump(exclude={"name", stage.reads, "optim", "save"} | left_out)
            fields |= {f"loss.{key}": value for key, value in chosen.pop("loss", {}).items()} | chosen
            values |= {f"stages.{stage.name}.{key}": value for key, value in fields.items()}
            values |= {f"stages.{stage.name}.optim.{key}": value for key, value in stage.optim.model_dump().items()}
        return values | {"run.precision": self.run.precision}

    def hash(self) -> str:
        """Hashes `decisive`: a run resumes only under a recipe with the same hash."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()[:16]

    def decisive(self) -> dict[str, Any]:
        """Lists the values that decide rows and loss; all others may change when a run resumes.

        It leaves out how a step fits into memory and is divided among processes, and where the run is kept, tracked,
        checkpointed, saved or evaluated. It leaves out the paths of data and model, too: a run knows these by their
        content.
        """
        content = self.model_dump(mode="json", exclude={"name", "strict", "eval", "provenance"})
        for key in ("base", "from"):
            content["model"].pop(key, None)
        for stage, part in zip(content["stages"], self.stages, strict=True):
            del stage["save"]
            for key in part.optim.added:
                del stage["optim"][key]
            for holder, key in ((stage, "without_instruction"), (stage.get("loss", {}), "spread_out")):
                if not holder.get(key):  # so that runs begun before there was such a key resume
                    holder.pop(key, None)
            for entry in stage.get("data") or stage["text"]:
                for key in ("path", "corpus", "rows"):
                    entry.pop(key, None)
        content["run"] = {"precision": self.run.precision}
        del content["tune"]["gradient_checkpointing"]
        if self.eval.decides:
            content["eval"] = self.eval.model_dump(mode="json")
        return content

    @property
    def out(self) -> Path:
        """The run's folder: `run.out`, expanded as the other paths of a recipe are."""
        return expand(self.run.out)

    def with_out(self, out: str | Path) -> Recipe:
        return self.model_copy(update={"run": self.run.model_copy(update={"out": str(out)})})


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Reads the keys of a recipe file, or of a packaged recipe by its name, unchecked. Errors as in `Recipe.load`."""
    file = Path(path).expanduser()
    if not file.exists():
        names = sorted(packaged.stem for packaged in PACKAGED.glob("*.yaml"))
        if str(path) not in names:
            raise NotFoundError(f"{path}: no such recipe file; packaged are: {', '.join(names)}")
        file = PACKAGED / f"{path}.yaml"
    return load_yaml(file)


def _parsed(content: dict[str, Any], where: str) -> Recipe:
    """Puts each stage of `kind: mine` into the stage after it. Errors still name a stage by its place in the file."""
    stages, places, waiting = [], [], None
    for place, stage in enumerate(content["stages"] if isinstance(content.get("stages"), list) else []):
        if not isinstance(stage, dict):
            raise ConfigError(f"{where}: stages.{place}: expected a mapping of keys, found {type(stage).__name__}")
        kind, rest = _kind_and_rest(stage, f"{where}: stages.{place}")
        if waiting is not None and kind == "mntp":
            raise ConfigError(f"{where}: stages.{waiting[0]}: mines negatives, but the stage after it uses none")
        if waiting is not None and (kind == "mine" or "mine" in rest):
            raise ConfigError(f"{where}: stages.{place}: negatives are mined for it by stages.{waiting[0]} already")
        if kind == "mine":
            waiting = place, rest
            continue
        stages.append(rest if waiting is None else rest | {"mine": waiting[1]})
        places.append((place, None if waiting is None else waiting[0]))
        waiting = None
    if waiting is not None:
        raise ConfigError(f"{where}: stages.{waiting[0]}: mines negatives for the stage after it, but there is none")

    def in_file(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
        match loc:
            case ("stages", number, "ContrastiveStage" | "MaskedStage", *rest):
                return in_file(("stages", number, *rest))
            case ("stages", number, "data", entry, "task", "Task" | "bare", *rest):
                return in_file(("stages", number, "data", entry, "task", *rest))
            case ("stages", int(number), "mine", *rest) if places[number][1] is not None:
                return "stages", places[number][1] or 0, *rest
            case ("stages", int(number), *rest):
                return "stages", places[number][0], *rest
        return loc

    return validate(Recipe, content | {"stages": stages} if stages else content, where, in_file)


def _kind_and_rest(stage: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Returns the kind of a stage and the keys of its part, of which `kind` is one in a masked phase."""
    kind = stage.get("kind", "train")
    if kind not in KINDS:
        raise ConfigError(f"{where}.kind: {kind!r} is none of {', '.join(KINDS)}")
    return kind, {key: value for key, value in stage.items() if key != "kind" or kind == "mntp"}


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for everything that is not a mapping or a list with entries."""
    if isinstance(tree, dict | list) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def differences(before: Any, after: Any) -> str:
    """Returns the first few dotted keys whose values differ, each with both values, in one line."""
    old, new = dict(leaves(before)), dict(leaves(after))
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    shown = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys[:5]]
    return ", ".join([*shown, *([f"and {len(keys) - 5} more"] if len(keys) > 5 else [])])


def expand(path: str) -> Path:
    """Fills `~` and `${NAME}`, a variable, into a recipe's path. ConfigError names a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not os.environ.get(name):
            raise ConfigError(f"{path}: set the environment variable {name} to the folder it stands for")
        return os.environ[name]

    return Path(re.sub(r"\$\{(\w+)\}", value, path)).expanduser()
