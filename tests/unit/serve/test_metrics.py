"""Counters of one app are its own."""

from __future__ import annotations

from typing import Any

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
