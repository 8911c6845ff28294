from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from embedwright import threads

NAMES = ("OMP_PROC_BIND", "OMP_PLACES")
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process of the command, before torch is loaded and with nothing set."""
    monkeypatch.setattr(threads, "_cores", None)
    for name in (*NAMES, *CACHES):
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/embedwright", "demo"])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return monkeypatch


def bound() -> list[str | None]:
    threads.prepare_command()
    return [os.environ.get(name) for name in NAMES]


@pytest.mark.parametrize("argv0", ["/usr/local/bin/embedwright", "embedwright", "C:/Scripts/embedwright.exe"])
def test_the_command_is_bound(fresh: pytest.MonkeyPatch, argv0: str) -> None:
    fresh.setattr(sys, "argv", [argv0, "demo"])
    assert bound() == ["true", "cores"]
    assert threads.described() == "OMP_PROC_BIND=true OMP_PLACES=cores"


@pytest.mark.parametrize(("module", "expected"), [("embedwright", ["true", "cores"]), ("pytest", [None, None])])
def test_the_command_is_bound_as_a_module_too(fresh: pytest.MonkeyPatch, module: str, expected: list[Any]) -> None:
    fresh.setattr(sys, "argv", ["-m", "demo"])  # as it is while the package is imported
    fresh.setattr(sys, "orig_argv", ["python", "-u", "-m", module, "demo"])
    assert bound() == expected


@pytest.mark.parametrize("argv", [["pytest"], ["/home/a/embedwright/train.py"], ["-c"], [""], []])
def test_other_programs_are_left_alone(fresh: pytest.MonkeyPatch, argv: list[str]) -> None:
    fresh.setattr(sys, "argv", argv)
    before = dict(os.environ)
    assert bound() == [None, None] and dict(os.environ) == before
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


def test_the_commands_caches_of_products_are_bounded(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("LRU_CACHE_CAPACITY", "7")
    bound()
    assert [os.environ[name] for name in CACHES] == ["32", "7"]


@pytest.fixture
def two_cores() -> Iterator[set[int]]:
    """Of this thread; put back afterwards."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs Linux, two cores")
    before = os.sched_getaffinity(0)
    yield set(sorted(before)[:2])
    os.sched_setaffinity(0, before)


def test_the_command_gives_a_bound_thread_its_cores_back(fresh: pytest.MonkeyPatch, two_cores: set[int]) -> None:
    os.sched_setaffinity(0, two_cores)
    bound()
    one = {min(two_cores)}
    os.sched_setaffinity(0, one)  # as a bound OpenMP does
    with threads.unbound():
        assert os.sched_getaffinity(0) == two_cores
    assert threads.cores() == 2
    assert os.sched_getaffinity(0) == one
    threads.unbind()
    assert os.sched_getaffinity(0) == two_cores


def test_in_other_programs_a_thread_keeps_its_cores(fresh: pytest.MonkeyPatch, two_cores: set[int]) -> None:
    fresh.setattr(sys, "argv", ["server.py"])
    os.sched_setaffinity(0, two_cores)
    bound()
    one = {min(two_cores)}
    os.sched_setaffinity(0, one)  # the program's own choice
    with threads.unbound():
        assert os.sched_getaffinity(0) == one
    assert threads.cores() == 1
    threads.unbind()
    assert os.sched_getaffinity(0) == one


TOKENISES = """
import os, sys
sys.argv = [sys.argv[1]]
all_cores = os.sched_getaffinity(0)
from embedwright import text
import torch
from tokenizers import Tokenizer, models

def cores_of_threads():
    return {task: os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}

torch.randn(600, 600) @ torch.randn(600, 600)  # a bound OpenMP puts its main thread on its core
before, kept = cores_of_threads(), os.sched_getaffinity(0)
assert kept != all_cores, kept
words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
text.tokenize(text.TextTokenizer(words), text.Contract(eos_id=None), ["a"] * 1000)
started = [cores for task, cores in cores_of_threads().items() if task not in before]
assert started and os.sched_getaffinity(0) == kept
print(all(cores == all_cores for cores in started))
"""


@pytest.mark.parametrize(("program", "all_cores"), [("embedwright", "True"), ("server.py", "False")])
def test_bound_openmp_leaves_the_commands_tokenizers_all_cores(
    program: str, all_cores: str, two_cores: set[int]
) -> None:
    environment = {**os.environ, "OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [sys.executable, "-c", TOKENISES, program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == all_cores
