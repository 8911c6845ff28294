"""The vectors of many texts, in blocks: in memory, or as files of a folder that a run which was stopped goes on with.

A folder of vectors holds one folder for each set of texts and each model that met there, `<SHA-256 of the texts,
shortened>-<number>`, with `manifest.json`, `probes.npy` (the vectors of a few of the texts, which tell the model) and
`block-00000.npy` ...: float32, written aside and renamed, so that a file that is there is whole.

`C` texts, `N` texts of a tile, `E` embedding.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedwright.data.readers import aside
from embedwright.data.teacher import Encoder, encode_finite
from embedwright.errors import InputError

logger = logging.getLogger(__name__)

_BLOCK, _LARGEST_BLOCK, _BLOCKS = 512, 65_536, 256  # texts of a block, at least and at most; blocks, where that allows
_TILE = 4096  # rows read at once where some of them are wanted
_PROBES = 2  # of the longest texts, which tell how they are cut, and of the first
_SAME_MODEL = 1e-3  # relative distance of a probe's vectors: the same model stays below, a trained one does not


class Vectors:
    """Float32 (C, E). A block is an array, or a .npy file, which is mapped into memory only while it is read."""

    def __init__(self, blocks: Sequence[NDArray[Any] | Path], rows: Sequence[int], width: int) -> None:
        """`rows` of each block."""
        self.blocks, self.rows = blocks, rows
        self.shape = sum(rows), width

    def __len__(self) -> int:
        return self.shape[0]

    def __add__(self, other: Vectors) -> Vectors:
        """The rows of both, those of `other` behind."""
        return Vectors([*self.blocks, *other.blocks], [*self.rows, *other.rows], self.shape[1])

    def tiles(self, size: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All rows in order, up to `size` at a time, each time with the number of the first: small blocks joined."""
        parts: list[NDArray[np.float32]] = []
        for row, part in self._parts(size):
            if parts and (held := sum(map(len, parts))) + len(part) > size:
                yield row - held, np.concatenate(parts) if len(parts) > 1 else parts[0]
                parts = []
            parts.append(part)
        if parts:
            yield len(self) - sum(map(len, parts)), np.concatenate(parts) if len(parts) > 1 else parts[0]

    def tiles_with(self, rows_F: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """As `tiles`, but only what holds one of `rows_F`, which ascend; nothing else is read."""
        yield from self._parts(_TILE, rows_F)

    def _parts(self, size: int, rows_F: NDArray[np.int64] | None = None) -> Iterator[tuple[int, NDArray[np.float32]]]:
        start = 0
        for block, rows in zip(self.blocks, self.rows, strict=True):
            for first in range(0, rows, size):
                end = min(first + size, rows)
                if rows_F is None or np.diff(np.searchsorted(rows_F, (start + first, start + end))):
                    array = np.load(block, mmap_mode="r") if isinstance(block, Path) else block
                    yield start + first, np.ascontiguousarray(array[first:end], dtype=np.float32)
            start += rows


def as_vectors(vectors: NDArray[Any] | Vectors) -> Vectors:
    """An array (C, E), a memory map also, as one block."""
    if isinstance(vectors, Vectors):
        return vectors
    array_CE = np.asanyarray(vectors)
    if array_CE.ndim != 2:
        raise InputError(f"vectors {array_CE.shape} must be (C, E)")
    return Vectors([array_CE], [len(array_CE)], array_CE.shape[1])


def as_tensor(vectors_NE: NDArray[Any]) -> Tensor:
    """A view, never to be written to; torch warns of arrays, such as memory maps, that must not be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(vectors_NE)


def encode_texts(
    encoder: Encoder,
    texts: Callable[[], Iterable[str]],
    total: int,
    *,
    folder: Path | None = None,
    advance: Callable[[int], None] = lambda encoded: None,
) -> Vectors:
    """The vectors of `total` texts as documents; `texts()` gives the texts anew each time it is called, in one order.

    Without a `folder` they are held in memory, else written there, and memory holds one block (1/256 of the texts, at
    least 512, at most 65,536). What the folder has already, of the same texts by the same model, is not encoded again.
    A model is known by what it computes, as no name tells whether it was trained on: it encodes a few texts anew.
    `advance(n)` is told of n more texts.

    Raises ValueError where the model gives a vector that is not finite, or `texts()` gives other texts than before.
    """
    size = min(_LARGEST_BLOCK, max(_BLOCK, total // _BLOCKS))
    rows = [min(size, total - start) for start in range(0, total, size)]
    home, width, digests = (None, 0, []) if folder is None or not total else _home(folder, encoder, texts(), rows)
    given, digest = iter(texts()), hashlib.sha256()
    blocks: list[NDArray[Any] | Path] = []
    for number, wanted in enumerate(rows):
        chunk = list(islice(given, wanted))
        if len(chunk) != wanted:
            raise InputError(f"of {total} texts, the corpus gave fewer when it was read again")
        path = home and home / f"block-{number:05d}.npy"
        if path is None:
            vectors_NE = encode_finite(encoder, chunk)
            width = vectors_NE.shape[1]
            blocks.append(vectors_NE)
        else:
            blocks.append(path)
            _add(digest, chunk)
            if digest.hexdigest() != digests[number]:
                raise InputError(f"of {total} texts, the corpus gave others when it was read again")
            if not _complete(path, (wanted, width)):
                _save(path, encode_finite(encoder, chunk))
        advance(wanted)
    return Vectors(blocks, rows, width)


def _home(folder: Path, encoder: Encoder, texts: Iterable[str], rows: Sequence[int]) -> tuple[Path, int, list[str]]:
    """The folder below `folder` of these texts by this model, made where there is none; the vectors' width; and a
    digest of the texts up to the end of each block of so many `rows`."""
    given, digest = iter(texts), hashlib.sha256()
    digests: list[str] = []
    first: list[str] = []
    longest: list[str] = []
    for wanted in rows:
        chunk = list(islice(given, wanted))
        _add(digest, chunk)
        digests.append(digest.hexdigest())
        for text in chunk:
            if len(first) < _PROBES:
                first.append(text)
            elif len(longest) < _PROBES or len(text) > len(longest[0]):
                longest = sorted([*longest, text], key=len)[-_PROBES:]
    probes_NE = encode_finite(encoder, [*first, *longest])
    manifest = {"texts": sum(rows), "sha256": digests[-1], "dimension": probes_NE.shape[1]}
    for number in count():
        home = folder / f"{digests[-1][:16]}-{number}"
        if not home.exists():
            _make(home, manifest, probes_NE)
        if _same(np.load(home / "probes.npy"), probes_NE):
            logger.info("%s: vectors of these texts by this model", home)
            return home, probes_NE.shape[1], digests
    raise AssertionError("there is always a next number")


def _make(home: Path, manifest: dict[str, Any], probes_NE: NDArray[np.float32]) -> None:
    """A folder without blocks, whole or not there; or another process's, where one made it in the meantime."""
    new = aside(home)
    new.mkdir(parents=True)
    np.save(new / "probes.npy", probes_NE)
    (new / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    try:
        new.rename(home)
    except OSError:
        shutil.rmtree(new)
        if not home.exists():
            raise


def _add(digest: Any, texts: Iterable[str]) -> None:
    for text in texts:
        raw = text.encode(errors="surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)


def _same(then_NE: NDArray[np.float32], now_NE: NDArray[np.float32]) -> bool:
    if then_NE.shape != now_NE.shape:
        return False
    moved_N, length_N = np.linalg.norm(now_NE - then_NE, axis=1), np.linalg.norm(then_NE, axis=1)
    return bool((moved_N <= _SAME_MODEL * length_N).all())


def _complete(path: Path, shape: tuple[int, int]) -> bool:
    try:
        return bool(np.load(path, mmap_mode="r").shape == shape)
    except (FileNotFoundError, ValueError):  # a file cut short is smaller than its header says
        return False


def _save(path: Path, vectors_NE: NDArray[np.float32]) -> None:
    part = aside(path).with_suffix(".part")
    try:
        with part.open("wb") as file:
            np.save(file, vectors_NE)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
