"""The parts of a recipe: frozen, checked one by one. Unknown keys are refused, and values of another type too.

YAML has its own numbers and truth values, so nothing is converted: `"3"`, `3.0` and `true` are no whole numbers.
The text under a key is its row in docs/recipe.md (`scripts/make_docs.py`): meaning, `Unit:`, `Source:`.
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

    An embedder of `from` keeps its text contract, pooling and attention: only `max_tokens` goes with it.
    """

    base: Text | None = None
    """The decoder: a packaged name, a folder, a hub id or a .gguf file. Source: paper: Mistral-7B-v0.1."""
    from_: Annotated[Text | None, Field(alias="from")] = None
    """The embedder: whatever `Embedder.load` opens."""
    layers: Positive | None = None
    """Keep the first so many layers; without it, all. Unit: layers."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether a token sees the tokens after it. Source: paper, 3.1."""
    pooling: Literal["latent", "mean", "last", "self", "mlp"] = "latent"
    """How token states become one vector (docs/concepts.md). Source: paper, 3.2."""
    latents: Positive = 512
    """Size of the trained array that tokens attend to; for `latent`. Unit: vectors. Source: paper, 3.2."""
    heads: Positive = 8
    """Attention heads of the pooling block; for `latent` and `self`. Source: paper, 3.2."""
    head_dim: Positive | None = None
    """Width of such a head; without it, the model's width / `heads`. Source: released code: 4096."""
    multiple: Positive = 4
    """Width of the pooling block's MLP, as a multiple of the model's. Source: released code."""
    max_tokens: Annotated[Positive, Field(ge=8)] = 512
    """Longer texts are cut here; instruction, BOS and EOS count. Unit: tokens. Source: sister models train at 512."""
    pool_prompt: Flag = False
    """Pool every token, the instruction's too, for servers that know no prompts (docs/models.md)."""

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
    """Which weights move. The pooling block always trains in full, in an optimizer group of its own."""

    method: Literal["lora", "full", "qlora"] = "lora"
    """Adapters on all linear layers, all weights, or adapters on a base in 4 bits. Source: paper, v1: lora."""
    rank: Positive = 16
    """Rank of the adapters. Source: paper, v1."""
    alpha: Positive = 32
    """The adapters' output is scaled by alpha / rank. Source: paper, v1."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    """Dropout on the adapters' input. Unit: probability. Source: paper, v1."""
    pooling_lr_ratio: PositiveNumber = 1.0
    """The pooling block's learning rate, as a multiple of `optim.lr`."""
    gradient_checkpointing: Flag = False
    """Compute activations again in the backward pass: less memory, more time, same result."""


def _form_of(task: Any) -> str:
    return "Task" if isinstance(task, dict | Task) else "bare"


# one branch is chosen first: pydantic would report a mistake in a description as "not a string" as well
NameOrTask = Annotated[Annotated[Task, Tag("Task")] | Annotated[Text, Tag("bare")], Discriminator(_form_of)]


class DataPart(Part):
    """One source of training data."""

    path: Text
    """A file or folder (docs/data.md); may hold `${VARIABLE}`."""
    corpus: Text | None = None
    """The documents that the rows name by id, and that a stage of `kind: mine` searches."""
    task: NameOrTask | None = None
    """The task of rows that name none: a name, or a description with the keys below."""
    weight: PositiveNumber = 1.0
    """Multiplies the share of the draws that the number of rows gives."""
    rows: Positive | None = None
    """How many rows there will be; `--plan` uses it while the file is missing. Unit: rows."""


class OptimPart(Part):
    """AdamW with linear warm-up and linear decay to zero; `clip` bounds the gradient's norm."""

    lr: PositiveNumber
    """Highest learning rate. Source: recalled from the paper's appendix: 2e-5, then 1.5e-5."""
    steps: Positive
    """Length of the stage. Unit: steps. Source: recalled: 20,000, then 18,000."""
    batch_queries: Positive
    """Queries of a step, over all processes. Unit: queries. Source: recalled: 128."""
    warmup_steps: NotNegative = 0
    """The learning rate rises linearly over these steps. Unit: steps. Source: recalled: 500."""
    clip: PositiveNumber = 1.0
    """Upper bound of the gradient's norm. Source: the usual value."""
    weight_decay: Weight = 0.0
    """AdamW's; latents, norms and biases have none. Source: recalled: 0.03."""

    @model_validator(mode="after")
    def _warm_up_ends(self) -> OptimPart:
        if self.warmup_steps >= self.steps:
            raise InputError(f"warmup_steps={self.warmup_steps} must be below steps={self.steps}")
        return self


