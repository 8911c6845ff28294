from __future__ import annotations

import os
import sys

import pytest

from embedwright import threads

NAMES = ("OMP_PROC_BIND", "OMP_PLACES")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process of the command, before torch is loaded and with nothing set."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/embedwright", "demo"])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return monkeypatch


def bound() -> list[str | None]:
    threads.bind_for_command()
    return [os.environ.get(name) for name in NAMES]


@pytest.mark.parametrize("argv0", ["/usr/local/bin/embedwright", "embedwright", "C:/Scripts/embedwright.exe"])
def test_the_command_is_bound(fresh: pytest.MonkeyPatch, argv0: str) -> None:
    fresh.setattr(sys, "argv", [argv0, "demo"])
    assert bound() == ["true", "cores"]
    assert threads.described() == "OMP_PROC_BIND=true OMP_PLACES=cores"


@pytest.mark.parametrize("argv", [["pytest"], ["/home/a/embedwright/train.py"], ["-c"], [""], []])
def test_other_programs_are_left_alone(fresh: pytest.MonkeyPatch, argv: list[str]) -> None:
    fresh.setattr(sys, "argv", argv)
    assert bound() == [None, None]
    assert threads.described().startswith("not bound")


def test_of_many_processes_on_one_machine_none_is_bound_to_the_cores_of_all(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("LOCAL_WORLD_SIZE", "2")
    assert bound() == [None, None]
    fresh.setenv("LOCAL_WORLD_SIZE", "1")
    assert bound() == ["true", "cores"]


def test_nothing_is_set_once_torch_has_read_it(fresh: pytest.MonkeyPatch) -> None:
    fresh.setitem(sys.modules, "torch", sys)
    assert bound() == [None, None]


@pytest.mark.parametrize(
    ("name", "value", "expected", "described"),
    [
        ("OMP_PROC_BIND", "false", ["false", None], "not bound"),
        ("OMP_PROC_BIND", "spread", ["spread", None], "OMP_PROC_BIND=spread OMP_PLACES="),
        ("OMP_PLACES", "sockets", [None, "sockets"], "not bound"),
    ],
)
def test_the_users_own_setting_stays(
    fresh: pytest.MonkeyPatch, name: str, value: str, expected: list[str | None], described: str
) -> None:
    fresh.setenv(name, value)
    assert bound() == expected
    assert threads.described().startswith(described)
