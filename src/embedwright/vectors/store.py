"""Vectors of many texts in shards: in memory, or in a folder where a run that was stopped goes on.

A folder holds `manifest.json` (what is encoded, how, and by which model), `probes.arrow` (a few of the texts with their
vectors) and `shard-00000.arrow` and so on: Arrow files with a column `vector` (fixed-size list of float32 or float16)
and, for a corpus, `id` and `text`; for an index, `document`, `start` and `end` (`index.layout`). Each is whole or
absent.

`C` texts, `N` texts of a tile, `E` embedding.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedwright.data.schema import DataError
from embedwright.encoders.protocol import Encoder, TextError, encode_finite
from embedwright.errors import InputError, NotFoundError
from embedwright.files import write_json
from embedwright.fingerprint import Facts, differences, fingerprint_of
from embedwright.remote import RemoteFolder
from embedwright.vectors.shards import Vectors, read_shard, vectors_of, write_shard

logger = logging.getLogger(__name__)

StoredPrecision = Literal["float32", "float16"]
Row = tuple[Any, ...]  # the columns stored beside a text's vector; the text comes last

_FORMAT = 2  # 1: Parquet shards of a corpus, .npy blocks of mining
_OWNER = b"embedwright.manifest"  # in each shard's metadata: the digest of the manifest that it was written under
_SHARD, _LARGEST_SHARD, _SHARDS = 512, 65_536, 256  # texts of a shard, at least and at most; shards, where that allows
_PROBES = 2  # how many of the first texts, and of the longest, are probes: these show how texts are cut
_SAME = 5e-3  # relative distance of two vectors of one text by one model: bfloat16 in other batches stays below 2e-3


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder holds: `count` texts, encoded under `task` into `dimension` numbers each."""

    format: int
    source_sha256: str  # digest of the rows, so that a file may be renamed or compressed in between
    count: int
    task: str | None
    shard_rows: int
    dimension: int
    model: Facts | None  # the fingerprint of the model; None where it has none
    precision: StoredPrecision = "float32"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Returns the manifest of `folder`. Raises FileNotFoundError, and DataError if it is not one of this format."""
        path = folder / "manifest.json"
        if not path.is_file():
            raise NotFoundError(f"{folder} holds no vectors: there is no {path.name} in it")
        try:
            manifest = cls(**json.loads(path.read_text(encoding="utf-8")))
            if manifest.format != _FORMAT:
                raise ValueError(f"format {manifest.format}")
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}: not the manifest of vectors of this version ({error}): take a new folder"
            ) from None
        return manifest

    def digest(self) -> bytes:
        said = asdict(self)
        if self.precision == "float32":
            del said["precision"]  # as in the manifests of older versions
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest().encode()

    def shards(self, folder: Path) -> Iterator[tuple[Path, int]]:
        """Yields the path of each shard and how many texts it has."""
        for start in range(0, self.count, self.shard_rows):
            yield shard_path(folder, start // self.shard_rows), min(self.shard_rows, self.count - start)


class Survey(NamedTuple):
    """What one pass over rows finds."""

    texts: int
    shard_rows: int
    digests: list[str]  # one for each shard: of all rows up to its end
    probes: list[str]  # the texts that tell two models apart


def survey(rows: Iterable[Row], shard_rows: int | None = None) -> Survey:
    """Counts and digests rows, and picks the probes: the first texts, and the longest, which show where it cuts.

    Without `shard_rows`, shards are of `shard_size`.
    """
    given, digest = iter(rows), hashlib.sha256()
    size, count, digests, probes = shard_rows or _SHARD, 0, list[str](), list[str]()
    while chunk := list(islice(given, size)):
        count += len(chunk)
        digests.append(_digested(digest, chunk))
        texts = [*probes, *(row[-1] for row in chunk)]
        probes = [texts[place] for place in probes_of([*map(len, texts)])]
        if shard_rows is None and shard_size(count) > size:  # this happens at a full shard, of an even number
            size, digests = 2 * size, digests[1::2]
    return Survey(count, size, digests, probes)


def probes_of(lengths: Sequence[int] | NDArray[np.int64]) -> list[int]:
    """Returns the places of the probes among texts of these lengths."""
    by_length = np.argsort(lengths[_PROBES:], kind="stable") + _PROBES
    return [*range(len(lengths))[:_PROBES], *by_length[-_PROBES:].tolist()]


def shard_size(rows: int) -> int:
    """Returns how many rows a shard has by default: 512, doubled while that makes 512 shards, at most 65,536.

    So a run that goes on has lost little, and progress is seen early.
    """
    size = _SHARD
    while size < _LARGEST_SHARD and rows >= 2 * _SHARDS * size:
        size *= 2
    return size


def encode_texts(
    encoder: Encoder,
    texts: Callable[[], Iterable[str]],
    total: int,
    *,
    folder: Path | None = None,
    precision: StoredPrecision = "float32",
    advance: Callable[[int], None] = lambda encoded: None,
) -> Vectors:
    """Encodes `total` texts as documents; `texts()` gives the texts anew each time it is called, in one order.

    Without a `folder` the vectors are held in memory. Else they are written to a folder below it, one for each set of
    texts and each model, and memory holds one shard (1/256 of the texts, at least 512, at most 65,536). What is there
    already, of the same texts by the same model, is not encoded again. float16 halves what is held or written; a score
    is off by at most 0.1 % of the two lengths' product then. `advance(n)` is told of n more texts.

    Raises ValueError if the model gives a vector that is not finite, or `texts()` gives other texts than before.
    """
    size = min(_LARGEST_SHARD, max(_SHARD, total // _SHARDS))
    if folder is not None and total:
        seen = survey(((text,) for text in texts()), size)
        if seen.texts != total:
            raise InputError(f"of {total} texts, the corpus gave {seen.texts} when it was read again")
        home = _home(folder, encoder, seen, precision)
        fill(home, Manifest.read(home), encoder, ((text,) for text in texts()), seen, advance=advance)
        return open_vectors(home)
    rows = [min(size, total - start) for start in range(0, total, size)]
    given, blocks = iter(texts()), list[NDArray[Any]]()
    for wanted in rows:
        chunk = list(islice(given, wanted))
        if len(chunk) != wanted:
            raise InputError(f"of {total} texts, the corpus gave fewer when it was read again")
        blocks.append(_stored(encode_finite(encoder, chunk), precision))
        advance(wanted)
    return Vectors(blocks, rows, blocks[0].shape[1] if blocks else 0)


def _home(folder: Path, encoder: Encoder, seen: Survey, precision: StoredPrecision) -> Path:
    """Returns the folder below `folder` of these texts by this model, made where there is none."""
    probe = cache(lambda texts: encode_finite(encoder, texts))
    others = []
    for home in sorted(path.parent for path in folder.glob(f"{seen.digests[-1][:16]}-*/manifest.json")):
        if Manifest.read(home).precision != precision:
            continue
        if (other := other_model(home, encoder, probe)) is None:
            logger.info("%s: vectors of these texts by this model", home)
            return home
        others.append(other)
    if others:
        logger.warning("%s: vectors of these texts are by another model (%s): encoded again", folder, "; ".join(others))
    known = json.dumps(fingerprint_of(encoder), sort_keys=True).encode() + probe(tuple(seen.probes)).tobytes()
    known += b"" if precision == "float32" else precision.encode()
    home = folder / f"{seen.digests[-1][:16]}-{hashlib.sha256(known).hexdigest()[:8]}"
    claim(home, encoder, seen, precision=precision, probe=probe)
    return home


def claim(
    folder: Path,
    encoder: Encoder,
    seen: Survey,
    task: str | None = None,
    precision: StoredPrecision = "float32",
    probe: Callable[[tuple[str, ...]], NDArray[np.float32]] | None = None,
) -> None:
    """Makes `folder` the place of these rows by this model: writes the probes, then the manifest."""
    probes = tuple(seen.probes)
    probes_NE = probe(probes) if probe else encode_finite(encoder, probes, task)
    model, width = fingerprint_of(encoder), probes_NE.shape[1]
    manifest = Manifest(_FORMAT, seen.digests[-1], seen.texts, task, seen.shard_rows, width, model, precision)
    write_shard(folder / "probes.arrow", probes_NE, {"text": probes}, {_OWNER: manifest.digest()})
    write_json(folder / "manifest.json", asdict(manifest))


def fill(
    folder: Path,
    manifest: Manifest,
    encoder: Encoder,
    rows: Iterable[Row],
    seen: Survey,
    *,
    columns: Sequence[str] = (),
    advance: Callable[[int], None],
    own: range | None = None,
    remote: RemoteFolder | None = None,
    name: Callable[[Row], str] = lambda row: "",
) -> None:
    """Encodes the shards that a claimed folder lacks: all, or only those in `own`.

    `columns` are the names of stored columns. With `remote`, each shard is sent there and removed here. Raises
    ValueError if the rows are not those of the survey, or the model cannot encode one: `name` gives its name.
    """
    given, digest = iter(rows), hashlib.sha256()
    own = range(len(seen.digests)) if own is None else own
    for shard, ((path, wanted), expected) in enumerate(zip(manifest.shards(folder), seen.digests, strict=True)):
        if shard == own.stop:
            break
        chunk = list(islice(given, wanted))
        if _digested(digest, chunk) != expected:
            raise InputError(f"of {seen.texts} texts, the corpus gave others when it was read again")
        if shard in own and not (_sent(remote, path.name, manifest) if remote else _complete(path, wanted, manifest)):
            try:
                vectors_NE = encode_finite(encoder, [row[-1] for row in chunk], manifest.task)
            except TextError as error:
                at = next(row for row in chunk if row[-1] == error.text)
                raise TextError(f"{name(at)}{error}", error.text) from None
            stored = zip(columns, zip(*chunk, strict=True), strict=False)
            write_shard(path, _stored(vectors_NE, manifest.precision), dict(stored), {_OWNER: manifest.digest()})
            if remote:
                remote.send(path.name)
                path.unlink()
        if shard in own:
            advance(wanted)


def open_vectors(folder: Path) -> Vectors:
    """Returns the vectors of a folder.

    Raises FileNotFoundError without a manifest, ValueError if a shard is missing.
    """
    manifest = Manifest.read(folder)
    shards = list(manifest.shards(folder))
    if missing := [path for path, rows in shards if not _complete(path, rows, manifest)]:
        raise InputError(f"{folder} is unfinished, {len(missing)} of {len(shards)} shards are missing: encode it again")
    return Vectors([path for path, _ in shards], [rows for _, rows in shards], manifest.dimension)


def copy_vectors(
    out: Path, manifest: Manifest, vectors: Vectors, columns: dict[str, Any], probes: dict[int, str]
) -> None:
    """Writes stored vectors, and `columns` beside them, as a folder. `probes` are the texts of some rows, in order."""
    owner = {_OWNER: manifest.digest()}
    write_shard(out / "probes.arrow", vectors.take(np.array([*probes])), {"text": [*probes.values()]}, owner)
    for shard, (path, rows) in enumerate(manifest.shards(out)):
        own = np.arange(rows) + shard * manifest.shard_rows
        beside = {name: values[own].tolist() for name, values in columns.items()}
        write_shard(path, _stored(vectors.take(own), manifest.precision), beside, owner)
    write_json(out / "manifest.json", asdict(manifest))


def check_model(folder: Path, encoder: Encoder) -> None:
    """Raises ValueError, naming what differs, unless `encoder` is the model that encoded `folder`."""
    task = Manifest.read(folder).task
    if other := other_model(folder, encoder, lambda texts: encode_finite(encoder, texts, task)):
        raise InputError(f"{folder} was encoded by another model ({other}): take that one, or a new or empty folder")


def other_model(folder: Path, encoder: Encoder, probe: Callable[[tuple[str, ...]], NDArray[np.float32]]) -> str | None:
    """Returns what differs if the vectors of `folder` are not those of `encoder`, else None.

    Fingerprints decide. Where the model has none, the vectors of the probes do, which `probe` encodes anew. Where it
    has one without weights, as a server has, another model may have its name: probes that have moved are warned of.
    """
    model, stored = fingerprint_of(encoder), Manifest.read(folder).model
    if model != stored:
        return differences(stored or {}, model or {})
    if "weights" in (model or {}):
        return None
    probes = read_shard(folder / "probes.arrow")
    distance = _moved(vectors_of(probes), probe(tuple(probes["text"].to_pylist())))
    if distance <= _SAME:
        return None
    if model is None:
        return f"its vectors of the same texts are {distance:.2g} away (relative)"
    logger.warning(
        "%s: a few texts, encoded again, have moved by %.2g: if another model has this name now, take a new folder",
        folder,
        distance,
    )
    return None


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.arrow"


def _stored(vectors_NE: NDArray[np.float32], precision: StoredPrecision) -> NDArray[Any]:
    """Rounds vectors to `precision`. Raises InputError where they are too large for it."""
    with np.errstate(over="ignore"):
        rounded_NE = vectors_NE.astype(precision, copy=False)
    if not np.isfinite(rounded_NE).all():
        raise InputError(f"vectors up to {np.abs(vectors_NE).max():.3g} are too large for {precision}: take float32")
    return rounded_NE


def _complete(path: Path, rows: int, manifest: Manifest) -> bool:
    """Returns whether the shard is whole, and was written for this folder and by its model."""
    try:
        found = read_shard(path)
    except (OSError, pa.ArrowInvalid):  # Arrow's footer comes last: a cut file has none
        return False
    return found.num_rows == rows and (found.schema.metadata or {}).get(_OWNER) == manifest.digest()


def _sent(remote: RemoteFolder, name: str, manifest: Manifest) -> bool:
    """Returns whether a store has a shard of this folder, by its end alone, which comes last: its rows stay there."""
    try:
        with remote.open(name) as stream:
            metadata = pa.ipc.open_file(stream).schema.metadata
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return (metadata or {}).get(_OWNER) == manifest.digest()


def _digested(digest: Any, rows: Iterable[Row]) -> str:
    """Returns the digest of all rows so far, after these."""
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return str(digest.hexdigest())


def _moved(then_NE: NDArray[np.float32], now_NE: NDArray[np.float32]) -> float:
    """Returns the largest distance of a text's two vectors, relative to their norm; infinite for other shapes."""
    if then_NE.shape != now_NE.shape:
        return math.inf
    length_N = np.maximum(np.linalg.norm(then_NE, axis=1), np.finfo(np.float32).tiny)
    return float(np.max(np.linalg.norm(now_NE - then_NE, axis=1) / length_N, initial=0.0))
