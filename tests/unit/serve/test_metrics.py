"""Counters of one app are its own."""

from __future__ import annotations

import time
from typing import Any

from embedwright.serve.app import create_app
from embedwright.serve.metrics import Metrics


def test_two_apps_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.texts.inc(3)
    assert b"embedwright_texts_total 3.0" in first.text() and b"embedwright_texts_total 0.0" in second.text()


def test_requests_are_counted_by_path_and_status(serving: Any) -> None:
    with serving() as server:
        server.embed({"input": ["a", "b"]})
        server.embed({"input": []})
        server.ask("GET", "/nothing")
        answer = server.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    counted = answer.raw.decode()
    for line in (
        'embedwright_requests_total{path="/v1/embeddings",status="200"} 1.0',
        'embedwright_requests_total{path="/v1/embeddings",status="400"} 1.0',
        'embedwright_requests_total{path="other",status="404"} 1.0',
        "embedwright_texts_total 2.0",
        "embedwright_queue_tokens 0.0",
        "embedwright_batch_tokens_count 1.0",
    ):
        assert line in counted


def test_requests_of_a_second_model_are_counted_under_its_own_path(serving: Any, model: Any, other: Any) -> None:
    second = create_app(model, name="second", index=other)
    with serving(index=other, page=True, against=second) as server:
        server.embed({"input": "a"})
        for _ in range(3):
            assert server.ask("POST", "/against/v1/embeddings", {"input": "a"}).status == 200
        ends, line = time.monotonic() + 20, 'embedwright_requests_total{path="/against/v1/embeddings",status="200"} 3.0'
        own = its = ""
        while (line not in own or line not in its) and time.monotonic() < ends:  # answers come before they are counted
            own, its = (server.ask("GET", path).raw.decode() for path in ("/metrics", "/against/metrics"))
    for counted, texts in ((own, 1), (its, 3)):
        assert line in counted and f"embedwright_texts_total {texts}.0" in counted
    assert 'embedwright_requests_total{path="/v1/embeddings",status="200"} 1.0' in own
    assert 'path="/v1/embeddings"' not in its
