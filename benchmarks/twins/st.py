"""The twins of sentence-transformers: `train` runs the stages of a recipe with its Trainer, one after the other.

Rows, temperatures and rates come from the same recipe as ours. Its own best settings are in the plan and in README.md.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.losses.gradcache import _create_minibatch
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler, NoDuplicatesBatchSampler
from sentence_transformers.sentence_transformer import losses
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from embedwright.data.schema import Example, Task
from embedwright.model.embedder import Embedder
from embedwright.training.batches.blend import Source, rows_at
from embedwright.training.parts import OptimPart
from embedwright.training.recipe import Recipe
from embedwright.training.stages import ContrastiveStage

Found = dict[str, Any]


class OwnNegatives(nn.Module):
    """InfoNCE of each row over its own positive and negatives alone, for which the library has no loss.

    Rows do not need each other: a few at a time go forward and backward, once, in little memory. The Trainer's own
    backward then has nothing left to do.
    """

    def __init__(self, model: SentenceTransformer, scale: float, rows: int) -> None:
        super().__init__()
        self.model, self.scale, self.rows = model, scale, rows

    def forward(self, features: Sequence[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        count, value = len(features[0]["input_ids"]), torch.zeros(())
        for i in range(0, count, self.rows):
            parts = [self.model(_create_minibatch(column, i, i + self.rows)) for column in features]
            query, *documents = [nn.functional.normalize(part["sentence_embedding"], dim=-1) for part in parts]
            scores = torch.stack([(query * document).sum(dim=-1) for document in documents], dim=1)
            first = torch.zeros(len(scores), dtype=torch.long)
            loss = nn.functional.cross_entropy(self.scale * scores, first, reduction="sum") / count
            loss.backward()
            value += loss.detach()
        return value.requires_grad_()


class Clock(TrainerCallback):
    """Counts steps and seconds from the begin of the first step, and stops training once `limit` seconds are over."""

    def __init__(self, optim: OptimPart, limit: float | None) -> None:
        self.optim, self.limit, self.steps = optim, limit, 0
        self.began = self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = self.began or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds, self.steps = time.perf_counter() - self.began, self.steps + 1
        control.should_training_stop |= self.limit is not None and self.seconds >= self.limit

    def rate(self, step: int) -> float:
        """Returns the factor of the rate: warm-up, then linear decay to zero; by steps, or by the clock if it stops us.

        The warm-up by the clock has the part of the limit that it has of the recipe's steps, as ours has.
        """
        warmup, steps = self.optim.warmup_steps, self.optim.steps
        if self.limit is None:
            return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)
        done = (time.perf_counter() - self.began) / self.limit if self.began else 0.0
        rising = max(done * steps, 1.0) / warmup if warmup else 1.0  # the first step trains, too
        return max(0.0, min(rising, (1 - done) / (1 - warmup / steps)))


class Scheduled(MultiDatasetDefaultBatchSampler):
    """Yields the batches of a schedule: the data set and the rows of each step."""

    schedule: Sequence[tuple[int, list[int]]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        first = [0, *self.dataset.cumulative_sizes]
        yield from ([first[source] + row for row in rows] for source, rows in self.schedule)

    def __len__(self) -> int:
        return len(self.schedule)


class ByLength(NoDuplicatesBatchSampler):
    """Sorts the rows of each batch of its parent by length: mini-batches then need less padding."""

    def __iter__(self) -> Iterator[list[int]]:
        lengths = [len(text) for text in self.dataset[self.dataset.column_names[1]]]
        yield from (sorted(batch, key=lengths.__getitem__) for batch in super().__iter__())


class Trainer(SentenceTransformerTrainer):
    """The library's Trainer, which counts tokens that are no padding and keeps the loss of each step."""

    tokens = 0

    def compute_loss(self, model: Any, inputs: Found, *rest: Any, **named: Any) -> Any:
        self.tokens += sum(int(mask.sum()) for name, mask in inputs.items() if name.endswith("attention_mask"))
        loss = super().compute_loss(model, inputs, *rest, **named)
        self.losses.append(round(float(loss.detach()), 5))
        return loss


