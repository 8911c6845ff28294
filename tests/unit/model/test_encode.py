"""A GPU's queue of batches: the next one is in it before one is waited for."""

from __future__ import annotations

import pytest
import torch

from embedwright.model.encode import queued


def test_a_gpu_has_the_next_batch_in_its_queue_before_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls, with an event that notes them; `make gpu-smoke` runs it on a GPU."""
    calls: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.batch = ""

        def record(self, stream: str) -> None:
            assert stream == "stream of cpu"  # of the GPU that computes, which need not be the current one
            self.batch = calls[-1].split()[1]

        def synchronize(self) -> None:
            calls.append(f"wait {self.batch}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")

    def run(batch: list[int]) -> torch.Tensor:
        calls.append(f"run {batch[0]}")
        return torch.tensor(batch)

    found = list(queued(run, [[1, 5], [2], [3]]))
    assert [(batch, array.tolist()) for batch, array in found] == [([1, 5], [1, 5]), ([2], [2]), ([3], [3])]
    assert calls == ["run 1", "run 2", "wait 1", "run 3", "wait 2", "wait 3"]
    assert list(queued(run, [])) == []
