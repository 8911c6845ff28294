"""Holds out evaluation data: removes training rows that repeat it, and writes the suite that evaluates on it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedwright.data.clean.repeats import DuplicateIndex
from embedwright.data.schema import Example
from embedwright.files import write_json, write_text


def without_leaks(rows: Sequence[Example], heldout: Iterable[str]) -> tuple[list[Example], int]:
    """Returns the rows whose query and positives repeat none of these texts, and how many negatives were left out.

    A negative that repeats one is left out of its row, which stays.
    """
    texts = list({text for row in rows for text in (row.query, *(p.text for p in (*row.positives, *row.negatives)))})
    found = DuplicateIndex(heldout).find(texts)
    leaked = {text for text, match in zip(texts, found, strict=True) if match}
    apart, left_out = [], 0
    for row in rows:
        if not leaked.isdisjoint((row.query, *(p.text for p in row.positives))):
            continue
        if (clean := tuple(p for p in row.negatives if p.text not in leaked)) != row.negatives:
            left_out += len(row.negatives) - len(clean)
            row = replace(row, negatives=clean, positive_scores=None, negative_scores=None)
        apart.append(row)
    return apart, left_out


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_suite(folder: Path, name: str, tasks: Sequence[Mapping[str, Any]], file: str = "suite.yaml") -> None:
    """Writes a suite of these tasks into `folder`. The paths in them are relative to `folder`."""
    write_json(folder / file, {"name": name, "tasks": tasks})  # JSON is YAML


def write_beir(
    folder: Path, documents: Mapping[str, str], queries: Mapping[str, str], judged: Iterable[tuple[str, str]]
) -> None:
    """Writes a BEIR folder of texts by id. `judged` has the pairs of a query and a document that answers it."""
    write_rows(folder / "corpus.jsonl", ({"_id": id, "text": text} for id, text in documents.items()))
    write_rows(folder / "queries.jsonl", ({"_id": id, "text": text} for id, text in queries.items()))
    lines = (f"{query}\t{document}\t1\n" for query, document in judged)
    write_text(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\n" + "".join(lines))
