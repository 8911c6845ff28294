"""Limits, and the sizes that follow from a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.serve.errors import ApiError
from embedwright.serve.packed import PackedModel
from embedwright.serve.server import Limits, Server
from embedwright.text import TokenizedText


def test_limits_are_positive() -> None:
    for name in ("max_inputs", "max_body", "batch_tokens", "queue_tokens"):
        with pytest.raises(InputError, match=f"{name}=0"):
            Limits(**{name: 0})


def test_batches_are_those_of_encode_and_two_may_wait(model: Embedder) -> None:
    server = Server(model, "tiny", Limits())
    assert server.batcher.batch_tokens == model.batch_tokens
    assert server.batcher.queue_tokens == 2 * model.batch_tokens
    own = Server(model, "tiny", Limits(batch_tokens=7, queue_tokens=9)).batcher
    assert (own.batch_tokens, own.queue_tokens) == (7, 9)


def test_another_models_name_is_refused(model: Embedder) -> None:
    server = Server(model, "tiny", Limits())
    server.check_name("tiny")
    server.check_name(None)
    with pytest.raises(ApiError, match=r"did you mean 'tiny'.* this server has 'tiny'"):
        server.check_name("tinny")


@pytest.mark.parametrize(("texts", "length"), [(1, 4_000_001), (256, 20_000)])
def test_an_instruction_counts_for_each_text_before_it_is_read(
    model: Embedder, monkeypatch: pytest.MonkeyPatch, texts: int, length: int
) -> None:
    monkeypatch.setattr(PackedModel, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(ApiError, match=r"task: [0-9,]+ characters in front of \d+ texts.* shorten it") as refused:
        asyncio.run(Server(model, "tiny", Limits()).encode(["a"] * texts, "x" * length))
    assert (refused.value.status, refused.value.param) == (400, "task")


def test_what_waits_to_be_read_is_bounded(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    server, read = Server(model, "tiny", Limits()), PackedModel.read

    def held(packed: PackedModel, texts: Sequence[str], task: str | None) -> list[TokenizedText]:
        assert go.wait(20)
        return read(packed, texts, task)

    monkeypatch.setattr(PackedModel, "read", held)
    monkeypatch.setattr("embedwright.serve.server._READING", 10)

    async def ask() -> None:
        async with server.running():
            first = asyncio.ensure_future(server.encode(["a", "b"], "Find"))  # ten characters are read
            await asyncio.sleep(0)  # alone, it is read
            with pytest.raises(ApiError) as refused:
                await server.encode(["b"], None)
            assert refused.value.status == 429 and "Retry-After" in (refused.value.headers or {})
            go.set()
            await first
            assert len((await server.encode(["b"], None))[0]) == 1 and server.reading == 0

    asyncio.run(ask())
