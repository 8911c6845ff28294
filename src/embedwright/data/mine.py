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

from embedwright.data.candidates import BEST_MARGIN, Barred, Positives, Rule, check_settings, drawn, eligible
from embedwright.data.ensemble import ENSEMBLES, Ensemble, drawn_teacher, in_turn
from embedwright.data.example import DataError, Example, Passage, text_of
from embedwright.data.keys import NEAR, exact_key, jaccard, shingles, word_key
from embedwright.data.mining_report import Histogram, MiningReport
from embedwright.data.teacher import Encoder, as_encoder, encode_finite
from embedwright.data.topk import pair_scores, top_k
from embedwright.data.vectors import Vectors, encode_texts
from embedwright.errors import InputError

__all__ = ["BEST_MARGIN", "Ensemble", "MiningReport", "Rule", "mine", "positives_of"]

logger = logging.getLogger(__name__)

_TILE = 2048  # queries encoded and searched at once


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
    sampled: bool = False,
    seed: int = 0,
    ensemble: Ensemble = "cross-sample",
    positives: Positives = "lowest",
    vectors: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Example], MiningReport]:
    """Fill each example up to `negatives` hard negatives from the exact top `depth` of `corpus` (id -> text).

    `teacher` is anything `as_encoder` takes; a score is the inner product of two of its vectors. `task` is the
    instruction for the queries, empty the teacher's own, None for queries that are read as documents are; documents get
    none. Of a query's ranked candidates, its positives taken away,
    - `naive` keeps all,
    - `shift` ignores the first `margin` (10),
    - `abs` keeps score <= `margin` (0.7),
    - `margin` keeps score < positive - `margin` (0.05),
    - `perc` keeps score < positive x `margin` (0.95); a positive below zero is multiplied by 2 - `margin` instead,
      else the threshold would lie above it.

    Of several positives, `positives="lowest"`: the lowest score sets the threshold, the safe side (as in
    sentence-transformers' `mine_hard_negatives` and in NeMo). `"each"`: an example for each of them, as NV-Retriever
    has one positive per query, with its own threshold and negatives, and the id `<id>:p<number>`; the others are not
    its negatives either, but a trainer that mixes such examples in a batch no longer knows that.

    Never a negative, under any rule: a document with the id or the text of a positive, or with the text of the query
    (whitespace collapsed, case folded), or without text; nor a near-duplicate of a positive (Jaccard of word 3-shingles
    of at least 0.8, as in `clean`; negatives that an example came with are not put to that test). Documents of the same
    text count once. Equal scores rank in the order of the corpus.

    The best are taken, in rank order. `sampled` draws them instead, by softmax over the eligible scores without
    replacement, seeded per example id; they stay in the order drawn, so that a trainer which uses the first few has a
    fair draw too. (The paper draws from the top 10 and finds that more hurts: `depth`.)

    Of a list of teachers, by `ensemble`: `cross-sample` draws one per example, seeded by its id; `intra-sample` has
    each rank for every query, by its own threshold, and takes the best of each in turn, no text twice;
    `intra-sample-duplicates` takes a text as often as teachers propose it.

    Negatives that an example came with stay in front; those that repeat a positive or the query are removed. Returned
    in the order given, with the teacher's `positive_scores` and `negative_scores`; without them where several ranked
    for one query. `progress(done, total)` counts encoded texts.

    Memory: the examples, for each document its id and 9 bytes, and per teacher the vectors of corpus and positives;
    with `vectors`, a folder, those are kept there (`encode_texts`) and memory holds a few blocks of them. A run that
    was stopped goes on at the next block; one by another rule encodes queries alone. `corpus` is read in order, a few
    times, one text at a time: it may be a view of a file.

    Raises ValueError for a margin that does not fit the rule, a `depth` too small for what is asked, a vector that is
    not finite; DataError for a corpus without text and, with its id, an example without a query or positives.
    """
    started = time.perf_counter()
    margin = check_settings(rule, margin, negatives, depth)
    teachers = [as_encoder(one) for one in (teacher if isinstance(teacher, list | tuple) else [teacher])]
    if not teachers:
        raise InputError("no teacher")
    if ensemble not in ENSEMBLES:
        raise InputError(f"ensemble must be one of {', '.join(ENSEMBLES)}, not {ensemble!r}")
    if positives not in ("lowest", "each"):
        raise InputError(f"positives must be lowest or each, not {positives!r}")
    asked = [one for example in examples for one in _ask(example, positives)]
    pool = _make_pool(corpus, [one.example for one in asked])
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
    run = _Run(pool, sides, rule, margin, negatives, depth, task, sampled, seed, ensemble, advance)
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


