"""Limits, and the sizes that follow from a model."""

from __future__ import annotations

import pytest

from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.serve.errors import ApiError
from embedwright.serve.server import Limits, Server


def test_limits_are_positive() -> None:
    for name in ("max_inputs", "max_body", "batch_tokens", "queue_tokens"):
        with pytest.raises(InputError, match=f"{name}=0"):
            Limits(**{name: 0})


def test_batches_are_those_of_encode_and_sixteen_may_wait(model: Embedder) -> None:
    server = Server(model, "tiny", Limits())
    assert server.batcher.batch_tokens == model.batch_tokens
    assert server.batcher.queue_tokens == 16 * model.batch_tokens
    own = Server(model, "tiny", Limits(batch_tokens=7, queue_tokens=9)).batcher
    assert (own.batch_tokens, own.queue_tokens) == (7, 9)


def test_another_models_name_is_refused(model: Embedder) -> None:
    server = Server(model, "tiny", Limits())
    server.check_name("tiny")
    server.check_name(None)
    with pytest.raises(ApiError, match=r"did you mean 'tiny'.* this server has 'tiny'"):
        server.check_name("tinny")
