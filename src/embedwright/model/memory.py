"""Memory of a process on a CPU: large blocks that are freed stay at hand instead of going back to the kernel."""

from __future__ import annotations

from functools import cache

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
