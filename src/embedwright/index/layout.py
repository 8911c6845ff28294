"""What an index folder holds, and `index.json`, the file that says which of it counts.

    index.json          settings, and the parts in their order, each with the numbers of its deleted documents
    documents.arrow     the documents, once each: id, title, text, and a column for each kept metadata column
    manifest.json       of the vectors: the model's fingerprint, dimension, precision and count (`vectors.store`)
    probes.arrow        a few texts with their vectors
    shard-00000.arrow   chunks: document (its row in documents.arrow), start and end (characters in its text), vector
    codes.arrow         the vectors as int8 or as signs, where the index has such (`codes`)
    index.faiss         a copy of the vectors for other programs
    part-00001-.../     the same files but index.json and index.faiss: documents that were added later

The folder itself is the part `.`. A document without chunking is one chunk. Deleted documents stay in their files until
the index is compacted. Each change writes its files first and `index.json` last, so a reader sees all of a change or
none. Vectors are unit vectors of what the model reads of a chunk: title, space, text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from embedwright.data.schema import DataError
from embedwright.errors import InputError
from embedwright.files import write_json

NAME, LOCK = "index.json", ".change.lock"
ColumnType = Literal["text", "int", "float", "bool"]


class Part(BaseModel):
    """Documents that were added together. `deleted` are rows of its documents.arrow."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    deleted: tuple[int, ...] = ()


class Layout(BaseModel):
    """The settings of an index and its parts. Without a part it is unfinished."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    model: str = ""  # its name, for messages; manifest.json has what identifies it
    chunk_tokens: int | None = None
    overlap: int = 0
    dim: int | None = None  # numbers that are kept of a vector
    codes: Literal["int8", "binary"] | None = None
    metadata: dict[str, ColumnType] = {}
    parts: tuple[Part, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Layout | None:
        """Returns the layout of a folder; None if it has none. Raises DataError for one of another format."""
        path = folder / NAME
        if not path.is_file():
            return None
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, ValidationError) as error:
            raise DataError(f"{path}: not the index of this version: make it anew ({error})") from None

    def write(self, folder: Path) -> None:
        write_json(folder / NAME, self.model_dump())

    def with_parts(self, *parts: Part) -> Layout:
        return self.model_copy(update={"parts": parts})

    def check_same(self, folder: Path, **settings: Any) -> None:
        """Raises InputError, naming the first setting that differs from those of this index."""
        for key, value in settings.items():
            if (own := getattr(self, key)) != value:
                raise InputError(f"{folder} has {key} {own!r}, this is {value!r}: take a new or empty folder")
