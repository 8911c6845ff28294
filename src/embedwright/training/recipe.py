"""`Recipe`: everything a run is, from one YAML file. Frozen; unknown keys are refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from embedwright.config import ConfigError, did_you_mean, load_yaml, validate
from embedwright.data.candidates import Rule, check_settings
from embedwright.data.example import InBatch, Task
from embedwright.errors import InputError

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
    """Which weights move. The pooling block always trains in full, in an optimizer group of its own.

    `qlora` is `lora` on a base that is held in 4 bits meanwhile (docs/qlora.md).
    """

    method: Literal["lora", "full", "qlora"] = "lora"
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
            raise InputError(f"warmup_steps={self.warmup_steps} must be below steps={self.steps}")
        return self


class DistillPart(_Part):
    """Terms beside the stage's loss that follow a teacher (docs/losses.md).

    `score_weight`: KL of the model's softmax over a row's positive and own negatives to that of the scores the row
    carries, at `temperature` (the model's is the stage's). `vector_weight`: distance to the vectors of `teacher`.
    """

    score_weight: Annotated[float, Field(ge=0)] = 0.0
    temperature: Annotated[float, Field(gt=0)] | None = None  # None: the stage's
    vector_weight: Annotated[float, Field(ge=0)] = 0.0
    teacher: str | None = None
    metric: Literal["cosine", "mse"] = "cosine"

    @model_validator(mode="after")
    def _says_what_to_follow(self) -> DistillPart:
        if not (self.score_weight or self.vector_weight):
            raise InputError("needs score_weight, vector_weight, or both")
        if bool(self.vector_weight) != bool(self.teacher):
            raise InputError("vector_weight and teacher need each other")
        if self.temperature and not self.score_weight:
            raise InputError("temperature is of the scores, and score_weight is 0")
        return self


class LossPart(_Part):
    """What a stage adds to InfoNCE; nothing by default. Formulas and sources: docs/losses.md."""

    mask_above: Annotated[float, Field(ge=-2, le=2)] | None = None  # no negative: cosine above the positive's + this
    hardness: Annotated[float, Field(ge=0)] = 0.0  # a negative weighs exp(hardness * cosine)
    hardness_on: Literal["own", "all"] = "own"  # the row's own hard negatives, or those of the batch too
    focal: Annotated[float, Field(ge=0)] = 0.0  # a query weighs (1 - p of its positive) ** focal
    same_tower: Literal["none", "queries", "both"] = "none"  # more in-batch negatives: query-query, document-document
    dims: tuple[Positive, ...] = ()  # Matryoshka: also on the first so many numbers of each vector
    dim_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None  # of the full width, then of each of dims
    scored: Literal["info_nce", "cosent"] = "info_nce"  # rows that carry a score
    distill: DistillPart | None = None

    @model_validator(mode="after")
    def _dims_are_weighed(self) -> LossPart:
        if len(set(self.dims)) != len(self.dims):
            raise InputError(f"dims: {list(self.dims)} names one width twice")
        if self.dim_weights is not None and len(self.dim_weights) != len(self.dims) + 1:
            raise InputError(
                f"dim_weights: {len(self.dim_weights)} weights; needed are {len(self.dims) + 1}, the full width's first"
            )
        if self.hardness_on == "all" and not self.hardness:
            raise InputError("hardness_on: nothing to weigh by, hardness is 0")
        return self


PREVIOUS = "previous"  # teacher of a stage's negatives
_EXTRAS = {"loss", "sampling_alpha", "mine"}


class MinePart(_Part):
    """Hard negatives mined anew for a stage: before its first step, and again behind `every` so many of its steps.

    `teacher`: `previous` is the model as it then is; else a packaged name, folder or hub id. The rest as `mine` has it.
    """

    name: str = "mine"
    teacher: str = PREVIOUS
    rule: Rule = "perc"
    margin: float | None = None
    negatives: Positive = 7
    depth: Positive = 100
    sampled: bool = False
    every: Positive | None = None

    @model_validator(mode="after")
    def _settings_fit(self) -> MinePart:
        check_settings(self.rule, self.margin, self.negatives, self.depth)
        return self


class StagePart(_Part):
    """One pass of contrastive training over a blend of data, with an optimizer of its own.

    `sampling_alpha`: an entry of `data` is drawn in proportion to weight * rows ** alpha; 1 is by size, 0 alike. `mine`
    is what a stage of `kind: mine` in front of it becomes.
    """

    name: str
    data: Annotated[tuple[DataPart, ...], Field(min_length=1)]
    in_batch_negatives: InBatch
    hard_negatives: NotNegative
    batching: Literal["blended", "homogeneous"] = "blended"
    temperature: Annotated[float, Field(gt=0)] = 0.02
    loss: LossPart = LossPart()
    sampling_alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    mine: MinePart | None = None
    optim: OptimPart

    @model_validator(mode="after")
    def _uses_what_is_mined(self) -> StagePart:
        if self.mine is not None and not 1 <= self.hard_negatives <= self.mine.negatives:
            raise InputError(f"hard_negatives={self.hard_negatives} of {self.mine.negatives} that are mined for it")
        return self

    @model_validator(mode="after")
    def _loss_has_what_it_needs(self) -> StagePart:
        distill = self.loss.distill
        if not self.hard_negatives and self.loss.hardness and self.loss.hardness_on == "own":
            raise InputError("loss.hardness weighs a row's own negatives, and hard_negatives is 0")
        if not self.hard_negatives and distill is not None and distill.score_weight:
            raise InputError("loss.distill.score_weight compares a row's own negatives, and hard_negatives is 0")
        return self

    def extras(self) -> dict[str, Any]:
        """What came later than the first recipes, as far as it was chosen: one without it does not speak of it."""
        return self.model_dump(mode="json", include=_EXTRAS, exclude_defaults=True)


TRACKERS = ("tensorboard", "wandb", "trackio")


def _listed(trackers: Any) -> Any:
    """One name is a list of one, `none` the empty list."""
    listed = ([] if trackers == "none" else [trackers]) if isinstance(trackers, str) else trackers
    if not isinstance(listed, list | tuple) or any(name not in TRACKERS for name in listed):
        raise InputError(f"{trackers!r} is neither none, nor one of {', '.join(TRACKERS)}, nor a list of these")
    return listed


class RunPart(_Part):
    """Where and how: `batch_tokens` bounds one forward pass of one process; larger batches are accumulated exactly.

    `workers` batches are tokenised ahead (0: none). `parallel`: how many processes share the work, where torchrun or
    accelerate started many.
    """

    out: str
    checkpoint_every: Positive = 100
    keep: Positive = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_tokens: Positive = 8192
    workers: NotNegative = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    tracker: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ("tensorboard",)


class EvalPart(_Part):
    """Suites run before the first stage, at the end of each stage, and `every` so many steps.

    `best`: each stage ends on the weights with the best mean of the suites' main scores. `patience`: a stage ends
    behind so many evaluations in a row without a better one.
    """

    suites: tuple[str, ...] = ()
    every: Positive | None = None
    best: bool = False
    patience: Positive | None = None

    @model_validator(mode="after")
    def _has_something_to_go_by(self) -> EvalPart:
        if (self.best or self.patience) and not (self.suites and self.every):
            raise InputError("best and patience need suites, and every")
        return self

    @property
    def decides(self) -> bool:
        """Whether the weights depend on the scores."""
        return self.best or self.patience is not None


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
            raise InputError(f"provenance: says nothing of {missing[0]}")
        for key, said in self.provenance.items():
            if key not in keys:
                raise InputError(f"provenance: no value {key!r}{did_you_mean(key, keys)}")
            if said.partition(":")[0] not in SOURCES:
                raise InputError(f"provenance.{key}: {said!r} is none of {', '.join(SOURCES)}")
        return self

    @model_validator(mode="after")
    def _four_bits_stay_whole(self) -> Recipe:
        if self.tune.method == "qlora" and self.run.parallel == "fsdp":
            raise InputError("run.parallel: fsdp cannot cut the 4-bit weights of tune.method: qlora; use ddp")
        return self

    @model_validator(mode="after")
    def _stage_names_differ(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise InputError(f"stages need different names, got {names}")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML file. FileNotFoundError, or ConfigError that names the file, the key and the nearest key."""
        return _parsed(load_yaml(Path(path)), str(path))

    @classmethod
    def parse(cls, content: dict[str, Any]) -> Recipe:
        """The same from a mapping. ConfigError as in `load`."""
        return _parsed(content, "recipe")

    def values_by_key(self) -> dict[str, Any]:
        """What makes the model, by dotted key: a stage by its name, its list of data as one value."""
        values: dict[str, Any] = {}
        for part in ("model", "tune"):
            values |= {f"{part}.{key}": value for key, value in getattr(self, part).model_dump().items()}
        for stage in self.stages:
            values[f"stages.{stage.name}.data"] = stage.data
            fields = stage.model_dump(exclude={"name", "data", "optim"} | _EXTRAS)
            extras = stage.extras()
            fields |= {f"loss.{key}": value for key, value in extras.pop("loss", {}).items()} | extras
            values |= {f"stages.{stage.name}.{key}": value for key, value in fields.items()}
            values |= {f"stages.{stage.name}.optim.{key}": value for key, value in stage.optim.model_dump().items()}
        return values | {"run.precision": self.run.precision}

    def hash(self) -> str:
        """Of all that decides the weights: not where the run is kept, tracked, checkpointed or evaluated."""
        content = self.model_dump(mode="json", exclude={"name": True, "eval": True, "provenance": True})
        for part, stage in zip(self.stages, content["stages"], strict=True):
            for key in _EXTRAS:
                del stage[key]
            stage |= part.extras()  # so that keys which came later change no hash of a recipe without them
            for entry in stage["data"]:
                del entry["rows"]
        for key in ("out", "tracker", "checkpoint_every", "keep", "workers", "parallel"):
            del content["run"][key]
        if self.eval.decides:
            content["eval"] = self.eval.model_dump(mode="json")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def with_out(self, out: str | Path) -> Recipe:
        return self.model_copy(update={"run": self.run.model_copy(update={"out": str(out)})})


