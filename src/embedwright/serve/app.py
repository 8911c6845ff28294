"""The app: its paths, and the way of a request from text to vector."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, Security
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from numpy.typing import NDArray
from pydantic_core import to_json

from embedwright.errors import InputTypeError
from embedwright.index.index import Index
from embedwright.model import encode
from embedwright.model.embedder import Embedder
from embedwright.serve.errors import ERRORS, ApiError, ErrorAnswer, add_handlers
from embedwright.serve.guard import Guard
from embedwright.serve.page import AGAINST, add_map, add_page
from embedwright.serve.schema import EmbeddingAnswer, EmbeddingRequest, Model, Models, Status, embedding_request
from embedwright.serve.search import add_search
from embedwright.serve.server import Limits, Server


def create_app(
    model: Any,
    *,
    name: str,
    index: Index | None = None,
    page: bool = False,
    against: FastAPI | None = None,
    keys: Sequence[str] = (),
    limits: Limits | None = None,
    token_ids: bool = False,
) -> FastAPI:
    """Makes the app of a server.

    Args:
        model: What `open_encoder` opens, if its texts can be packed: an `Embedder`.
        name: The model's name for clients.
        index: An index of this model, or of the teacher that it is aligned with, to be searched at /search.
        page: Show the page that searches the index, at /.
        against: The app of a second model and its index, with the same keys. It lies at /against, for the page.
        keys: API keys, any of which a client may send. Without one, the server answers as localhost alone.
        limits: What it takes.
        token_ids: Take the model's own token ids in place of texts.

    Raises:
        TypeError: The model is not an `Embedder`.
        ValueError: Another model has made the index.
    """
    if not isinstance(model, Embedder):
        raise InputTypeError(f"{name} opens through sentence-transformers: serve packs texts, which needs a decoder")
    if index is not None:
        index.check(model, queries=True)
    server = Server(model, name, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for each in (server, against.state.server) if against else (server,):
                await stack.enter_async_context(each.running())
            yield

    # pages of documentation would load scripts from elsewhere
    app = FastAPI(title="Embedwright", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    app.add_middleware(
        Guard, keys=keys, max_body=server.limits.max_body, traffic=server.traffic, metrics=server.metrics
    )
    add_handlers(app)
    _add_health(app, [server, against.state.server] if against else [server])
    # the guard checks the keys: this tells OpenAPI of them
    secured = [Security(HTTPBearer(auto_error=False))] if keys else []
    paths = APIRouter(responses=ERRORS, dependencies=secured)
    _add_model(paths, server, embedding_request(model.embedding_dim, server.limits.max_inputs, token_ids))
    if index is not None:
        add_search(paths, server, index)
        add_map(paths, index)
    app.include_router(paths)
    if page:
        add_page(app, two=against is not None)
    if against is not None:
        app.mount(f"/{AGAINST}", against)
    return app


def _add_health(app: FastAPI, servers: Sequence[Server]) -> None:
    @app.get("/health", response_model=Status)
    async def health() -> Status:
        """The process is up."""
        return Status(status="ok")

    @app.get("/ready", response_model=Status, responses={503: {"model": ErrorAnswer}})
    async def ready() -> Status:
        """The models take requests, and give vectors."""
        for server in servers:
            if server.traffic.draining or not server.batcher.alive:
                raise ApiError(503, "the server stops", code="stopping")
            await server.check_model()
        return Status(status="ready")


def _add_model(paths: APIRouter, server: Server, request_model: type[EmbeddingRequest]) -> None:
    @paths.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @paths.get("/v1/models", response_model=Models)
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
    paths.post("/v1/embeddings", response_model=None, responses={200: {"model": EmbeddingAnswer}})(embeddings)


def _embeddings(vectors_NE: NDArray[np.float32], as_base64: bool, name: str, tokens: int) -> bytes:
    """Writes the answer. Base64 holds little-endian float32; decimal numbers read as float32 give the same bits."""
    if as_base64:
        shown = [base64.b64encode(vector.tobytes()).decode() for vector in vectors_NE.astype("<f4", copy=False)]
    else:
        shown = vectors_NE.tolist()
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(shown)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return to_json({"object": "list", "data": data, "model": name, "usage": usage})
