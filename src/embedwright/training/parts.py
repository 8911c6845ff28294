"""The parts of a recipe: frozen, checked one by one. Unknown keys are refused, and values of another type too.

YAML has its own numbers and truth values, so nothing is converted: `"3"`, `3.0` and `true` are no whole numbers.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from embedwright.data.schema import InBatch, Task
from embedwright.errors import InputError
from embedwright.mining.rules import Rule, check_sampling, check_settings

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _number(value: Any) -> Any:
    """`2e-5` is a number to everybody but YAML 1.1, which asks for a dot and a sign."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


Positive = Annotated[int, Field(strict=True, ge=1)]
NotNegative = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, BeforeValidator(_number), Field(strict=True, allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, le=1)]
Weight = Annotated[Number, Field(ge=0)]
PositiveNumber = Annotated[Number, Field(gt=0)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(pattern=r"\S")]  # not empty


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)


class ModelPart(Part):
    """What is trained: `base`, a decoder that becomes an embedder, or `from`, an embedder that trains on.

    `base`: packaged name, folder, hub id or .gguf; `layers`: keep the first so many. `from`: whatever `Embedder.load`
    opens. It keeps its contract, pooling and attention, so of the other keys `max_tokens` alone goes with it, to
    shorten.
    """

    base: Text | None = None
    from_: Annotated[Text | None, Field(alias="from")] = None
    layers: Positive | None = None
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    pooling: Literal["latent", "mean", "last", "self", "mlp"] = "latent"
    latents: Positive = 512
    heads: Positive = 8
    head_dim: Positive | None = None
    multiple: Positive = 4
    max_tokens: Annotated[Positive, Field(ge=8)] = 512
    pool_prompt: Flag = False  # every token is pooled, the instruction's too, as servers do that know no prompts

    @property
    def name(self) -> str:
        """The decoder or the embedder, as the recipe has it."""
        return self.from_ or self.base or ""

    @property
    def shortened(self) -> int | None:
        """The `max_tokens` that an embedder is to have instead of its own."""
        return self.max_tokens if "max_tokens" in self.model_fields_set else None

    @model_validator(mode="after")
    def _begins_with_one_model(self) -> ModelPart:
        if (self.base is None) == (self.from_ is None):
            raise InputError("needs base, a decoder, or from, an embedder to train on, and not both")
        if self.from_ and (others := sorted(self.model_fields_set - {"base", "from_", "max_tokens"})):
            raise InputError(f"{', '.join(others)}: an embedder of `from` keeps its own; leave out all but max_tokens")
        return self

    @model_serializer(mode="wrap")
    def _as_it_acts(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what the embedder of `from` decides, so that what is written is a recipe again."""
        values = dump(self)
        if self.from_ is None:
            return {key: value for key, value in values.items() if key != "from" and (value or key != "pool_prompt")}
        return {"from": self.from_} | ({} if self.shortened is None else {"max_tokens": self.max_tokens})


class TunePart(Part):
    """Which weights move. The pooling block always trains in full, in an optimizer group of its own.

    `qlora` is `lora` on a base that is held in 4 bits meanwhile (docs/qlora.md).
    """

    method: Literal["lora", "full", "qlora"] = "lora"
    rank: Positive = 16
    alpha: Positive = 32
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    pooling_lr_ratio: PositiveNumber = 1.0
    gradient_checkpointing: Flag = False


def _form_of(task: Any) -> str:
    return "Task" if isinstance(task, dict | Task) else "bare"


# one branch is chosen first: pydantic would report a mistake in a description as "not a string" as well
NameOrTask = Annotated[Annotated[Task, Tag("Task")] | Annotated[Text, Tag("bare")], Discriminator(_form_of)]


class DataPart(Part):
    """One file of examples (or a raw kind, or a BEIR folder). `weight` multiplies its share by number of rows.

    `rows` is how many there will be: for `plan` alone, while the file is not there.
    """

    path: Text
    corpus: Text | None = None
    task: NameOrTask | None = None
    weight: PositiveNumber = 1.0
    rows: Positive | None = None


class OptimPart(Part):
    """AdamW with linear warm-up and linear decay to zero; `clip` bounds the gradient's norm."""

    lr: PositiveNumber
    steps: Positive
    batch_queries: Positive
    warmup_steps: NotNegative = 0
    clip: PositiveNumber = 1.0
    weight_decay: Weight = 0.0

    @model_validator(mode="after")
    def _warm_up_ends(self) -> OptimPart:
        if self.warmup_steps >= self.steps:
            raise InputError(f"warmup_steps={self.warmup_steps} must be below steps={self.steps}")
        return self


class DistillPart(Part):
    """Terms beside the stage's loss that follow a teacher (docs/losses.md).

    `score_weight`: KL of the model's softmax over a row's positive and own negatives to that of the scores the row
    carries, at `temperature` (the model's is the stage's). `vector_weight`: distance to the vectors of `teacher`.
    """

    score_weight: Weight = 0.0
    temperature: PositiveNumber | None = None  # None: the stage's
    vector_weight: Weight = 0.0
    teacher: Text | None = None

    @model_validator(mode="after")
    def _says_what_to_follow(self) -> DistillPart:
        if not (self.score_weight or self.vector_weight):
            raise InputError("needs score_weight, vector_weight, or both")
        if bool(self.vector_weight) != bool(self.teacher):
            raise InputError("vector_weight and teacher need each other")
        if self.temperature and not self.score_weight:
            raise InputError("temperature is of the scores, and score_weight is 0")
        return self


class LossPart(Part):
    """What a stage adds to InfoNCE; nothing by default. Formulas and sources: docs/losses.md."""

    mask_above: Annotated[Number, Field(ge=-2, le=2)] | None = None  # no negative: cosine above the positive's + this
    hardness: Weight = 0.0  # a hard negative of the row weighs exp(hardness * cosine)
    focal: Weight = 0.0  # a query weighs (1 - p of its positive) ** focal
    same_tower: Literal["none", "queries", "both"] = "none"  # more in-batch negatives: query-query, document-document
    dims: tuple[Positive, ...] = ()  # Matryoshka: also on the first so many numbers of each vector
    scored: Literal["info_nce", "cosent"] = "info_nce"  # rows that carry a score
    distill: DistillPart | None = None

    @model_validator(mode="after")
    def _dims_differ(self) -> LossPart:
        if len(set(self.dims)) != len(self.dims):
            raise InputError(f"dims: {list(self.dims)} names one width twice")
        return self


PREVIOUS = "previous"  # teacher of a stage's negatives
START = "start"  # what evaluations before the first stage are called


class MinePart(Part):
    """Hard negatives mined anew for a stage: before its first step, and again after `every` so many of its steps.

    `teacher`: `previous` is the model as it then is; else a packaged name, folder or hub id. The rest as `mine` has it.
    `every` is for `previous` alone: another teacher would find the same again.
    """

    name: Text = "mine"
    teacher: Text = PREVIOUS
    rule: Rule = "perc"
    margin: Number | None = None
    negatives: Positive = 7
    depth: Positive = 100
    sampled: Flag = False
    sample_from: Positive | None = None
    every: Positive | None = None

    @model_validator(mode="after")
    def _settings_fit(self) -> MinePart:
        check_settings(self.rule, self.margin, self.negatives, self.depth)
        check_sampling(self.sampled, self.sample_from, self.negatives)
        if self.every is not None and self.teacher != PREVIOUS:
            raise InputError(
                f"every: {self.teacher} does not change in the run and would mine the same again: "
                f"leave every out, or mine with teacher: {PREVIOUS}"
            )
        return self


def _folder_name(name: str) -> str:
    if name in (".", "..", START) or not re.fullmatch(r"[\w .+=@-]+", name):
        raise InputError(f"{name!r} also names files of the run: letters, digits, space and .+=@-_, and not {START!r}")
    return name


class StagePart(Part):
    """One pass of contrastive training over a blend of data, with an optimizer of its own.

    `sampling_alpha`: an entry of `data` is drawn in proportion to weight * rows ** alpha; 1 is by size, 0 alike. `mine`
    is what a stage of `kind: mine` in front of it becomes.
    """

    name: Annotated[Text, AfterValidator(_folder_name)]
    data: Annotated[tuple[DataPart, ...], Field(min_length=1)]
    in_batch_negatives: InBatch
    hard_negatives: NotNegative
    batching: Literal["blended", "homogeneous"] = "blended"
    temperature: PositiveNumber = 0.02
    loss: LossPart = LossPart()
    sampling_alpha: Share = 1.0
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
        if not self.hard_negatives and self.loss.hardness:
            raise InputError("loss.hardness weighs a row's own negatives, and hard_negatives is 0")
        if not self.hard_negatives and distill is not None and distill.score_weight:
            raise InputError("loss.distill.score_weight compares a row's own negatives, and hard_negatives is 0")
        return self

    @model_validator(mode="after")
    def _data_differ(self) -> StagePart:
        seen: dict[str, int] = {}
        for number, entry in enumerate(self.data):
            first = seen.setdefault(entry.model_dump_json(include={"path", "corpus", "task"}), number)
            if first != number:
                raise InputError(f"data.{number} has the path and task of data.{first}: raise its weight instead")
        return self

    def chosen(self) -> dict[str, Any]:
        """What the stage asks for beyond plain InfoNCE over rows as they are: nothing by default."""
        return self.model_dump(mode="json", include={"loss", "sampling_alpha", "mine"}, exclude_defaults=True)


TRACKERS = ("tensorboard", "wandb", "trackio")


def _listed(trackers: Any) -> Any:
    """One name is a list of one, `none` the empty list."""
    listed = ([] if trackers == "none" else [trackers]) if isinstance(trackers, str) else trackers
    if not isinstance(listed, list | tuple) or any(name not in TRACKERS for name in listed):
        raise InputError(f"{trackers!r} is neither none, nor one of {', '.join(TRACKERS)}, nor a list of these")
    return listed


class RunPart(Part):
    """Where and how: `batch_tokens` bounds one forward pass of one process; larger batches are accumulated exactly.

    `workers` batches are tokenised ahead (0: none). `parallel`: how many processes share the work, where torchrun or
    accelerate started many.
    """

    out: Text
    checkpoint_every: Positive = 100
    keep: Positive = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_tokens: Positive = 8192
    workers: NotNegative = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    tracker: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ("tensorboard",)


class EvalPart(Part):
    """Suites run before the first stage, at the end of each stage, and `every` so many steps.

    `best`: each stage ends on the weights with the best mean of the suites' main scores. `patience`: a stage ends
    after so many evaluations in a row without a better one.
    """

    suites: tuple[Text, ...] = ()
    every: Positive | None = None
    best: Flag = False
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
