"""Builds an index: documents first, then the vectors of their chunks, then the file that makes them count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from embedwright.data.files.beir import with_title
from embedwright.encoders.chunks import Chunk, chunker
from embedwright.encoders.protocol import Encoder, as_encoder
from embedwright.errors import InputError
from embedwright.index import documents as docs
from embedwright.index.documents import Document
from embedwright.index.layout import Layout, Part
from embedwright.vectors.corpus import Progress, encode_corpus, encode_rows
from embedwright.vectors.store import StoredPrecision

_DOCUMENTS = "documents.arrow"
_READ = 1024  # documents read at once


def build_index(
    model: Any,
    source: Path,
    out: Path,
    *,
    chunk_tokens: int | None = None,
    overlap: int = 0,
    metadata: Sequence[str] = (),
    precision: StoredPrecision | None = None,
    shard_rows: int = 10_000,
    progress: Progress | None = None,
) -> Path:
    """Makes `out` an index of the documents of `source`, and returns it. Called again, it does what is missing.

    Args:
        model: anything that `as_encoder` takes. It encodes the chunks as documents.
        source: a data file, a folder of such, a BEIR folder, or a folder of text and Markdown files.
        out: a new folder, or one that a run before has begun.
        chunk_tokens: cut documents into chunks of so many of the model's tokens. Default: whole documents.
        overlap: tokens that a chunk shares with the one before it.
        metadata: columns to keep beside the documents, or `["all"]`.
        precision: of the vectors on disk; `float16` halves them. Default: that of the folder, `float32` for a new one.
        shard_rows: chunks of a shard.
        progress: `progress(done, total)` counts chunks.

    Raises:
        DataError: a bad line, or an id that occurs twice; the message names file and line.
        ValueError: `out` holds something else: another source, other settings, another model.
    """
    encoder = as_encoder(model)
    settings: dict[str, Any] = {"chunk_tokens": chunk_tokens, "overlap": overlap}
    settings["metadata"] = docs.find_types(source, list(metadata)) if metadata else {}
    layout = Layout.read(out)
    how: dict[str, Any] = {"shard_rows": shard_rows, "precision": precision, "progress": progress}
    if layout is None:
        if (out / "manifest.json").is_file():  # as `encode` writes it, which can be searched as it is
            if chunk_tokens or metadata:
                raise InputError(f"{out} holds whole documents that `encode` wrote: take a new or empty folder")
            return encode_corpus(encoder, source, out, **how)
        layout = Layout(**settings)
    layout.check_same(out, **settings)
    read = partial(docs.read_documents, source, layout.metadata)
    digest = docs.digest_of(read())
    if docs.written_digest(out / _DOCUMENTS) not in (None, digest):
        raise InputError(f"{out} is an index of other documents: take a new folder, or --append or --replace")
    if not layout.parts:
        layout.write(out)
    encode_part(encoder, out, layout, read, digest, **how)
    if not layout.parts:
        layout.with_parts(Part(folder=".")).write(out)
    return out


def encode_part(
    encoder: Encoder,
    folder: Path,
    layout: Layout,
    documents: Callable[[], Iterable[Document]],
    digest: str,
    **how: Any,
) -> None:
    """Writes documents and the vectors of their chunks into a folder, as far as they are missing there.

    `documents()` gives the documents anew, `digest` is theirs, `how` is for `encode_rows`.
    """
    if docs.written_digest(folder / _DOCUMENTS) != digest:
        docs.write_documents(folder / _DOCUMENTS, documents(), layout.metadata, digest)
    cut = chunker(encoder, layout.chunk_tokens, layout.overlap) if layout.chunk_tokens else _whole
    encode_rows(encoder, partial(_chunk_rows, folder / _DOCUMENTS, cut), folder, ("document", "start", "end"), **how)


def _whole(title: str, text: str) -> list[Chunk]:
    return [Chunk(0, len(text), with_title(title, text))]


def _chunk_rows(path: Path, cut: Callable[[str, str], list[Chunk]]) -> Iterator[tuple[int, int, int, str]]:
    """Yields row of the document, start, end and text of each chunk."""
    table = docs.open_table([path], {})
    for start in range(0, len(table), _READ):
        for row, document in enumerate(table.slice(start, _READ).to_pylist(), start):
            yield from ((row, *chunk) for chunk in cut(document["title"], document["text"]))
