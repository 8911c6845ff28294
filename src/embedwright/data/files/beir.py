"""Reads retrieval sets in the layout of BEIR (arXiv 2104.08663), and corpora: `{"_id" or "id", "text", "title"?}`.

A bad line is an error here: a document that is silently missing would change every score computed on the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedwright.data.files.folders import data_files, is_beir
from embedwright.data.files.rows import Row, read_rows, text_lines
from embedwright.data.schema import DataError, id_of, number_of, text_of
from embedwright.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class Beir:
    """Holds a retrieval set in memory."""

    corpus: dict[str, str]  # document id -> title and text
    queries: dict[str, str]  # query id -> text
    qrels: dict[str, dict[str, int]]  # query id -> document id -> relevance


def read_beir(folder: Path, split: str | None = None) -> Beir:
    """Reads `corpus.jsonl[.gz]`, `queries.jsonl[.gz]` and `qrels/<split>.tsv[.gz]` (or `.jsonl`) of `folder`.

    `split` may be left out where there is one. A document's text is title, space, text. Raises FileNotFoundError, and
    DataError naming file and line: on a bad line, an id that occurs twice, a judgement of an unknown query or document.
    """
    corpus_path, queries_path, qrels_path = beir_files(folder, split)
    corpus, queries = read_corpus(corpus_path), read_corpus(queries_path)
    return Beir(corpus, queries, _read_qrels(qrels_path, corpus, queries))


def beir_files(folder: Path, split: str | None = None) -> tuple[Path, Path, Path]:
    """Returns the corpus, queries and qrels files of a BEIR folder."""
    splits = beir_splits(folder)
    if split is None:
        if len(splits) > 1:
            raise DataError(f"{folder / 'qrels'}: several splits ({', '.join(splits)}), name one")
        split = next(iter(splits), "test")
    if split not in splits:
        raise NotFoundError(f"{folder / 'qrels' / split}.tsv")
    return _plain_or_gz(folder / "corpus.jsonl"), _plain_or_gz(folder / "queries.jsonl"), splits[split]


def beir_splits(folder: Path) -> dict[str, Path]:
    """Maps each split of a BEIR folder to its file of judgements."""
    found = sorted(path for end in (".tsv", ".tsv.gz", ".jsonl") for path in (folder / "qrels").glob(f"[!.]*{end}"))
    return {path.name.removesuffix(".gz").removesuffix(".tsv").removesuffix(".jsonl"): path for path in found}


def _plain_or_gz(path: Path) -> Path:
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    raise NotFoundError(f"{path}[.gz]")


def read_corpus(path: Path) -> dict[str, str]:
    """Maps document id to text, from rows `{"_id" or "id", "text", "title"?}`. Other keys are not read.

    `path` is a file, a folder of files, or a BEIR folder. A document may be empty, as some of BEIR's are. Raises
    FileNotFoundError, and DataError naming file and line.
    """
    corpus: dict[str, str] = {}
    for where, document, text in corpus_documents(path):
        if document in corpus:
            raise DataError(f"{where}: id {document[:60]!r} twice")
        corpus[document] = text
    if not corpus:
        raise DataError(f"{path}: no document")
    return corpus


def corpus_documents(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields file:line, id and text of each document, as `read_corpus` reads them, but an id may occur twice."""
    return documents_of(corpus_rows(path))


def documents_of(rows: Iterable[tuple[Path, int, Row]]) -> Iterator[tuple[str, str, str]]:
    """Yields the same for rows as `corpus_rows` gives them."""
    for file, number, row in rows:
        try:
            id, title, text = document_of(row)
        except DataError as error:
            raise DataError(f"{file}:{number}: {error}") from None
        yield f"{file}:{number}", id, with_title(title, text)


def document_of(row: Row, default_id: str | None = None) -> tuple[str, str, str]:
    """Returns id, title and text of a row. Raises DataError if it is none, or has no text, or no id and no default."""
    if isinstance(row, DataError):
        raise row
    key = "_id" if row.get("_id") is not None else "id"
    found = row.get(key)
    return default_id if found is None and default_id else id_of(found, key), *title_and_text(row)


def corpus_rows(path: Path) -> Iterator[tuple[Path, int, Row]]:
    """Yields (file, number, row) for each document of a file, a folder of files, or a BEIR folder."""
    for file in corpus_files(path):
        yield from ((file, number, row) for number, _, row in read_rows(file))


def corpus_files(path: Path) -> list[Path]:
    """Returns the files of documents of a file, a folder of files, or a BEIR folder."""
    return [_plain_or_gz(path / "corpus.jsonl")] if path.is_dir() and is_beir(path) else data_files(path, "corpus")


def document_text(row: Mapping[str, Any]) -> str:
    """Returns title, space, text. Either may be empty, as some of BEIR's are. Raises DataError if there is no text."""
    return with_title(*title_and_text(row))


def title_and_text(row: Mapping[str, Any]) -> tuple[str, str]:
    """Returns title and text of a document. Either may be empty. Raises DataError if there is no text."""
    if row.get("text") is None:
        raise DataError("no text")
    title, text = (
        "" if (value := row.get(key)) is None or (isinstance(value, str) and not value.strip()) else text_of(value, key)
        for key in ("title", "text")
    )
    return title, text


def with_title(title: str, text: str) -> str:
    """Returns what a model reads of a document: title, space, text."""
    return f"{title} {text}".strip() if title else text


def _read_qrels(path: Path, corpus: Mapping[str, str], queries: Mapping[str, str]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for where, query, document, score in read_judgements(path):
        if query not in queries:
            raise DataError(f"{where}: query {query[:60]!r} is not among the queries")
        if document not in corpus:
            raise DataError(f"{where}: document {document[:60]!r} is not in the corpus")
        if qrels.setdefault(query, {}).setdefault(document, score) != score:
            raise DataError(f"{where}: another score of query {query[:60]!r} and document {document[:60]!r} is above")
    if not qrels:
        raise DataError(f"{path}: no judgement")
    return qrels


def read_judgements(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """Yields (file:line, query id, document id, relevance) of a qrels file. Raises DataError naming the line.

    The file has tab-separated lines below a header, as BEIR's own, or a JSON object a line, as mteb's copies of them.
    """
    if path.suffix == ".jsonl":
        yield from _judgements_of_rows(path)
        return
    for number, raw, _ in text_lines(path):
        if raw.isspace():
            continue
        where = f"{path}:{number}"
        try:
            fields = raw.decode("utf-8").rstrip("\r\n").split("\t")
        except UnicodeDecodeError:
            raise DataError(f"{where}: not UTF-8") from None
        if number == 1:
            if fields != ["query-id", "corpus-id", "score"]:
                raise DataError(f"{where}: expected the header query-id, corpus-id, score, separated by tabs")
            continue
        if len(fields) != 3 or not fields[2].removeprefix("-").isdecimal():
            raise DataError(f"{where}: expected query id, document id and a whole number, separated by tabs")
        yield where, fields[0], fields[1], int(fields[2])


def _judgements_of_rows(path: Path) -> Iterator[tuple[str, str, str, int]]:
    for number, _, row in read_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            query, document = (id_of(row.get(key), key) for key in ("query-id", "corpus-id"))
            score = number_of(row.get("score"), "score")
            if not score.is_integer():
                raise DataError(f"score {score:g} is not a whole number")
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        yield f"{path}:{number}", query, document, int(score)
