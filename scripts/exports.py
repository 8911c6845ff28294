"""What exports of real models give: measured by this script, and shown in docs/export.md, which `make_docs.py` writes.

python scripts/exports.py results/flagship   # needs EMBEDWRIGHT_DATA; runs each graph by the lines of docs/export.md
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedwright.evaluation.about import about
from embedwright.export.onnx import export_onnx
from embedwright.files import write_json
from embedwright.model.embedder import Embedder

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "export-onnx.json"
MARK, END = "<!-- onnx, made by scripts/exports.py -->\n", "<!-- end -->"
PAIRS = 50  # of STS 2014, the first
TASK = "Retrieve semantically similar text."
AT_ONCE = 16  # texts of about one length

Vectors = np.ndarray[Any, Any]


def page(text: str) -> str:
    """docs/export.md with its table between its marks."""
    before, mark, rest = text.partition(MARK)
    return f"{before}{mark}{table(json.loads(RESULTS.read_text(encoding='utf-8')))}{END}{rest.partition(END)[2]}"


def table(kept: dict[str, Any]) -> str:
    """One row for each graph."""
    head = ["weights", "size", "largest difference", "mean cosine", "lowest cosine"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in kept["rows"]:
        cells = [row["weights"], f"{row['bytes'] / 1e6:,.0f} MB", f"{row['difference']:.1e}"]
        cells += [f"{row[name]:.4f}" for name in ("mean_cosine", "lowest_cosine")]
        lines.append(f"| {' | '.join(cells)} |")
    said = kept["about"]
    versions = ", ".join(f"{name} {said['versions'][name]}" for name in ("torch", "onnxruntime"))
    how = f"`{said['command']}`, {said['date'][:10]}, on {said['machine']['processor']}, {versions}."
    what = f"`{said['model']}` on {2 * PAIRS} texts, the first {PAIRS} pairs of STS 2014"
    return "\n".join([*lines, "", f"{what}: {how}"]) + "\n"


def documented(folder: Path) -> Any:
    """`encode` of docs/export.md, which runs no line of ours, for this folder."""
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def encode" in block)
    names: dict[str, Any] = {}
    exec(code.replace('"my-onnx"', repr(str(folder))), names)
    return names["encode"]


def in_batches(encode: Any, texts: Sequence[str]) -> Vectors:
    """Encodes many texts by a function that takes one batch."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    batches = [order[i : i + AT_ONCE] for i in range(0, len(order), AT_ONCE)]
    found = np.concatenate([encode([texts[i] for i in batch], TASK) for batch in batches])
    vectors = np.empty_like(found)
    vectors[order] = found
    return vectors


def measured(name: str) -> dict[str, Any]:
    """Exports a model in both types, and compares what the graphs give with what it gives."""
    model = Embedder.load(name, device="cpu", dtype="float32")
    if any("lora_" in part for part, _ in model.network.named_parameters()):
        model.merge()
    file = Path(os.environ["EMBEDWRIGHT_DATA"]) / "dev" / "sts14.scored.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        pairs = [json.loads(line) for line, _ in zip(lines, range(PAIRS), strict=False)]
    texts = [text for pair in pairs for text in (pair["text1"], pair["text2"])]
    expected = model.encode(texts, TASK)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("float32", "int8"):
            folder, started = Path(scratch) / kind, time.perf_counter()
            print(export_onnx(model, folder, kind), flush=True)
            seconds = time.perf_counter() - started
            size = sum(file.stat().st_size for file in (folder / "onnx").iterdir())
            vectors = in_batches(documented(folder), texts)
            cosines = (vectors * expected).sum(1)
            row = {"weights": kind, "bytes": size, "seconds": seconds, "mean_cosine": float(cosines.mean())}
            row |= {"difference": float(np.abs(vectors - expected).max()), "lowest_cosine": float(cosines.min())}
            rows.append(row)
    said = about(name)
    import onnxruntime

    said["versions"]["onnxruntime"] = onnxruntime.__version__
    return {"about": said, "rows": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    write_json(RESULTS, measured(parser.parse_args().model))
