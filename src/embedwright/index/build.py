"""Builds an index: documents first, then the vectors of their chunks, then the file that makes them count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from embedwright.data.files.beir import with_title
from embedwright.encoders.chunks import Chunk, chunker, token_counter
from embedwright.encoders.protocol import Encoder, as_encoder
from embedwright.errors import InputError
from embedwright.files import locked
from embedwright.index import documents as docs
from embedwright.index.codes import Shortened, write_codes
from embedwright.index.documents import Document
from embedwright.index.index import Index, name_of
from embedwright.index.layout import LOCK, Layout, Part
from embedwright.vectors.corpus import Progress, encode_corpus, encode_rows

DOCUMENTS = "documents.arrow"
Precision = Literal["float32", "float16", "int8", "binary"]
_READ = 1024  # documents read at once
_EQUAL = 1e-6  # scores that differ by less are equal: other programs add in another order
Find = Callable[[NDArray[np.float32], int], Iterable[NDArray[np.int64]]]


def build_index(
    model: Any,
    source: Path,
    out: Path,
    *,
    chunk_tokens: int | None = None,
    overlap: int = 0,
    metadata: Sequence[str] = (),
    precision: Precision | None = None,
    dim: int | None = None,
    shard_rows: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Makes `out` an index of the documents of `source`, and returns it. Called again, it does what is missing.

    Args:
        model: anything that `as_encoder` takes. It encodes the chunks as documents.
        source: a data file, a folder of such, a BEIR folder, or a folder of text and Markdown files.
        out: a new folder, or one that a run before has begun.
        chunk_tokens: cut documents into chunks of this many of the model's tokens. Default: whole documents.
        overlap: tokens that a chunk shares with the one before it.
        metadata: columns to keep beside the documents, or `["all"]`.
        precision: of the vectors on disk; `float16` halves them. `int8` and `binary` are codes beside float32 vectors:
            they nominate, and memory holds a quarter or a thirtieth. Default: that of the folder, or `float32`.
        dim: keep the first `dim` dimensions of a vector, for models that were trained for it. Default: all.
        shard_rows: chunks of a shard. Default: as `encode_corpus`.
        progress: `progress(done, total)` counts chunks.

    Raises:
        DataError: a bad line, or an id that occurs twice; the message names file and line.
        ValueError: `out` holds something else: another source, other settings, another model.
    """
    encoder = as_encoder(model)
    if overlap and chunk_tokens is None:
        raise InputError(f"overlap {overlap}: whole documents have none: give chunk_tokens, too")
    layout = Layout.read(out)
    codes = precision if precision in ("int8", "binary") else None
    settings: dict[str, Any] = {"chunk_tokens": chunk_tokens, "overlap": overlap, "dim": dim, "codes": codes}
    settings["metadata"] = docs.find_types(source, list(metadata)) if metadata else {}
    stored = "float32" if codes else precision
    how: dict[str, Any] = {"shard_rows": shard_rows, "precision": stored, "progress": progress}
    begun = (out / "manifest.json").is_file()
    if layout is None or not (layout.parts or begun):  # a run that encoded nothing binds nobody
        if begun:  # as `encode` writes it, which can be searched as it is
            if chunk_tokens or metadata or codes or dim:
                raise InputError(f"{out} holds whole documents that `encode` wrote: take a new or empty folder")
            return encode_corpus(encoder, source, out, **how)
        if layout is None and (out / DOCUMENTS).exists():  # it may be the source itself
            raise InputError(f"{out} holds a {DOCUMENTS} that is of no index: take a new or empty folder")
        layout = Layout(**settings, model=name_of(encoder))
    if precision is None:
        settings["codes"] = layout.codes
    layout.check_same(out, **settings)
    if layout.parts:
        _check_model(out, encoder)
        if layout.parts[0].folder != ".":  # compacted, or encoded anew: the files of the first source are gone
            raise InputError(f"{out} was changed since it was made: take --append or --replace, or a new folder")
    read = partial(docs.read_documents, source, layout.metadata)
    digest = docs.digest_of(read())
    if begun and docs.written_digest(out / DOCUMENTS) not in (None, digest):
        raise InputError(f"{out} is an index of other documents: take a new folder, or --append or --replace")
    _write(out, layout)
    encode_part(encoder, out, layout, read, digest, **how)
    _write(out, layout.with_parts(Part(folder=".")))
    return out


