"""Hard negatives: what a teacher ranks high for a query and that, by a rule, is not one of its answers.

The rules are those of NV-Retriever (arXiv 2407.15831); `perc` at 0.95 is the one NV-Embed v2 used (paper, 4.1.1).
`Q` queries, `C` documents of the corpus, `P` rows of the pool (the corpus, then the texts it lacks), `K` candidates of
one query, `F` pairs of a query and a passage, `E` embedding.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedwright.data.answers import Answers, marks_of, question_of, text_mark
from embedwright.data.keys import are_near, shingles, word_key
from embedwright.data.schema import DataError, Example, Passage, Task, text_of
from embedwright.data.sources.catalog import find_task
from embedwright.encoders.protocol import Encoder, as_encoder, encode_finite
from embedwright.errors import InputError
from embedwright.mining.ensemble import ENSEMBLES, Ensemble, drawn_teacher, in_turn
from embedwright.mining.pool import Pool, make_pool, positives_of
from embedwright.mining.report import Histogram, MiningReport
from embedwright.mining.rules import (
    BEST_MARGIN,
    Barred,
    Positives,
    Rule,
    check_sampling,
    check_settings,
    drawn,
    eligible,
)
from embedwright.vectors.search import pair_scores, top_k
from embedwright.vectors.shards import Vectors

__all__ = ["BEST_MARGIN", "Ensemble", "MiningReport", "Rule", "mine", "positives_of"]

logger = logging.getLogger(__name__)

_TILE = 2048  # queries encoded and searched at once
SEARCHED_PER_SAMPLED = 10  # candidates looked at for each that may be drawn: the rule takes most away


def mine(
    examples: Iterable[Example],
    corpus: Mapping[str, str],
    teacher: Any,
    *,
    rule: Rule = "perc",
    margin: float | None = None,
    negatives: int = 7,
    depth: int = 100,
    task: str | None = "",
    tasks: Mapping[str, Task] | None = None,
    sampled: bool = False,
    sample_from: int | None = None,
    seed: int = 0,
    ensemble: Ensemble = "cross-sample",
    positives: Positives = "lowest",
    answers: Answers | None = None,
    vectors: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Example], MiningReport]:
    """Fill each example up to `negatives` hard negatives from the exact top `depth` of `corpus` (id -> text).

    `teacher` is anything `as_encoder` takes; a score is the inner product of two of its vectors. Queries get the
    instruction of their row's task, where `tasks` (by name) or the catalogue has one, else the teacher's own; documents
    get none. `task` is the instruction for all queries instead, None for queries that are read as documents are. Of a
    query's ranked candidates, its answers taken away,
    - `naive` keeps all,
    - `shift` ignores the first `margin` (10),
    - `abs` keeps score <= `margin` (0.7),
    - `margin` keeps score < positive - `margin` (0.05),
    - `perc` keeps score < positive x `margin` (0.95); a positive below zero is multiplied by 2 - `margin` instead,
      else the threshold would lie above it.

    Of several positives, `positives="lowest"`: the lowest score sets the threshold, the safe side (as in
    sentence-transformers' `mine_hard_negatives` and in NeMo). `"each"`: an example for each of them, as NV-Retriever
    has one positive per query, with its own threshold and negatives, and the id `<id>:p<number>`; the others are not
    its negatives either, nor in a batch that holds their examples.

    Never a negative, under any rule: a document without text; one with the id or the exact key (`keys`) of an answer;
    one with the exact key of the query; nor a near-duplicate of an answer, of the query, of a negative that the example
    came with or of one taken before. The answers to a question are those of all its rows (`answers`; default: those of
    `examples`), and ids are compared within a task only. Equal scores rank in the order of the corpus.

    The best are taken, in rank order. `sampled` draws them instead, by softmax over the scores without replacement,
    seeded per example id, from the first `sample_from` candidates that may be negatives (10, from which the paper draws
    and finds that more hurts; `negatives` where that is more). At least ten times as many are looked at, whatever
    `depth`. They stay in the order drawn, so that a trainer which uses the first few has a fair draw too.

    Of a list of teachers, by `ensemble`: `cross-sample` draws one per example, seeded by its id; `intra-sample` has
    each rank for every query, by its own threshold, and takes the best of each in turn, no text twice;
    `intra-sample-duplicates` takes a text as often as teachers propose it.

    Negatives that an example came with stay in front; those that are equal to an answer or to the query are removed.
    Returned in the order given, with the teacher's `positive_scores` and `negative_scores`; without them where several
    ranked for one query. `progress(done, total)` counts encoded texts.

    Memory: the examples, for each document its id and 9 bytes, and per teacher the vectors of corpus and positives;
    with `vectors`, a folder, those are kept there (`encode_texts`) and memory holds a few blocks of them. A run that
    was stopped goes on at the next block; one by another rule encodes queries alone. `corpus` is read in order, a few
    times, one text at a time: it may be a view of a file.

    Raises ValueError for a margin that does not fit the rule, a `depth` too small for what is asked, a vector that is
    not finite; DataError for a corpus without text and, with its id, an example without a query or positives.
    """
    started = time.perf_counter()
    margin = check_settings(rule, margin, negatives, depth)
    sample_from = check_sampling(sampled, sample_from, negatives)
    teachers = [as_encoder(one) for one in (teacher if isinstance(teacher, list | tuple) else [teacher])]
    if not teachers:
        raise InputError("no teacher")
    if ensemble not in ENSEMBLES:
        raise InputError(f"ensemble must be one of {', '.join(ENSEMBLES)}, not {ensemble!r}")
    if positives not in ("lowest", "each"):
        raise InputError(f"positives must be lowest or each, not {positives!r}")
    rows = list(map(_checked, examples))
    answers, instructions = answers or Answers(rows), _instructions(rows, task, tasks or {})
    asked = [one for row in rows for one in _ask(row, answers.of(row), positives, instructions[row.task])]
    pool = make_pool(corpus, [one.example for one in asked], (p for one in asked for p in one.answers))
    if not pool.ids:
        raise DataError("the corpus holds no text: nothing to mine from")
    crossed = len(teachers) > 1 and ensemble == "cross-sample"
    total = len(teachers) * len(pool.keys) + (1 if crossed else len(teachers)) * len(asked)
    encoded = 0

    def advance(texts: int) -> None:
        nonlocal encoded
        encoded += texts
        if progress:
            progress(encoded, total)

    folder = None if vectors is None else Path(vectors)
    sides = [_Side(encoder, *pool.encoded(encoder, folder, advance)) for encoder in teachers]
    searched = max(depth, SEARCHED_PER_SAMPLED * sample_from) if sampled else depth
    run = _Run(pool, sides, rule, margin, negatives, searched, sample_from, seed, ensemble, advance)
    mined = [example for start in range(0, len(asked), _TILE) for example in run.fill(asked[start : start + _TILE])]

    report = MiningReport(
        rule,
        margin,
        len(teachers),
        ensemble if len(teachers) > 1 else None,
        round(time.perf_counter() - started, 3),
        len(mined),
        len(pool.ids),
        **run.count,
        scores=run.histogram.to_json(),
    )
    logger.info("mined %s", report.counts())
    return mined, report


# ---- what is asked


class _Asked(NamedTuple):
    """An example to fill, without the negatives that are answers, and all answers to its question."""

    example: Example
    answers: tuple[Passage, ...]
    removed: int  # of its negatives
    instruction: str | None


def _checked(example: Example) -> Example:
    """Raises DataError where query or positives are missing."""
    text_of(example.query, f"example {example.id!r}: query")
    if not example.positives:
        raise DataError(f"example {example.id!r}: no positive, so that its answers cannot be told from negatives")
    return example


def _ask(
    example: Example, answers: tuple[Passage, ...], positives: Positives, instruction: str | None
) -> Iterator[_Asked]:
    left = example.negatives
    if left:
        barred = marks_of(example.task, answers) | {text_mark(example.query)}
        left = tuple(p for p in left if barred.isdisjoint(marks_of(example.task, [p])))
    removed = len(example.negatives) - len(left)
    if positives == "lowest" or len(example.positives) == 1:
        yield _Asked(replace(example, negatives=left) if removed else example, answers, removed, instruction)
        return
    for number, positive in enumerate(example.positives):
        own = replace(example, id=f"{example.id}:p{number}", positives=(positive,), negatives=left)
        yield _Asked(own, answers, removed if number == 0 else 0, instruction)


def _instructions(rows: Iterable[Example], task: str | None, tasks: Mapping[str, Task]) -> dict[str, str | None]:
    """Of each task that rows name: `task` for all, or else its own, which is empty where it is not known."""
    own = {name: tasks.get(name) or find_task(name) for name in {row.task for row in rows}}
    return {name: task if task != "" else known.instruction if known else "" for name, known in own.items()}


# ---- the work


class _Side(NamedTuple):
    """One teacher, and its vectors of the corpus and of all rows of the pool."""

    encoder: Encoder
    documents: Vectors
    all: Vectors


_Ranked = tuple[int, float]  # a row of the pool and its score


class _Proposed(NamedTuple):
    """What one teacher proposes for one query, in the order to take it, what it passed over as a near copy, and its
    scores of the passages there are."""

    ranked: list[_Ranked]
    passed: set[int]
    positive_scores: tuple[float, ...]
    given_scores: tuple[float, ...]


class _Answered(NamedTuple):
    """The question and its answers, word key -> shingles, and which rows of the pool nearly repeat one of them."""

    words: dict[str, set[str]]
    near: dict[int, bool]


@dataclass(slots=True)
class _Run:
    """The settings of `mine`, and what it counts."""

    pool: Pool
    sides: list[_Side]
    rule: Rule
    margin: float | None
    negatives: int
    depth: int
    sample_from: int  # 0: the best are taken
    seed: int
    ensemble: Ensemble
    advance: Callable[[int], None]
    count: Counter[str] = field(default_factory=Counter)
    histogram: Histogram = field(default_factory=Histogram)
    copies: dict[int, _Answered] = field(default_factory=dict)  # of the questions of a tile

    def fill(self, asked: Sequence[_Asked]) -> Iterator[Example]:
        """The examples with their negatives."""
        self.copies.clear()
        proposed: list[list[_Proposed]] = [[] for _ in asked]
        for number in range(len(self.sides)):
            some = [q for q, one in enumerate(asked) if self._is_asked(number, one.example.id)]
            for q, proposal in zip(some, self._propose(number, [asked[q] for q in some]), strict=True):
                proposed[q].append(proposal)
        taken: list[float] = []
        short = 0
        for one, lists in zip(asked, proposed, strict=True):
            example, pairs = one.example, self._take(one, lists)
            found = [self.pool.passage(example.task, row) for row, _ in pairs]
            scores = [score for _, score in pairs]
            known = lists[0] if len(lists) == 1 else None
            filled = replace(
                example,
                negatives=(*example.negatives, *found),
                positive_scores=known and known.positive_scores,
                negative_scores=known and (*known.given_scores, *scores),
            )
            short += len(filled.negatives) < self.negatives
            taken += scores
            yield filled
        removed = sum(one.removed for one in asked)
        self.count.update(negatives=len(taken), removed_given=removed, queries_short=short)
        self.histogram.add("negatives", np.array(taken))

    def _is_asked(self, number: int, example_id: str) -> bool:
        if len(self.sides) == 1 or self.ensemble != "cross-sample":
            return True
        return drawn_teacher(example_id, len(self.sides), self.seed) == number

    def _propose(self, number: int, asked: Sequence[_Asked]) -> Iterator[_Proposed]:
        """What teacher `number` proposes for each query."""
        if not asked:
            return
        side, pool = self.sides[number], self.pool
        queries_QE = _encoded(side.encoder, asked)
        self.advance(len(asked))
        scores_QK, rows_QK = top_k(queries_QE, side.documents, self.depth)
        positive_rows = [pool.rows_of_texts(one.example.positives) for one in asked]
        given_rows = [pool.rows_of_texts(one.example.negatives) for one in asked]
        positive_scores, given_scores = (_scores(queries_QE, side.all, rows) for rows in (positive_rows, given_rows))
        barred = [
            Barred(
                pool.rows_with_id(one.example.task, one.answers),
                [text_mark(text) for text in (one.example.query, *(p.text for p in one.answers))],
                pool.rows_with_id(one.example.task, one.example.negatives),
                [text_mark(p.text) for p in one.example.negatives],
            )
            for one in asked
        ]
        lowest_Q = np.array([min(scores) for scores in positive_scores], dtype=np.float32)
        masks = eligible(rows_QK, pool.keys_of(rows_QK), scores_QK, lowest_Q, barred, self.rule, self.margin)
        self.count["candidates"] += rows_QK.size
        self.count.update({f"removed_{reason}": int(mask.sum()) for reason, mask in masks.removed().items()})
        self.histogram.add("positives", _joined(positive_scores, np.float32))
        self.histogram.add("removed_by_rule", scores_QK[masks.by_rule])
        for q, one in enumerate(asked):
            rows, scores = rows_QK[q, masks.eligible[q]].tolist(), scores_QK[q, masks.eligible[q]].tolist()
            ranked = list(zip(rows, scores, strict=True))
            passed: set[int] = set()
            if self.sample_from:
                first = list(islice(self._distinct(one, ranked, passed), self.sample_from))
                order = drawn(np.array([score for _, score in first]), self.seed, one.example.id, number)
                ranked = [first[place] for place in order]
            yield _Proposed(ranked, passed, tuple(positive_scores[q]), tuple(given_scores[q]))

    def _distinct(self, one: _Asked, ranked: Iterable[_Ranked], passed: set[int]) -> Iterator[_Ranked]:
        """Those of the ranked rows that nearly repeat nothing of the question, and none before them; `passed` gets the
        others."""
        answered, before = self._answered(one), self._given(one)
        for row, score in ranked:
            own = self._words(row)
            if row not in answered.near:
                answered.near[row] = _repeats(own, answered.words)
            if answered.near[row] or _repeats(own, before):
                passed.add(row)
                continue
            before[own[0]] = own[1]
            yield row, score

    def _take(self, one: _Asked, proposed: Sequence[_Proposed]) -> list[_Ranked]:
        """Row and score of the negatives to add, the best of each teacher in turn."""
        missing = self.negatives - len(one.example.negatives)
        if missing <= 0:
            return []
        passed = set().union(*(each.passed for each in proposed))
        taken: list[_Ranked] = []
        before: dict[str, set[str]] = {}
        keys: set[int] = set()
        for row, score in in_turn([self._distinct(one, each.ranked, passed) for each in proposed]):
            key = int(self.pool.keys[row])
            if key in keys:
                if self.ensemble != "intra-sample-duplicates":
                    continue
            elif _repeats(own := self._words(row), before):  # what another teacher proposed
                passed.add(row)
                continue
            else:
                keys.add(key)
                before[own[0]] = own[1]
            taken.append((row, score))
            if len(taken) == missing:
                break
        self.count["removed_near_duplicate"] += len(passed)
        return taken

    def _answered(self, one: _Asked) -> _Answered:
        question = question_of(one.example.task, one.example.query)
        if question not in self.copies:
            texts = (one.example.query, *(p.text for p in one.answers))
            self.copies[question] = _Answered({key: shingles(key) for key in map(word_key, texts)}, {})
        return self.copies[question]

    def _given(self, one: _Asked) -> dict[str, set[str]]:
        return {key: shingles(key) for key in (word_key(p.text) for p in one.example.negatives)}

    def _words(self, row: int) -> tuple[str, set[str]]:
        key = word_key(self.pool.text(row))
        return key, shingles(key)


def _repeats(own: tuple[str, set[str]], others: Mapping[str, set[str]]) -> bool:
    return own[0] in others or any(are_near(own[1], other) for other in others.values())


def _encoded(encoder: Encoder, asked: Sequence[_Asked]) -> NDArray[np.float32]:
    """The queries, each under its instruction."""
    by_instruction: dict[str | None, list[int]] = {}
    for q, one in enumerate(asked):
        by_instruction.setdefault(one.instruction, []).append(q)
    parts = [
        encode_finite(encoder, [asked[q].example.query for q in some], instruction)
        for instruction, some in by_instruction.items()
    ]
    order = np.argsort(_joined(list(by_instruction.values())))
    vectors_QE: NDArray[np.float32] = np.concatenate(parts)[order] if len(parts) > 1 else parts[0]
    return vectors_QE


def _scores(queries_QE: NDArray[np.float32], vectors: Vectors, rows: Sequence[list[int]]) -> list[list[float]]:
    """The scores of each query's own rows."""
    query_F = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
    return _split(pair_scores(queries_QE, vectors, query_F, _joined(rows)), rows)


def _joined(lists: Sequence[Sequence[Any]], dtype: Any = np.int64) -> NDArray[Any]:
    return np.fromiter(chain.from_iterable(lists), dtype)


def _split(values_F: NDArray[Any], like: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """What `_joined` makes one, as lists that are as long as those of `like`."""
    values = iter(values_F.tolist())
    return [list(islice(values, len(some))) for some in like]
