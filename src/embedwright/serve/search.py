"""/search and /index: an index behind the server, searched with vectors of the model that made it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic_core import to_json

from embedwright import threads
from embedwright.index.index import Index
from embedwright.serve.schema import IndexFacts, SearchAnswer, SearchRequest, search_request
from embedwright.serve.server import Server


def add_search(paths: APIRouter, server: Server, index: Index) -> None:
    """Adds the two paths. Queries are encoded beside all other texts; one thread searches."""
    contract = server.packed.model.contract
    searching = ThreadPoolExecutor(1, "embedwright-search", initializer=threads.free)

    async def search(asked: SearchRequest) -> Response:
        """Find the documents of the index that answer queries, best first."""
        task = contract.query_task(asked.task)
        vectors_QE, tokens = await server.encode(asked.query, task)
        found = await asyncio.get_running_loop().run_in_executor(
            searching, index.search_vectors, vectors_QE, asked.k, asked.where
        )
        data = [
            {"query": query, "task": task or contract.default_task, "hits": [hit._asdict() for hit in hits]}
            for query, hits in zip(asked.query, found, strict=True)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        answer = {"object": "list", "data": data, "model": server.name, "usage": usage}
        return Response(to_json(answer, inf_nan_mode="null"), media_type="application/json")

    search.__annotations__["asked"] = search_request(server.limits.max_inputs)
    paths.post("/search", response_model=None, responses={200: {"model": SearchAnswer}})(search)

    @paths.get("/index", response_model=IndexFacts)
    async def facts() -> IndexFacts:
        """What the index holds."""
        return IndexFacts(**index.facts() | {"model": server.name}, task=contract.default_task or None)
