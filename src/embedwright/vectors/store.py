"""The vectors of many texts, in blocks: in memory, or as files of a folder that a run which was stopped goes on with.

A folder of vectors holds one folder for each set of texts and each model that met there, `<SHA-256 of the texts,
shortened>-<digest of the model>`, with `manifest.json` (the model's fingerprint, too), `probes.npy` (the vectors of a
few of the texts) and `block-00000.npy` ...: float32, whole or not there.

`C` texts, `N` texts of a tile, `E` embedding.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedwright.encoders.protocol import Encoder, encode_finite
from embedwright.errors import InputError
from embedwright.files import whole_file, whole_folder, write_json
from embedwright.fingerprint import Facts, differences, fingerprint_of

logger = logging.getLogger(__name__)

_BLOCK, _LARGEST_BLOCK, _BLOCKS = 512, 65_536, 256  # texts of a block, at least and at most; blocks, where that allows
_TILE = 4096  # rows read at once where some of them are wanted
_PROBES = 2  # of the longest texts, which tell how they are cut, and of the first
_SAME = 5e-3  # relative distance of two vectors of one text by one model: bfloat16 in other batches stays below 2e-3


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
    A model is known by its fingerprint, or without one by the vectors of a few texts that it encodes anew.
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
                with whole_file(path) as temp:
                    np.save(temp, encode_finite(encoder, chunk))
        advance(wanted)
    return Vectors(blocks, rows, width)


def _home(folder: Path, encoder: Encoder, texts: Iterable[str], rows: Sequence[int]) -> tuple[Path, int, list[str]]:
    """The folder below `folder` of these texts by this model, made where there is none; the vectors' width; and a
    digest of the texts up to the end of each block of so many `rows`."""
    given, digest = iter(texts), hashlib.sha256()
    digests: list[str] = []
    probes: list[str] = []
    for wanted in rows:
        chunk = list(islice(given, wanted))
        _add(digest, chunk)
        digests.append(digest.hexdigest())
        probes = probe_texts([*probes, *chunk])
    model, about = fingerprint_of(encoder), digests[-1]
    probed = cache(lambda: encode_finite(encoder, probes))
    others = []
    for home in sorted(folder.glob(f"{about[:16]}-*")):
        manifest = json.loads((home / "manifest.json").read_text())
        then_NE = np.load(home / "probes.npy")
        drift = partial(lambda then_NE: moved(then_NE, probed()), then_NE)
        if (other := differs(model, manifest.get("model"), drift, home)) is None:
            logger.info("%s: vectors of these texts by this model", home)
            return home, manifest["dimension"], digests
        others.append(other)
    if others:
        logger.warning("%s: vectors of these texts are by another model (%s): encoded again", folder, "; ".join(others))
    probes_NE = probed()
    known = probes_NE.tobytes() if model is None else json.dumps(model, sort_keys=True).encode()
    home = folder / f"{about[:16]}-{hashlib.sha256(known).hexdigest()[:8]}"
    manifest = {"texts": sum(rows), "sha256": about, "dimension": probes_NE.shape[1], "model": model}
    try:
        with whole_folder(home) as new:
            np.save(new / "probes.npy", probes_NE)
            write_json(new / "manifest.json", manifest)
    except OSError:
        if not home.exists():  # or another run has made it in the meantime
            raise
    return home, probes_NE.shape[1], digests


def probe_texts(texts: Sequence[str]) -> list[str]:
    """The texts that tell two models apart: the first ones, and the longest of the rest, which show where it cuts."""
    rest = sorted(texts[_PROBES:], key=len)
    return [*texts[:_PROBES], *rest[-_PROBES:]]


def _add(digest: Any, texts: Iterable[str]) -> None:
    for text in texts:
        raw = text.encode(errors="surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)


def moved(then_NE: NDArray[np.float32], now_NE: NDArray[np.float32]) -> float:
    """The largest distance between two vectors of one text, relative to their length; infinite for other shapes."""
    if then_NE.shape != now_NE.shape:
        return math.inf
    length_N = np.maximum(np.linalg.norm(then_NE, axis=1), np.finfo(np.float32).tiny)
    return float(np.max(np.linalg.norm(now_NE - then_NE, axis=1) / length_N, initial=0.0))


def differs(model: Facts | None, stored: Facts | None, drift: Callable[[], float], where: Path) -> str | None:
    """None where the vectors at `where`, stored by a model of the facts `stored`, are those of `model`; else why not.

    `drift()` encodes a few of the texts anew and gives what `moved` says. It decides where the model has no
    fingerprint. Where the facts hold no weights, as those of a server, it only warns: another model may have its name.
    """
    if model is None and stored is None:
        distance = drift()
        return None if distance <= _SAME else f"its vectors of the same texts are {distance:.2g} away (relative)"
    if model != stored:
        return differences(stored or {}, model or {})
    if "weights" not in (model or {}) and (distance := drift()) > _SAME:
        logger.warning(
            "%s: a few texts, encoded again, have moved by %.2g: if another model has this name now, take a new folder",
            where,
            distance,
        )
    return None


def _complete(path: Path, shape: tuple[int, int]) -> bool:
    try:
        return bool(np.load(path, mmap_mode="r").shape == shape)
    except (FileNotFoundError, ValueError):  # a file cut short is smaller than its header says
        return False
