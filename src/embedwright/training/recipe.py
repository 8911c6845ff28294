"""`Recipe`: everything a run is, from one YAML file. Frozen; unknown keys are refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from embedwright.config import ConfigError, did_you_mean, load_yaml, validate
from embedwright.data.example import InBatch, Task

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelPart(_Part):
    """What is trained. `base`: packaged name, folder, hub id or .gguf; `layers`: keep the first so many."""

    base: str
    layers: Positive | None = None
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    pooling: Literal["latent", "mean", "last", "self", "mlp"] = "latent"
    latents: Positive = 512
    heads: Positive = 8
    head_dim: Positive | None = None
    multiple: Positive = 4
    max_tokens: Annotated[int, Field(ge=8)] = 512


class TunePart(_Part):
    """Which weights move. The pooling block always trains in full, in an optimizer group of its own."""

    method: Literal["lora", "full"] = "lora"
    rank: Positive = 16
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    pooling_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    gradient_checkpointing: bool = False


class DataPart(_Part):
    """One file of examples (or a raw kind, or a BEIR folder). `weight` multiplies its share by number of rows.

    `rows` is how many there will be: for `plan` alone, while the file is not there.
    """

    path: str
    corpus: str | None = None
    task: Task | str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    rows: Positive | None = None


class OptimPart(_Part):
    """AdamW with linear warm-up and linear decay to zero; `clip` bounds the gradient's norm."""

    lr: Annotated[float, Field(gt=0)]
    steps: Positive
    batch_queries: Positive
    warmup_steps: NotNegative = 0
    clip: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _warm_up_ends(self) -> OptimPart:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be below steps={self.steps}")
        return self


class StagePart(_Part):
    """One pass of contrastive training over a blend of data, with an optimizer of its own."""

    name: str
    data: Annotated[tuple[DataPart, ...], Field(min_length=1)]
    in_batch_negatives: InBatch
    hard_negatives: NotNegative
    batching: Literal["blended", "homogeneous"] = "blended"
    temperature: Annotated[float, Field(gt=0)] = 0.02
    optim: OptimPart


class RunPart(_Part):
    """Where and how: `batch_tokens` bounds one forward pass; larger batches are accumulated exactly."""

    out: str
    checkpoint_every: Positive = 100
    keep: Positive = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_tokens: Positive = 8192
    tracker: Literal["tensorboard", "none"] = "tensorboard"


class EvalPart(_Part):
    """Suites run before the first stage, at the end of each stage, and `every` so many steps."""

    suites: tuple[str, ...] = ()
    every: Positive | None = None


SOURCES = ("paper", "released code", "sister model", "guess")  # of a recipe's values, the surest first


class Recipe(_Part):
    """One run, all stages in it (design, section 8).

    `provenance` says of each value that makes the model where it comes from: its dotted key (a stage by its name) to
    one of SOURCES, and a note behind a colon. Where it is given, it is complete.
    """

    name: str
    seed: int = 0
    strict: bool = False  # a missing instruction or licence is an error
    model: ModelPart
    tune: TunePart = TunePart()
    stages: Annotated[tuple[StagePart, ...], Field(min_length=1)]
    run: RunPart
    eval: EvalPart = EvalPart()
    provenance: dict[str, str] | None = None

    @model_validator(mode="after")
    def _provenance_is_complete(self) -> Recipe:
        if self.provenance is None:
            return self
        keys = set(self.values_by_key())
        if missing := sorted(keys - set(self.provenance)):
            raise ValueError(f"provenance: says nothing of {missing[0]}")
        for key, said in self.provenance.items():
            if key not in keys:
                raise ValueError(f"provenance: no value {key!r}{did_you_mean(key, keys)}")
            if said.partition(":")[0] not in SOURCES:
                raise ValueError(f"provenance.{key}: {said!r} is none of {', '.join(SOURCES)}")
        return self

    @model_validator(mode="after")
    def _stage_names_differ(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages need different names, got {names}")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML file. FileNotFoundError, or ConfigError that names the file, the key and the nearest key."""
        return validate(cls, load_yaml(Path(path)), str(path))

    @classmethod
    def parse(cls, content: dict[str, Any]) -> Recipe:
        """The same from a mapping. ConfigError as in `load`."""
        return validate(cls, content, "recipe")

    def values_by_key(self) -> dict[str, Any]:
        """What makes the model, by dotted key: a stage by its name, its list of data as one value."""
        values: dict[str, Any] = {}
        for part in ("model", "tune"):
            values |= {f"{part}.{key}": value for key, value in getattr(self, part).model_dump().items()}
        for stage in self.stages:
            values[f"stages.{stage.name}.data"] = stage.data
            fields = stage.model_dump(exclude={"name", "data", "optim"})
            values |= {f"stages.{stage.name}.{key}": value for key, value in fields.items()}
            values |= {f"stages.{stage.name}.optim.{key}": value for key, value in stage.optim.model_dump().items()}
        return values | {"run.precision": self.run.precision}

    def hash(self) -> str:
        """Of all that decides the weights: not where the run is kept, tracked, checkpointed or evaluated."""
        content = self.model_dump(mode="json", exclude={"name": True, "eval": True, "provenance": True})
        for stage in content["stages"]:
            for entry in stage["data"]:
                del entry["rows"]
        for key in ("out", "tracker", "checkpoint_every", "keep"):
            del content["run"][key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def with_out(self, out: str | Path) -> Recipe:
        return self.model_copy(update={"run": self.run.model_copy(update={"out": str(out)})})


def expand(path: str) -> Path:
    """A recipe's path with `${NAME}` filled from the environment. ConfigError names a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not os.environ.get(name):
            raise ConfigError(f"{path}: set the environment variable {name} to the folder it stands for")
        return os.environ[name]

    return Path(re.sub(r"\$\{(\w+)\}", value, path)).expanduser()
