from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedwright.training.run.memory import forget_peak, peak


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_the_peak_is_that_of_what_was_held_since() -> None:
    cpu = torch.device("cpu")
    forget_peak(cpu)
    before = peak(cpu)
    torch.ones(64 * 2**20, dtype=torch.uint8)
    after = peak(cpu)
    assert before is not None and after is not None and after - before > 48 * 2**20
    forget_peak(cpu)
    again = peak(cpu)
    assert again is not None and again < after - 32 * 2**20
