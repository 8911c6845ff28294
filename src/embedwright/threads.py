"""OpenMP threads bound to cores, for the `embedwright` command, and runtimes loaded so that binding does no harm.

Unbound, threads collapse to a tenth of their speed beside one other busy process. Only the environment of a process
that is our own command is touched, before torch reads it; `OMP_PROC_BIND` set by the user (`false`, say) is left alone.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path


def _cores() -> set[int]:
    if not hasattr(os, "sched_getaffinity"):
        return set(range(os.cpu_count() or 1))
    cores: set[int] = os.sched_getaffinity(0)
    if "torch" not in sys.modules:
        return cores
    # Imported first, its OpenMP may have this thread on one core already. It knows those of the others.
    openmp = ctypes.CDLL(None)
    for place in range(openmp.omp_get_num_places() if hasattr(openmp, "omp_get_num_places") else 0):
        ids = (ctypes.c_int * openmp.omp_get_place_num_procs(place))()
        openmp.omp_get_place_proc_ids(place, ids)
        cores |= set(ids)
    return cores


CORES = _cores()
"""Of this process, whatever core a bound OpenMP runtime has put its main thread on."""


def bind_for_command() -> None:
    """Set OMP_PROC_BIND and OMP_PLACES where this process is `embedwright ...`, or `python -m embedwright ...`, and the
    user set neither.

    Not where torchrun or accelerate started several on this machine: each would take the first cores, all the same.
    """
    by_module = sys.argv[:1] == ["-m"] and ("-m", "embedwright") in pairwise(sys.orig_argv)  # `argv` has no name yet
    is_command = by_module or Path(sys.argv[0] if sys.argv else "").stem == "embedwright"
    alone = os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
    if is_command and alone and "torch" not in sys.modules and not {"OMP_PROC_BIND", "OMP_PLACES"} & os.environ.keys():
        os.environ["OMP_PROC_BIND"] = "true"
        os.environ["OMP_PLACES"] = "cores"


def load_runtimes() -> None:
    """Import torch, then faiss. Each brings an OpenMP runtime of its own, which, bound, pins the main thread to one
    core when it is loaded; the next runtime would see that one core and run on one thread. So the mask is put back."""
    import torch  # noqa: F401

    free()
    import faiss  # noqa: F401


def free() -> None:
    """This thread may run on all cores again, and so may the threads that it starts.

    To be called in every thread that is no OpenMP thread: it comes from one that a bound OpenMP keeps on one core.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, CORES)


@contextmanager
def freed() -> Iterator[None]:
    """This thread on all cores meanwhile, for a library that starts threads of its own: they inherit them."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    free()
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def described() -> str:
    """How threads are bound in this process, for `doctor`."""
    bound = os.environ.get("OMP_PROC_BIND", "")
    if bound.lower() in ("", "false"):
        return "not bound: set OMP_PROC_BIND=true OMP_PLACES=cores before Python starts, or expect slow shared machines"
    return f"OMP_PROC_BIND={bound} OMP_PLACES={os.environ.get('OMP_PLACES', '')}"
