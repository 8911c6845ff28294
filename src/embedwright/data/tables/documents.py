"""Corpora as Arrow files of ids and texts, read from disk whenever they are needed: memory does not hold them.

`open_corpus` converts a corpus of any format once, into the cache. What `encode` writes is such files as it is.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from embedwright.cache import cache_folder
from embedwright.data.files.beir import corpus_documents, corpus_files, read_corpus, with_title
from embedwright.data.files.folders import stem_of
from embedwright.files import locked, sha256_of, whole_file

_FORMAT = 1  # part of the cache key
_ROWS = 4096  # of a batch
_OPEN = 64  # files that are mapped at once
_SCHEMA = pa.schema({"id": pa.large_string(), "text": pa.large_string()})


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
    """Opens a corpus as `read_corpus` reads it, and raises as that does. Converts it once into the cache."""
    facts = [_FORMAT, [sha256_of(file) for file in corpus_files(path)]]
    identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    arrow = cache_folder() / "data" / f"{stem_of(path)[:80]}-corpus-{identity[:16]}.arrow"
    if not arrow.is_file():
        with locked(arrow.with_name(f".{arrow.name}.lock")):  # one process converts, the others wait for the file
            if not arrow.is_file():
                _convert(path, arrow)
    return DocumentTable([arrow], identity)


def _convert(path: Path, arrow: Path) -> None:
    documents, marks = corpus_documents(path), array("q")
    with whole_file(arrow) as part, pa.ipc.new_file(str(part), _SCHEMA) as writer:
        while chunk := list(islice(documents, _ROWS)):
            _, ids, texts = zip(*chunk, strict=True)
            marks.extend(map(hash, ids))
            writer.write_batch(pa.RecordBatch.from_pydict({"id": list(ids), "text": list(texts)}, _SCHEMA))
        if not marks or len(np.unique(np.array(marks))) < len(marks):
            read_corpus(path)  # which names the id that occurs twice, and its line
