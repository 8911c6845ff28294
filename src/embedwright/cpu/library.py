"""The library of our kernels (`csrc/`): compiled once by the machine's C compiler, kept in the cache, then loaded."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
from ctypes import c_long, c_void_p
from functools import cache
from pathlib import Path

import torch

from embedwright.cache import cache_folder, check_private
from embedwright.files import whole_folder

SOURCES = Path(__file__).parent / "csrc"
_COMPILER_S = 120.0  # a compiler that takes longer hangs: it needs two to five seconds


@cache
def load() -> ctypes.CDLL:
    """The compiled kernels. OSError, InputError or AttributeError, with the reason, where there can be none."""
    gomp_parallel()
    path = compiled()
    check_private(path.parent)  # a stranger's library would run its own code in this process
    check_private(path)
    library = ctypes.CDLL(str(path))
    library.attention_scratch.argtypes, library.attention_scratch.restype = [c_long], c_long
    for name in ("attention", "norm", "rotary", "quantise", "reach", "dots"):
        getattr(library, name).argtypes = [c_void_p, c_void_p, c_long]
    return library


@cache
def gomp_parallel() -> int:
    """What starts threads in the OpenMP runtime that torch runs on. AttributeError where it is of another kind."""
    try:  # a symbol of a library is looked for in those that it was linked with
        torch_cpu = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
        address = ctypes.cast(torch_cpu.GOMP_parallel, c_void_p).value
    except (StopIteration, AttributeError):
        raise AttributeError("torch's OpenMP runtime is not found") from None
    assert address is not None
    return address


@cache
def compiler() -> tuple[str, ...]:
    """The command: `CC`, else the first of cc, gcc, clang. OSError where there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return tuple(command)
    raise OSError(f"no C compiler{': ' + named[0] if named else ''}")


def compiled() -> Path:
    """The library's file, compiled where it is not in the cache yet: one for each source, compiler and processor."""
    command = [*compiler(), "-O3", "-std=gnu11", "-shared", "-fPIC"]
    command.append("-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native")
    version = _run_compiler([*compiler(), "--version"])
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    facts = [*sources, shlex.join(command).encode(), version, _processor(), b"private"]
    folder = cache_folder("kernels", hashlib.sha256(b"\0".join(facts)).hexdigest()[:16])
    library = folder / "kernels.so"
    if not library.exists():
        try:
            with whole_folder(folder, mode=0o700) as temp:
                _run_compiler([*command, "-o", str(temp / library.name), *map(str, sorted(SOURCES.glob("*.c"))), "-lm"])
                if not (temp / library.name).is_file():
                    raise OSError(f"{command[0]} fails: no output")
                (temp / library.name).chmod(0o700)
        except OSError:
            if not library.is_file():  # else another process compiled it meanwhile
                raise
    return library


def _run_compiler(command: list[str]) -> bytes:
    """What the compiler prints. OSError where it fails or takes too long; it is then ended."""
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        printed, errors = running.communicate(timeout=_COMPILER_S)
    except BaseException as error:
        os.killpg(running.pid, signal.SIGKILL)  # a compiler's driver starts programs of its own
        running.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise OSError(f"{command[0]} did not finish in {_COMPILER_S:.0f} s") from None
        raise
    if running.returncode:
        raise OSError(
            f"{command[0]} fails: {(errors.decode(errors='replace').strip().splitlines() or ['no output'])[0]}"
        )
    return printed


def _processor() -> bytes:
    """What -march=native goes by: a cache may be shared by machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_bytes().splitlines() if info.is_file() else [platform.processor().encode()]
    names = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(dict.fromkeys(line for line in lines if line.startswith(names) or not info.is_file()))
