"""Choosing negatives: each teacher ranks and proposes documents for each query, and the best proposals are taken.

`Q` queries, `K` candidates of one query.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedwright.data.answers import ids_of, question_of, text_mark
from embedwright.data.keys import are_near, shingles, word_key
from embedwright.data.schema import Example
from embedwright.mining.pool import Pool
from embedwright.mining.rank import Candidates, MiningQuery, Teacher, Tile
from embedwright.mining.report import Histogram
from embedwright.mining.rules import Eligible, Ensemble, Exclusions, Rule, eligible, in_turn, sample_order, teacher_of

_TILE = 2048  # queries that are encoded at once, and chosen for at once
Ranked = tuple[int, float]  # a row of the pool and its score
Words = tuple[str, set[str]]  # a text's word key and its shingles


class MiningSettings(NamedTuple):
    """What is chosen, as `mine` describes and has checked it."""

    rule: Rule
    margin: float | None
    negatives: int
    sample_from: int  # 0: the best are taken
    seed: int
    ensemble: Ensemble
    scored: bool  # whether the teachers have scores


class Proposal(NamedTuple):
    """What one teacher proposes for one query, in the order to take it."""

    ranked: list[Ranked]
    near_copies: set[int]  # rows that were passed over
    positive_scores: tuple[float, ...]
    given_scores: tuple[float, ...]  # scores of the negatives that the example came with


class _Question(NamedTuple):
    """The words of a question and of its answers, and which rows of the pool nearly repeat one of them."""

    words: dict[str, set[str]]
    near: dict[int, bool]


@dataclass(slots=True)
class Miner:
    """Fills queries with negatives, and counts what it finds."""

    pool: Pool
    teachers: list[Teacher]
    settings: MiningSettings
    count: Counter[str] = field(default_factory=Counter, init=False)
    histogram: Histogram = field(default_factory=Histogram, init=False)
    questions: dict[int, _Question] = field(default_factory=dict, init=False)  # those of the queries in progress

    def fill(self, queries: Sequence[MiningQuery]) -> Iterator[Example]:
        """Gives the examples with their negatives. The corpus is read once; all queries given are held in memory."""
        tiles = [queries[start : start + _TILE] for start in range(0, len(queries), _TILE)]
        asked = [[self._asking(number, tile) for tile in tiles] for number in range(len(self.teachers))]
        ranked = [
            teacher([[tile[q] for q in own] for tile, own in zip(tiles, each, strict=True)])
            for teacher, each in zip(self.teachers, asked, strict=True)
        ]
        for number, tile in enumerate(tiles):
            yield from self._filled(tile, [each[number] for each in asked], [next(each) for each in ranked])

    def _filled(
        self, queries: Tile, asked: Sequence[Sequence[int]], candidates: Sequence[Candidates]
    ) -> Iterator[Example]:
        """`asked` are the queries that each teacher has ranked `candidates` for."""
        self.questions.clear()
        proposals: list[list[Proposal]] = [[] for _ in queries]
        for number, (own, found) in enumerate(zip(asked, candidates, strict=True)):
            for q, proposal in zip(own, self._propose(number, [queries[q] for q in own], found), strict=True):
                proposals[q].append(proposal)
        for query, proposed in zip(queries, proposals, strict=True):
            taken = self._take(query, proposed)
            only = proposed[0] if len(proposed) == 1 and self.settings.scored else None
            scores = [score for _, score in taken]
            filled = replace(
                query.example,
                negatives=(*query.example.negatives, *(self.pool.passage(query.example.task, row) for row, _ in taken)),
                positive_scores=only and only.positive_scores,
                negative_scores=only and (*only.given_scores, *scores),
            )
            short = len(filled.negatives) < self.settings.negatives
            self.count.update(negatives=len(taken), removed_given=query.removed, queries_short=short)
            self._count_scores("negatives", np.array(scores))
            yield filled

    def _asking(self, number: int, queries: Tile) -> list[int]:
        """Returns the queries that teacher `number` is asked for."""
        teachers, settings = len(self.teachers), self.settings
        if teachers == 1 or settings.ensemble != "cross-sample":
            return list(range(len(queries)))
        drawn = (teacher_of(query.example.id, teachers, settings.seed) for query in queries)
        return [q for q, one in enumerate(drawn) if one == number]

    def _propose(self, number: int, queries: Tile, candidates: Candidates) -> Iterator[Proposal]:
        """Returns what teacher `number` proposes for each query."""
        if not queries:
            return
        pool, settings = self.pool, self.settings
        rows_QK, scores_QK, listed_QK, own = candidates
        positives = [some[: len(query.example.positives)] for some, query in zip(own, queries, strict=True)]
        lowest_Q = np.array([min(some) for some in positives], dtype=np.float32)
        excluded = [self._exclusions(query) for query in queries]
        masks = eligible(rows_QK, pool.keys_of(rows_QK), scores_QK, lowest_Q, excluded, settings.rule, settings.margin)
        masks = Eligible(*(mask_QK & listed_QK for mask_QK in masks))
        self.count["candidates"] += int(listed_QK.sum())
        self.count.update({f"removed_{reason}": int(mask.sum()) for reason, mask in masks.removed().items()})
        self._count_scores("positives", np.concatenate(positives))
        self._count_scores("removed_by_rule", scores_QK[masks.by_rule])
        for q, query in enumerate(queries):
            rows, scores = rows_QK[q, masks.eligible[q]].tolist(), scores_QK[q, masks.eligible[q]].tolist()
            ranked = list(zip(rows, scores, strict=True))
            near_copies: set[int] = set()
            if settings.sample_from:
                first = list(islice(self._distinct(query, ranked, near_copies), settings.sample_from))
                order = sample_order(np.array([s for _, s in first]), settings.seed, query.example.id, number)
                ranked = [first[place] for place in order]
            given = own[q][len(positives[q]) :]
            yield Proposal(ranked, near_copies, tuple(positives[q].tolist()), tuple(given.tolist()))

    def _count_scores(self, kind: str, scores: NDArray[np.floating[Any]]) -> None:
        if self.settings.scored:
            self.histogram.add(kind, scores)

    def _exclusions(self, query: MiningQuery) -> Exclusions:
        example, answers = query.example, query.answers
        return Exclusions(
            self.pool.rows_with_id(example.task, dict.fromkeys(id for answer in answers for id in ids_of(answer))),
            [text_mark(text) for text in (example.query, *(p.text for p in answers))],
            self.pool.rows_with_id(example.task, (p.id for p in example.negatives if p.id is not None)),
            [text_mark(p.text) for p in example.negatives],
        )

    def _distinct(self, query: MiningQuery, ranked: Iterable[Ranked], near_copies: set[int]) -> Iterator[Ranked]:
        """Gives the rows that nearly repeat neither the question, an answer, a given negative nor a row before them.

        `near_copies` gets the others.
        """
        question = self._question(query)
        before = dict(_words(p.text) for p in query.example.negatives)
        for row, score in ranked:
            own = _words(self.pool.document(row)[1])
            if row not in question.near:
                question.near[row] = _repeats(own, question.words)
            if question.near[row] or _repeats(own, before):
                near_copies.add(row)
                continue
            before[own[0]] = own[1]
            yield row, score

    def _take(self, query: MiningQuery, proposed: Sequence[Proposal]) -> list[Ranked]:
        """Returns row and score of the negatives to add, the best of each teacher in turn."""
        missing = self.settings.negatives - len(query.example.negatives)
        if missing <= 0:
            return []
        near_copies = set().union(*(each.near_copies for each in proposed))
        taken: list[Ranked] = []
        before: dict[str, set[str]] = {}
        keys: set[int] = set()
        for row, score in in_turn([self._distinct(query, each.ranked, near_copies) for each in proposed]):
            key = int(self.pool.keys[row])
            if key in keys:
                if self.settings.ensemble != "intra-sample-duplicates":
                    continue
            elif _repeats(own := _words(self.pool.document(row)[1]), before):  # what another teacher proposed
                near_copies.add(row)
                continue
            else:
                keys.add(key)
                before[own[0]] = own[1]
            taken.append((row, score))
            if len(taken) == missing:
                break
        self.count["removed_near_duplicate"] += len(near_copies)
        return taken

    def _question(self, query: MiningQuery) -> _Question:
        question = question_of(query.example.task, query.example.query)
        if question not in self.questions:
            texts = (query.example.query, *(p.text for p in query.answers))
            self.questions[question] = _Question(dict(map(_words, texts)), {})
        return self.questions[question]


def _words(text: str) -> Words:
    key = word_key(text)
    return key, shingles(key)


def _repeats(own: Words, others: Mapping[str, set[str]]) -> bool:
    return own[0] in others or any(are_near(own[1], other) for other in others.values())