def positives_of(examples: Iterable[Example]) -> dict[str, str]:
    """The examples' own positives as a corpus: document id (a number where it has none) -> text, each text once."""
    passages = {passage.text: passage.id for example in examples for passage in example.positives}
    return {id or f"p{number}": text for number, (text, id) in enumerate(passages.items())}


# ---- what is asked


class _Asked(NamedTuple):
    """An example to fill, without the negatives that are answers, and all positives of its query."""

    example: Example
    answers: tuple[Passage, ...]
    removed: int  # of its negatives


def _ask(example: Example, positives: Positives) -> Iterator[_Asked]:
    """Raises DataError where query or positives are missing."""
    text_of(example.query, f"example {example.id!r}: query")
    answers = example.positives
    if not answers:
        raise DataError(f"example {example.id!r}: no positive, so that its answers cannot be told from negatives")
    left = example.negatives
    if left:
        ids = {p.id for p in answers if p.id is not None}
        keys = {_key(text) for text in (example.query, *(p.text for p in answers))}
        left = tuple(p for p in left if p.id not in ids and _key(p.text) not in keys)
    removed = len(example.negatives) - len(left)
    if positives == "lowest" or len(answers) == 1:
        yield _Asked(replace(example, negatives=left) if removed else example, answers, removed)
        return
    for number, positive in enumerate(answers):
        own = replace(example, id=f"{example.id}:p{number}", positives=(positive,), negatives=left)
        yield _Asked(own, answers, removed if number == 0 else 0)


# ---- all texts


@dataclass(frozen=True, slots=True)
class _Pool:
    """All texts to be encoded: the documents of the corpus, then, each once, the passages that it lacks."""

    corpus: Mapping[str, str]
    ids: list[str]  # (C) of the documents that have text
    lacking: list[str]  # (P - C)
    keys: NDArray[np.int64]  # (P), of the rows that are `known`
    known: NDArray[np.bool_]  # (P)
    row_of_id: dict[str, int]  # of the documents that the examples name
    row_of_text: dict[str, int]  # of the passages of the examples

    def text(self, row: int) -> str:
        return self.corpus[self.ids[row]] if row < len(self.ids) else self.lacking[row - len(self.ids)]

    def keys_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The `_key` of each row, made when it is first asked for: of a large corpus most are no one's candidates."""
        asked = np.unique(rows[~self.known[rows]])
        self.known[asked] = True
        self.keys[asked] = np.fromiter((_key(self.text(row)) for row in asked.tolist()), np.int64, len(asked))
        return self.keys[rows]

    def rows_with_id(self, passages: Iterable[Passage]) -> list[int]:
        return [self.row_of_id[p.id] for p in passages if p.id in self.row_of_id]

    def rows_of_texts(self, passages: Iterable[Passage]) -> list[int]:
        return [self.row_of_text[p.text] for p in passages]

    def encoded(self, encoder: Encoder, folder: Path | None, advance: Callable[[int], None]) -> tuple[Vectors, Vectors]:
        """The vectors of the corpus, and of all rows."""
        documents = encode_texts(
            encoder, lambda: _with_text(self.corpus.values()), len(self.ids), folder=folder, advance=advance
        )
        lacking = encode_texts(encoder, lambda: self.lacking, len(self.lacking), folder=folder, advance=advance)
        return documents, documents + lacking


def _make_pool(corpus: Mapping[str, str], examples: Sequence[Example]) -> _Pool:
    passages = [p for example in examples for p in (*example.positives, *example.negatives)]
    wanted_ids, row_of_text = {p.id for p in passages}, dict.fromkeys((p.text for p in passages), -1)
    ids: list[str] = []
    row_of_id: dict[str, int] = {}
    for id_, text in corpus.items():
        if not text or text.isspace():
            continue
        if row_of_text.get(text) == -1:
            row_of_text[text] = len(ids)
        if id_ in wanted_ids:
            row_of_id[id_] = len(ids)
        ids.append(id_)
    lacking = [text for text, row in row_of_text.items() if row == -1]
    row_of_text.update(zip(lacking, range(len(ids), len(ids) + len(lacking)), strict=True))
    rows = len(ids) + len(lacking)
    return _Pool(corpus, ids, lacking, np.empty(rows, np.int64), np.zeros(rows, bool), row_of_id, row_of_text)


def _with_text(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text and not text.isspace())


def _key(text: str) -> int:
    """Equal for texts of one exact key. Others share one of the 2^64 keys with a chance of 3e-8 in a corpus of a
    million, and one of the two is then no negative."""
    return hash(exact_key(text))


# ---- the work


