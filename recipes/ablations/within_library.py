"""Writes the suite of second-stage.yaml beside the demo's held-out one: `python within_library.py HELDOUT`.

`docs-within-library` ranks for each query only the documents of its own library, the first part of their ids. If a
second stage hurts that alone, it has pulled together the texts of a library, and no others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from embedwright.demo.heldout import write_rows, write_suite


def main(heldout: Path) -> None:
    folder = heldout / "retrieval"
    queries, documents = (
        [json.loads(line)["_id"] for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("queries", "corpus")
    )
    # a query has the id of its answer, `library.module:name`
    own = {query: [each for each in documents if library(each) == library(query)] for query in queries}
    write_rows(heldout / "within-library.jsonl", ({"query-id": query, "corpus-ids": ids} for query, ids in own.items()))
    tasks = yaml.safe_load((heldout / "suite.yaml").read_text(encoding="utf-8"))["tasks"]
    within = {"name": "docs-within-library", "kind": "reranking", "metric": "nDCG@10"}
    within |= {"path": "retrieval", "candidates": "within-library.jsonl", "instruction": tasks[0]["instruction"]}
    write_suite(heldout, "second-stage", [*tasks, within], "second-stage.yaml")


def library(document: str) -> str:
    return document.partition(":")[0].partition(".")[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
