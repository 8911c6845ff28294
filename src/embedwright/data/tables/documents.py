"""Corpora as Arrow files of ids and texts, read from disk whenever they are needed: memory does not hold them.

`open_corpus` converts a corpus of any format once, into the cache. What `encode` writes is such files as it is.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path

import pyarrow as pa

from embedwright.cache import cache_folder
from embedwright.data.files.beir import corpus_documents, corpus_files, documents_of, with_title
from embedwright.data.files.folders import stem_of
from embedwright.data.files.pieces import Piece, pieces_of, unchanged
from embedwright.data.keys import refuse_repeats
from embedwright.data.schema import DataError
from embedwright.data.tables.arrow import rebatched
from embedwright.data.tables.workers import Facts, in_processes
from embedwright.files import locked, scratch_folder, sha256_of, whole_file

_FORMAT = 1  # part of the cache key
_ROWS = 4096  # rows of a batch
_OPEN = 64  # files that are mapped at once
_SCHEMA = pa.schema({"id": pa.large_string(), "text": pa.large_string()}, {"embedwright": "documents 1"})


class DocumentTable:
    """The documents of Arrow files with the columns `id` and `text`, in order: it has `len`, `[row]` and `items()`.

    Where there is a column `title`, it is put in front of the text.
    """

    def __init__(self, files: Sequence[Path], identity: str, encoded: Path | None = None) -> None:
        """`identity` is equal for equal documents; `encoded` is the folder that also has their vectors."""
        self.files, self.identity, self.encoded = files, identity, encoded
        self._open = lru_cache(_OPEN)(lambda file: pa.ipc.open_file(pa.memory_map(str(file))))
        self._batches = [(file, i) for file in files for i in range(self._open(file).num_record_batches)]
        self._ends = list(accumulate(self._open(file).get_batch(i).num_rows for file, i in self._batches))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> tuple[str, str]:
        """Returns id and text of a document."""
        number = bisect_right(self._ends, row)
        file, i = self._batches[number]
        batch = self._open(file).get_batch(i)
        place = row - self._ends[number] + batch.num_rows
        return next(_documents(batch.slice(place, 1)))

    def items(self) -> Iterator[tuple[str, str]]:
        """Yields id and text of all documents. Files are read, not mapped: pages read once would count as memory."""
        for file in self.files:
            names = self._open(file).schema.names
            columns = [names.index(name) for name in ("id", "title", "text") if name in names]
            reader = pa.ipc.open_file(pa.OSFile(str(file)), options=pa.ipc.IpcReadOptions(included_fields=columns))
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                for start in range(0, batch.num_rows, _ROWS):
                    yield from _documents(batch.slice(start, _ROWS))


def _documents(batch: pa.RecordBatch) -> Iterator[tuple[str, str]]:
    ids, texts = batch["id"].to_pylist(), batch["text"].to_pylist()
    if "title" in batch.schema.names:
        texts = list(map(with_title, batch["title"].to_pylist(), texts))
    yield from zip(ids, texts, strict=True)


def open_corpus(path: Path) -> DocumentTable:
    """Opens a corpus as `read_corpus` reads it, and raises as that does.

    What `write_documents` wrote is read in place, anything else is converted once into the cache.
    """
    files = corpus_files(path)
    facts = [_FORMAT, [sha256_of(file) for file in files]]
    identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if len(files) == 1 and _is_own(files[0]):
        if not pa.ipc.open_file(pa.memory_map(str(files[0]))).num_record_batches:
            raise DataError(f"{path}: no document")
        return DocumentTable(files, identity)
    arrow = cache_folder() / "data" / f"{stem_of(path)[:80]}-corpus-{identity[:16]}.arrow"
    if not arrow.is_file():
        with locked(arrow.with_name(f".{arrow.name}.lock")):  # one process converts, the others wait for the file
            if not arrow.is_file():
                _convert(path, arrow)
    return DocumentTable([arrow], identity)


def write_documents(path: Path, documents: Iterable[tuple[str, str]]) -> int:
    """Writes ids and texts as an Arrow file that `open_corpus` reads in place. Returns the number of documents.

    Memory: 8 bytes a document. Raises DataError, in the end, if an id occurs twice.
    """
    marks = _write(path, _batches(documents))
    refuse_repeats(marks, ((f"document {n}", id) for n, (id, _) in enumerate(DocumentTable([path], "").items(), 1)))
    return len(marks)


def _is_own(file: Path) -> bool:
    try:
        return file.suffix == ".arrow" and pa.ipc.open_file(pa.memory_map(str(file))).schema.equals(_SCHEMA, True)
    except pa.ArrowInvalid:  # a stream, or damaged
        return False


def _convert(path: Path, arrow: Path) -> None:
    pieces = pieces_of(files := corpus_files(path))

    def made(folder: Path) -> Iterator[pa.RecordBatch]:
        for _, _, batches in in_processes(convert_piece, pieces, {}, folder):
            yield from batches

    with whole_file(arrow) as part, unchanged(files), ExitStack() as stack:
        if pieces:
            batches = rebatched(made(stack.enter_context(scratch_folder(arrow))), _ROWS)
        else:
            batches = _batches((id, text) for _, id, text in corpus_documents(path))
        marks = _write(part, batches)
        if not marks:
            raise DataError(f"{path}: no document")
        refuse_repeats(marks, ((where, id) for where, id, _ in corpus_documents(path)))


def convert_piece(piece: Piece, _: Facts, out: Path) -> Facts:
    """Writes the documents of a piece."""
    rows = ((piece.file, number, row) for number, _, row in piece.rows())
    _write(out, _batches((id, text) for _, id, text in documents_of(rows)))
    return {}


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[pa.RecordBatch]:
    given = iter(documents)
    while chunk := list(islice(given, _ROWS)):
        yield pa.RecordBatch.from_arrays(
            [pa.array(column, pa.large_string()) for column in zip(*chunk, strict=True)], schema=_SCHEMA
        )


def _write(path: Path, batches: Iterable[pa.RecordBatch]) -> array[int]:
    """Writes the batches, and returns a mark of each id."""
    marks = array("q")
    with pa.ipc.new_file(str(path), _SCHEMA) as writer:
        for batch in batches:
            marks.extend(map(hash, batch["id"].to_pylist()))
            writer.write_batch(batch)
    return marks
