from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import groups
import numpy as np
import pytest
from groups import raised

from embedwright.encoders.http import RefusedTextsError
from embedwright.errors import InputError
from embedwright.processes import ALONE, Processes, joined, start


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
    assert (alone.all_max(3), alone.all_sum(2.5), alone.is_rank_0) == (3, 2.5, True)
    alone.barrier()


def test_one_process_decides_for_itself() -> None:
    assert ALONE.on_rank_0(lambda: 3) == ALONE.broadcast(3) == 3 and ALONE.all_gather("a") == ["a"]
    with pytest.raises(ZeroDivisionError), ALONE.together():
        _ = 1 / 0


def test_the_error_of_another_process_keeps_the_texts_that_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mine` names file and row of texts that a teacher refuses, whichever process asked for them."""
    error, sent = RefusedTextsError("server", {"a text": "too long"}), list[Any]()

    def all_gather(self: Processes, value: Any) -> list[Any]:
        sent.append(json.loads(json.dumps(value)))
        return sent

    monkeypatch.setattr(Processes, "all_gather", all_gather)
    with pytest.raises(RefusedTextsError):
        Processes(rank=1, count=2).agree(error)
    with pytest.raises(InputError, match="process 0: server: 1 texts were refused") as raised:
        Processes(rank=1, count=2).agree(None)
    assert raised.value.texts == ["a text"]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return groups.run(__file__, tmp_path_factory.mktemp("g"), {"in_a_group": (3,), "one_dies": (3,)})


@pytest.fixture
def group(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What three processes found, by rank."""
    return cast(list[dict[str, Any]], found["in_a_group"][3])


def test_all_hear_what_rank_0_decides(group: list[dict[str, Any]]) -> None:
    assert [one["told"] for one in group] == [["rank 0", 0.1, None]] * 3
    assert [one["decided"] for one in group] == [0] * 3
    assert [one["each"] for one in group] == [["", "é", "éé"]] * 3
    assert [one["most"] for one in group] == [0.5] * 3


def test_an_error_of_one_process_reaches_all(group: list[dict[str, Any]]) -> None:
    bad, other = ("InputError: row 7 is bad", "InputError: process 1: row 7 is bad")
    assert [one["bad input"] for one in group] == [other, bad, other]
    assert [one["failure"] for one in group] == ["OtherProcessError: process 2: no disk"] * 2 + ["OSError: no disk"]
    assert [one["of rank 0"] for one in group] == ["InputError: no"] + ["InputError: process 0: no"] * 2
    assert [one["after"] for one in group] == [[0, 1, 2]] * 3  # and the group is as it was


def test_a_process_that_dies_ends_the_others_at_once(found: dict[str, Any]) -> None:
    ends = found["one_dies"][3]
    assert ends[1] is None and all("Error" in error for error in (ends[0], ends[2]))


# ---- in the processes


def in_a_group(folder: Path) -> dict[str, Any]:
    processes = start()
    rank = processes.rank

    def fail(who: int, error: Exception) -> None:
        with processes.together():
            if rank == who:
                raise error

    def no() -> None:
        raise InputError("no")

    with joined() as again:
        return {
            "told": again.broadcast((f"rank {rank}", rank + 0.1, None)),
            "decided": processes.on_rank_0(lambda: rank),
            "each": processes.all_gather("é" * rank),
            "most": processes.all_max(rank / 4),
            "bad input": raised(lambda: fail(1, InputError("row 7 is bad"))),
            "failure": raised(lambda: fail(2, OSError("no disk"))),
            "of rank 0": raised(lambda: processes.on_rank_0(no)),
            "after": processes.all_gather(rank),
        }


def one_dies(folder: Path) -> str | None:
    processes = start()
    processes.barrier()
    if processes.rank == 1:
        os._exit(9)
    return raised(lambda: processes.on_rank_0(lambda: 0))
