from __future__ import annotations

import numpy as np

from embedwright.processes import Processes


def test_parts_are_of_about_equal_cost_and_leave_nothing_out() -> None:
    costs = np.random.default_rng(0).integers(1, 100, 57).tolist()
    for count in (1, 2, 3, 8):
        parts = Processes(0, count).split(costs)
        assert sorted(i for part in parts for i in part) == list(range(57))
        loads = [sum(costs[i] for i in part) for part in parts]
        assert max(loads) - min(loads) <= max(costs)
        assert parts == [Processes(rank, count).split(costs) for rank in range(count)][-1]
    assert Processes(0, 4).split([5]) == [[0], [], [], []]


def test_one_process_asks_nobody() -> None:
    alone = Processes()
    assert (alone.most(3), alone.total(2.5), alone.first) == (3, 2.5, True)
    alone.wait()
