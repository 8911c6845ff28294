"""What one process encodes at step s, tokenised and some steps ahead of its use.

N texts of this process, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from torch import Tensor

from embedwright import threads
from embedwright.processes import Processes
from embedwright.text import Contract, TextTokenizer, TokenizedText, tokenize
from embedwright.training.batches.batch import Batch, Text, split_token_limit
from embedwright.training.batches.blend import Row, Source, rows_at
from embedwright.training.batches.make import make_batch
from embedwright.training.recipe import Recipe
from embedwright.training.stages import ContrastiveStage

Made = TypeVar("Made")
Teach = Callable[[Sequence[Text]], Tensor]  # what a teacher makes of texts: (N, E) float32


@dataclass(frozen=True)
class LocalBatch:
    """One process's part of a batch.

    `texts` lists each process's distinct texts, by rank. `tokens` maps this process's texts to their tokens (if it has
    none, one filler text). `rows` are this process's queries if the batch is split by queries, else None (see
    `split_batch`). `teacher_NE` holds the teacher's vectors of this process's texts, in their order.
    """

    batch: Batch
    texts: list[list[Text]]
    rows: list[int] | None
    tokens: Mapping[Text, TokenizedText]
    teacher_NE: Tensor | None = None

    @property
    def ids(self) -> list[str]:
        return self.batch.ids

    def ids_hash(self) -> str:
        return self.batch.ids_hash()

    @property
    def filler(self) -> TokenizedText:
        """Some text, for a process that has fewer micro-batches than others, or none."""
        return next(iter(self.tokens.values()))


def batch_of_step(recipe: Recipe, number: int, sources: Sequence[Source], contract: Contract, step: int) -> Batch:
    """Returns the batch of a step of stage `number`, both from 0. It depends on its arguments alone.

    A row whose task has no instruction is read under the model's own.
    """
    stage = recipe.stages[number]
    assert isinstance(stage, ContrastiveStage)
    rows = rows_at(
        sources,
        step,
        batch_queries=stage.optim.batch_queries,
        batching=stage.batching,
        seed=recipe.seed,
        stage=stage.name,
    )
    if contract.default_task:
        rows = [row if row.task.instruction else _with_instruction(row, contract.default_task) for row in rows]
    if stage.without_instruction:
        # numbers of their own: the same positives and negatives are drawn whatever the share
        numbers = np.random.default_rng([recipe.seed, number, step, 2]).random(len(rows))
        rows = [
            _with_instruction(row, "") if u < stage.without_instruction else row
            for row, u in zip(rows, numbers, strict=True)
        ]
    return make_batch(
        rows,
        contract,
        hard_negatives=stage.hard_negatives,
        in_batch=stage.in_batch_negatives,
        rng=np.random.default_rng([recipe.seed, number, step]),
        loss=stage.loss,
    )


def _with_instruction(row: Row, instruction: str) -> Row:
    return replace(row, task=row.task.model_copy(update={"instruction": instruction}))


def local_batch(
    batch: Batch, tokenizer: TextTokenizer, contract: Contract, processes: Processes, teach: Teach | None = None
) -> LocalBatch:
    """Takes this process's part of a batch, tokenises it and, with `teach`, has the stage's teacher encode it.

    It does not communicate, so it may run ahead of its step.
    """
    texts, by_rows = split_batch(batch, processes)
    rows = None if by_rows is None else by_rows[processes.rank]
    own = texts[processes.rank]
    some = own or batch.queries[:1]
    # a process without texts has an empty part of what all gather
    teacher_NE = None if teach is None else teach(some)[: len(own)]
    return LocalBatch(batch, texts, rows, tokenize_texts(tokenizer, contract, some), teacher_NE)


def split_batch(batch: Batch, processes: Processes) -> tuple[list[list[Text]], list[list[int]] | None]:
    """Splits a batch among processes. Returns each process's texts, and each process's queries or None.

    A separable batch is split by queries if few texts are encoded twice. Else its distinct texts are split.
    """
    distinct = list(dict.fromkeys([*batch.queries, *batch.candidates]))
    if batch.separable():
        needed = [batch.texts(row) for row in range(len(batch.queries))]
        rows = processes.split([_characters(some) for some in needed])
        by_rows = [list(dict.fromkeys(text for i in part for text in needed[i])) for part in rows]
        if sum(map(_characters, by_rows)) <= split_token_limit(_characters(distinct)):
            return by_rows, rows
    parts = processes.split([len(prefix) + len(text) for prefix, text in distinct])
    return [[distinct[i] for i in part] for part in parts], None


def _characters(texts: Iterable[Text]) -> int:
    return sum(len(text) for _, text in texts)


def tokenize_texts(tokenizer: TextTokenizer, contract: Contract, texts: Sequence[Text]) -> dict[Text, TokenizedText]:
    """Tokenises each distinct text once."""
    by_prefix: dict[str, list[str]] = {}
    for prefix, text in dict.fromkeys(texts):
        by_prefix.setdefault(prefix, []).append(text)
    return {
        (prefix, text): tokens
        for prefix, some in by_prefix.items()
        for text, tokens in zip(some, tokenize(tokenizer, contract, some, prefix), strict=True)
    }


def ahead(make: Callable[[int], Made], steps: Iterable[int], workers: int) -> Generator[tuple[int, Made], None, None]:
    """Yields each step with its local batch, in order. `workers` threads make as many batches ahead of use."""
    if workers == 0:
        yield from ((step, make(step)) for step in steps)
        return
    with ThreadPoolExecutor(workers, initializer=threads.unbind) as pool:
        waiting: list[tuple[int, Future[Made]]] = []
        try:
            for step in steps:
                waiting.append((step, pool.submit(make, step)))
                if len(waiting) > workers:
                    first, future = waiting.pop(0)
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