class DistillPart(Part):
    """Terms beside the stage's loss that follow a teacher."""

    score_weight: Weight = 0.0
    """Weight of the KL term between the model's softmax and that of the row's scores. Source: arXiv 2010.11386."""
    temperature: PositiveNumber | None = None
    """Of the row's scores; without it, the stage's."""
    vector_weight: Weight = 0.0
    """Weight of the distance to the teacher's vectors. Source: EmbedDistill, arXiv 2301.12005."""
    teacher: Text | None = None
    """The model whose vectors `vector_weight` follows; of the same width."""

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
    """What a stage adds to InfoNCE; nothing by default. Formulas: docs/losses.md."""

    mask_above: Annotated[Number, Field(ge=-2, le=2)] | None = None
    """Leave out negatives whose cosine is above the positive's + this. Unit: cosine. Source: Qwen3-Embedding: 0.1."""
    hardness: Weight = 0.0
    """A hard negative of the row weighs exp(hardness * cosine). Source: EmbeddingGemma: 5."""
    focal: Weight = 0.0
    """A query weighs (1 - p of its positive) ** focal. Source: KaLM-Embedding-V2."""
    same_tower: Literal["none", "queries", "both"] = "none"
    """More in-batch negatives: other queries; `both`: also documents against the positive. Source: GTE."""
    dims: tuple[Positive, ...] = ()
    """Matryoshka: take the loss also on the first so many numbers of each vector. Source: arXiv 2205.13147."""
    scored: Literal["info_nce", "cosent"] = "info_nce"
    """The loss of rows with a score. Source: CoSENT."""
    distill: DistillPart | None = None

    @model_validator(mode="after")
    def _dims_differ(self) -> LossPart:
        if len(set(self.dims)) != len(self.dims):
            raise InputError(f"dims: {list(self.dims)} names one width twice")
        return self


PREVIOUS = "previous"  # teacher of a stage's negatives
START = "start"  # what evaluations before the first stage are called


class MinePart(Part):
    """Hard negatives mined for the next stage before its first step: in a recipe, a stage of `kind: mine`."""

    name: Text = "mine"
    """Names the stage in messages and folders."""
    teacher: Text = PREVIOUS
    """`previous` (the model as it then is), a packaged name, a folder or a hub id. Source: paper, 4.1: E5-Mistral."""
    rule: Rule = "perc"
    """Which candidates are left out (docs/mining.md). Source: paper, 4.1."""
    margin: Number | None = None
    """Of the rule; without it, NV-Retriever's best. Source: paper, 4.1: 0.95."""
    negatives: Positive = 7
    """Taken for each query. Unit: negatives. Source: recalled from the paper's appendix."""
    depth: Positive = 100
    """Candidates looked at for each query. Unit: documents."""
    sampled: Flag = False
    """Draw negatives by softmax over the scores, instead of taking the best. Source: NV-Retriever, arXiv 2407.15831."""
    sample_from: Positive | None = None
    """With `sampled`: draw from the first so many that the rule lets pass; without it, 10. Unit: documents."""
    every: Positive | None = None
    """Mine again after so many steps of the stage; for `previous` alone. Unit: steps."""

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
    """One pass of contrastive training over a blend of data, with an optimizer of its own."""

    name: Annotated[Text, AfterValidator(_folder_name)]
    """Names the stage in messages, files and scores."""
    data: Annotated[tuple[DataPart, ...], Field(min_length=1)]
    in_batch_negatives: InBatch
    """Whose texts are negatives too: none, those of the query's task, or all. Source: paper, 3.3: all, then none."""
    hard_negatives: NotNegative
    """Negatives of the row that a step uses. Unit: negatives. Source: recalled from the paper's appendix: 7."""
    batching: Literal["blended", "homogeneous"] = "blended"
    """Tasks mixed in each batch, or one task a batch. Source: paper, 2.2: blended."""
    temperature: PositiveNumber = 0.02
    """Divides the cosines in the softmax. Source: E5-Mistral; the paper names none."""
    loss: LossPart = LossPart()
    sampling_alpha: Share = 1.0
    """Draw an entry of `data` in proportion to weight * rows ** alpha: 1 by size, 0 equally. Source: mT5: 0.3."""
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
    """Where the run is kept, and how a step fits the machine."""

    out: Text
    """The run's folder (docs/runs.md)."""
    checkpoint_every: Positive = 100
    """Between two checkpoints. Unit: steps."""
    keep: Positive = 2
    """How many checkpoints stay. Unit: checkpoints."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the frozen weights and of the products. Source: recalled from the paper's appendix: bf16."""
    batch_tokens: Positive = 8192
    """Bound of one forward pass of one process; a larger batch is accumulated exactly. Unit: tokens."""
    workers: NotNegative = 1
    """Batches that are tokenised ahead. Unit: batches."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How many processes share the work (docs/distributed.md)."""
    tracker: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ("tensorboard",)
    """`tensorboard`, `wandb`, `trackio`, `none`, or a list (docs/runs.md)."""


class EvalPart(Part):
    """Suites run before the first stage, at the end of each stage, and `every` so many steps."""

    suites: tuple[Text, ...] = ()
    """Suite files, folders of data sets, or `dev` (docs/evaluation.md)."""
    every: Positive | None = None
    """Evaluate also after so many steps. Unit: steps."""
    best: Flag = False
    """Each stage ends on the weights with the best mean of the suites' main scores."""
    patience: Positive | None = None
    """A stage ends after so many evaluations in a row without a better one. Unit: evaluations."""

    @model_validator(mode="after")
    def _has_something_to_go_by(self) -> EvalPart:
        if (self.best or self.patience) and not (self.suites and self.every):
            raise InputError("best and patience need suites, and every")
        return self

    @property
    def decides(self) -> bool:
        """Whether the weights depend on the scores."""
        return self.best or self.patience is not None
