"""What Prometheus reads at /metrics: counts and times, no texts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """The counters of one app, in a registry of their own."""

    def __init__(self) -> None:
        at = self.registry = CollectorRegistry()
        self.requests = Counter(
            "embedwright_requests",
            "Requests by path and status; 499: the client left.",
            ["path", "status"],
            registry=at,
        )
        self.seconds = Histogram(
            "embedwright_request_seconds", "Time of requests.", ["path"], buckets=_SECONDS, registry=at
        )
        self.texts = Counter("embedwright_texts", "Texts that were encoded.", registry=at)
        self.tokens = Counter("embedwright_tokens", "Tokens of these texts.", registry=at)
        self.cut = Counter("embedwright_full_texts", "Texts of the model's full length: most are cut.", registry=at)
        self.queue = Gauge("embedwright_queue_tokens", "Tokens that wait.", registry=at)
        self.under_way = Gauge("embedwright_requests_under_way", "Requests accepted, not answered yet.", registry=at)
        self.refused = Counter("embedwright_refused", "Requests refused because the queue was full.", registry=at)
        self.failed = Counter("embedwright_failed_batches", "Batches on which the model failed.", registry=at)
        self.batch_tokens = Histogram("embedwright_batch_tokens", "Tokens of a batch.", buckets=_TOKENS, registry=at)
        self.batch_seconds = Histogram("embedwright_batch_seconds", "Time of a batch.", buckets=_SECONDS, registry=at)

    def text(self) -> bytes:
        """Returns all of it in Prometheus's text format."""
        return generate_latest(self.registry)
