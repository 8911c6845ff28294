"""The kernels' library: compiled here or not, by whom, and what it brings into the process."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from embedwright.cpu import kernels, library


@pytest.fixture
def needs_kernels() -> None:
    if not kernels.available():
        pytest.skip(f"kernels {kernels.described()}")


@pytest.fixture
def forgotten() -> Iterator[None]:
    probes: tuple[Any, ...] = (kernels._fault, library.load, library.compiler, library.gomp_parallel)
    for probe in probes:
        probe.cache_clear()
    yield
    for probe in probes:
        probe.cache_clear()


@pytest.mark.parametrize("compiler", ["/bin/false", "no-such-compiler", "true"])
def test_without_a_compiler_that_is_said_once(
    compiler: str, forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert not kernels.available() and not kernels.can_attend(*torch.zeros(3, 2, 5, 64))
    assert len(caplog.records) == 1 and "stock torch" in caplog.text
    assert kernels.described().startswith("not used: ")
    assert not list(tmp_path.rglob("*.so"))


def test_without_a_home_folder_they_are_not_used(forgotten: None, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("EMBEDWRIGHT_CACHE", raising=False)
    monkeypatch.delenv("EMBEDWRIGHT_KERNELS", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert not kernels.available() and "home directory" in kernels.described()


def test_they_can_be_left_out(forgotten: None, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_KERNELS", "off")
    assert not kernels.available() and kernels.described() == "not used: EMBEDWRIGHT_KERNELS=off"
    assert caplog.records == []


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("", "", ""),  # nothing is broken: they are found right, compiled in half of the time
        ("1.44269504f", "1.44f", "attention"),
        ("(-off <= (int32_t)a->ahead)", "(-off <= (int32_t)a->ahead + 1)", "attention (20, 0)"),
        ("weight + 1.0f", "weight", "norm"),
        ("- b * load(r->sine", "+ b * load(r->sine", "rotary"),
        ("127 / most", "100 / most", "quantise"),
        ("lost += off * off", "lost += off", "quantise"),
        ("(vi)(most < limit)", "(vi)(most < limit + 1)", "reach"),
        ("even += odd;", "", "dots"),
        ("#define ROWS 16", "#define ROWS sixteen", "fails"),
    ],
)
def test_a_broken_kernel_is_found(
    right: str,
    wrong: str,
    named: str,
    needs_kernels: None,
    forgotten: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = Path(shutil.copytree(library.SOURCES, tmp_path / "csrc"))
    sources = {path: path.read_text() for path in broken.iterdir()}
    assert any(right in source for source in sources.values())
    for path, source in sources.items():
        path.write_text(source.replace(right, wrong) if right else source)
    for probe in (kernels._fault, library.load):
        probe.cache_clear()
    monkeypatch.setattr(library, "SOURCES", broken)
    monkeypatch.setattr(library, "OPTIMISE", "-O1")
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    assert kernels.available() is (not named) and named in kernels.described()


def test_a_compiler_that_hangs_is_ended(
    forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = tmp_path / "cc"
    fake.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit\nsleep 600 & echo $! > {tmp_path}/started\nwait\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_COMPILER_S", 1.0)
    assert not kernels.available() and "did not finish" in kernels.described()
    state = Path("/proc", (tmp_path / "started").read_text().strip(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # what it had started has ended, too
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.fixture
def fake_compiler(forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that writes an empty library, and a new cache."""
    fake = tmp_path / "cc"
    fake.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && echo > "$2"; shift; done\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("umask", [0o002, 0o000])
def test_the_library_is_this_users_alone(umask: int, fake_compiler: None) -> None:
    before = os.umask(umask)
    try:
        made = library.compiled()
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (made, made.parent)] == [0o700, 0o700]


@pytest.mark.parametrize("which", ["file", "folder"])
@pytest.mark.parametrize("how", ["mode", "owner", "link"])
def test_a_strangers_library_is_not_loaded(
    how: str, which: str, needs_kernels: None, fake_compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that leaves a file when it is loaded."""
    compiled = library.compiled()
    path = compiled if which == "file" else compiled.parent
    source = tmp_path / "loaded.c"
    source.write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) void loaded(void) {{ fopen("{tmp_path}/loaded", "w"); }}\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", compiled, source], check=True)
    if how == "mode":
        path.chmod(0o770)
    elif how == "link":
        path.symlink_to(path.rename(tmp_path / "elsewhere"))
    elif os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert not kernels.available() and str(path) in kernels.described()
    assert not (tmp_path / "loaded").exists()


PROCESS = """
import os, sys, torch
from embedwright.cpu import kernels
torch.set_num_threads(2)
torch.randn(2000, 2000) @ torch.randn(2000, 2000)  # torch's threads are there now

def state():
    mapped = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
    return sorted(mapped), len(os.listdir("/proc/self/task"))

torch.ones(500_000).sum()
before = state()
q = torch.randn(4, 900, 64)
assert kernels.available(), kernels.described()
kernels.attention(q, q, q, torch.tensor([0, 900]).int(), 0.1, (-1, -1))
print("same" if state() == before else (before, state()), len(before[0]))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_they_bring_neither_a_runtime_nor_threads(needs_kernels: None) -> None:
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("same") and not done.stdout.endswith(" 0\n")


def test_two_processes_may_compile_at_once(needs_kernels: None, tmp_path: Path) -> None:
    code = "from embedwright.cpu import kernels, library; library.OPTIMISE = '-O1'; "  # in half of the time
    code += "assert kernels.available(), kernels.described()"
    environment = os.environ | {"EMBEDWRIGHT_CACHE": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["kernels.so"]


FIRST = """
import torch
from embedwright.cpu import kernels
torch.set_default_dtype(torch.float16)
with torch.device("meta"):
    print(kernels.described())
"""


def test_the_first_model_may_be_made_without_memory_and_under_another_type(needs_kernels: None) -> None:
    """As `from_pretrained` makes it: in a process of its own, which an address of nothing would end."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, kernels.described()), done.stderr[-2000:]