class _Side(NamedTuple):
    """One teacher, and its vectors of the corpus and of all rows of the pool."""

    encoder: Encoder
    documents: Vectors
    all: Vectors


class _Proposed(NamedTuple):
    """What one teacher proposes for one query, in the order to take it, and its scores of the passages there are."""

    rows: list[int]
    scores: list[float]
    positive_scores: tuple[float, ...]
    given_scores: tuple[float, ...]


@dataclass(slots=True)
class _Run:
    """The settings of `mine`, and what it counts."""

    pool: _Pool
    sides: list[_Side]
    rule: Rule
    margin: float | None
    negatives: int
    depth: int
    task: str | None
    sampled: bool
    seed: int
    ensemble: Ensemble
    advance: Callable[[int], None]
    count: Counter[str] = field(default_factory=Counter)
    histogram: Histogram = field(default_factory=Histogram)

    def fill(self, asked: Sequence[_Asked]) -> Iterator[Example]:
        """The examples with their negatives."""
        proposed: list[list[_Proposed]] = [[] for _ in asked]
        for number in range(len(self.sides)):
            some = [q for q, one in enumerate(asked) if self._is_asked(number, one.example.id)]
            for q, proposal in zip(some, self._propose(number, [asked[q] for q in some]), strict=True):
                proposed[q].append(proposal)
        taken: list[float] = []
        short = 0
        for (example, answers, _), lists in zip(asked, proposed, strict=True):
            pairs = self._take(example, answers, lists)
            found = [Passage(self.pool.text(row), self.pool.ids[row]) for row, _ in pairs]
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
        queries_QE = encode_finite(side.encoder, [one.example.query for one in asked], self.task)
        self.advance(len(asked))
        scores_QK, rows_QK = top_k(queries_QE, side.documents, self.depth)
        positive_rows = [pool.rows_of_texts(one.example.positives) for one in asked]
        given_rows = [pool.rows_of_texts(one.example.negatives) for one in asked]
        answer_rows = [pool.rows_of_texts(one.answers) for one in asked]
        positive_scores, given_scores = (_scores(queries_QE, side.all, rows) for rows in (positive_rows, given_rows))
        answer_keys, given_keys = (_split(pool.keys_of(_joined(rows)), rows) for rows in (answer_rows, given_rows))
        barred = [
            Barred(
                pool.rows_with_id(one.answers),
                [_key(one.example.query), *answers],
                pool.rows_with_id(one.example.negatives),
                given,
            )
            for one, answers, given in zip(asked, answer_keys, given_keys, strict=True)
        ]
        lowest_Q = np.array([min(scores) for scores in positive_scores], dtype=np.float32)
        masks = eligible(rows_QK, pool.keys_of(rows_QK), scores_QK, lowest_Q, barred, self.rule, self.margin)
        self.count["candidates"] += rows_QK.size
        self.count.update({f"removed_{reason}": int(mask.sum()) for reason, mask in masks.removed().items()})
        self.histogram.add("positives", _joined(positive_scores, np.float32))
        self.histogram.add("removed_by_rule", scores_QK[masks.by_rule])
        for q, one in enumerate(asked):
            rows, scores = rows_QK[q, masks.eligible[q]], scores_QK[q, masks.eligible[q]]
            if self.sampled:
                order = drawn(scores.astype(np.float64), self.seed, one.example.id, number)
                rows, scores = rows[order], scores[order]
            yield _Proposed(rows.tolist(), scores.tolist(), tuple(positive_scores[q]), tuple(given_scores[q]))

    def _take(
        self, example: Example, answers: Sequence[Passage], proposed: Sequence[_Proposed]
    ) -> list[tuple[int, float]]:
        """Row and score of the negatives to add, the best of each teacher in turn."""
        missing = self.negatives - len(example.negatives)
        if missing <= 0:
            return []
        words = [word_key(passage.text) for passage in answers]
        answered = list(map(shingles, words))
        near: dict[int, bool] = {}

        def is_near(row: int) -> bool:
            if row not in near:
                key = word_key(self.pool.text(row))
                own = shingles(key)
                near[row] = key in words or any(jaccard(own, answer) >= NEAR for answer in answered)
            return near[row]

        lists = [zip(each.rows, each.scores, strict=True) for each in proposed]
        taken: list[tuple[int, float]] = []
        keys: set[int] = set()
        for row, score in in_turn([((row, score) for row, score in pairs if not is_near(row)) for pairs in lists]):
            key = int(self.pool.keys[row])
            if key not in keys or self.ensemble != "intra-sample":
                keys.add(key)
                taken.append((row, score))
            if len(taken) == missing:
                break
        self.count["removed_near_duplicate"] += sum(near.values())
        return taken


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