def train(recipe: Recipe, sources: list[list[Source]], limits: Sequence[float | None], spec: Found, out: Path) -> Found:
    """Trains all stages and saves the model to `out/model`, for `open_encoder`. Returns what it took.

    A stage without a limit takes the rows of each of our steps. With one, the library's own samplers draw.
    """
    base, tune, lora = Path(spec["base"]), recipe.tune, recipe.tune.method == "lora"
    torch.manual_seed(recipe.seed)
    model = opened(base, spec["st"]["weights"] if lora else "float32")
    if lora:
        ranks = {"r": tune.rank, "lora_alpha": tune.alpha, "lora_dropout": tune.dropout}
        model.add_adapter(LoraConfig(target_modules="all-linear", **ranks))
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    model.contract = Embedder.load(str(base)).contract
    took: list[Found] = []
    for number, (stage, own, limit) in enumerate(zip(recipe.stages, sources, limits, strict=True)):
        rows, data = columns(stage, own)
        schedule = scheduled(recipe, number, own, rows, data) if limit is None else None
        took.append(
            one_stage(recipe, stage, model, data, {s.task.name: s.task for s in own}, limit, schedule, spec, out)
        )
    if not all(torch.isfinite(weights).all() for weights in model.parameters() if weights.requires_grad):
        raise FloatingPointError("the trained weights are not finite")
    save(model, base, out / "model")
    totals = {name: sum(part[name] for part in took) for name in ("training", "queries", "tokens")}
    losses = [loss for part in took for loss in part["losses"]]
    return totals | {"steps": [part["steps"] for part in took], "pace": None, "losses": losses}


def one_stage(
    recipe: Recipe,
    stage: ContrastiveStage,
    model: SentenceTransformer,
    data: DatasetDict,
    tasks: dict[str, Task],
    limit: float | None,
    schedule: list[tuple[int, list[int]]] | None,
    spec: Found,
    out: Path,
) -> Found:
    optim, clock = stage.optim, Clock(stage.optim, limit)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)
    prompts = {
        name: dict.fromkeys(
            data[name].column_names[: 99 if task.symmetric else 1], model.contract.prefix(task.instruction)
        )
        for name, task in tasks.items()
        if task.instruction
    }
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=optim.steps if limit is None else 10**6,
        per_device_train_batch_size=optim.batch_queries,
        max_grad_norm=optim.clip,
        batch_sampler=ByLength,
        prompts=prompts or None,
        dataloader_drop_last=True,
        dataloader_num_workers=spec["st"]["workers"],
        seed=recipe.seed,
        use_cpu=True,
        bf16=recipe.run.precision == "bf16",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if schedule is not None:
        arguments.multi_dataset_batch_sampler = type("Ours", (Scheduled,), {"schedule": schedule})
    loss = {name: loss_of(stage, tasks.get(name), model, spec["st"]) for name in data}
    optimizers = (optimizer, LambdaLR(optimizer, clock.rate))
    trainer = Trainer(model, arguments, data, loss=loss, optimizers=optimizers, callbacks=[clock])
    trainer.losses = []
    trainer.train()
    told = {"steps": clock.steps, "queries": clock.steps * optim.batch_queries, "losses": trainer.losses}
    return told | {"training": clock.seconds, "tokens": trainer.tokens}


def loss_of(stage: ContrastiveStage, task: Task | None, model: SentenceTransformer, settings: Found) -> nn.Module:
    """Returns the loss of a data set: CoSENT of scored pairs, InfoNCE with or without the batch's other rows."""
    scale, rows = 1 / stage.temperature, settings["mini_batch"]
    if task is not None and task.family == "sts" and stage.loss.scored == "cosent":
        return losses.CoSENTLoss(model, scale=scale)
    if task is not None and task.in_batch_negatives == "none":
        return OwnNegatives(model, scale, rows or stage.optim.batch_queries)
    if rows:
        return losses.CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=rows)
    return losses.MultipleNegativesRankingLoss(model, scale=scale)


