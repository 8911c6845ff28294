"""The batcher with a model that a test holds up, so that nothing depends on time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from embedwright.serve.batcher import Batcher
from embedwright.serve.errors import ApiError
from embedwright.serve.metrics import Metrics
from embedwright.text import TokenizedText


class Model:
    """The vector of a text is (first id, number of tokens). The first batch waits until `go` is set."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []  # first ids
        self.sizes: list[int] = []
        self.poison: Callable[[list[int]], Any] = lambda ids: None

    def __call__(self, texts: Sequence[TokenizedText]) -> Any:
        first = [int(text.ids[0]) for text in texts]
        self.batches.append(first)
        self.sizes.append(sum(len(text.ids) for text in texts))
        self.began.set()
        assert self.go.wait(20)
        vectors = np.array([(id, len(text.ids)) for id, text in zip(first, texts, strict=True)], np.float32)
        if (fault := self.poison(first)) is not None:
            if isinstance(fault, Exception):
                raise fault
            vectors[first.index(fault)] = np.nan
        return vectors


def text(id: int, tokens: int = 10) -> TokenizedText:
    return TokenizedText(np.full(tokens, id), np.ones(tokens, bool))


def with_batcher(
    work: Callable[[Batcher, Model], Awaitable[None]], batch_tokens: int = 100, queue_tokens: int = 1000
) -> Model:
    model = Model()

    async def main() -> None:
        batcher = Batcher(model, batch_tokens, queue_tokens, Metrics())
        batcher.start()
        try:
            await asyncio.wait_for(work(batcher, model), 20)
        finally:
            model.go.set()
            await asyncio.to_thread(batcher.close, 20)

    asyncio.run(main())
    return model


async def first_under_way(batcher: Batcher, model: Model) -> asyncio.Future[Any]:
    """A request whose batch is being computed, so that what comes next gathers."""
    first = asyncio.ensure_future(batcher.encode([text(0)]))
    assert await asyncio.to_thread(model.began.wait, 20)
    return first


async def queued(batcher: Batcher, *requests: Sequence[TokenizedText]) -> list[asyncio.Future[Any]]:
    tasks = [asyncio.ensure_future(batcher.encode(texts)) for texts in requests]
    await asyncio.sleep(0)  # each runs up to its place in the queue
    return tasks


def test_what_comes_while_a_batch_computes_is_the_next_batch() -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        first = await first_under_way(batcher, model)
        others = await queued(batcher, [text(1), text(2, 30)], [text(3, 5)], [text(4)])
        assert batcher.waiting_tokens == 55
        model.go.set()
        found = await asyncio.gather(first, *others)
        assert [vectors.tolist() for vectors in found] == [[[0, 10]], [[1, 10], [2, 30]], [[3, 5]], [[4, 10]]]
        assert batcher.waiting_tokens == 0

    model = with_batcher(work)
    assert model.batches == [[0], [2, 1, 4, 3]]  # the longest first: attention wants neighbours of equal length


def test_a_batch_keeps_its_budget_and_a_longer_text_is_alone() -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        model.go.set()
        await asyncio.gather(*await queued(batcher, [text(i, 30) for i in range(1, 8)], [text(9, 250)]))

    model = with_batcher(work)
    assert sum(map(len, model.batches)) == 8 and all(size <= 100 or size == 250 for size in model.sizes)
    assert [9] in model.batches


def test_requests_take_turns() -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        first = await first_under_way(batcher, model)
        others = await queued(batcher, [text(i, 20) for i in range(10, 40)], [text(1, 20)], [text(2, 20)])
        model.go.set()
        await asyncio.gather(first, *others)

    model = with_batcher(work)
    assert sorted(model.batches[1]) == [1, 2, 10, 11, 12]  # the short ones do not wait for the thirty


