"""The page of a served index: its files, and what it asks for beside `/search` and `/index`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from pydantic_core import to_json

from embedwright.errors import InputError
from embedwright.index.index import Index
from embedwright.serve.map import map_of
from embedwright.serve.schema import DocumentsMap
from embedwright.serve.worker import Worker

_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    # nothing from elsewhere, no script or style in the page itself, and no other site may frame it
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the query
    "Cache-Control": "no-cache",
}
AGAINST = "against"  # where the app of a second model lies
# The page asks for the key itself, so its files want none. They hold nothing of the index.
PAGE_PATHS = ("/", *(f"/page/{file.name}" for file in sorted(_FOLDER.iterdir())))


def add_page(app: FastAPI, two: bool) -> None:
    """Serves the page at `/`. `two`: it may ask a second model, whose app lies at `/against`."""

    def add(path: str, content: bytes, kind: str) -> None:
        async def file() -> Response:
            return Response(content, media_type=kind, headers=_HEADERS)

        app.get(path, include_in_schema=False)(file)

    for file in _FOLDER.iterdir():
        add(f"/page/{file.name}", file.read_bytes(), _TYPES[file.suffix])
    add("/", (_FOLDER / "index.html").read_bytes(), _TYPES[".html"])
    add("/page/sides.json", to_json({"bases": ["", f"{AGAINST}/"] if two else [""]}), "application/json")


def add_map(paths: APIRouter, index: Index) -> None:
    """Serves the map of an index at `/map`. It is made when it is first asked for, once, and kept.

    So is the InputError of an index that has none. After any other failure the next request tries again.
    """
    making: list[asyncio.Future[bytes]] = []
    working = Worker("embedwright-map")

    def make() -> bytes:
        return to_json(map_of(index), inf_nan_mode="null")

    def keep(made: asyncio.Future[bytes]) -> None:
        if made.cancelled() or not isinstance(made.exception(), InputError | None):
            making.clear()

    @paths.get("/map", response_model=None, responses={200: {"model": DocumentsMap}})
    async def documents_map() -> Response:
        """Lay out a sample of the documents in a plane. The first request waits for it."""
        if not making:
            making.append(asyncio.ensure_future(working.run(make)))
            making[0].add_done_callback(keep)
        # shielded: whoever waits may leave, and the next one finds it made
        return Response(await asyncio.shield(making[0]), media_type="application/json")
