"""OpenMP threads bound to cores, for the `embedwright` command, and runtimes loaded so that binding does no harm.

Unbound, threads collapse to a tenth of their speed beside one other busy process. Only the environment of a process
that is our own command is touched, before torch reads it; `OMP_PROC_BIND` set by the user (`false`, say) is left alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
"""Of this process, before a bound OpenMP runtime put its main thread on one of them."""


def bind_for_command() -> None:
    """Set OMP_PROC_BIND and OMP_PLACES where this process is `embedwright ...` and the user set neither.

    Not where torchrun or accelerate started several on this machine: each would take the first cores, all the same.
    """
    is_command = Path(sys.argv[0] if sys.argv else "").stem == "embedwright"
    alone = os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
    if is_command and alone and "torch" not in sys.modules and not {"OMP_PROC_BIND", "OMP_PLACES"} & os.environ.keys():
        os.environ["OMP_PROC_BIND"] = "true"
        os.environ["OMP_PLACES"] = "cores"


def load_runtimes() -> None:
    """Import torch, then faiss. Each brings an OpenMP runtime of its own, which, bound, pins the main thread to one
    core when it is loaded; the next runtime would see that one core and run on one thread. So the mask is put back."""
    import torch  # noqa: F401

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, CORES)
    import faiss  # noqa: F401


def described() -> str:
    """How threads are bound in this process, for `doctor`."""
    bound = os.environ.get("OMP_PROC_BIND", "")
    if bound.lower() in ("", "false"):
        return "not bound: set OMP_PROC_BIND=true OMP_PLACES=cores before Python starts, or expect slow shared machines"
    return f"OMP_PROC_BIND={bound} OMP_PLACES={os.environ.get('OMP_PLACES', '')}"
