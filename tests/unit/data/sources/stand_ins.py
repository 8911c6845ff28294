"""Local copies of public sets, as small as a test needs them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def repository(folder: Path, **configs: tuple[str, list[dict[str, Any]]]) -> Path:
    """A folder as a repository of the hub is laid out: a split of each config, named in the card."""
    card = ["---", "configs:"]
    for config, (split, rows) in configs.items():
        write(folder / config / split / "0000.parquet", rows)
        card += [f"- config_name: {config}", "  data_files:"]
        card += [f"  - split: {split}", f"    path: {config}/{split}/*.parquet"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


def beir(folder: Path) -> Path:
    return repository(
        folder,
        default=("train", [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1.0} for i in range(5)]),
        queries=("queries", [{"_id": f"q{i}", "text": f"question {i}"} for i in range(5)]),
        corpus=("corpus", [{"_id": f"d{i}", "title": f"Title {i}", "text": "body"} for i in range(9)]),
    )
