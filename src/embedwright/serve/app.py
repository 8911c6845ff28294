"""The app: its paths, and the way of a request from text to vector."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic_core import to_json

from embedwright import threads
from embedwright.config import did_you_mean
from embedwright.errors import InputError, InputTypeError
from embedwright.model import encode
from embedwright.model.embedder import Embedder
from embedwright.model.verify.modes import evaluating
from embedwright.serve.batcher import Batcher
from embedwright.serve.errors import ApiError, ErrorAnswer, add_handlers
from embedwright.serve.guard import Guard, Traffic
from embedwright.serve.metrics import Metrics
from embedwright.serve.packed import PackedModel
from embedwright.serve.schema import EmbeddingAnswer, EmbeddingRequest, Model, Models, Status, embedding_request
from embedwright.text import TokenizedText

_QUEUED_BATCHES = 16
_READERS = 2  # threads that tokenise
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request is wrong; `param` names the field."},
    401: {"model": ErrorAnswer, "description": "The API key is missing or wrong."},
    403: {"model": ErrorAnswer, "description": "The server has no key, and was asked under another name."},
    404: {"model": ErrorAnswer, "description": "There is no such model or path."},
    408: {"model": ErrorAnswer, "description": "The body did not arrive in time."},
    413: {"model": ErrorAnswer, "description": "The body is too large."},
    429: {"model": ErrorAnswer, "description": "The queue is full; Retry-After says when to ask again."},
    503: {"model": ErrorAnswer, "description": "The server stops, or the model has failed on a text."},
    "default": {"model": ErrorAnswer, "description": "Any other error."},
}


@dataclass(frozen=True)
class Limits:
    """What a server takes. None: worked out from the model."""

    max_inputs: int = 256  # texts of a request
    max_body: int = 2_000_000  # bytes of a request
    max_tokens: int | None = None  # of a text, which is cut after them
    batch_tokens: int | None = None  # of a batch
    queue_tokens: int | None = None  # of the texts that wait

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be positive")


class Server:
    """A model behind a batcher, with the requests that are under way: what the paths of an app share."""

    def __init__(self, model: Embedder, name: str, limits: Limits) -> None:
        self.name, self.limits, self.created = name, limits, int(time.time())
        self.packed, self.traffic, self.metrics = PackedModel(model, limits.max_tokens), Traffic(), Metrics()
        batch_tokens = limits.batch_tokens or model.batch_tokens
        queue_tokens = limits.queue_tokens or _QUEUED_BATCHES * batch_tokens
        self.batcher = Batcher(self.packed.embed, batch_tokens, queue_tokens, self.metrics)
        self.metrics.queue.set_function(lambda: self.batcher.waiting_tokens)
        self.metrics.under_way.set_function(lambda: self.traffic.under_way)
        self.readers = ThreadPoolExecutor(_READERS, "embedwright-read", initializer=threads.free)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Context manager: the thread of the model runs within the block."""
        with evaluating(self.packed.model.network):
            self.batcher.start()
            yield
            await asyncio.get_running_loop().run_in_executor(None, self.batcher.close, 5.0)
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

    async def encode(self, texts: Sequence[str], task: str | None) -> tuple[NDArray[np.float32], int]:
        """Returns the vectors of texts, as `Embedder.encode` gives them, and the number of tokens that were read.

        Raises ApiError if there is no room in the queue, the server stops, or the model fails.
        """
        self.batcher.check_room()
        read = asyncio.get_running_loop().run_in_executor(self.readers, self.packed.read, texts, task)
        tokenized: list[TokenizedText] = await read
        vectors_NE = await self.batcher.encode(tokenized)
        lengths = [len(text.ids) for text in tokenized]
        self.metrics.texts.inc(len(lengths))
        self.metrics.tokens.inc(sum(lengths))
        self.metrics.cut.inc(sum(length >= self.packed.max_tokens for length in lengths))
        return vectors_NE, sum(lengths)


def create_app(
    model: Embedder,
    *,
    name: str,
    keys: Sequence[str] = (),
    limits: Limits | None = None,
    token_ids: bool = False,
) -> FastAPI:
    """Makes the app of a server.

    Args:
        model: What `open_encoder` opens, if its texts can be packed: an `Embedder`.
        name: The model's name for clients.
        keys: API keys, any of which a client may send. Without one, the server answers as localhost alone.
        limits: What it takes.
        token_ids: Take the model's own token ids in place of texts.

    Raises:
        TypeError: The model is no `Embedder`.
    """
    if not isinstance(model, Embedder):
        raise InputTypeError(f"{name} opens through sentence-transformers: serve packs texts, which needs a decoder")
    server = Server(model, name, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with server.running():
            yield

    # pages of documentation would load scripts from elsewhere
    app = FastAPI(title="Embedwright", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    app.add_middleware(
        Guard, keys=keys, max_body=server.limits.max_body, traffic=server.traffic, metrics=server.metrics
    )
    add_handlers(app)
    _add_health(app, server)
    _add_embeddings(app, server, embedding_request(model.embedding_dim, server.limits.max_inputs, token_ids))
    return app


def _add_health(app: FastAPI, server: Server) -> None:
    @app.get("/health", response_model=Status)
    async def health() -> Status:
        """The process is up."""
        return Status(status="ok")

    @app.get("/ready", response_model=Status, responses={503: {"model": ErrorAnswer}})
    async def ready() -> Status:
        """The model takes requests."""
        if server.traffic.draining or not server.batcher.alive:
            raise ApiError(503, "the server stops", code="stopping")
        return Status(status="ready")

    @app.get("/metrics", response_class=Response, responses=ERRORS | {200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_embeddings(app: FastAPI, server: Server, request_model: type[EmbeddingRequest]) -> None:
    @app.get("/v1/models", response_model=Models, responses=ERRORS)
    async def models() -> Models:
        """The model of this server."""
        packed = server.packed
        only = Model(
            id=server.name,
            created=server.created,
            dimension=packed.model.embedding_dim,
            max_tokens=packed.max_tokens,
        )
        return Models(data=[only])

    async def embeddings(asked: EmbeddingRequest) -> Response:
        """Encode texts, as OpenAI's clients ask for it."""
        server.check_name(asked.model)
        texts = [
            server.packed.text_of(item, f"input[{i}]") if isinstance(item, list) else item
            for i, item in enumerate(asked.input)
        ]
        vectors_NE, tokens = await server.encode(texts, server.task(asked))
        if asked.dimensions is not None:
            vectors_NE = encode.shortened(vectors_NE, asked.dimensions)
        return Response(
            _embeddings(vectors_NE, asked.encoding_format == "base64", server.name, tokens),
            media_type="application/json",
        )

    embeddings.__annotations__["asked"] = request_model  # its bounds are known only now
    app.post("/v1/embeddings", response_model=None, responses=ERRORS | {200: {"model": EmbeddingAnswer}})(embeddings)


def _embeddings(vectors_NE: NDArray[np.float32], as_base64: bool, name: str, tokens: int) -> bytes:
    """Writes the answer. Base64 holds little-endian float32; decimal numbers read as float32 give the same bits."""
    if as_base64:
        shown = [base64.b64encode(vector.tobytes()).decode() for vector in vectors_NE.astype("<f4", copy=False)]
    else:
        shown = vectors_NE.tolist()
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(shown)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return to_json({"object": "list", "data": data, "model": name, "usage": usage})
