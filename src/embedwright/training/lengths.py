"""The tokens of a stage's steps, counted before it runs: the texts that training will draw, read as it will read them.

Q queries of a step, C its distinct candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embedwright.text import Contract, TextTokenizer
from embedwright.training.batches.blend import Source
from embedwright.training.batches.feed import batch_of_step, tokenize_texts
from embedwright.training.batches.sources import open_sources
from embedwright.training.recipe import Recipe
from embedwright.training.run.start import longest_of, naming_the_model, reading_of

SAMPLED_ROWS = 512  # of a stage: enough for a mean within a few percent


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of one kind of text in the sampled steps."""

    mean: float
    median: int
    most: int  # 95 % of the texts have no more
    longest: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """What goes through the model in a step: means over sampled steps, but for `largest`, the largest of them.

    Equal texts of a step count once. `squares` sums the squared lengths, `padded` counts the tokens if queries and
    candidates were padded, each side to its longest. `shared`: queries share candidates, so that a batch beyond
    `batch_tokens` is encoded twice. `rows` is how many were sampled; 0 where no file is there: then every text is taken
    to be as long as the model reads, which is the most that it can be, and `kinds` has `texts` alone.
    """

    rows: int
    kinds: dict[str, Lengths]
    step: float
    largest: int
    squares: float
    padded: float
    shared: bool


def tokens_of(recipe: Recipe, there: list[list[bool]]) -> list[Tokens]:
    """Of each stage; `there` says of each entry of its data whether the file can be read.

    OSError where the base's tokenizer cannot be had, ConfigError where training would refuse the data.
    """
    parts = tuple(
        part.model_copy(update={"data": tuple(e for e, is_there in zip(part.data, found, strict=True) if is_there)})
        for part, found in zip(recipe.stages, there, strict=True)
    )
    sources = open_sources(recipe.model_copy(update={"stages": parts}))
    if not any(sources):
        with naming_the_model(recipe):
            longest = longest_of(recipe.model)
        return [_at_most(recipe, number, longest) for number in range(len(parts))]
    with naming_the_model(recipe):
        tokenizer, contract = reading_of(recipe.model)
    own_tokenizer = TextTokenizer(tokenizer.backend_tokenizer)
    return [
        _sampled(recipe, number, own, own_tokenizer, contract) if own else _at_most(recipe, number, contract.max_tokens)
        for number, own in enumerate(sources)
    ]


def _sampled(
    recipe: Recipe, number: int, sources: list[Source], tokenizer: TextTokenizer, contract: Contract
) -> Tokens:
    """Some steps of the stage, evenly spaced: where all files are there, the very texts that training will read."""
    part = recipe.stages[number]
    queries, steps = part.optim.batch_queries, part.optim.steps
    count = min(steps, -(-SAMPLED_ROWS // queries))
    kinds: dict[str, list[int]] = {"queries": [], "positives": [], "negatives": []}
    sizes, squares, padded, shared = [], [], [], False
    for step in (i * steps // count for i in range(count)):
        batch = batch_of_step(recipe, number, sources, contract, step)
        tokens = tokenize_texts(tokenizer, contract, [*batch.queries, *batch.candidates])
        length = {text: len(read.ids) for text, read in tokens.items()}
        positive = set(batch.masks.positive_Q.tolist())
        kinds["queries"] += (of_queries := [length[text] for text in batch.queries])
        for column, text in enumerate(batch.candidates):
            kinds["positives" if column in positive else "negatives"].append(length[text])
        sizes.append(sum(length.values()))
        squares.append(sum(n * n for n in length.values()))
        padded.append(sum(len(side) * max(side) for side in (of_queries, [length[t] for t in batch.candidates])))
        shared |= not batch.separable()
    return Tokens(
        rows=count * queries,
        kinds={kind: summary(lengths) for kind, lengths in kinds.items() if lengths},
        step=float(np.mean(sizes)),
        largest=max(sizes),
        squares=float(np.mean(squares)),
        padded=float(np.mean(padded)),
        shared=shared,
    )


def summary(lengths: list[int]) -> Lengths:
    median, most = np.percentile(lengths, [50, 95], method="lower")
    return Lengths(float(np.mean(lengths)), int(median), int(most), max(lengths))


def _at_most(recipe: Recipe, number: int, longest: int) -> Tokens:
    part = recipe.stages[number]
    texts = part.optim.batch_queries * (2 + part.hard_negatives)
    tokens = texts * longest
    shared = part.in_batch_negatives != "none"
    kinds = {"texts": Lengths(longest, longest, longest, longest)}
    return Tokens(0, kinds, float(tokens), tokens, float(tokens * longest), float(tokens), shared)
