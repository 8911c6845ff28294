"""Texts of many requests as packed batches: one thread computes, and the next batch gathers meanwhile.

A batch starts as soon as the one before it has ended. Nothing waits for a batch to fill up.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from embedwright import threads
from embedwright.serve.errors import ApiError, busy
from embedwright.serve.metrics import Metrics
from embedwright.text import TokenizedText

log = logging.getLogger(__name__)

_RECENT = 0.2  # weight of the newest batch in the speed by which Retry-After is worked out

Embed = Callable[[Sequence[TokenizedText]], NDArray[np.float32]]


class _Job:
    """The texts of one request. `taken` of them are in batches; the others wait."""

    def __init__(self, texts: Sequence[TokenizedText], field: str, done: asyncio.Future[None]) -> None:
        self.texts, self.field, self.done, self.taken = texts, field, done, 0
        self.vectors: list[NDArray[np.float32] | None] = [None] * len(texts)
        self.missing = len(texts)

    def waiting_tokens(self, most: int | None = None) -> int:
        """Counts the tokens of the texts that wait, or of the next `most` of them."""
        return sum(len(text.ids) for text in self.texts[self.taken :][:most])


_Place = tuple[_Job, int]  # a text of a request


class Batcher:
    """The queue of texts and the thread that computes them.

    `embed` gets at most `batch_tokens` tokens at once; a longer text is a batch of its own. A request is refused if it
    and the texts before its last one have more than `queue_tokens` tokens, unless nothing waits. Requests take turns,
    so of a bulk request only one text comes before a single one.
    """

    def __init__(self, embed: Embed, batch_tokens: int, queue_tokens: int, metrics: Metrics) -> None:
        self.embed, self.batch_tokens, self.queue_tokens, self.metrics = embed, batch_tokens, queue_tokens, metrics
        self.waiting_tokens = 0
        self.failed_in_a_row = 0  # texts without a vector since the last one that has one
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()  # guards all that both threads write
        self._closed = False
        self._tokens_per_s = 0.0
        self._thread = threading.Thread(target=self._work, name="embedwright-model", daemon=True)

    def start(self) -> None:
        """Starts the thread. To be called in the event loop that `encode` is called in."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def close(self, wait_s: float = 0.0) -> None:
        """Refuses all that waits with 503, and ends the thread. Waits for the batch that is being computed."""
        with self._changed:
            self._closed = True
            left, self._jobs, self.waiting_tokens = list(self._jobs), deque(), 0
            self._changed.notify()
        for job in left:
            _fail(job, busy("the server stops", 503, "stopping", 1))
        if wait_s:
            self._thread.join(wait_s)

    def check_room(self) -> None:
        """Raises ApiError 429 if no request has room, before any work is done for one."""
        with self._changed:
            if self._ahead(1) >= self.queue_tokens:
                raise self.full()

    async def encode(self, texts: Sequence[TokenizedText], field: str = "input") -> NDArray[np.float32]:
        """Returns the vectors (N, E) of a request. A caller that is cancelled leaves the queue.

        Raises ApiError: 429 for a full queue, 400 where the vector of a text is not finite, which it would be again,
        503 when the server stops or the model fails on a text. `field` names the texts in the answer.
        """
        job = _Job(texts, field, self._loop.create_future())
        tokens = job.waiting_tokens()
        with self._changed:
            if not self.alive:
                raise busy("the server stops", 503, "stopping", 1)
            if self._jobs and self._ahead(len(texts)) + tokens > self.queue_tokens:
                raise self.full()
            self._jobs.append(job)
            self.waiting_tokens += tokens
            self._changed.notify()
        try:
            await job.done
        except asyncio.CancelledError:
            self._drop(job)
            raise
        return np.stack([vector for vector in job.vectors if vector is not None])

    def full(self) -> ApiError:
        """Makes and counts the answer to a request that there is no room for."""
        self.metrics.refused.inc()
        seconds = min(60.0, self.waiting_tokens / self._tokens_per_s) if self._tokens_per_s else 1.0
        return busy("the queue is full: ask again later", 429, "queue_full", seconds)

    def _ahead(self, texts: int) -> int:
        """Counts the tokens before the last text of a new request: each one that waits gives as many texts, in turn."""
        return sum(job.waiting_tokens(texts) for job in self._jobs)

    def _drop(self, job: _Job) -> None:
        """Takes what waits of a request out of the queue."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                self.waiting_tokens -= job.waiting_tokens()

    # ---- in the thread

    def _work(self) -> None:
        threads.unbind()
        while batch := self._next():
            began = time.perf_counter()
            results = self._results(batch)
            whole = any(vector is not None and np.isfinite(vector).all() for vector in results)
            self.failed_in_a_row = 0 if whole else self.failed_in_a_row + len(batch)
            self._note(batch, time.perf_counter() - began)
            self._loop.call_soon_threadsafe(self._deliver, batch, results)

    def _next(self) -> list[_Place]:
        """Waits for texts and returns a batch; an empty one when the batcher is closed.

        The requests that wait give one text each in turn, so that a short one is not held up by a long one.
        """
        batch: list[_Place] = []
        room = self.batch_tokens
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            while self._jobs:
                job = self._jobs[0]
                size = len(job.texts[job.taken].ids)
                if batch and size > room:
                    break
                self._jobs.popleft()
                batch.append((job, job.taken))
                job.taken += 1
                room -= size
                self.waiting_tokens -= size
                if job.taken < len(job.texts):
                    self._jobs.append(job)
        return sorted(batch, key=lambda place: -len(place[0].texts[place[1]].ids))  # attention wants equal lengths

    def _results(self, batch: Sequence[_Place]) -> list[NDArray[np.float32] | None]:
        """Computes a batch. Where that fails, its halves are tried; None stands for a text that fails alone."""
        try:
            vectors_NE = self.embed([job.texts[i] for job, i in batch])
        except Exception as error:
            self.metrics.failed.inc()
            log.warning("a batch of %d texts failed (%s)", len(batch), type(error).__name__)  # the message may quote
            middle = len(batch) // 2
            return [*self._results(batch[:middle]), *self._results(batch[middle:])] if middle else [None]
        return list(vectors_NE)

    def _note(self, batch: Sequence[_Place], seconds: float) -> None:
        tokens = sum(len(job.texts[i].ids) for job, i in batch)
        weight = _RECENT if self._tokens_per_s else 1.0
        self._tokens_per_s += weight * (tokens / max(seconds, 1e-6) - self._tokens_per_s)
        self.metrics.batch_tokens.observe(tokens)
        self.metrics.batch_seconds.observe(seconds)

    # ---- in the event loop

    def _deliver(self, batch: Sequence[_Place], results: Sequence[NDArray[np.float32] | None]) -> None:
        for (job, i), vector in zip(batch, results, strict=True):
            if vector is None or not np.isfinite(vector).all():
                _fail(job, _without_vector(f"{job.field}[{i}]", failed=vector is None))
                self._drop(job)
                continue
            job.vectors[i] = vector
            job.missing -= 1
            if not job.missing and not job.done.done():
                job.done.set_result(None)


def _without_vector(text: str, failed: bool) -> ApiError:
    if failed:
        return ApiError(503, f"the model failed on {text}", text, "model_failed")
    return ApiError(400, f"{text}: the model's vector of it is not finite: leave it out", text, "not_finite")


def _fail(job: _Job, error: ApiError) -> None:
    if not job.done.done():
        job.done.set_exception(error)
