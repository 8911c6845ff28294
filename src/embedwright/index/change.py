"""Changes an index: adds, replaces and deletes documents, compacts it, or encodes it with another model.

A change writes its files into a new part and then `index.json`. Killed before that, it leaves the index as it was, and
the same call goes on where it stopped. What stays is not encoded again. One process changes an index at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace as changed
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedwright.config import did_you_mean
from embedwright.data.files.beir import with_title
from embedwright.encoders.protocol import as_encoder
from embedwright.errors import InputError
from embedwright.files import locked, remove_leftovers
from embedwright.fingerprint import fingerprint_of
from embedwright.index import documents as docs
from embedwright.index.build import DOCUMENTS, encode_part, live_documents
from embedwright.index.codes import write_codes
from embedwright.index.documents import Document
from embedwright.index.index import Index, name_of
from embedwright.index.layout import LOCK, Layout, Part
from embedwright.vectors.corpus import Progress
from embedwright.vectors.store import copy_vectors, probes_of, shard_size

logger = logging.getLogger(__name__)

_PART = re.compile(r"part-\d{5,}-[0-9a-f]{12}")  # the names that `_home` gives
_FILES = re.compile(r"documents\.arrow|manifest\.json|probes\.arrow|codes\.arrow|shard-\d{5,}\.arrow")
_READ = 1024  # documents read at once
_NEAR = 10_000  # ids among which the nearest one is looked for


class Change(NamedTuple):
    """How many documents came, and how many of the index they replaced."""

    added: int
    replaced: int


def add(model: Any, source: Path, out: Path, *, replace: bool = False, progress: Progress | None = None) -> Change:
    """Adds the documents of a source to an index. Documents that it already has, word for word, are left out.

    `replace` lets a document take the place of one with its id. `model` is the one that made the index, whose settings
    count. Raises ValueError for another model, and without `replace` for an id whose document is another one. With
    `replace` it raises, too, where that id is a line's number: another file has the same numbers for other documents.
    """
    with _changing(out) as index:
        encoder = index.check(model)
        row_of = {id: row for row, id in enumerate(index.documents["id"].to_pylist()) if index.live_N[row]}
        new = partial(_new, index, row_of, source, replace)
        replaced = [row for _, row in new()]
        if not replaced:
            _sweep(index.folder, index.layout.parts)
            return Change(0, 0)

        def documents() -> Iterator[Document]:
            yield from (document for document, _ in new())

        digest = docs.digest_of(documents())
        home, how = _home(index, digest), {"precision": index.manifest.precision, "progress": progress}
        encode_part(encoder, home, index.layout, documents, digest, **how)
        gone = [row for row in replaced if row is not None]
        _commit(index, *_without(index, gone), Part(folder=home.name))
        return Change(len(replaced) - len(gone), len(gone))


def delete(out: Path, ids: Sequence[str]) -> int:
    """Deletes documents by id, and returns how many there were. Those deleted before count for nothing.

    Their rows stay on disk until the index is compacted. Raises ValueError for an id that the index never had.
    """
    with _changing(out) as index:
        row_of: dict[str, list[int]] = {id: [] for id in ids}
        known = index.documents["id"].to_pylist()
        for row, id in enumerate(known):
            if id in row_of:
                row_of[id].append(row)
        if missing := [id for id, rows in row_of.items() if not rows]:
            raise InputError(f"{out}: no document {missing[0]!r}{did_you_mean(missing[0], known[:_NEAR])}")
        gone = [row for rows in row_of.values() for row in rows if index.live_N[row]]
        if gone:
            _commit(index, *_without(index, gone))
        return len(gone)


def compact(out: Path) -> None:
    """Writes an index anew without its deleted documents, as one part. Nothing is encoded."""
    with _changing(out) as index:
        if len(index.layout.parts) == 1 and index.live_N.all():
            _sweep(index.folder, index.layout.parts)
            return
        if not index.live_N.any():
            raise InputError(f"{out}: all documents are deleted: delete the folder, and make a new index")
        digest = docs.digest_of(live_documents(index))
        home = _home(index, digest)
        docs.write_documents(home / DOCUMENTS, live_documents(index), index.types, digest)
        row_F = index.live_rows()
        columns = {name: index.chunks[name].to_numpy()[row_F] for name in index.chunks.column_names}
        columns["document"] = (np.cumsum(index.live_N) - 1)[columns["document"]]
        count, shard_rows = len(row_F), shard_size(len(row_F))
        manifest = changed(index.manifest, source_sha256=digest, count=count, shard_rows=shard_rows)
        copy_vectors(home, manifest, index.vectors.of_rows(row_F), columns, _probes(index, row_F))
        if index.layout.codes:
            write_codes(home, index.layout.codes)
        _commit(index, Part(folder=home.name))


def reencode(model: Any, out: Path, progress: Progress | None = None) -> None:
    """Encodes all documents of an index with another model, from the texts that it holds, and cuts them anew.

    Until the last vector is written, the index stays that of the old model.
    """
    with _changing(out) as index:
        encoder = as_encoder(model)
        if index.difference(encoder) is None:
            _sweep(index.folder, index.layout.parts)
            return
        digest = docs.digest_of(live_documents(index))
        facts = json.dumps([digest, fingerprint_of(encoder)], sort_keys=True)
        home = _home(index, hashlib.sha256(facts.encode()).hexdigest())
        how = {"precision": index.manifest.precision, "progress": progress}
        encode_part(encoder, home, index.layout, partial(live_documents, index), digest, **how)
        index.layout = index.layout.model_copy(update={"model": name_of(encoder)})
        _commit(index, Part(folder=home.name))


@contextmanager
def _changing(out: Path) -> Iterator[Index]:
    """Yields an index that no other process changes meanwhile."""
    if Layout.read(out) is None:
        raise InputError(f"{out} is not an index that can be changed: make one with `embedwright index`")
    with locked(out / LOCK):
        yield Index.open(out)


def _new(index: Index, row_of: dict[str, int], source: Path, replace: bool) -> Iterator[tuple[Document, int | None]]:
    """Yields the documents that the index lacks, each with the row of the one that it replaces."""
    given = docs.placed_documents(source, index.types)
    while chunk := list(islice(given, _READ)):
        rows = [row_of[document.id] for document, _ in chunk if document.id in row_of]
        before = dict(zip(rows, docs.take(index.documents, rows), strict=True))
        for document, numbered in chunk:
            row = row_of.get(document.id)
            if row is not None and before[row] == document:
                continue
            if row is not None and numbered:
                raise InputError(
                    f"{numbered}: this row has no id but its number, {document.id!r}, and {index.folder} has another "
                    "document by that: give the rows an `_id` of their own (for lines of a .txt, write them as JSONL)"
                )
            if row is not None and not replace:
                raise InputError(f"{index.folder} has another document {document.id[:60]!r}: take --replace")
            yield document, row


def _home(index: Index, digest: str) -> Path:
    """Returns the folder of the next part. The same change gets the same one, so that it goes on there."""
    number = max(int(part.folder.split("-")[1]) if part.folder != "." else 0 for part in index.layout.parts) + 1
    return index.folder / f"part-{number:05d}-{digest[:12]}"


def _probes(index: Index, row_F: NDArray[np.int64]) -> dict[int, str]:
    """Returns what the model read of the probes among these chunks, by place. Probes of before may be deleted texts."""
    document_F, start_F, end_F = (index.chunks[name].to_numpy()[row_F] for name in ("document", "start", "end"))
    title_N = pc.utf8_length(index.documents["title"]).to_numpy()
    places = sorted(probes_of(title_N[document_F] + end_F - start_F))
    chunks = index.chunks_at(row_F[places])
    return {at: with_title(hit.title, hit.text[hit.start : hit.end]) for at, hit in zip(places, chunks, strict=True)}


def _without(index: Index, rows: Sequence[int]) -> list[Part]:
    """Returns the parts with these documents deleted, too."""
    start, parts = 0, []
    for part, size in zip(index.layout.parts, index.sizes, strict=True):
        own = {row - start for row in rows if start <= row < start + size}
        parts.append(Part(folder=part.folder, deleted=tuple(sorted(own.union(part.deleted)))))
        start += size
    return parts


def _commit(index: Index, *parts: Part) -> None:
    """Makes a change count, then removes the files that no longer do."""
    (index.folder / "index.faiss").unlink(missing_ok=True)  # it holds the vectors of before
    index.layout.with_parts(*parts).write(index.folder)
    _sweep(index.folder, parts)


def _sweep(folder: Path, parts: Sequence[Part]) -> None:
    """Removes what belongs to no part. An unfinished change of another kind is lost with it.

    The folder may hold other files of its user, so only names that an index writes are removed. The change counts
    already: what cannot be removed is warned of.
    """
    kept = {part.folder for part in parts}
    unused = [path for path in folder.glob("part-*") if _PART.fullmatch(path.name) and path.name not in kept]
    try:
        for part in filter(Path.is_dir, unused):
            remove_leftovers(part)
            _empty(part)
            if not any(part.iterdir()):
                part.rmdir()
        if "." not in kept and docs.written_digest(folder / DOCUMENTS):
            _empty(folder)
    except OSError as error:
        logger.warning("%s: files that the index does not need any more cannot be removed: %s", folder, error)


def _empty(part: Path) -> None:
    """Removes the files of a part, the documents last: where this was stopped, they tell the next change of it."""
    own = [path for path in part.iterdir() if _FILES.fullmatch(path.name)]
    for path in sorted(own, key=lambda path: path.name == DOCUMENTS):
        path.unlink()
