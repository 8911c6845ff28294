"""The parts of a recipe: frozen, checked one by one. Unknown keys are refused, and values of another type too.

YAML has its own numbers and truth values, so nothing is converted: `"3"`, `3.0` and `true` are not whole numbers.
The text under a key is its row in docs/recipe.md (`scripts/make_docs.py`): meaning, `Unit:`, `Source:`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from embedwright.errors import InputError

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

    An embedder of `from` keeps its text contract, pooling and attention: only `max_tokens` and `default_task` go with
    it.
    """

    base: Text | None = None
    """The decoder: a packaged name, a folder, a hub id or a .gguf file. Source: paper: Mistral-7B-v0.1."""
    from_: Annotated[Text | None, Field(alias="from")] = None
    """The embedder: whatever `Embedder.load` opens."""
    layers: Positive | None = None
    """Keep only the first N layers. Default: all. Unit: layers."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether a token sees the tokens after it. Source: paper, 3.1."""
    pooling: Literal["latent", "mean", "last", "self", "mlp"] = "latent"
    """How token states become one vector (docs/concepts.md). Source: paper, 3.2."""
    latents: Positive = 512
    """Size of the trained array that tokens attend to; for `latent`. Unit: vectors. Source: paper, 3.2."""
    heads: Positive = 8
    """Attention heads of the pooling block; for `latent` and `self`. Source: paper, 3.2."""
    head_dim: Positive | None = None
    """Width of each such head. Default: the model's width / `heads`. Source: released code: 4096."""
    multiple: Positive = 4
    """Width of the pooling block's MLP, as a multiple of the model's. Source: released code."""
    max_tokens: Annotated[Positive, Field(ge=8)] = 512
    """Longer texts are cut here; instruction, BOS and EOS count. Unit: tokens. Source: sister models train at 512."""
    pool_prompt: Flag = False
    """Pool every token, the instruction's too, for servers that know no prompts (docs/models.md)."""
    mask_rule: Literal["offsets", "boundary"] | None = None
    """Template and pool mask: NV-Embed's (`offsets`), or those of plain sentence-transformers. Default: by pooling."""
    default_task: Text | None = None
    """The model's own instruction, for queries without one, in training and in use. Default with `from`: its own."""

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
            raise InputError("needs base, a decoder, or from, an embedder to train on, but not both")
        if self.from_ and (others := sorted(self.model_fields_set - {"base", "from_", "max_tokens", "default_task"})):
            kept = "an embedder of `from` keeps its own; leave out all but max_tokens and default_task"
            raise InputError(f"{', '.join(others)}: {kept}")
        if self.mask_rule and self.pool_prompt:
            raise InputError(f"mask_rule={self.mask_rule} keeps the instruction out, and pool_prompt pools it: set one")
        return self

    @model_serializer(mode="wrap")
    def _as_it_acts(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what the embedder of `from` decides, so that the result is a valid recipe. Leaves out `mask_rule`
        and `default_task` where they are not set, so that an older recipe keeps its hash.
        """
        values = dump(self)
        own = {} if self.default_task is None else {"default_task": values["default_task"]}
        if self.from_ is None:
            unset = {key for key in ("mask_rule", "default_task") if values.get(key) is None}
            return {key: value for key, value in values.items() if key != "from" and key not in unset}
        return {"from": self.from_} | ({} if self.shortened is None else {"max_tokens": self.max_tokens}) | own


class TunePart(Part):
    """Which weights move. The pooling block trains in full, in an optimizer group of its own, except for `freeze`."""

    method: Literal["lora", "full", "qlora"] = "lora"
    """Adapters on all linear layers, all weights, or adapters on a base in 4 bits. Source: paper, v1: lora."""
    rank: Positive = 16
    """Rank of the adapters. Source: paper, v1."""
    alpha: Positive = 32
    """The adapters' output is scaled by alpha / rank. Source: paper, v1."""
    adapters: Literal["fresh", "continue"] = "fresh"
    """Adapters of `model.from`: merge them and add new ones, or train them on, with their rank and alpha."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    """Dropout on the adapters' input. Unit: probability. Source: paper, v1."""
    pooling_lr_ratio: PositiveNumber = 1.0
    """The pooling block's learning rate, as a multiple of `optim.lr`."""
    freeze: tuple[Literal["latents"], ...] = ()
    """`[latents]`: the trained array of `latent` stays as it begins, and the rest of the block trains."""
    gradient_checkpointing: Flag = False
    """Compute activations again in the backward pass: less memory, more time, same result."""

    @model_serializer(mode="wrap")
    def _as_it_acts(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what the adapters decide that train on. A recipe without such adapters keeps its older hash."""
        left_out = ("rank", "alpha") if self.adapters == "continue" else ("adapters",)
        return {key: value for key, value in dump(self).items() if key not in left_out}


class OptimPart(Part):
    """AdamW with linear warm-up, then the decay of `schedule`; `clip` bounds the gradient's norm."""

    lr: PositiveNumber
    """Peak learning rate. Source: recalled from the paper's appendix: 2e-5, then 1.5e-5."""
    steps: Positive
    """Length of the stage. Unit: steps. Source: recalled: 20,000, then 18,000."""
    batch_queries: Positive
    """Queries of a step, over all processes; of `kind: mntp`, texts. Unit: queries. Source: recalled: 128."""
    warmup_steps: NotNegative = 0
    """The learning rate rises linearly over these steps. Unit: steps. Source: recalled: 500."""
    clip: PositiveNumber = 1.0
    """Upper bound of the gradient's norm. Source: the usual value."""
    weight_decay: Weight = 0.0
    """AdamW's weight decay; latents, norms and biases have none. Source: recalled: 0.03."""
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moments. Source: Adam, arXiv 1412.6980."""
    eps: PositiveNumber = 1e-8
    """Added to the denominator of AdamW's update. Source: Adam."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """The learning rate after the warm-up: falls to zero linearly or as half a cosine, or stays. Source: recalled."""

    @property
    def added(self) -> set[str]:
        """The keys added later that have their default here: older recipes and runs do not know them."""
        return {"betas", "eps", "schedule"} - self.model_dump(exclude_defaults=True).keys()

    @model_validator(mode="after")
    def _warm_up_ends(self) -> OptimPart:
        if self.warmup_steps >= self.steps:
            raise InputError(f"warmup_steps={self.warmup_steps} must be below steps={self.steps}")
        return self


def _listed(names: Any) -> Any:
    """Turns one name into a list, and the name `none` into an empty list. Anything else is returned as it is."""
    return ([] if names == "none" else [names]) if isinstance(names, str) else names


Tracker = Literal["tensorboard", "wandb", "trackio"]
Form = Literal["adapter", "merged"]


class RunPart(Part):
    """Where the run is kept, and how a step fits the machine."""

    out: Text
    """The run's folder (docs/runs.md); may hold `${VARIABLE}`."""
    checkpoint_every: Positive = 100
    """Write a checkpoint every N steps. Unit: steps."""
    keep: Positive = 2
    """Keep the newest N checkpoints. Unit: checkpoints."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the frozen weights and of the products. Source: recalled from the paper's appendix: bf16."""
    batch_tokens: Positive = 8192
    """Bound of one forward pass of one process; a larger batch is accumulated exactly. Unit: tokens."""
    workers: NotNegative = 1
    """Batches that are tokenised ahead. Unit: batches."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How many processes share the work (docs/distributed.md)."""
    timeout_minutes: PositiveNumber = 30
    """A process that waits longer than this for the others in a step ends the run with an error. Unit: minutes."""
    tracker: Annotated[tuple[Tracker, ...], BeforeValidator(_listed)] = ("tensorboard",)
    """`tensorboard`, `wandb`, `trackio`, `none`, or a list (docs/runs.md)."""
    save: Annotated[tuple[Form, ...], BeforeValidator(_listed)] = ("merged",)
    """What is kept of the model: `merged`, the whole; `adapter`, without the base; both, or `none` (docs/runs.md)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights that are saved."""


class EvalPart(Part):
    """Suites run before the first stage, at the end of each stage, and every N steps (`every`)."""

    suites: tuple[Text, ...] = ()
    """Suite files, folders of data sets, packaged suites, or what mteb knows by name (docs/evaluation.md)."""
    every: Positive | None = None
    """Also evaluate every N steps. Unit: steps."""
    best: Flag = False
    """Each stage ends on the weights with the best mean of the suites' main scores."""
    patience: Positive | None = None
    """Early stopping: end a stage after N evaluations in a row without improvement. Unit: evaluations."""

    @model_validator(mode="after")
    def _has_something_to_go_by(self) -> EvalPart:
        if (self.best or self.patience) and not (self.suites and self.every):
            raise InputError("best and patience need suites, and every")
        return self

    @property
    def decides(self) -> bool:
        """Whether the weights depend on the scores."""
        return self.best or self.patience is not None
