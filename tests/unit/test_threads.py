from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(("module", "expected"), [("embedwright", ["true", "cores"]), ("pytest", [None, None])])
def test_the_command_is_bound_as_a_module_too(fresh: pytest.MonkeyPatch, module: str, expected: list[Any]) -> None:
    fresh.setattr(sys, "argv", ["-m", "demo"])  # as it is while the package is imported
    fresh.setattr(sys, "orig_argv", ["python", "-u", "-m", module, "demo"])
    assert bound() == expected


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


TOKENISES = """
import os
from embedwright import text, threads
import torch
from tokenizers import Tokenizer, models

def cores_of_threads():
    return {task: os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}

torch.randn(600, 600) @ torch.randn(600, 600)  # a bound OpenMP puts its main thread on its core
before, kept = cores_of_threads(), os.sched_getaffinity(0)
assert kept != threads.CORES, kept
words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
contract = text.Contract(eos_id=None)
text.tokenize(words, contract, ["a"] * 1000)
started = [cores for task, cores in cores_of_threads().items() if task not in before]
assert started and all(cores == threads.CORES for cores in started), started
assert os.sched_getaffinity(0) == kept
"""


IMPORTS = """
import os, sys
if sys.argv[1] == "torch first":
    import torch
from embedwright import threads
print(len(threads.CORES))
"""


@pytest.mark.parametrize("first", ["torch first", "embedwright first"])
def test_the_cores_are_those_of_the_process_whatever_is_imported_first(first: str) -> None:
    environment = {**os.environ, "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    with threads.freed():  # pytest's own runtime may be bound too
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS, first], env=environment, stdout=subprocess.PIPE, text=True
        )
    assert done.returncode == 0 and int(done.stdout) == len(threads.CORES)


@pytest.mark.skipif(len(threads.CORES) < 2 or not Path("/proc/self/task").is_dir(), reason="needs Linux, two cores")
def test_bound_openmp_leaves_the_tokenizers_threads_all_cores() -> None:
    environment = {**os.environ, "OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "TOKENIZERS_PARALLELISM": "true"}
    with threads.freed():
        done = subprocess.run([sys.executable, "-c", TOKENISES], env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
