"""How much memory a process, or its part of a GPU, held at most."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch


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
