from __future__ import annotations

from collections import Counter

from embedwright.mining.ensemble import drawn_teacher, in_turn


def test_a_teacher_is_drawn_evenly_and_the_same_in_every_run() -> None:
    drawn = [drawn_teacher(f"e{i}", 3, seed=0) for i in range(900)]
    assert drawn == [drawn_teacher(f"e{i}", 3, seed=0) for i in range(900)]
    assert (
        set(Counter(drawn)) == {0, 1, 2} and max(Counter(drawn).values()) < 300 + 4 * 200**0.5
    )  # 4 standard deviations
    assert drawn != [drawn_teacher(f"e{i}", 3, seed=1) for i in range(900)]


def test_lists_are_taken_from_in_turn() -> None:
    assert list(in_turn([[1, 2, 3], iter([4]), [], [5, 6]])) == [1, 4, 5, 2, 6, 3]
    assert list(in_turn([])) == []
