"""The command that makes an index of documents and changes it: `index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from embedwright.cli import options
from embedwright.cli.display import counter, say
from embedwright.cli.model import with_all
from embedwright.cli.options import arg, opt


def index(
    model: options.Model,
    source: Annotated[
        Path,
        arg("JSONL or Parquet with `text`, a BEIR folder, a folder of .txt and .md, or a .txt with a text a line."),
    ],
    out: Annotated[Path, arg("Folder for the index.", callback=options.folder_to_write)],
    chunk_tokens: Annotated[
        int | None, opt("Cut documents into chunks of so many tokens of the model. Default: whole documents.", min=1)
    ] = None,
    overlap: Annotated[int, opt("Tokens that a chunk shares with the one before it.", min=0)] = 0,
    metadata: Annotated[
        str | None, opt("Columns to keep and filter by, as lang,year; or all. Default: none.", "--metadata")
    ] = None,
    precision: Annotated[
        Literal["float32", "float16"] | None,
        opt("Number type of stored vectors; float16 halves them. Default: that of the folder, float32 for a new one."),
    ] = None,
    faiss: Annotated[bool, opt("Also write index.faiss, a copy of the vectors for other programs.")] = False,
) -> None:
    """Make an index of documents, which `search` and `serve` read. Run it again to go on after a stop.

    Under torchrun, all processes encode.
    """
    from embedwright.index.build import build_index
    from embedwright.index.faiss_file import write_faiss

    columns = [name.strip() for name in metadata.split(",")] if metadata else []
    how: dict[str, Any] = {"chunk_tokens": chunk_tokens, "overlap": overlap, "metadata": columns}

    def work(encoder: Any) -> None:
        say(str(build_index(encoder, source, out, **how, precision=precision, progress=counter("texts"))))
        if faiss:
            say(str(write_faiss(out)))

    with_all(model, work)
