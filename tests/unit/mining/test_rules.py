"""Rules and masks by hand; `test_mine` has them against a reference."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from embedwright.mining.rules import Exclusions, Rule, eligible, in_turn, sample_order, teacher_of

NOTHING = Exclusions((), (), (), ())


def one_query(rule: Rule, margin: float | None, scores: list[float], positive: float = 0.5) -> list[bool]:
    rows = np.arange(len(scores))[None]
    found = eligible(rows, rows + 100, np.float32([scores]), np.float32([positive]), [NOTHING], rule, margin)
    assert (found.eligible != found.by_rule).all()
    return found.eligible[0].tolist()


@pytest.mark.parametrize(
    ("rule", "margin", "positive", "expected"),
    [
        ("naive", None, 0.5, [True, True, True, True]),
        ("shift", 2, 0.5, [False, False, True, True]),
        ("abs", 0.5, 0.1, [False, True, True, True]),  # a score at the threshold stays
        ("margin", 0.25, 0.75, [False, False, True, True]),  # and here goes
        ("perc", 0.5, 1.0, [False, False, True, True]),
        ("perc", 0.5, -0.25, [False, False, False, True]),  # below -0.375
    ],
)
def test_the_rules(rule: Rule, margin: float | None, positive: float, expected: list[bool]) -> None:
    assert one_query(rule, margin, [0.75, 0.5, -0.375, -0.5], positive) == expected


def test_the_first_reason_counts_and_queries_do_not_mix() -> None:
    rows = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    keys = np.array([[70, 71, 72, 72, 74, 75], [70, 71, 72, 72, 74, 75]])
    scores = np.float32([[9, 8, 7, 6, 5, 4]] * 2)
    excluded = [Exclusions([0], [70, 71], [4], []), Exclusions([], [74], [], [75])]
    found = eligible(rows, keys, scores, np.float32([7.5, 99]), excluded, "perc", 1)
    assert found.same_document.tolist() == [[True] + 5 * [False], 6 * [False]]
    assert np.flatnonzero(found.same_text).tolist() == [1, 6 + 4]
    assert not found.by_rule.any()
    assert np.flatnonzero(found.duplicates).tolist() == [3, 4, 6 + 3, 6 + 5]
    assert np.flatnonzero(found.eligible).tolist() == [2, 5, 6, 6 + 1, 6 + 2]
    stricter = eligible(rows, keys, scores, np.float32([6.5, 99]), excluded, "perc", 1)
    assert np.flatnonzero(stricter.by_rule).tolist() == [2]  # so that its copy is the first that passes
    assert np.flatnonzero(stricter.eligible[0]).tolist() == [3, 5]
    assert set(found.removed()) == {"same_document", "same_text", "by_rule", "duplicates"}


def test_no_queries() -> None:
    none = np.empty((0, 3), np.int64)
    found = eligible(none, none, none.astype(np.float32), np.empty(0, np.float32), [], "perc", 0.95)
    assert found.eligible.shape == (0, 3)


def test_a_draw_is_by_softmax_and_of_its_own_for_each_teacher() -> None:
    scores = np.array([0.0, np.log(2.0), 0.0])
    first = [int(sample_order(scores, 0, f"e{i}", 0)[0]) for i in range(2000)]
    assert abs(np.mean(np.array(first) == 1) - 0.5) < 0.045  # 4 standard errors
    assert [sample_order(scores, 0, f"e{i}", 1)[0] for i in range(50)] != first[:50]
    assert sorted(sample_order(scores, 0, "e", 0).tolist()) == [0, 1, 2]


def test_a_teacher_is_numbers_evenly_and_the_same_in_every_run() -> None:
    numbers = [teacher_of(f"e{i}", 3, seed=0) for i in range(900)]
    assert numbers == [teacher_of(f"e{i}", 3, seed=0) for i in range(900)]
    assert (
        set(Counter(numbers)) == {0, 1, 2} and max(Counter(numbers).values()) < 300 + 4 * 200**0.5
    )  # 4 standard deviations
    assert numbers != [teacher_of(f"e{i}", 3, seed=1) for i in range(900)]


def test_lists_are_taken_from_in_turn() -> None:
    assert list(in_turn([[1, 2, 3], iter([4]), [], [5, 6]])) == [1, 4, 5, 2, 6, 3]
    assert list(in_turn([])) == []
