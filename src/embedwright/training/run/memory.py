"""The peak memory of a process, or of its part of a GPU."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch


def forget_peak(device: torch.device) -> None:
    """Starts `peak` again from here, where the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not Linux, or not allowed: `peak` is then that of the whole process so far, or None
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int | None:
    """Returns the most bytes held since `forget_peak`, by torch on a GPU, else by the process. None if it is not
    counted.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
