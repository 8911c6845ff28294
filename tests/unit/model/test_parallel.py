"""Batches side by side: which, on how many threads, with what vectors, and that nothing of it stays behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from embedwright import threads
from embedwright.model import parallel
from embedwright.model.embedder import Embedder
from embedwright.model.parallel import planned, queued, side_by_side


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "CORES", os.sched_getaffinity(0) | {0, 1} if os.cpu_count() == 1 else threads.CORES)
    if len(threads.CORES) < 2:
        pytest.skip("one core")
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_shares_are_equal_and_within_the_bound(two_threads: None) -> None:
    lengths = [40, 3, 300, 500, 17, 64, *[30] * 60, 1025, 2000]
    alone, shared = planned(lengths, 1024)
    assert sorted(i for batch in (*alone, *shared) for i in batch) == list(range(len(lengths)))
    assert alone == [[67], [66]]
    tokens = [sum(lengths[i] for i in batch) for batch in shared]
    assert max(tokens) <= 512 and len(tokens) >= 6 and min(tokens[:6]) > 400


@pytest.mark.parametrize("case", ["few tokens", "small batches", "one thread", "many threads", "one core", "autocast"])
def test_otherwise_all_threads_work_on_one_batch(case: str, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, batch_tokens = [100] * (5 if case == "few tokens" else 50), 300 if case == "small batches" else 1024
    assert planned([100] * 50, 1024)[1]
    if case.endswith("thread"):
        torch.set_num_threads(1)
    if case == "many threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    if case == "one core":
        monkeypatch.setattr(threads, "CORES", {0})
    with torch.autocast("cpu", enabled=case == "autocast"):
        alone, shared = planned(lengths, batch_tokens)
    assert shared == [] and sum(map(len, alone)) == len(lengths)


def test_each_batch_has_one_thread_and_all_cores(two_threads: None) -> None:
    seen, both = [], threading.Barrier(2)

    def run(batch: list[int]) -> int:
        both.wait(timeout=30)  # two are at work at a time
        seen.append((torch.get_num_threads(), os.sched_getaffinity(0), threading.get_ident()))
        return batch[0]

    assert list(side_by_side(run, [[5], [6], [7], [8]])) == [([5], 5), ([6], 6), ([7], 7), ([8], 8)]
    assert {(count, frozenset(cores)) for count, cores, _ in seen} == {(1, frozenset(threads.CORES))}
    assert threading.get_ident() not in {thread for *_, thread in seen}
    assert torch.get_num_threads() == 2


def test_an_error_comes_through_and_threads_are_put_back(two_threads: None) -> None:
    def run(batch: list[int]) -> int:
        raise KeyError(batch[0])

    with pytest.raises(KeyError, match="3"):
        list(side_by_side(run, [[3], [4]]))
    assert torch.get_num_threads() == 2


def test_vectors_are_those_of_one_batch_after_the_other(
    two_threads: None, tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_embedder("latent")
    texts = [f"text {i} " + "of many words " * (i % 40) for i in range(90)]
    calls: list[int] = []
    monkeypatch.setattr(
        "embedwright.model.embedder.side_by_side",
        lambda run, made: (calls.append(len(made)), side_by_side(run, made))[1],
    )
    shared = model.encode(texts)
    monkeypatch.setattr(parallel, "_MOST", 1)
    np.testing.assert_allclose(shared, model.encode(texts), rtol=0, atol=1e-6)
    assert calls[0] >= 4 and calls[1] == 0


def test_a_gpu_has_the_next_batch_in_its_queue_before_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls, with an event that notes them; `make gpu-smoke` runs it on a GPU."""
    calls: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.batch = ""

        def record(self) -> None:
            self.batch = calls[-1].split()[1]

        def synchronize(self) -> None:
            calls.append(f"wait {self.batch}")

    monkeypatch.setattr(torch.cuda, "Event", Event)

    def run(batch: list[int]) -> torch.Tensor:
        calls.append(f"run {batch[0]}")
        return torch.tensor(batch)

    found = list(queued(run, [[1, 5], [2], [3]]))
    assert [(batch, array.tolist()) for batch, array in found] == [([1, 5], [1, 5]), ([2], [2]), ([3], [3])]
    assert calls == ["run 1", "run 2", "wait 1", "run 3", "wait 2", "wait 3"]
    assert list(queued(run, [])) == []
