"""A corpus of documents, read from a file or a folder and encoded into shards of vectors (`store`)."""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from embedwright.data.files.beir import document_of, with_title
from embedwright.data.files.documents import document_rows
from embedwright.data.files.folders import stem_of
from embedwright.data.files.parts import Shard
from embedwright.data.keys import refuse_repeats
from embedwright.data.schema import DataError
from embedwright.data.tables.documents import DocumentTable, open_corpus
from embedwright.encoders.protocol import Encoder, as_encoder
from embedwright.errors import InputError
from embedwright.remote import RemoteFolder
from embedwright.vectors.shards import read_shard
from embedwright.vectors.store import (
    Manifest,
    Row,
    StoredPrecision,
    Survey,
    check_model,
    claim,
    fill,
    open_vectors,
    survey,
)

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # told how many are done, of how many


class SourceRow(NamedTuple):
    """A document as it was read, and the whole row, which may say more. `where` names file and line."""

    where: str
    id: str
    title: str
    text: str
    row: Mapping[str, Any]


def encode_corpus(
    model: Any,
    source: Path,
    out: Path,
    *,
    task: str | None = None,
    shard_rows: int | None = None,
    precision: StoredPrecision | None = None,
    progress: Progress | None = None,
    shard: Shard | None = None,
    remote: RemoteFolder | None = None,
) -> Path:
    """Encodes the documents of `source` into the folder `out`, and returns it. Called again, it does what is missing.

    The source is read twice: once to check every line, before hours go into encoding, and once to encode.

    Args:
        model: anything that `as_encoder` takes.
        source: what `read_source` reads. A title is put in front of its text, with a space.
        out: a new folder, or one that a run before has begun.
        task: an instruction for the documents, which most models want without.
        shard_rows: documents of a shard. A run that stopped goes on at the first shard that is missing. Default: that
            of the folder, `shard_size` for a new one.
        precision: of the vectors on disk; `float16` halves them. Default: that of the folder, `float32` for a new one.
        progress: `progress(done, total)` counts documents.
        shard: encode these shards of the folder alone. Other processes encode the others, at the same time or later;
            all together write the files of one run. Each reads the whole source to check it.
        remote: the folder of a store (`local_folder`) where the files go, each when it is whole. `out` keeps none of
            the shards then, and shards that the store has are not encoded again.

    Raises:
        DataError: a bad line, or an id that occurs twice; the message names file and line.
        ValueError: `out` holds something else: vectors of another source, task, shard size or model, or an index.
    """
    if (out / "index.json").is_file():  # those who open the folder would read that, and its next change remove these
        raise InputError(f"{out} is an index: take a new or empty folder, or add the documents by `index --append`")
    rows = lambda: ((row.id, with_title(row.title, row.text)) for row in read_source(source))  # noqa: E731
    how: dict[str, Any] = {"task": task, "shard_rows": shard_rows, "precision": precision}
    how |= {"progress": progress, "shard": shard, "remote": remote, "name": lambda row: f"{source}: id {row[0]!r}: "}
    encode_rows(as_encoder(model), rows, out, ("id", "text"), **how)
    return out


def encode_rows(
    encoder: Encoder,
    rows: Callable[[], Iterable[Row]],
    out: Path,
    columns: Sequence[str],
    *,
    task: str | None = None,
    shard_rows: int | None = None,
    precision: StoredPrecision | None = None,
    progress: Progress | None = None,
    shard: Shard | None = None,
    remote: RemoteFolder | None = None,
    name: Callable[[Row], str],
) -> Manifest:
    """Does the work of `encode_corpus` for rows that `rows()` gives anew each time: what is stored, then the text.

    `columns` names what is stored. It may include the text, which comes last. `name` gives a row's name for messages.
    """
    if shard_rows is not None and shard_rows < 1:
        raise InputError(f"shard_rows must be at least 1, not {shard_rows}")
    if remote:
        remote.fetch("manifest.json", "probes.arrow")
    if shard_rows is None and (out / "manifest.json").is_file():
        shard_rows = Manifest.read(out).shard_rows
    seen = survey(rows(), shard_rows)
    done, new = 0, remote is not None and not remote.fetch("manifest.json", "probes.arrow")
    manifest = _claim(out, encoder, seen, task, precision)
    if remote and new:
        remote.send("probes.arrow", "manifest.json")
    own = (shard or Shard(0, 1)).rows(len(seen.digests))
    total = min(own.stop * seen.shard_rows, seen.texts) - min(own.start * seen.shard_rows, seen.texts)

    def advance(texts: int) -> None:
        nonlocal done
        done += texts
        if progress:
            progress(done, total)

    fill(out, manifest, encoder, rows(), seen, columns=columns, advance=advance, own=own, remote=remote, name=name)
    if remote:
        remote.fetch("manifest.json")
    if Manifest.read(out) != manifest:  # two commands may have begun at one moment: those vectors count for nothing
        raise InputError(f"{out} was taken by a command with other settings meanwhile: take a new folder")
    logger.info("%s: %d texts", out, total)
    return manifest