def _write(out: Path, layout: Layout) -> None:
    """Writes the layout of a new index, unless another process has finished it, and perhaps changed it, meanwhile."""
    with locked(out / LOCK):
        now = Layout.read(out)
        if now is None or not now.parts:
            layout.write(out)


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
    if docs.written_digest(folder / DOCUMENTS) != digest:
        docs.write_documents(folder / DOCUMENTS, documents(), layout.metadata, digest)
    cut = _chunks(encoder, layout)
    encoder = Shortened(encoder, layout.dim) if layout.dim else encoder
    how["name"] = lambda row: f"id {docs.open_table([folder / DOCUMENTS], {})['id'][row[0]].as_py()!r}: "
    encode_rows(encoder, partial(_chunk_rows, folder / DOCUMENTS, cut), folder, ("document", "start", "end"), **how)
    if layout.codes:
        write_codes(folder, layout.codes)


def recall(index: Index, find: Find | None = None, queries: int = 200, k: int = 10) -> float:
    """Returns how much of an exact search's best `k` another search finds, with chunks of the index as queries.

    `find(vectors, count)` gives the rows of the best chunks of each query; by default the codes of the index find them.
    The chunk that is the query does not count, and of equal scores any one does.
    """
    row_F = index.live_rows()
    if len(row_F) < 2:
        return 1.0
    own_Q = np.sort(np.random.default_rng(0).permutation(row_F)[:queries])
    query_QE = index.vectors.take(own_Q)
    best_QK, place_QK = index.top_k(query_QE, k + 1, row_F, exact=True)
    found = find(query_QE, k + 1) if find else row_F[index.top_k(query_QE, k + 1, row_F)[1]]
    right = wanted = 0
    for own, query_E, best_K, place_K, rows in zip(own_Q, query_QE, best_QK, place_QK, found, strict=True):
        others_K = best_K[row_F[place_K] != own][:k]
        others = np.sort(rows[rows != own][:k])
        least = others_K[-1] - _EQUAL * max(1.0, abs(others_K[-1]))
        right += int((index.vectors.take(others) @ query_E >= least).sum())
        wanted += len(others_K)
    return right / wanted


def cost(encoder: Encoder, index: Index) -> tuple[int, int]:
    """Returns how many chunks, and tokens of them, `encoder` would read if it encoded all documents of an index."""
    cut, count = _chunks(encoder, index.layout), token_counter(encoder)
    chunks = tokens = 0
    for document in live_documents(index):
        for chunk in cut(document.title, document.text):
            chunks, tokens = chunks + 1, tokens + count(chunk.read)
    return chunks, tokens


def live_documents(index: Index) -> Iterator[Document]:
    """Yields the documents of an index that are not deleted."""
    rows = np.flatnonzero(index.live_N).tolist()
    for start in range(0, len(rows), _READ):
        yield from docs.take(index.documents, rows[start : start + _READ])


def _check_model(out: Path, encoder: Encoder) -> None:
    index = Index.open(out)
    try:
        index.check(encoder)
    except InputError as error:
        documents = index.facts()["documents"]
        raise InputError(
            f"{error}; or --reencode, which says how many tokens its {documents:,} documents are, and encodes them anew"
        ) from None


def _chunks(encoder: Encoder, layout: Layout) -> Callable[[str, str], list[Chunk]]:
    return chunker(encoder, layout.chunk_tokens, layout.overlap) if layout.chunk_tokens else _whole


def _whole(title: str, text: str) -> list[Chunk]:
    return [Chunk(0, len(text), with_title(title, text))]


def _chunk_rows(path: Path, cut: Callable[[str, str], list[Chunk]]) -> Iterator[tuple[int, int, int, str]]:
    """Yields row of the document, start, end and text of each chunk."""
    table = docs.open_table([path], {})
    for start in range(0, len(table), _READ):
        for row, document in enumerate(table.slice(start, _READ).to_pylist(), start):
            yield from ((row, *chunk) for chunk in cut(document["title"], document["text"]))
