"""/search, /document and /index: an index behind the server, searched with vectors of the model that made it."""

from __future__ import annotations

import numpy as np
from fastapi import APIRouter
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic_core import to_json

from embedwright.index.index import Index
from embedwright.serve.errors import ApiError
from embedwright.serve.schema import MOST_HITS, FoundDocument, IndexFacts, SearchAnswer, SearchRequest, search_request
from embedwright.serve.server import Server
from embedwright.serve.worker import Worker

_MOST = 10 * MOST_HITS  # hits of a request
_MOST_BYTES = 50_000_000  # the most that an answer's documents may have


def add_search(paths: APIRouter, server: Server, index: Index) -> None:
    """Adds the three paths. Queries are encoded beside all other texts; one thread reads the index."""
    contract = server.packed.model.contract
    searching = Worker("embedwright-search")

    def answer(asked: SearchRequest, task: str, vectors_QE: NDArray[np.float32], tokens: int) -> bytes:
        where = [each if isinstance(each, str) else each.model_dump() for each in asked.where or ()]
        found = index.search_vectors(vectors_QE, asked.k, where, most_bytes=_MOST_BYTES)
        data = [
            {"query": query, "task": task, "hits": [hit._asdict() for hit in hits]}
            for query, hits in zip(asked.query, found, strict=True)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        said = {"object": "list", "data": data, "model": server.name, "usage": usage}
        return to_json(said, inf_nan_mode="null")

    async def search(asked: SearchRequest) -> Response:
        """Find the documents of the index that answer queries, best first."""
        if (most := len(asked.query) * asked.k) > _MOST:
            raise ApiError(400, f"{most:,} hits are too many: k times the queries may be {_MOST:,}", "k")
        task = contract.query_task(asked.task)
        vectors_QE, tokens = await server.encode(asked.query, task, "query")
        content = await searching.run(answer, asked, task, vectors_QE, tokens)
        return Response(content, media_type="application/json")

    search.__annotations__["asked"] = search_request(server.limits.max_inputs)
    paths.post("/search", response_model=None, responses={200: {"model": SearchAnswer}})(search)

    @paths.get("/document", response_model=None, responses={200: {"model": FoundDocument}})
    async def document(id: str) -> Response:
        """A document of the index, by its id."""
        found = await searching.run(index.document, id)
        if found is None:
            raise ApiError(404, "the index has no document of this id", "id", "document_not_found")
        return Response(to_json(found._asdict(), inf_nan_mode="null"), media_type="application/json")

    @paths.get("/index", response_model=IndexFacts)
    async def facts() -> IndexFacts:
        """What the index holds."""
        return IndexFacts(**index.facts() | {"model": server.name}, task=contract.default_task or None)