def is_encoded(folder: Path) -> bool:
    """Returns whether a folder is one that `encode` or `index` writes, though shards be missing."""
    if (folder / "index.json").is_file():
        return True
    return (folder / "manifest.json").is_file() and (folder / "probes.arrow").is_file()


def open_encoded(folder: Path) -> DocumentTable:
    """Opens the documents of a folder that `encode` or `index` has filled, one for each vector.

    Raises as `open_vectors`, and ValueError for an index of chunks or one that was changed: the rows of its vectors are
    no longer those of its documents.
    """
    if (layout := folder / "index.json").is_file():
        said = json.loads(layout.read_text(encoding="utf-8"))
        if said["chunk_tokens"] or said["dim"] or len(said["parts"]) != 1 or said["parts"][0]["deleted"]:
            raise InputError(
                f"{folder} is an index of chunks or of shortened vectors, is unfinished, or was changed: run `index "
                "--compact` after changes, or `encode` on the corpus"
            )
        folder = folder / said["parts"][0]["folder"]
        identity = Manifest.read(folder).source_sha256
        open_vectors(folder)
        return DocumentTable([folder / "documents.arrow"], identity, encoded=folder)
    vectors, identity = open_vectors(folder), Manifest.read(folder).source_sha256
    files = [block for block in vectors.blocks if isinstance(block, Path)]
    if files and "id" not in read_shard(files[0]).schema.names:
        raise InputError(f"{folder} holds vectors without documents: take a folder that `encode` or `index` wrote")
    return DocumentTable(files, identity, encoded=folder)


def corpus_at(path: Path) -> DocumentTable:
    """Opens the documents of a corpus of any format, or of a folder that `encode` or `index` has filled."""
    return open_encoded(path) if is_encoded(path) else open_corpus(path)


def _claim(out: Path, encoder: Encoder, seen: Survey, task: str | None, precision: StoredPrecision | None) -> Manifest:
    """Makes `out` the folder of these documents by this model. Raises ValueError if it holds anything else."""
    if not (out / "manifest.json").exists():
        if strays := [*out.glob("shard-*"), *out.glob("index.faiss")]:
            raise InputError(f"{out} holds {strays[0].name} but no manifest.json: take a new or empty folder")
        claim(out, encoder, seen, task, precision or "float32")
    manifest = Manifest.read(out)
    now = {"source_sha256": seen.digests[-1], "task": task, "shard_rows": seen.shard_rows}
    now["precision"] = precision or manifest.precision
    for key, value in now.items():
        if (before := getattr(manifest, key)) != value:
            raise InputError(f"{out} was encoded with {key} {before!r}, this is {value!r}: take a new or empty folder")
    check_model(out, encoder)
    return manifest


def read_source(source: Path) -> Iterator[SourceRow]:
    """Yields the documents of a data file, a folder of such, a BEIR folder, or a folder of `.txt` and `.md` files.

    Rows have `text`, optional `title` and optional `_id` or `id` (else the number of the line); a `.txt` has one text
    per line. In a folder of texts each file is a document: its id is the path, its title the first heading or the
    file's name. Raises DataError, naming file and line, for a bad row, and in the end for an id that occurs twice.
    Memory: 8 bytes a document.
    """
    marks = array("q")
    for row in _rows(source):
        marks.append(hash(row.id))
        yield row
    if not marks:
        raise DataError(f"{source}: no document")
    refuse_repeats(marks, ((row.where, row.id) for row in _rows(source)))


def _rows(source: Path) -> Iterator[SourceRow]:
    """Does the same, but an id may occur twice."""
    for file, number, _, row in document_rows(source, file_titles=True):
        where = f"{file}:{number}"
        try:
            id, title, text = document_of(row, str(number) if file == source else f"{stem_of(file)}:{number}")
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        assert not isinstance(row, DataError)
        yield SourceRow(where, id, title, text, row)
