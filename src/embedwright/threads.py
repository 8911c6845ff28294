"""Sets up the process of the `embedwright` command: OpenMP threads bound to cores, and bounded caches of products.

Unbound threads drop to a tenth of their speed beside one other busy process. Only our own command is set up. In a
program that imports this package, nothing here changes its environment or the cores of its threads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

# oneDNN's cache of prepared products, for all threads, and torch's, for each thread. Both hold 1,024 shapes, at more
# than half a megabyte each. Packed rows have a new length every time and fill them: a gigabyte, for 1 % of the time.
# (0 crashes torch.)
_CACHED_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "4"}

_cores: set[int] | None = None  # of the command, before an OpenMP runtime is loaded; None in other programs


def prepare_command() -> None:
    """Calls `set_up_process` if this process is `embedwright ...` or `python -m embedwright ...`; else does nothing."""
    by_module = sys.argv[:1] == ["-m"] and ("-m", "embedwright") in pairwise(sys.orig_argv)  # `argv` has no name yet
    is_command = by_module or Path(sys.argv[0] if sys.argv else "").stem == "embedwright"
    if is_command and "torch" not in sys.modules:
        set_up_process()


def set_up_process() -> None:
    """Sets up this process as our own. To be called before torch is loaded, which reads the environment once.

    What the user has set in the environment stays. Threads are not bound where torchrun or accelerate started several
    processes on this machine: each of them would take the first cores, all the same.
    """
    global _cores
    _cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    for name, value in _CACHED_PRODUCTS.items():
        os.environ.setdefault(name, value)
    alone = os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
    if alone and not {"OMP_PROC_BIND", "OMP_PLACES"} & os.environ.keys():
        os.environ["OMP_PROC_BIND"] = "true"
        os.environ["OMP_PLACES"] = "cores"


def unbind() -> None:
    """Lets this thread, and the threads that it starts, run on all cores again. Does nothing outside of the command.

    Call it in every thread that is not an OpenMP thread: a bound OpenMP keeps the thread that started it on one core.
    """
    if _cores is not None:
        os.sched_setaffinity(0, _cores)


@contextmanager
def unbound() -> Iterator[None]:
    """Frees this thread for a while, for a library that starts its own threads or OpenMP. Such a library uses only the
    cores of the thread that loads it. Does nothing outside of the command."""
    if _cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    unbind()
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cores() -> int:
    """Returns how many cores this process may use: more than this thread's one, where a bound OpenMP holds it there."""
    with unbound():
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_faiss() -> Any:
    """Loads faiss and returns the module. Its OpenMP takes the cores of the thread that loads it for all."""
    with unbound():
        import faiss
    return faiss


def described() -> str:
    """Returns how threads are bound in this process, for `doctor`."""
    bound = os.environ.get("OMP_PROC_BIND", "")
    if bound.lower() in ("", "false"):
        return "not bound: set OMP_PROC_BIND=true OMP_PLACES=cores before Python starts, or expect slow shared machines"
    return f"OMP_PROC_BIND={bound} OMP_PLACES={os.environ.get('OMP_PLACES', '')}"