def test_a_cancelled_request_leaves_the_queue() -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        first = await first_under_way(batcher, model)
        gone, stays = await queued(batcher, [text(1), text(2)], [text(3)])
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert batcher.waiting_tokens == 10
        model.go.set()
        assert (await asyncio.gather(first, stays))[1].tolist() == [[3, 10]]

    assert with_batcher(work).batches == [[0], [3]]


@pytest.mark.parametrize("kind", ["raises", "not_finite"])
def test_a_poisoned_text_fails_alone(kind: str) -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        first = await first_under_way(batcher, model)
        fault = RuntimeError("bad") if kind == "raises" else 7
        model.poison = lambda ids: fault if 7 in ids else None
        tasks = await queued(batcher, [text(1)], [text(2), text(7), *[text(i) for i in range(20, 40)]], [text(3)])
        model.go.set()
        one, poisoned, other = await asyncio.gather(*tasks, return_exceptions=True)
        assert one.tolist() == [[1, 10]] and other.tolist() == [[3, 10]] and (await first).tolist() == [[0, 10]]
        assert isinstance(poisoned, ApiError) and "input[1]" in poisoned.message and poisoned.param == "input[1]"
        said = (503, "model_failed") if kind == "raises" else (400, "not_finite")  # which would come again: no 5xx
        assert (poisoned.status, poisoned.code) == said
        assert batcher.waiting_tokens == 0  # the rest of its texts have left the queue
        assert (await batcher.encode([text(5)])).tolist() == [[5, 10]]

    with_batcher(work)


def test_a_poisoned_text_is_found_by_halving() -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        first = await first_under_way(batcher, model)
        model.poison = lambda ids: RuntimeError("bad") if 7 in ids else None
        tasks = await queued(batcher, *([text(i, 1)] for i in range(1, 65)))
        model.go.set()
        found = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [i for i, one in enumerate(found) if isinstance(one, ApiError)] == [7]

    model = with_batcher(work)
    assert len(model.batches) == 1 + 1 + 2 * 6  # the first, all 64, and two halves at each of six steps


def test_a_full_queue_refuses_and_says_when_to_ask_again() -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        first = await first_under_way(batcher, model)
        tasks = await queued(batcher, [text(1, 400)])  # more than fits, but alone
        for refused in (batcher.encode([text(2, 1)]), asyncio.to_thread(batcher.check_room)):
            with pytest.raises(ApiError) as found:
                await refused
            answer = found.value.response()
            assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
        assert batcher.waiting_tokens == 400
        model.go.set()
        await asyncio.gather(first, *tasks)
        assert (await batcher.encode([text(2, 1)])).tolist() == [[2, 1]]

    with_batcher(work, queue_tokens=100)


def test_behind_a_bulk_request_there_is_room_for_a_single_text_and_not_for_another_bulk_request() -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        first = await first_under_way(batcher, model)
        bulk = await queued(batcher, [text(i, 30) for i in range(10, 30)])  # alone, so it may have any size
        batcher.check_room()
        single = await queued(batcher, [text(1, 30)])
        with pytest.raises(ApiError):  # two texts of the bulk request and one come before it: 90 + 60
            await batcher.encode([text(2, 30), text(3, 30)])
        (second,) = await queued(batcher, [text(4, 30)])
        with pytest.raises(ApiError):  # 30 each of bulk and two singles, and its own
            await batcher.encode([text(5, 30)])
        model.go.set()
        await asyncio.gather(first, *bulk, *single, second)

    model = with_batcher(work, queue_tokens=100)
    assert set(model.batches[1]) == {10, 1, 4}  # one text of each


def test_a_closed_batcher_answers_all() -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        first = await first_under_way(batcher, model)
        (waiting,) = await queued(batcher, [text(1)])
        batcher.close()
        model.go.set()
        assert (await first).tolist() == [[0, 10]]  # its batch was under way
        for late in (waiting, batcher.encode([text(2)])):
            with pytest.raises(ApiError) as found:
                await late
            assert found.value.status == 503
        assert not batcher.alive

    assert with_batcher(work).batches == [[0]]
