"""Compiles our kernels (`csrc/`) once with the machine's C compiler, keeps the library in the cache and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from embedwright.cache import cache_folder, check_private
from embedwright.files import whole_folder

SOURCES = Path(__file__).parent / "csrc"
OPTIMISE = "-O3"
_COMPILER_S = 120.0  # a compiler that takes longer hangs: it needs two to five seconds


@cache
def load() -> ctypes.CDLL:
    """Loads the compiled kernels. Raises OSError, InputError or AttributeError, with the reason, if it cannot."""
    gomp_parallel()
    path = compiled()
    check_private(path.parent)  # a stranger's library would run its own code in this process
    check_private(path)
    library = ctypes.CDLL(str(path))
    library.attention_scratch.argtypes, library.attention_scratch.restype = [ctypes.c_long], ctypes.c_long
    return library


@cache
def gomp_parallel() -> Any:
    """Returns the function that starts threads in torch's OpenMP runtime. Raises AttributeError for another runtime."""
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        return ctypes.CDLL(str(path)).GOMP_parallel  # dlsym also searches the libraries that this one links
    raise AttributeError("torch's library is not found")


@cache
def compiler() -> tuple[str, ...]:
    """Returns the compiler command: `CC`, else the first of cc, gcc, clang. Raises OSError if there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return tuple(command)
    raise OSError(f"no C compiler{': ' + named[0] if named else ''}")


def compiled() -> Path:
    """Returns the library's file, and compiles it if the cache has none for this source, compiler and processor."""
    command = [*compiler(), OPTIMISE, "-std=gnu11", "-shared", "-fPIC"]
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
    """Returns what the compiler prints. Raises OSError if it fails or takes too long, and then ends it."""
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
    """Identifies the processor as -march=native does, because several machines may share a cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_bytes().splitlines() if info.is_file() else [platform.processor().encode()]
    names = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(dict.fromkeys(line for line in lines if line.startswith(names) or not info.is_file()))
