"""A corpus as vectors on disk: Parquet shards, written one by one, so that a run that stops goes on where it was.

The folder holds `manifest.json` (what is encoded, and how) and `shard-00000.parquet` ... with the columns id, text and
vector (fixed-size list of float32). `C` documents, `N` documents of one shard, `E` embedding.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedwright.data.files.beir import corpus_rows
from embedwright.data.files.folders import stem_of
from embedwright.data.files.rows import MAX_LINE, plain_name, text_lines
from embedwright.data.schema import DataError, id_of, text_of
from embedwright.encoders.protocol import as_encoder, encode_finite
from embedwright.errors import InputError
from embedwright.files import whole_file, write_json
from embedwright.fingerprint import Facts, fingerprint_of
from embedwright.vectors.store import differs, moved, probe_texts

logger = logging.getLogger(__name__)

_OWNER = b"embedwright.manifest"  # in each shard's metadata: the digest of the manifest that it was written under


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder of shards holds: `count` documents, encoded under `task` into `dimension` numbers each.

    `model` is the fingerprint of the one that encoded them; None where it has none.
    """

    source_sha256: str  # of the ids and texts, so that a file may be renamed or compressed in between
    count: int
    task: str | None
    shard_rows: int
    dimension: int
    model: Facts | None

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of `folder`. Raises FileNotFoundError, and DataError where it is not one."""
        path = folder / "manifest.json"
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}: not the manifest of an encoded corpus ({error}): encode it into a new folder"
            ) from None

    def digest(self) -> bytes:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest().encode()

    def shards(self, folder: Path) -> Iterator[tuple[Path, int]]:
        """Each shard's path and its number of documents."""
        for start in range(0, self.count, self.shard_rows):
            yield shard_path(folder, start // self.shard_rows), min(self.shard_rows, self.count - start)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.parquet"


def encode_corpus(
    model: Any,
    source: Path,
    out: Path,
    *,
    task: str | None = None,
    shard_rows: int = 10_000,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Encode the documents of `source` into the folder `out`, and return it. Called again, it does what is missing.

    `source` is a data file, a folder of such, or a BEIR folder. Its rows have `text`, optional `title` (put in front,
    with a space) and optional `_id` or `id` (else the number of the line); a `.txt` has one text per line. `model` is
    anything `as_encoder` takes; `task` is an instruction for the documents, which most models want without.
    `progress(done, total)` counts documents.

    The source is read twice: once to check every line, before hours go into encoding, and once to encode.

    Raises DataError naming file and line for a bad line or an id that occurs twice, and ValueError where `out` holds
    something else: vectors of another source, task, shard size or model, which is known by its fingerprint.
    """
    if shard_rows < 1:
        raise InputError(f"shard_rows must be at least 1, not {shard_rows}")
    count, sha256 = _survey(source)
    encoder = as_encoder(model)
    dimension = encode_finite(encoder, ["how wide is a vector?"], task).shape[1]
    manifest = Manifest(sha256, count, task, shard_rows, dimension, fingerprint_of(encoder))
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, manifest)
    check_model(out, model)

    documents, done = _documents(source), 0
    for path, rows in manifest.shards(out):
        ids, texts = zip(*islice(documents, rows), strict=True)
        if not _complete(path, rows, manifest):
            vectors_NE = encode_finite(encoder, texts, task)
            vector = pa.FixedSizeListArray.from_arrays(pa.array(vectors_NE.ravel()), dimension)
            table = pa.table({"id": pa.array(ids, pa.string()), "text": pa.array(texts, pa.string()), "vector": vector})
            with whole_file(path) as temp:
                owned = table.replace_schema_metadata({_OWNER: manifest.digest()})
                pq.write_table(owned, temp, use_dictionary=False, compression="zstd")
        done += rows
        if progress:
            progress(done, count)
    logger.info("%s: %d documents of %s", out, count, source)
    return out


def read_vectors(folder: Path) -> tuple[list[str], list[str], NDArray[np.float32]]:
    """Ids (C), texts (C) and vectors float32 (C, E) of an encoded corpus, in the order of its source.

    Raises FileNotFoundError without a manifest, ValueError where encoding has not finished.
    """
    manifest = Manifest.read(folder)
    ids: list[str] = []
    texts: list[str] = []
    vectors_CE = np.empty((manifest.count, manifest.dimension), np.float32)
    for table in read_shards(folder):
        vectors_CE[len(ids) : len(ids) + len(table)] = vectors_of(table)
        ids += table["id"].to_pylist()
        texts += table["text"].to_pylist()
    return ids, texts, vectors_CE


def read_shards(folder: Path) -> Iterator[pa.Table]:
    """The shards in order, one in memory at a time. Raises ValueError, before the first, where one is missing."""
    manifest = Manifest.read(folder)
    shards = list(manifest.shards(folder))
    if missing := [path.name for path, rows in shards if not _complete(path, rows, manifest)]:
        raise InputError(f"{folder} is unfinished, {len(missing)} of {len(shards)} shards are missing: encode it again")
    for path, _ in shards:
        yield pq.read_table(path)


def vectors_of(shard: pa.Table) -> NDArray[np.float32]:
    """The vectors (N, E) of a shard."""
    flat: NDArray[np.float32] = shard["vector"].combine_chunks().flatten().to_numpy()
    return flat.reshape(len(shard), -1)


def check_model(folder: Path, model: Any) -> None:
    """Raises ValueError, naming what differs, unless `model` is the one that encoded `folder`.

    A model that is not known by its weights encodes a few of the stored texts anew, if there are any yet: one without
    a fingerprint is judged by them, and a server whose vectors have moved is warned of.
    """
    manifest = Manifest.read(folder)
    encoder = as_encoder(model)

    def drift() -> float:
        path, rows = next(manifest.shards(folder))
        if not _complete(path, rows, manifest):
            return 0.0
        stored = pq.read_table(path)
        texts, vectors_NE = stored["text"].to_pylist(), vectors_of(stored)
        row_of = dict(zip(reversed(texts), reversed(range(rows)), strict=True))
        probes = probe_texts(texts)
        return moved(vectors_NE[[row_of[text] for text in probes]], encode_finite(encoder, probes, manifest.task))

    if other := differs(fingerprint_of(encoder), manifest.model, drift, folder):
        raise InputError(f"{folder} was encoded by another model ({other}): take that one, or a new or empty folder")


def _claim(out: Path, manifest: Manifest) -> None:
    """Make `out` the folder of `manifest`. Raises ValueError where it holds anything else."""
    path = out / "manifest.json"
    if not path.exists():
        if strays := [*out.glob("shard-*.parquet"), *out.glob("index.faiss")]:
            raise InputError(f"{out} holds {strays[0].name} but no manifest.json: take a new or empty folder")
        write_json(path, asdict(manifest))
        return
    before, now = asdict(Manifest.read(out)), asdict(manifest)
    for key, value in before.items():
        if now[key] != value and key != "model":  # `check_model` says what of it differs
            raise InputError(
                f"{out} was encoded with {key} {value!r}, this is {now[key]!r}: take a new or empty folder"
            )


def _complete(path: Path, rows: int, manifest: Manifest) -> bool:
    """Whether the shard is whole, and was written for this folder and by its model."""
    try:
        found = pq.read_metadata(path)
        return found.num_rows == rows and (found.metadata or {}).get(_OWNER) == manifest.digest()
    except (FileNotFoundError, pa.ArrowInvalid):  # Parquet's footer comes last: a cut file has none
        return False


def _survey(source: Path) -> tuple[int, str]:
    """How many documents `source` has, and the SHA-256 of their ids and texts."""
    count, digest = 0, hashlib.sha256()
    for document in _documents(source):
        digest.update(json.dumps(document).encode())
        count += 1
    if not count:
        raise DataError(f"{source}: no document")
    return count, digest.hexdigest()


def _documents(source: Path) -> Iterator[tuple[str, str]]:
    """(id, text) of each document. Raises DataError naming file and line."""
    seen: set[str] = set()
    for file, number, row in _rows(source):
        try:
            if isinstance(row, DataError):
                raise row
            id_, text = _document(row, str(number) if file == source else f"{stem_of(file)}:{number}")
            if id_ in seen:
                raise DataError(f"id {id_[:60]!r} twice")
        except DataError as error:
            raise DataError(f"{file}:{number}: {error}") from None
        seen.add(id_)
        yield id_, text


def _rows(source: Path) -> Iterator[tuple[Path, int, Mapping[str, Any] | DataError]]:
    if plain_name(source.name).endswith(".txt"):
        yield from ((source, number, row) for number, row in _texts(source))
    else:
        yield from corpus_rows(source)


def _texts(source: Path) -> Iterator[tuple[int, Mapping[str, Any] | DataError]]:
    for number, raw, whole in text_lines(source):
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            yield number, DataError(f"not UTF-8 at byte {error.start}")
            continue
        if not whole:
            yield number, DataError(f"longer than {MAX_LINE >> 20} MiB")
        elif text:
            yield number, {"text": text}


def _document(row: Mapping[str, Any], default_id: str) -> tuple[str, str]:
    key = "_id" if row.get("_id") is not None else "id"
    id_ = default_id if row.get(key) is None else id_of(row[key], key)
    if row.get("text") is None:
        raise DataError("no text")
    title, text = (text_of(row[part], part) if row.get(part) else "" for part in ("title", "text"))
    return id_, f"{title} {text}".strip() if title else text  # an empty text is a document: BEIR has some
