from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embedwright.model import memory

FAULTS = """
import resource, torch
from embedwright.model.memory import keep_freed_memory
torch.set_num_threads(1)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (3, 7, 12, 5):
        torch.zeros(size * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
print(first, min(faults() for _ in range(6)))  # the heap may have to grow for the first ones
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_a_large_block_comes_without_new_pages_once_one_was_freed() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 1000 and after < before / 10


@pytest.mark.skipif(not Path("/proc/self/status").is_file() or platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_goes_back() -> None:
    small = [torch.zeros(2_000) for _ in range(20_000)]  # 160 MB in blocks that malloc keeps
    fence = torch.zeros(2_000)
    held = resident()
    del small
    memory.give_back()
    assert held - resident() > 100 * 2**20
    del fence


def resident() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024
