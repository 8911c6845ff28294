"""A GPU's queue of batches, and vectors as a caller asks for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from embedwright.model.encode import first_not_finite, quantize, queued, shortened


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


def test_a_vector_of_zeros_is_quantized_to_zeros() -> None:
    zeros = np.zeros((1, 8), dtype=np.float32)
    assert not quantize(zeros, "int8").any() and not quantize(zeros, "binary").any()


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_quantized(precision: Any, bad: float) -> None:
    vectors = np.ones((3, 4), dtype=np.float32)
    vectors[1, 2] = bad
    assert first_not_finite(vectors) == 1
    with pytest.raises(ValueError, match="vector 1 is not finite"):
        quantize(vectors, precision)


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match="precision='int4' is none of float32, int8, binary"):
        quantize(np.ones((1, 4), dtype=np.float32), "int4")  # type: ignore[arg-type]


def test_a_cut_has_unit_length_or_is_an_error() -> None:
    vectors = np.array([[3, 4, 0, 0], [0, 0, 0, 1]], dtype=np.float32)
    np.testing.assert_allclose(shortened(vectors[:1], 2), [[0.6, 0.8]])
    with pytest.raises(ValueError, match=r"texts\[1\]: the first 3 dimensions of its vector are zero"):
        shortened(vectors, 3)