def columns(stage: ContrastiveStage, sources: list[Source]) -> tuple[dict[str, tuple[str, int]], DatasetDict]:
    """Returns where the row of each id is, and the data sets: one of each source, or one if batches are mixed."""
    data: dict[str, list[Found]] = {}
    place: dict[str, tuple[str, int]] = {}
    for source in sources:
        own = data.setdefault(source.task.name if stage.batching == "homogeneous" else "mixed", [])
        for example in (source.row(number).example for number in range(len(source.rows))):
            place[example.id] = (source.task.name if stage.batching == "homogeneous" else "mixed", len(own))
            row: Found = {"anchor": example.query, "positive": other_of(example)}
            if example.score is not None and stage.loss.scored == "cosent":
                own.append(row | {"score": float(example.score)})
            else:
                own.append(
                    row | {f"negative_{i}": p.text for i, p in enumerate(example.negatives[: stage.hard_negatives])}
                )
    return place, DatasetDict({name: Dataset.from_list(rows) for name, rows in data.items()})


def other_of(example: Example) -> str:
    """Returns the text that a query is paired with; that of a pair with a low score stands among the negatives."""
    return (example.positives or example.negatives)[0].text


def scheduled(
    recipe: Recipe, number: int, sources: list[Source], place: dict[str, tuple[str, int]], data: DatasetDict
) -> list[tuple[int, list[int]]]:
    """Returns the data set and the rows, by length, of each of our steps."""
    stage, names, found = recipe.stages[number], list(data), []
    drawn: Found = {"batch_queries": stage.optim.batch_queries, "batching": stage.batching, "stage": stage.name}
    for step in range(stage.optim.steps):
        examples = [row.example for row in rows_at(sources, step, seed=recipe.seed, **drawn)]
        examples.sort(key=lambda example: len(other_of(example)))
        found.append((names.index(place[examples[0].id][0]), [place[example.id][1] for example in examples]))
    return found


def opened(base: Path, dtype: str) -> SentenceTransformer:
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    return SentenceTransformer(str(base), device="cpu", model_kwargs=options)


def save(trained: SentenceTransformer, base: Path, folder: Path) -> None:
    """Saves the trained weights in float32, adapters merged in float32, as ours are. Beside them lies our contract."""
    whole = opened(base, "float32")
    source, target = trained[0].model, whole[0].model
    adapted = {name: module for name, module in source.named_modules() if isinstance(module, LoraLayer)}
    for name, module in adapted.items():
        target.get_submodule(name).weight.data += module.get_delta_weight("default").float()
    if not adapted:
        target.load_state_dict(source.state_dict())
    whole.save_pretrained(str(folder), create_model_card=False)
    shutil.copy(base / "embedwright.json", folder)


def proof(base: Path) -> dict[str, float]:
    """Shows that the library reads texts as we do, and both ways. Raises RuntimeError where it does not.

    Returns the largest difference of a number of a vector in float32, the largest cosine distance in bfloat16 (whose
    single numbers have 8 bits), and by how much a later token moves an earlier state.
    """
    task, texts = "Given a word, retrieve its definition", ["a", "An owl is a bird of the night.", "word " * 400]
    found: dict[str, float] = {}
    for dtype, most in (("float32", 1e-5), ("bfloat16", 1e-3)):
        ours = Embedder.load(str(base), dtype=dtype)
        a = opened(base, dtype).encode(texts, prompt=ours.contract.prefix(task), convert_to_tensor=True).float()
        b = torch.from_numpy(ours.encode(texts, task=task))
        found[dtype] = float(
            (a - b).abs().max() if dtype == "float32" else 1 - nn.functional.cosine_similarity(a, b).min()
        )
        if found[dtype] > most:
            raise RuntimeError(f"vectors differ by {found[dtype]:.2g} in {dtype}")
    with torch.no_grad():
        states = opened(base, "float32")[0].model(torch.tensor([[10, 20, 30], [10, 20, 31]])).last_hidden_state
    found["later_token_moves"] = float((states[0, 0] - states[1, 0]).abs().max())
    if found["later_token_moves"] < 1e-3:
        raise RuntimeError("a later token does not move an earlier state: attention is causal")
    return found
