"""The command that makes an index of documents and changes it: `index`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from embedwright.cli import options
from embedwright.cli.display import clock, counter, note, say
from embedwright.cli.model import with_all
from embedwright.cli.options import arg, opt
from embedwright.cli.shell import file_of
from embedwright.errors import InputError


@options.opens_models
def index(
    how: options.How,
    model: options.Model,
    source: Annotated[
        Path,
        arg("JSONL or Parquet with `text`, a BEIR folder, a folder of .txt and .md, a .txt with a text a line, or -."),
    ],
    out: Annotated[
        Path | None,
        arg(
            "Folder for the index. --delete, --compact and --reencode need no source: the folder stands in its place.",
            callback=options.folder_to_write,
        ),
    ] = None,
    chunk_tokens: Annotated[
        int | None, opt("Cut documents into chunks of this many tokens of the model. Default: whole documents.", min=1)
    ] = None,
    overlap: Annotated[int, opt("Tokens that a chunk shares with the one before it.", min=0)] = 0,
    metadata: Annotated[
        str | None, opt("Columns to keep and filter by, as lang,year; or all. Default: none.", "--metadata")
    ] = None,
    precision: Annotated[
        Literal["float32", "float16", "int8", "binary"] | None,
        opt(
            "Number type of stored vectors; float16 halves them. int8 and binary nominate documents, which float32 "
            "vectors on disk then score. Default: that of the folder, float32 for a new one."
        ),
    ] = None,
    dim: Annotated[int | None, opt("Keep the first N dimensions of a vector. Default: all.", min=1)] = None,
    append: Annotated[bool, opt("Add the documents to an index; an id that it has is refused.", "--append")] = False,
    replace: Annotated[bool, opt("Add the documents, in place of those with their ids.", "--replace")] = False,
    delete: Annotated[list[str] | None, opt("Id of a document to delete. Repeatable.", metavar="ID")] = None,
    compact: Annotated[bool, opt("Remove deleted documents from the disk.", "--compact")] = False,
    reencode: Annotated[bool, opt("Encode all documents of an index with this model instead.", "--reencode")] = False,
    lancedb: Annotated[
        bool, opt("Also write a LanceDB table of the index, for `search --by`. Write it again after a change.")
    ] = False,
    task: Annotated[
        str | None,
        opt("With --lancedb: instruction of the queries that LanceDB itself encodes. Default: the model's own."),
    ] = None,
    faiss: Annotated[bool, opt("Also write index.faiss, a copy of the vectors for other programs.")] = False,
) -> None:
    """Make an index of documents, which `search` and `serve` read, or change it. Run it again to go on after a stop.

    A change counts whole or not at all, and encodes only what is new. Under torchrun, all processes encode.
    """
    from embedwright.index import change
    from embedwright.index.build import build_index, cost
    from embedwright.index.index import Index

    if task is not None and not lancedb:
        raise InputError("--task is kept in a LanceDB table: add --lancedb, or give it to `search`")
    if lancedb:
        import embedwright.index.lancedb  # noqa: F401  # raises where the package is missing, before the work
    asked = {"--append": append, "--replace": replace, "--delete": delete, "--compact": compact, "--reencode": reencode}
    changes = [name for name, given in asked.items() if given]
    if len(changes) > 1:
        raise InputError(f"{' and '.join(changes)} are separate changes: run one after the other")
    if changes and (chunk_tokens or overlap or metadata or precision or dim):
        raise InputError(f"{changes[0]} keeps the settings of the index: leave out chunks, metadata, precision and dim")
    if (out is None) != (changes in (["--delete"], ["--compact"], ["--reencode"])):
        raise InputError("give MODEL SOURCE OUT; with --delete, --compact and --reencode, MODEL OUT")
    folder, finish = source if out is None else out, partial(_finish, faiss=faiss, lancedb=lancedb, task=task)
    settings: dict[str, Any] = {"chunk_tokens": chunk_tokens, "overlap": overlap, "precision": precision, "dim": dim}
    settings["metadata"] = [name.strip() for name in metadata.split(",")] if metadata else []

    def work(encoder: Any) -> None:
        progress = counter("texts")
        if reencode:
            opened = Index.open(folder)
            if opened.difference(encoder) is None:
                note("nothing to encode: this model made the index")
            else:
                chunks, tokens = cost(encoder, opened)
                note(f"to encode: {chunks:,} texts, {tokens:,} tokens")
            change.reencode(encoder, folder, _timed(progress))
            return finish(folder)
        with file_of(source) as texts:
            if append or replace:
                added, replaced = change.add(encoder, texts, folder, replace=replace, progress=progress)
                say(f"{folder}: {added:,} documents added, {replaced:,} replaced")
            else:
                build_index(encoder, texts, folder, **settings, progress=progress)
        finish(folder)

    if delete:
        say(f"{folder}: {change.delete(folder, delete):,} documents deleted")
        finish(folder)
    elif compact:
        change.compact(folder)
        finish(folder)
    else:
        with_all(model, how, work, task)


def _finish(folder: Path, faiss: bool, lancedb: bool, task: str | None) -> None:
    """Prints what an index holds, and writes its forms for other programs."""
    from embedwright.index.build import recall
    from embedwright.index.index import Index

    index = Index.open(folder)
    held = index.facts()
    say(f"{folder}: {held['documents']:,} documents, {held['chunks']:,} chunks, {held['precision']}")
    if index.codes:
        say(f"recall@10 against exact search: {recall(index):.4f} (chunks of it as queries)")
    if faiss:
        from embedwright.index.faiss_file import write_faiss

        say(str(write_faiss(folder)))
    if lancedb:
        from embedwright.index.lancedb import to_lancedb

        table = to_lancedb(index, task)
        found = "" if table.recall is None else f", recall@10 of approximate search: {table.recall:.4f}"
        say(f"{table.folder}: {table.rows:,} chunks{found}")


def _timed(progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Says after the first shard how long all of them take at its rate."""
    started, said = time.monotonic(), False

    def update(done: int, total: int) -> None:
        nonlocal said
        if not said:
            seconds = (time.monotonic() - started) * total / done
            note(f"at the rate of the first {done:,} texts, all {total:,} take {clock(seconds)}")
            said = True
        progress(done, total)

    return update
