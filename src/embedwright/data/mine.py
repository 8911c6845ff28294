"""Hard negatives: what a teacher ranks high for a query and that, by a rule, is not one of its answers.

The rules are those of NV-Retriever (arXiv 2407.15831); `perc` at 0.95 is the one NV-Embed v2 used (paper, 4.1.1).
`Q` queries, `C` documents of the corpus, `P` rows of the pool (the corpus, then the texts it lacks), `K` candidates of
one query, `E` embedding.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from embedwright.data.example import DataError, Example, Passage, text_of
from embedwright.data.teacher import Encoder, as_encoder
from embedwright.data.topk import top_k

logger = logging.getLogger(__name__)

Rule = Literal["naive", "shift", "abs", "margin", "perc"]

BEST_MARGIN: dict[Rule, float | None] = {"naive": None, "shift": 10, "abs": 0.7, "margin": 0.05, "perc": 0.95}
"""The best setting of each rule in NV-Retriever's ablation: what `margin=None` stands for."""

_CHUNK = 512  # texts in one call of the teacher: enough for it to sort by length, few enough to report progress
_TILE = 1024  # queries encoded and searched at once


@dataclass(frozen=True, slots=True)
class MiningReport:
    """What mining looked at, what it took away and why, and what is left.

    A candidate falls under the first reason that holds, so that `candidates` minus the four `removed_*` after it are
    the eligible ones, of which `negatives` were taken. `removed_given` counts negatives that the examples came with
    and that repeat a positive or the query. `queries_short` got fewer than they asked for.
    """

    rule: Rule
    margin: float | None
    seconds: float
    queries: int
    documents: int
    candidates: int = 0
    removed_same_document: int = 0
    removed_same_text: int = 0
    removed_by_rule: int = 0
    removed_duplicates: int = 0
    removed_given: int = 0
    negatives: int = 0
    queries_short: int = 0

    def to_json(self) -> dict[str, Any]:
        """The report as plain values, ready for `json.dumps`."""
        return asdict(self)


def mine(
    examples: Iterable[Example],
    corpus: Mapping[str, str],
    teacher: Any,
    *,
    rule: Rule = "perc",
    margin: float | None = None,
    negatives: int = 7,
    depth: int = 100,
    task: str | None = None,
    sampled: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Example], MiningReport]:
    """Fill each example up to `negatives` hard negatives from the exact top `depth` of `corpus` (id -> text).

    `teacher` is anything `as_encoder` takes; a score is the inner product of two of its vectors. `task` is the
    instruction for the queries. Of a query's ranked candidates, its positives taken away,
    - `naive` keeps all,
    - `shift` ignores the first `margin` (10),
    - `abs` keeps score <= `margin` (0.7),
    - `margin` keeps score < positive - `margin` (0.05),
    - `perc` keeps score < positive x `margin` (0.95); a positive below zero is multiplied by 2 - `margin` instead,
      else the threshold would lie above it.

    Of several positives the lowest score sets the threshold, the safe side (as in sentence-transformers'
    `mine_hard_negatives` and in NeMo). Never a negative, under any rule: a document with the id or the text of a
    positive, or with the text of the query (whitespace collapsed, case folded), or without text. Documents of the same
    text count once. Equal scores rank in the order of the corpus.

    The best are taken, in rank order. `sampled` draws them instead, by softmax over the eligible scores without
    replacement, seeded per example id; they stay in the order drawn, so that a trainer which uses the first few has a
    fair draw too. (The paper draws from the top 10 and finds that more hurts: `depth`.)

    Negatives that an example came with stay in front; those that repeat a positive or the query are removed. Returned
    in the order given, with the teacher's `positive_scores` and `negative_scores`.
    `progress(done, total)` counts encoded texts.

    Raises ValueError for a margin that does not fit the rule, a `depth` too small for what is asked, a vector that is
    not finite; DataError for a corpus without text and, with its id, an example without a query or positives.
    """
    started = time.perf_counter()
    margin = _check_settings(rule, margin, negatives, depth)
    allowed = partial(_allowed, rule, margin)
    given = list(examples)
    asked = [_without_answers(example) for example in given]
    pool = _make_pool(corpus, asked)
    if not pool.ids:
        raise DataError("the corpus holds no text: nothing to mine from")
    encoder, total = as_encoder(teacher), len(pool.texts) + len(asked)

    def advance(done: int) -> None:
        if progress:
            progress(done, total)

    vectors_PE = _encode_pool(encoder, pool.texts, advance)
    count: Counter[str] = Counter()
    mined: list[Example] = []
    for start in range(0, len(asked), _TILE):
        tile = asked[start : start + _TILE]
        queries_QE = encode_finite(encoder, [example.query for example in tile], task)
        scores_QK, rows_QK = top_k(queries_QE, vectors_PE[: len(pool.ids)], depth)
        for example, query_E, scores_K, rows_K in zip(tile, queries_QE, scores_QK, rows_QK, strict=True):
            positive_scores, given_scores = (
                (vectors_PE[[pool.row_of_text[passage.text] for passage in passages]] @ query_E).tolist()
                for passages in (example.positives, example.negatives)
            )
            rows, scores, removed = _eligible(example, pool, rows_K, scores_K, partial(allowed, min(positive_scores)))
            count.update(removed, candidates=len(rows_K))
            order = _draw(scores, seed, example.id) if sampled else np.arange(len(rows))
            chosen = order[: max(0, negatives - len(example.negatives))]
            found = (Passage(pool.texts[row], pool.ids[row]) for row in rows[chosen])
            mined.append(
                replace(
                    example,
                    negatives=(*example.negatives, *found),
                    positive_scores=tuple(positive_scores),
                    negative_scores=(*given_scores, *scores[chosen].tolist()),
                )
            )
            count["negatives"] += len(chosen)
            count["queries_short"] += len(mined[-1].negatives) < negatives
        advance(len(pool.texts) + len(mined))

    count["removed_given"] = sum(len(a.negatives) - len(b.negatives) for a, b in zip(given, asked, strict=True))
    seconds = round(time.perf_counter() - started, 3)
    report = MiningReport(rule, margin, seconds, len(mined), len(pool.ids), **count)
    logger.info("mined %s", report)
    return mined, report


