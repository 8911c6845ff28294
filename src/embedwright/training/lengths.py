"""The tokens of a stage's steps, counted before it runs, from the texts that training will draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from embedwright.processes import Processes
from embedwright.text import Contract, TextTokenizer
from embedwright.training.batches.blend import Row, Source
from embedwright.training.batches.feed import batch_of_step, split_batch, tokenize_texts
from embedwright.training.batches.sources import is_mined, open_sources
from embedwright.training.masked.batch import Masker
from embedwright.training.masked.batch import batch_of_step as masked_batch
from embedwright.training.recipe import Recipe
from embedwright.training.run.start import longest_of, model_error_prefix, tokenizer_and_contract
from embedwright.training.stages import MaskedStage, Stage

SAMPLED_ROWS = 512  # rows sampled of a stage: enough for a mean within a few percent


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of one kind of text in the sampled steps."""

    mean: float
    median: int
    most: int  # 95 % of the texts have no more
    longest: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """What goes through the model in a step: `step` and `padded` are means over the sampled steps.

    `largest` is the most tokens of a sampled step, `largest_step` the number of that step. Equal texts of a step count
    once. `fullest` is the most that one of the processes encodes of a sampled step, as training deals its texts out.
    `padded` is what queries and candidates would take if each side were padded to its longest. `rows` is how
    many rows were sampled; 0 where no file is there: then every text counts at full length, and `kinds` has `texts`
    alone.
    """

    rows: int
    kinds: dict[str, Lengths]
    step: float
    largest: int
    largest_step: int
    fullest: int
    padded: float


def tokens_of(recipe: Recipe, there: list[list[bool]], processes: int = 1) -> list[Tokens]:
    """Counts the tokens of each stage; `there` says of each entry of its data whether the file can be read.

    `processes` share the texts of a step. Raises OSError if the base's tokenizer cannot be loaded, ConfigError if
    training would refuse the data.
    """
    parts = tuple(_part_that_is_there(part, found) for part, found in zip(recipe.stages, there, strict=True))
    lacking = [part.name for part, found in zip(parts, there, strict=True) if not all(found)]
    sources = open_sources(recipe.model_copy(update={"stages": parts}), lacking=lacking)
    with model_error_prefix(recipe):
        if not any(sources):  # then the tokenizer need not be there
            longest = longest_of(recipe.model)
            return [_at_most(part, longest, processes) for part in parts]
        tokenizer, contract = tokenizer_and_contract(recipe.model)
    own_tokenizer = TextTokenizer(tokenizer.backend_tokenizer)
    return [
        sampled(recipe, number, own, own_tokenizer, contract, processes)
        if own
        else _at_most(parts[number], contract.max_tokens, processes)
        for number, own in enumerate(sources)
    ]


def _part_that_is_there(part: Stage, there: Sequence[bool]) -> Stage:
    found = tuple(entry for entry, is_there in zip(part.data, there, strict=True) if is_there)
    # a part of the text may have fewer documents than are held out of all
    kept = {"heldout": 0} if isinstance(part, MaskedStage) and not all(there) else {}
    return part.model_copy(update={part.reads: found} | kept)


def sampled(
    recipe: Recipe,
    number: int,
    sources: Sequence[Source],
    tokenizer: TextTokenizer,
    contract: Contract,
    processes: int = 1,
    rows: int = SAMPLED_ROWS,
) -> Tokens:
    """Counts some steps of stage `number`, evenly spaced: as many as have `rows` rows, or all steps if they have fewer.

    Of negatives that are mined in the run, other documents stand in their place.
    """
    optim = recipe.stages[number].optim
    count = min(optim.steps, -(-rows // optim.batch_queries))
    kinds: dict[str, list[int]] = {}
    sizes: dict[int, int] = {}
    fullest, padded = [], []
    stood_in = stand_ins(recipe.stages[number], sources)
    for step in (i * optim.steps // count for i in range(count)):
        found, sizes[step], most = _texts_of_step(
            recipe, number, stood_in, tokenizer, contract, step, Processes(count=processes)
        )
        fullest.append(most)
        for kind, lengths in found.items():
            kinds.setdefault(kind, []).extend(lengths)
        first, *others = found.values()
        sides = (side for side in (first, [length for other in others for length in other]) if side)
        padded.append(sum(len(side) * max(side) for side in sides))
    largest_step = max(sizes, key=sizes.__getitem__)
    return Tokens(
        rows=count * optim.batch_queries,
        kinds={kind: summary(lengths) for kind, lengths in kinds.items() if lengths},
        step=float(np.mean(list(sizes.values()))),
        largest=sizes[largest_step],
        largest_step=largest_step,
        fullest=max(fullest),
        padded=float(np.mean(padded)),
    )


def _texts_of_step(
    recipe: Recipe,
    number: int,
    sources: Sequence[Source],
    tokenizer: TextTokenizer,
    contract: Contract,
    step: int,
    processes: Processes,
) -> tuple[dict[str, list[int]], int, int]:
    """Returns the lengths of the step's texts by kind, all its tokens, and those of the fullest process."""
    stage = recipe.stages[number]
    if isinstance(stage, MaskedStage):
        masked = masked_batch(recipe, number, sources, Masker(stage, tokenizer, contract), step)
        texts = [len(text.tokens.ids) for text in masked.texts]
        # training splits by characters, which are about proportional to tokens
        return {"texts": texts}, sum(texts), max(sum(texts[i] for i in part) for part in processes.split(texts))
    batch = batch_of_step(recipe, number, sources, contract, step)
    tokens = tokenize_texts(tokenizer, contract, [*batch.queries, *batch.candidates])
    queries, candidates = ([len(tokens[text].ids) for text in texts] for texts in (batch.queries, batch.candidates))
    kinds: dict[str, list[int]] = {"queries": queries, "positives": [], "negatives": []}
    positive = set(batch.masks.positive_Q.tolist())
    for column, length in enumerate(candidates):
        kinds["positives" if column in positive else "negatives"].append(length)
    parts = [sum(len(tokens[text].ids) for text in part) for part in split_batch(batch, processes)[0]]
    return kinds, sum(len(read.ids) for read in tokens.values()), max(parts)


def summary(lengths: list[int]) -> Lengths:
    median, most = np.percentile(lengths, [50, 95], method="lower")
    return Lengths(float(np.mean(lengths)), int(median), int(most), max(lengths))


def _at_most(part: Stage, longest: int, processes: int) -> Tokens:
    texts = part.optim.batch_queries * part.texts_a_row
    tokens, fullest = texts * longest, -(-texts // processes) * longest
    kinds = {"texts": Lengths(longest, longest, longest, longest)}
    return Tokens(0, kinds, float(tokens), tokens, 0, fullest, float(tokens))


# ---- negatives that are not there yet


def stand_ins(stage: Stage, sources: Sequence[Source]) -> list[Source]:
    """Returns the sources of a stage, with other rows' positives in the place of negatives that the run will mine."""
    if stage.mine is None:
        return list(sources)
    return [_StandIn(**vars(source), count=stage.hard_negatives) if is_mined(source) else source for source in sources]


@dataclass(frozen=True)
class _StandIn(Source):
    count: int = 0

    def row(self, number: int) -> Row:
        row = super().row(number)
        if not row.example.positives:  # a scored pair, for which nothing is mined
            return row
        others = [Source.row(self, (number + i) % len(self.rows)) for i in range(1, self.count + 1)]
        negatives = tuple(other.example.paired[0] for other in others)
        example = replace(row.example, negatives=negatives, positive_scores=None, negative_scores=None)
        return Row(example, row.task)
