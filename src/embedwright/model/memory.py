"""Memory of a process: large blocks that are freed stay at hand on a CPU, and how much was held at most."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

_BLOCK = 31 * 2**20  # bytes: below the largest that glibc learns from


@cache
def keep_freed_memory() -> None:
    """Once per process: let glibc's malloc keep up to 62 MB of freed memory.

    It returns blocks above a threshold to the kernel when they are freed, and pays for every page of the next one: a
    tenth of a float32 encode and more. The threshold, 128 kB at first, is raised by the largest mapped block that was
    ever freed (mallopt(3), M_MMAP_THRESHOLD), so one is made and freed, without touching its pages. Other allocators
    take no notice.
    """
    torch.empty(_BLOCK, dtype=torch.uint8, device="cpu")


def give_back() -> None:
    """Freed memory goes back to the system, where it is glibc's: making and probing a model leaves some 30 MB."""
    with suppress(AttributeError, OSError, TypeError):  # another allocator; Windows
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak(device: torch.device) -> None:
    """`peak` starts again from here, where the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # no Linux, or not allowed: `peak` is then that of the whole process so far, or None
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int | None:
    """Bytes held at most since `forget_peak`: on a GPU by torch, else by the process. None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
