"""A hub's cache with two small retrieval sets of mteb, as `hf download` leaves them: cards with configs, Parquet."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Any

import mteb
import pyarrow as pa
import pyarrow.parquet as pq

TASKS = ("NanoSciFactRetrieval", "NanoNFCorpusRetrieval")
_MODULES = "argparse ast calendar csv datetime difflib heapq json logging os pathlib random shutil statistics string"


def documents(count: int) -> list[tuple[str, str]]:
    """Titles and texts: what the functions and classes of the standard library say about themselves."""
    found = {}
    for name in _MODULES.split():
        __import__(name)
        for key, value in sorted(vars(sys.modules[name]).items()):
            text = inspect.getdoc(value) if callable(value) and not key.startswith("_") else None
            if text and len(text) > 60:
                found.setdefault(text[:600], f"{name}.{key}")
    assert len(found) >= count
    return [(title, text) for text, title in list(found.items())[:count]]


def fill(hub: Path, docs: int = 60) -> None:
    """Writes both sets into the cache `hub`: blobs, links to them in the snapshot of mteb's commit, and a ref."""
    texts = documents(2 * docs)
    for number, name in enumerate(TASKS):
        own = texts[number * docs : (number + 1) * docs]
        corpus = [{"_id": f"d{i}", "title": title, "text": text} for i, (title, text) in enumerate(own)]
        asked = range(0, docs, 7)
        queries = [{"_id": f"q{i}", "text": " ".join(own[i][1].split()[2:9])} for i in asked]
        qrels = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in asked]
        _put(hub, mteb.get_task(name).metadata.dataset, {"corpus": corpus, "queries": queries, "qrels": qrels})


def _put(hub: Path, dataset: dict[str, str], configs: dict[str, list[dict[str, Any]]]) -> None:
    home = hub / f"datasets--{dataset['path'].replace('/', '--')}"
    snapshot = home / "snapshots" / dataset["revision"]
    card = ["---", "configs:"]
    (home / "blobs").mkdir(parents=True)
    for config, rows in configs.items():
        card += [f"- config_name: {config}", "  data_files:", "  - split: train", f"    path: {config}/train-*"]
        (snapshot / config).mkdir(parents=True)
        blob, file = home / "blobs" / config, snapshot / config / "train-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(rows), blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    (snapshot / "README.md").write_text("\n".join([*card, "---", ""]))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(dataset["revision"])
