"""Vectors of single texts, kept on disk by model, instruction and text, so that a model encodes each text once.

A folder belongs to one model. It holds Arrow files with the columns `key` and `vector`. Each is whole or absent and is
never changed, so several processes and runs may add files to one folder at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedwright.data.schema import DataError
from embedwright.encoders.protocol import Encoder, encode_finite, task_for
from embedwright.errors import InputError
from embedwright.fingerprint import brief_of
from embedwright.vectors.shards import read_shard, vectors_of, write_shard

Asked = tuple[str | None, str]  # an instruction (None: the text is a document; empty: the model's own), and a text


class KeptVectors:
    """The vectors that a model has given texts, in this run or an earlier one. Threads may read them at a time."""

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        """The vectors lie in a folder below `folder` that is named by the fingerprint of `encoder`.

        Raises InputError for an encoder without a fingerprint.
        """
        known = brief_of(encoder)
        if known is None:
            raise InputError(f"{type(encoder).__name__} has no fingerprint() that its vectors could be kept under")
        self.encoder = encoder
        self.folder = folder / known
        self._files = set[Path]()
        self._place = dict[str, tuple[Path, int]]()  # key -> its file, and its row there
        self.refresh()

    def refresh(self) -> None:
        """Takes note of the files that this or another process has added."""
        for path in sorted(self.folder.glob("[!.]*.arrow")):
            if path not in self._files:
                self._note(path)

    def fill(self, asked: Sequence[Asked]) -> int:
        """Encodes the texts that have no vector yet, writes them as one file, and returns their number."""
        keys = {_key(one): one for one in asked}
        missing = {key: one for key, one in keys.items() if key not in self._place}
        if missing:
            path = self.folder / f"{hashlib.sha256(''.join(missing).encode()).hexdigest()[:32]}.arrow"
            write_shard(path, encode_asked(self.encoder, list(missing.values())), {"key": list(missing)}, {})
            self._note(path)
        return len(missing)

    def of(self, asked: Sequence[Asked]) -> NDArray[np.float32]:
        """Returns the vectors (N, E) of at least one text. Raises InputError, with the text, where one has none."""
        rows_of: dict[Path, list[tuple[int, int]]] = {}
        for i, one in enumerate(asked):
            if (place := self._place.get(_key(one))) is None:
                raise InputError(
                    f"{self.folder} has no vector of {one[1][:100]!r}: all processes need one EMBEDWRIGHT_CACHE"
                )
            rows_of.setdefault(place[0], []).append((i, place[1]))
        parts = [vectors_of(read_shard(path))[[row for _, row in rows]] for path, rows in rows_of.items()]
        back = np.argsort([i for rows in rows_of.values() for i, _ in rows])
        found: NDArray[np.float32] = np.concatenate(parts)[back]
        return found

    def _note(self, path: Path) -> None:
        try:
            keys = read_shard(path)["key"].to_pylist()
        except (pa.ArrowInvalid, KeyError) as error:
            raise DataError(f"{path} is damaged ({error}): remove it, and its texts are encoded again") from None
        self._files.add(path)
        for row, key in enumerate(keys):
            self._place.setdefault(key, (path, row))


def encode_asked(encoder: Encoder, asked: Sequence[Asked]) -> NDArray[np.float32]:
    """Encodes each text under its instruction (N, E). Raises ValueError, with the text, for one that is not finite."""
    by_task: dict[str | None, list[int]] = {}
    for i, (task, _) in enumerate(asked):
        by_task.setdefault(task, []).append(i)
    parts = [
        encode_finite(encoder, [asked[i][1] for i in rows], task_for(encoder, task)) for task, rows in by_task.items()
    ]
    back = np.argsort([i for rows in by_task.values() for i in rows])
    encoded: NDArray[np.float32] = np.concatenate(parts)[back]
    return encoded


def _key(asked: Asked) -> str:
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