def _parsed(content: dict[str, Any], where: str) -> Recipe:
    """Stages of `kind: mine` go into those behind them; errors still name a stage by its place in the file."""
    stages, places, waiting = [], [], None
    for place, stage in enumerate(content["stages"] if isinstance(content.get("stages"), list) else []):
        rest = dict(stage) if isinstance(stage, dict) else stage
        kind = rest.pop("kind", "train") if isinstance(rest, dict) else "train"
        if kind not in ("train", "mine"):
            raise ConfigError(f"{where}: stages.{place}.kind: {kind!r} is neither train nor mine")
        if waiting is not None and (kind == "mine" or "mine" in rest):
            raise ConfigError(f"{where}: stages.{place}: negatives are mined for it by stages.{waiting[0]} already")
        if kind == "mine":
            waiting = place, rest
            continue
        stages.append(rest if waiting is None else rest | {"mine": waiting[1]})
        places.append((place, None if waiting is None else waiting[0]))
        waiting = None
    if waiting is not None:
        raise ConfigError(f"{where}: stages.{waiting[0]}: mines negatives for the stage behind it, and there is none")

    def in_file(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
        match loc:
            case ("stages", int(number), "mine", *rest) if places[number][1] is not None:
                return "stages", places[number][1] or 0, *rest
            case ("stages", int(number), *rest):
                return "stages", places[number][0], *rest
        return loc

    return validate(Recipe, content | {"stages": stages} if stages else content, where, in_file)


def expand(path: str) -> Path:
    """A recipe's path with `${NAME}` filled from the environment. ConfigError names a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not os.environ.get(name):
            raise ConfigError(f"{path}: set the environment variable {name} to the folder it stands for")
        return os.environ[name]

    return Path(re.sub(r"\$\{(\w+)\}", value, path)).expanduser()
