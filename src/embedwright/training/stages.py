"""A stage of a recipe: its data, its loss, its optimizer, and the mining before it; or a masked phase."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from embedwright.data.schema import InBatch, Task
from embedwright.errors import InputError
from embedwright.mining.rules import NAMED, Rule, check_sampling, check_settings, check_teachers
from embedwright.training.parts import (
    Flag,
    NotNegative,
    Number,
    OptimPart,
    Part,
    Positive,
    PositiveNumber,
    Share,
    Text,
    Weight,
)

PREVIOUS = "previous"  # teacher of a stage's negatives
START = "start"  # what evaluations before the first stage are called


def _form_of(task: Any) -> str:
    return "Task" if isinstance(task, dict | Task) else "bare"


# one branch is chosen first: pydantic would report a mistake in a description as "not a string" as well
NameOrTask = Annotated[Annotated[Task, Tag("Task")] | Annotated[Text, Tag("bare")], Discriminator(_form_of)]


class DataPart(Part):
    """One source of training data."""

    path: Text
    """A file or folder (docs/data.md); may hold `${VARIABLE}`."""
    corpus: Text | None = None
    """Documents that rows name by id and a stage of `kind: mine` searches, or what `encode` wrote of them."""
    task: NameOrTask | None = None
    """The task of rows that name none: a name, or a description with the keys below.

    A description is also that of rows which name its task. A key that it leaves out is as the file of tasks says.
    """
    weight: PositiveNumber = 1.0
    """Multiplies the sampling weight that the number of rows gives."""
    rows: Positive | None = None
    """How many rows there will be; `--plan` uses it while the file is missing. Unit: rows."""


def _as_list(names: Any) -> Any:
    return [] if names is None else [names] if isinstance(names, str) else names


class DistillPart(Part):
    """Terms added to the stage's loss that follow a teacher."""

    score_weight: Weight = 0.0
    """Weight of the KL term between the model's softmax and that of the row's scores. Source: arXiv 2010.11386."""
    temperature: PositiveNumber | None = None
    """Temperature of the row's scores and the teacher's cosines. Default: the stage's."""
    vector_weight: Weight = 0.0
    """Weight of the distance to the teacher's vectors, of any width. Source: EmbedDistill, arXiv 2301.12005."""
    similarity_weight: Weight = 0.0
    """Weight of the KL term as above, over the teacher's cosines of each query and all candidates of the batch."""
    teacher: Annotated[tuple[Text, ...], BeforeValidator(_as_list)] = ()
    """The model that `vector_weight` and `similarity_weight` follow. Several count as one, by their mean cosine."""

    @model_validator(mode="after")
    def _says_what_to_follow(self) -> DistillPart:
        if not (self.score_weight or self.vector_weight or self.similarity_weight):
            raise InputError("needs score_weight, vector_weight or similarity_weight")
        if bool(self.vector_weight or self.similarity_weight) != bool(self.teacher):
            raise InputError("a teacher and vector_weight or similarity_weight need each other")
        if self.temperature and not (self.score_weight or self.similarity_weight):
            raise InputError("temperature is of the scores, but neither score_weight nor similarity_weight is above 0")
        if len(set(self.teacher)) != len(self.teacher):
            raise InputError(f"teacher: {list(self.teacher)} names one model twice")
        if named := [name for name in self.teacher if name in (PREVIOUS, *NAMED)]:
            raise InputError(
                f"teacher: {named[0]} has no vectors to follow: name a model, or leave teacher out and follow the "
                "scores that mining writes, by score_weight"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Writes one teacher as its name, and no weight of 0 for similarities: older runs keep their hash."""
        values: dict[str, Any] = dump(self)
        if not self.similarity_weight:
            values.pop("similarity_weight", None)
        if "teacher" in values and len(self.teacher) < 2:
            values["teacher"] = self.teacher[0] if self.teacher else None
        return values


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
    spread_out: Weight = 0.0
    """Weight of the mean squared cosine of different queries, and of different positives. Source: EmbeddingGemma."""
    dims: tuple[Positive, ...] = ()
    """Matryoshka: also compute the loss on the first N dimensions of vectors, for each N. Source: arXiv 2205.13147."""
    scored: Literal["info_nce", "cosent"] = "info_nce"
    """The loss of rows with a score. Source: CoSENT."""
    distill: DistillPart | None = None

    @property
    def teachers(self) -> tuple[str, ...]:
        """The models whose vectors the loss follows."""
        return () if self.distill is None else self.distill.teacher

    @model_validator(mode="after")
    def _dims_differ(self) -> LossPart:
        if len(set(self.dims)) != len(self.dims):
            raise InputError(f"dims: {list(self.dims)} names one width twice")
        return self


class MinePart(Part):
    """Hard negatives mined for the next stage before its first step: in a recipe, a stage of `kind: mine`."""

    teacher: Text = PREVIOUS
    """`previous` (the model as it then is), `bm25`, `random`, or a model by name. Source: paper, 4.1: E5-Mistral."""
    rule: Rule = "perc"
    """Which candidates are left out (docs/mining.md). Source: paper, 4.1."""
    margin: Number | None = None
    """The rule's margin. Default: NV-Retriever's best. Source: paper, 4.1: 0.95."""
    negatives: Positive = 7
    """Negatives mined for each query. Unit: negatives. Source: recalled from the paper's appendix."""
    depth: Positive = 100
    """Candidates looked at for each query. Unit: documents."""
    sampled: Flag = False
    """Draw negatives by softmax over the scores, instead of taking the best. Source: NV-Retriever, arXiv 2407.15831."""
    sample_from: Positive | None = None
    """With `sampled`: draw from the top N that pass the rule. Default: 10. Unit: documents."""
    every: Positive | None = None
    """Mine again every N steps; only with teacher `previous`. Unit: steps."""

    @property
    def teachers(self) -> tuple[str, ...]:
        """The models other than the trained one whose vectors are searched."""
        return () if self.teacher in (PREVIOUS, *NAMED) else (self.teacher,)

    @model_validator(mode="after")
    def _settings_fit(self) -> MinePart:
        check_settings(self.rule, self.margin, self.negatives, self.depth)
        check_teachers([self.teacher], self.rule, self.margin, self.sampled)
        check_sampling(self.sampled, self.sample_from, self.negatives)
        if self.every is not None and self.teacher != PREVIOUS:
            raise InputError(
                f"every: {self.teacher} does not change in the run and would mine the same again: "
                f"leave every out, or mine with teacher: {PREVIOUS}"
            )
        return self


def _folder_name(name: str) -> str:
    if name in (".", "..", START) or not re.fullmatch(r"[\w .+=@-]+", name):
        raise InputError(f"{name!r} also names files of the run: letters, digits, space and .+=@-_, but not {START!r}")
    return name


class ContrastiveStage(Part):
    """One pass of contrastive training over a blend of data, with an optimizer of its own."""

    reads: ClassVar = "data"  # the key that lists what it reads

    name: Annotated[Text, AfterValidator(_folder_name)]
    """Names the stage in messages, files and scores."""
    data: Annotated[tuple[DataPart, ...], Field(min_length=1)]
    in_batch_negatives: InBatch
    """Whose texts are negatives too: none, those of the query's task, or all. Source: paper, 3.3: all, then none."""
    hard_negatives: NotNegative
    """Negatives of the row that a step uses. Unit: negatives. Source: recalled from the paper's appendix: 7."""
    batching: Literal["blended", "homogeneous"] = "blended"
    """Sources mixed in each batch, or one a batch: an entry's rows of one kind of task. Source: paper, 2.2: blended."""
    temperature: PositiveNumber = 0.02
    """Divides the cosines in the softmax. Source: E5-Mistral; the paper names none."""
    without_instruction: Share = 0.0
    """Share of the rows that a step reads without their instruction, so that the model can also be used without."""
    loss: LossPart = LossPart()
    sampling_alpha: Share = 1.0
    """Draw an entry of `data` in proportion to weight * rows ** alpha: 1 by size, 0 equally. Source: mT5: 0.3."""
    mine: MinePart | None = None
    optim: OptimPart
    save: Flag = False
    """Keep the forms of `run.save` at the stage's end in `<run.out>/stages/<name>/`, for another run's `model.from`."""

    @model_validator(mode="after")
    def _uses_what_is_mined(self) -> ContrastiveStage:
        if self.mine is not None and not 1 <= self.hard_negatives <= self.mine.negatives:
            raise InputError(f"hard_negatives={self.hard_negatives} of {self.mine.negatives} that are mined for it")
        return self

    @model_validator(mode="after")
    def _loss_has_what_it_needs(self) -> ContrastiveStage:
        distill = self.loss.distill
        if not self.hard_negatives and self.loss.hardness:
            raise InputError("loss.hardness weighs a row's own negatives, but hard_negatives is 0")
        if not self.hard_negatives and distill is not None and distill.score_weight:
            raise InputError("loss.distill.score_weight compares a row's own negatives, but hard_negatives is 0")
        return self

    @model_validator(mode="after")
    def _data_differ(self) -> ContrastiveStage:
        seen: dict[str, int] = {}
        for number, entry in enumerate(self.data):
            first = seen.setdefault(entry.model_dump_json(include={"path", "corpus", "task"}), number)
            if first != number:
                raise InputError(f"data.{number} has the path and task of data.{first}: raise its weight instead")
        return self

    @property
    def texts_a_row(self) -> int:
        return 2 + self.hard_negatives

    def chosen(self) -> dict[str, Any]:
        """Lists what the stage adds to plain InfoNCE over the rows as they are; empty by default."""
        keys = {"without_instruction", "loss", "sampling_alpha", "mine"}
        return self.model_dump(mode="json", include=keys, exclude_defaults=True)


class TextPart(Part):
    """One source of plain text for a masked phase: what `data pairs` reads, too (docs/pairs.md)."""

    # keys of other data, which text lacks
    corpus: ClassVar[None] = None
    task: ClassVar[None] = None
    rows: ClassVar[None] = None
    weight: ClassVar[float] = 1.0

    path: Text
    """Rows with `text` and `title`, a .txt with a text a line, or a folder of such or of pages; also `${VARIABLE}`."""
    licence: str = ""
    """Licence of the text, for the model card."""


class MaskedStage(Part):
    """A masked phase before contrastive training: masked next-token prediction on plain text (docs/losses.md).

    In a recipe, a stage of `kind: mntp`. It trains the backbone, never the pooling block.
    """

    # it compares no texts with each other
    reads: ClassVar = "text"
    in_batch_negatives: ClassVar[InBatch] = "none"
    hard_negatives: ClassVar[int] = 0
    texts_a_row: ClassVar[int] = 1
    sampling_alpha: ClassVar[float] = 1.0
    mine: ClassVar[None] = None
    loss: ClassVar[LossPart] = LossPart()

    name: Annotated[Text, AfterValidator(_folder_name)]
    """Names the stage in messages, files and scores."""
    kind: Literal["mntp"]
    """Makes the stage a masked phase."""
    text: Annotated[tuple[TextPart, ...], Field(min_length=1)]
    mask_token: Text
    """Stands for masked tokens: one token of the model's tokenizer. Source: LLM2Vec: _."""
    mask_share: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    """Share of a text's tokens that are masked. Unit: share of tokens. Source: LLM2Vec, its Llama models: 0.2."""
    heldout: NotNegative = 200
    """Documents kept out of training; the loss on them is measured before and after. Unit: documents."""
    optim: OptimPart
    save: Flag = False
    """As in a contrastive stage."""

    @property
    def data(self) -> tuple[TextPart, ...]:
        """The sources of text, under the name that they have in other stages."""
        return self.text

    def chosen(self) -> dict[str, Any]:
        """Lists what makes up the objective."""
        return self.model_dump(mode="json", include={"kind", "mask_token", "mask_share"})


Stage = ContrastiveStage | MaskedStage
