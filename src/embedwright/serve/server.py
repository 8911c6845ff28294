"""The state of a server: the model behind its batcher, limits, and the requests that are under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedwright import threads
from embedwright.config import did_you_mean
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.model.verify.modes import evaluating
from embedwright.serve.batcher import Batcher
from embedwright.serve.errors import ApiError
from embedwright.serve.guard import Traffic
from embedwright.serve.metrics import Metrics
from embedwright.serve.packed import PackedModel
from embedwright.serve.schema import EmbeddingRequest
from embedwright.text import TokenizedText

# At four times the load, accepted requests of some texts then wait some three times as long as one alone; with 16
# batches, 12 to 22 times (docs/serving.md).
_QUEUED_BATCHES = 2
_READERS = 2  # threads that tokenise
_READING = 4_000_000  # characters that they read or that wait for them, an instruction for each text: seconds of work
_FAILED = 8  # texts in a row on which a model has failed that is asked again before it counts as ready
_END_S = 1.0  # in which the batch that is computed may end, when the server stops


@dataclass(frozen=True)
class Limits:
    """What a server takes. None: worked out from the model."""

    max_inputs: int = 256  # texts of a request
    max_body: int = 2_000_000  # bytes of a request
    batch_tokens: int | None = None  # the most in one batch
    queue_tokens: int | None = None  # the most that may wait, a request's own texts included

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be positive")


class Server:
    """A model behind a batcher, with the requests that are under way: what the paths of an app share."""

    def __init__(self, model: Embedder, name: str, limits: Limits) -> None:
        self.name, self.limits, self.created = name, limits, int(time.time())
        self.packed, self.traffic, self.metrics = PackedModel(model), Traffic(), Metrics()
        batch_tokens = limits.batch_tokens or model.batch_tokens
        queue_tokens = limits.queue_tokens or _QUEUED_BATCHES * batch_tokens
        self.batcher = Batcher(self.packed.embed, batch_tokens, queue_tokens, self.metrics)
        self.metrics.queue.set_function(lambda: self.batcher.waiting_tokens)
        self.metrics.under_way.set_function(lambda: self.traffic.under_way)
        self.reading = 0
        self.readers = ThreadPoolExecutor(_READERS, "embedwright-read", initializer=threads.unbind)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Context manager: the thread of the model runs within the block."""
        with evaluating(self.packed.model.network):
            self.batcher.start()
            yield
            await asyncio.get_running_loop().run_in_executor(None, self.batcher.close, _END_S)
        self.readers.shutdown(wait=False, cancel_futures=True)

    def check_name(self, name: str | None) -> None:
        """Raises ApiError 404 for the name of another model, whose vectors the client would take these for."""
        if name is not None and name != self.name:
            near = did_you_mean(name, [self.name])
            message = f"there is no such model{near}; this server has {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def task(self, asked: EmbeddingRequest) -> str | None:
        """Returns the `task` of `Embedder.encode` for a request: None for documents.

        Raises ApiError 400 for documents with a task, and InputError for queries without one where the model has none.
        """
        if asked.input_type == "query":
            return self.packed.model.contract.query_task(asked.task)
        if asked.input_type == "document" and asked.task is not None:
            raise ApiError(400, "documents have no task: send it with input_type: query", "task")
        return asked.task

    async def check_model(self) -> None:
        """Raises ApiError 503 if the model has failed on the last texts, and fails on one more that it should read.

        This asks the model, since a server that is sent no more requests would never be ready again.
        """
        if self.batcher.failed_in_a_row >= _FAILED:
            try:
                await self.batcher.encode(self.packed.read(["a"], None))
            except ApiError as error:
                raise ApiError(503, "the model fails on every text", code="model_failed") from error

    async def encode(
        self, texts: Sequence[str], task: str | None, field: str = "input"
    ) -> tuple[NDArray[np.float32], int]:
        """Returns the vectors of texts, as `Embedder.encode` gives them, and the number of tokens that were read.

        `field` of the request holds the texts. Raises ApiError if `task` is too long, there is no room in the queue,
        the server stops, or the model has no vector for a text.
        """
        in_front = len(task or "") * len(texts)
        if in_front > _READING:  # a short body may hold it: it is read again with each text
            message = f"task: {in_front:,} characters in front of {len(texts)} texts are more than {_READING:,}"
            raise ApiError(400, f"{message}: shorten it, or send fewer texts", "task")
        self.batcher.check_room()
        size = in_front + sum(map(len, texts))
        if self.reading and self.reading + size > _READING:
            raise self.batcher.full()
        self.reading += size
        try:
            read = asyncio.get_running_loop().run_in_executor(self.readers, self.packed.read, texts, task)
            tokenized: list[TokenizedText] = await read
        finally:
            self.reading -= size
        vectors_NE = await self.batcher.encode(tokenized, field)
        lengths = [len(text.ids) for text in tokenized]
        self.metrics.texts.inc(len(lengths))
        self.metrics.tokens.inc(sum(lengths))
        self.metrics.cut.inc(sum(length >= self.packed.max_tokens for length in lengths))
        return vectors_NE, sum(lengths)
