"""The texts of a step of a masked phase: a window of each document, some of its tokens masked.

L tokens of a text, M masked ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedwright.config import ConfigError, did_you_mean
from embedwright.processes import ALONE, Processes
from embedwright.text import Contract, TextTokenizer, TokenizedText, tokenize
from embedwright.training.batches.batch import ids_hash
from embedwright.training.batches.blend import Source, rows_at
from embedwright.training.recipe import Recipe
from embedwright.training.stages import MaskedStage

# BERT's split: 80 % of the masked tokens become the mask token, 10 % another token, the others stay. Source: BERT,
# arXiv 1810.04805, and LLM2Vec's run_mntp.py, which takes transformers' DataCollatorForLanguageModeling for Llama.
MASKED, ANOTHER = 0.8, 0.1
UNCUT = 2**30  # more tokens than any text has
_CHARACTERS = 20  # characters of a document that are tokenised for each token of its window

_STEP, _HELDOUT = 3, 4  # keys of the random numbers


class MaskedText(NamedTuple):
    """One text of L tokens. Those at `positions` (M,) are masked; `targets` (M,) are the tokens that stood there."""

    tokens: TokenizedText
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]


@dataclass(frozen=True)
class MaskedBatch:
    """The texts of one step. `ids`: of the documents of all processes. `texts`: those of this process."""

    ids: list[str]
    texts: list[MaskedText]

    def ids_hash(self) -> str:
        return ids_hash(self.ids)


class Masker:
    """Reads documents as the model reads them, and masks some of their tokens."""

    def __init__(self, stage: MaskedStage, tokenizer: TextTokenizer, contract: Contract) -> None:
        """Raises ConfigError, which names a near token, if the stage's mask token is not one token of the tokenizer."""
        self.stage, self.tokenizer, self.contract = stage, tokenizer, contract
        self.vocabulary, name = tokenizer.plain.get_vocab_size(), stage.mask_token
        known = tokenizer.plain.token_to_id(name)
        ids = tokenizer.plain.encode(name, add_special_tokens=False).ids if known is None else [known]
        if len(ids) != 1:
            raise ConfigError(
                f"stages.{stage.name}.mask_token: {name!r} is {len(ids)} tokens of the model's tokenizer, but must be "
                f"one{did_you_mean(name, tokenizer.plain.get_vocab())}; `_` is one as a rule"
            )
        self.token: int = ids[0]

    def __call__(self, texts: Sequence[str], keys: Sequence[Sequence[int]]) -> list[MaskedText]:
        """Masks each text, which is a document without an instruction. What is masked follows from its key alone."""
        draws = [np.random.default_rng(key) for key in keys]
        most = _CHARACTERS * self.contract.max_tokens
        starts = [draw.integers(max(len(text) - most, 0) + 1) for text, draw in zip(texts, draws, strict=True)]
        cut = [text[start : start + most] for text, start in zip(texts, starts, strict=True)]
        tokenized = tokenize(self.tokenizer, self.contract, cut, self.contract.prefix(None), UNCUT)
        return [self._masked(tokens, draw) for tokens, draw in zip(tokenized, draws, strict=True)]

    def _masked(self, tokens: TokenizedText, draw: np.random.Generator) -> MaskedText:
        tokens, own = self._window(tokens, draw)
        own = own[own > 0]  # the first token has no state before it to be predicted from
        chosen = draw.random(len(own)) < self.stage.mask_share
        if len(own) and not chosen.any():
            chosen[draw.integers(len(own))] = True
        positions, ids = own[chosen], tokens.ids.copy()
        fate = draw.random(len(positions))
        ids[positions[fate < MASKED]] = self.token
        others = positions[fate >= 1 - ANOTHER]
        ids[others] = draw.integers(self.vocabulary, size=len(others))
        return MaskedText(TokenizedText(ids, tokens.pool), positions, tokens.ids[positions])

    def _window(self, tokens: TokenizedText, draw: np.random.Generator) -> tuple[TokenizedText, NDArray[np.int64]]:
        """Cuts a text to the model's length, anywhere; what stands around it stays. Also returns its positions."""
        special = [id for id in (*self.contract.bos_ids, self.contract.eos_id) if id is not None]
        own = np.flatnonzero(tokens.pool & ~np.isin(tokens.ids, special))
        excess = len(tokens.ids) - self.contract.max_tokens
        if excess <= 0 or not len(own):
            return tokens, own
        start = own[0] + draw.integers(len(own) - max(len(own) - excess, 1) + 1)
        kept = np.r_[0 : own[0], start : start + len(own) - excess, own[-1] + 1 : len(tokens.ids)]
        return TokenizedText(tokens.ids[kept], tokens.pool[kept]), own[: len(own) - excess]


def batch_of_step(
    recipe: Recipe, number: int, sources: Sequence[Source], masker: Masker, step: int, processes: Processes = ALONE
) -> MaskedBatch:
    """Returns the batch of a step of stage `number`, both from 0, with the texts of this process.

    It depends on its arguments alone: what is masked in a row follows from seed, stage, step and the row's place.
    """
    optim, name = recipe.stages[number].optim, recipe.stages[number].name
    rows = rows_at(sources, step, batch_queries=optim.batch_queries, batching="blended", seed=recipe.seed, stage=name)
    texts = [row.example.positives[0].text for row in rows]
    own = processes.split([len(text) for text in texts])[processes.rank]
    keys = [[recipe.seed, number, step, _STEP, i] for i in own]
    return MaskedBatch([row.example.id for row in rows], masker([texts[i] for i in own], keys))


def heldout_batch(
    recipe: Recipe, number: int, texts: Sequence[str], masker: Masker, processes: Processes = ALONE
) -> list[MaskedText]:
    """Masks the held-out texts of stage `number`, always alike. Returns those of this process."""
    own = processes.split([len(text) for text in texts])[processes.rank]
    return masker([texts[i] for i in own], [[recipe.seed, number, 0, _HELDOUT, i] for i in own])