def positives_of(examples: Iterable[Example]) -> dict[str, str]:
    """The examples' own positives as a corpus: document id (a number where it has none) -> text, each text once."""
    passages = {passage.text: passage.id for example in examples for passage in example.positives}
    return {id or f"p{number}": text for number, (text, id) in enumerate(passages.items())}


def encode_finite(encoder: Encoder, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
    """`encoder`'s vectors as float32 (N, E). Raises ValueError for another shape, or naming a text that gave NaN."""
    vectors_NE = np.ascontiguousarray(encoder.encode(texts, task=task), dtype=np.float32)
    if vectors_NE.ndim != 2 or len(vectors_NE) != len(texts):
        raise ValueError(f"the model gave {vectors_NE.shape} for {len(texts)} texts")
    if not (finite_N := np.isfinite(vectors_NE).all(axis=1)).all():
        raise ValueError(f"the model's vector is not finite for {texts[int(finite_N.argmin())][:100]!r}")
    return vectors_NE


@dataclass(frozen=True, slots=True)
class _Pool:
    """All texts to be encoded: the documents of the corpus, then, each once, the passages that it lacks."""

    ids: list[str]  # (C)
    texts: list[str]  # (P)
    row_of_id: dict[str, int]
    row_of_text: dict[str, int]
    first_of_key: dict[bytes, int]
    firsts: NDArray[np.int64]  # (P) the first row with the same normalised text

    def rows_with_id(self, passages: Iterable[Passage]) -> list[int]:
        return [self.row_of_id[p.id] for p in passages if p.id in self.row_of_id]

    def firsts_of(self, texts: Iterable[str]) -> list[int]:
        return [self.first_of_key.get(_key(text), -1) for text in texts]


def _make_pool(corpus: Mapping[str, str], examples: Iterable[Example]) -> _Pool:
    documents = {id_: text for id_, text in corpus.items() if text.strip()}
    ids, texts = list(documents), list(documents.values())
    row_of_text: dict[str, int] = {}
    for row, text in enumerate(texts):
        row_of_text.setdefault(text, row)
    for example in examples:
        for passage in (*example.positives, *example.negatives):
            if row_of_text.setdefault(passage.text, len(texts)) == len(texts):
                texts.append(passage.text)
    first_of_key: dict[bytes, int] = {}
    firsts = [first_of_key.setdefault(_key(text), row) for row, text in enumerate(texts)]
    row_of_id = {id_: row for row, id_ in enumerate(ids)}
    return _Pool(ids, texts, row_of_id, row_of_text, first_of_key, np.array(firsts, dtype=np.int64))


def _encode_pool(encoder: Encoder, texts: list[str], advance: Callable[[int], None]) -> NDArray[np.float32]:
    vectors_PE = np.empty((0, 0), np.float32)
    for start in range(0, len(texts), _CHUNK):
        chunk_NE = encode_finite(encoder, texts[start : start + _CHUNK])
        if start == 0:  # filled in place: joining chunks at the end would hold a large corpus twice
            vectors_PE = np.empty((len(texts), chunk_NE.shape[1]), np.float32)
        vectors_PE[start : start + len(chunk_NE)] = chunk_NE
        advance(start + len(chunk_NE))
    return vectors_PE


def _eligible(
    example: Example,
    pool: _Pool,
    rows_K: NDArray[np.int64],
    scores_K: NDArray[np.float32],
    allowed: Callable[[NDArray[np.float64]], NDArray[np.bool_]],
) -> tuple[NDArray[np.int64], NDArray[np.float64], dict[str, int]]:
    """The ranked candidates that may be negatives of `example`, their scores, and how many may not, by reason."""
    same_document = np.isin(rows_K, pool.rows_with_id(example.positives))
    answers = pool.firsts_of([example.query, *(p.text for p in example.positives)])
    same_text = ~same_document & np.isin(pool.firsts[rows_K], answers)
    other = ~same_document & ~same_text
    rows, scores = rows_K[other], scores_K[other].astype(np.float64)

    passed = allowed(scores)
    rows, scores = rows[passed], scores[passed]

    fresh = np.zeros(len(rows), dtype=bool)
    fresh[np.unique(pool.firsts[rows], return_index=True)[1]] = True
    fresh &= ~np.isin(rows, pool.rows_with_id(example.negatives))
    fresh &= ~np.isin(pool.firsts[rows], pool.firsts_of(p.text for p in example.negatives))

    removed = {
        "removed_same_document": same_document,
        "removed_same_text": same_text,
        "removed_by_rule": ~passed,
        "removed_duplicates": ~fresh,
    }
    return rows[fresh], scores[fresh], {reason: int(mask.sum()) for reason, mask in removed.items()}


def _allowed(rule: Rule, margin: float | None, positive_score: float, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the ranked `scores` the rule lets pass."""
    if margin is None:  # naive
        return np.ones(len(scores), dtype=bool)
    if rule == "shift":
        return np.arange(len(scores)) >= margin
    if rule == "abs":
        return scores <= margin
    if rule == "margin":
        return scores < positive_score - margin
    return scores < positive_score * (margin if positive_score >= 0 else 2 - margin)


def _draw(scores: NDArray[np.float64], seed: int, example_id: str) -> NDArray[np.int64]:
    """An order drawn by softmax over `scores` without replacement (the Gumbel trick gives exactly that)."""
    random = np.random.default_rng([seed, zlib.crc32(example_id.encode())])
    return np.argsort(-(scores + random.gumbel(size=len(scores))), kind="stable")


def _without_answers(example: Example) -> Example:
    """`example` without the negatives that repeat a positive or the query. Raises DataError where either is missing."""
    text_of(example.query, f"example {example.id!r}: query")
    if not example.positives:
        raise DataError(f"example {example.id!r}: no positive, so that its answers cannot be told from negatives")
    ids = {p.id for p in example.positives if p.id is not None}
    keys = {_key(text) for text in (example.query, *(p.text for p in example.positives))}
    return replace(
        example, negatives=tuple(p for p in example.negatives if p.id not in ids and _key(p.text) not in keys)
    )


def _check_settings(rule: Rule, margin: float | None, negatives: int, depth: int) -> float | None:
    """The margin to use. Raises ValueError where the settings do not fit together."""
    if rule not in BEST_MARGIN:
        raise ValueError(f"rule must be one of {', '.join(BEST_MARGIN)}, not {rule!r}")
    if negatives < 1:
        raise ValueError(f"negatives must be at least 1, not {negatives}")
    if margin is None:
        margin = BEST_MARGIN[rule]
    elif rule == "naive":
        raise ValueError("rule 'naive' takes no margin")
    else:
        sound, what = {
            "shift": (margin >= 0 and margin % 1 == 0, "a whole number of ranks"),
            "abs": (math.isfinite(margin), "a score"),
            "margin": (0 <= margin < math.inf, "a difference of scores, 0 or more"),
            "perc": (0 < margin < 2, "a share of the positive's score, such as 0.95"),
        }[rule]
        if not sound:
            raise ValueError(f"the margin of rule {rule!r} must be {what}, not {margin}")
    if depth < (needed := negatives + int(margin or 0 if rule == "shift" else 0)):
        raise ValueError(f"depth {depth} cannot hold what rule {rule!r} needs: {needed}")
    return margin


def _key(text: str) -> bytes:
    """Equal for texts that differ in case and whitespace alone; a digest, since whole keys would double the corpus."""
    return blake2b(" ".join(text.split()).casefold().encode(errors="surrogatepass"), digest_size=16).digest()
