"""What exports of real models give: measured by this script, and shown in docs/export.md, which `make_docs.py` writes.

python scripts/exports.py onnx results/flagship   # needs EMBEDWRIGHT_DATA; by the lines of docs/export.md
python scripts/exports.py gguf results/flagship   # the same texts as documents, by llama.cpp (xllamacpp)
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
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedwright.evaluation.about import about
from embedwright.export.gguf import export_gguf
from embedwright.export.onnx import export_onnx
from embedwright.files import write_json
from embedwright.model.adapters.lora import has_lora
from embedwright.model.embedder import Embedder

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FORMATS = {"onnx": ("float32", "int8"), "gguf": ("f32", "f16", "q8_0")}  # with the types of weights
RUNTIMES = {"onnx": "onnxruntime", "gguf": "xllamacpp"}
END = "<!-- end -->"
PAIRS = 50  # of STS 2014, the first
TASK = "Retrieve semantically similar text."
AT_ONCE = 16  # texts of about one length

Vectors = np.ndarray[Any, Any]


def page(text: str) -> str:
    """docs/export.md with the table of each format between its marks."""
    for name in FORMATS:
        before, mark, rest = text.partition(f"<!-- {name}, made by scripts/exports.py -->\n")
        record = json.loads((RESULTS / f"export-{name}.json").read_text(encoding="utf-8"))
        text = f"{before}{mark}{table(name, record)}{END}{rest.partition(END)[2]}"
    return text


def table(name: str, kept: dict[str, Any]) -> str:
    """One row for each type of weights."""
    head = ["weights", "size", "largest difference", "mean cosine", "lowest cosine"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in kept["rows"]:
        cells = [row["weights"], f"{row['bytes'] / 1e6:,.0f} MB", f"{row['difference']:.1e}"]
        cells += [f"{row[part]:.6f}" for part in ("mean_cosine", "lowest_cosine")]
        lines.append(f"| {' | '.join(cells)} |")
    said = kept["about"]
    versions = ", ".join(f"{package} {said['versions'][package]}" for package in ("torch", RUNTIMES[name]))
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


def by_onnxruntime(model: Embedder, kind: Any, folder: Path) -> tuple[int, Any]:
    """Exports a model; returns its bytes, and a function from texts to vectors."""
    print(export_onnx(model, folder, kind), flush=True)
    encode = documented(folder)
    return size_of(folder / "onnx"), lambda texts: in_batches(encode, texts)


def by_llama_cpp(model: Embedder, kind: Any, folder: Path) -> tuple[int, Any]:
    """The same through llama.cpp."""
    print(export_gguf(model, folder / "model.gguf", kind), flush=True)
    return size_of(folder), partial(llama_cpp, folder / "model.gguf")


def llama_cpp(file: Path, texts: Sequence[str]) -> Vectors:
    """Vectors of llama.cpp's own server, which is told of the file and nothing more."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.embedding, params.warmup = str(file), True, False
    params.cpuparams.n_threads = torch.get_num_threads()
    params.n_ctx = params.n_batch = params.n_ubatch = 1024
    rows = xllamacpp.Server(params).handle_embeddings({"input": list(texts)})["data"]
    return np.array([row["embedding"] for row in rows], dtype=np.float32)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def measured(form: str, name: str) -> dict[str, Any]:
    """Exports a model in each type, and compares what the runtime gives with what the model gives."""
    model = Embedder.load(name, device="cpu", dtype="float32")
    if has_lora(model.network.backbone):
        model.merge()
    file = Path(os.environ["EMBEDWRIGHT_DATA"]) / "dev" / "sts14.scored.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        pairs = [json.loads(line) for line, _ in zip(lines, range(PAIRS), strict=False)]
    texts = [text for pair in pairs for text in (pair["text1"], pair["text2"])]
    expected = model.encode(texts, TASK if form == "onnx" else None)  # llama.cpp is right for documents alone
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in FORMATS[form]:
            folder, started = Path(scratch) / kind, time.perf_counter()
            size, encode = (by_onnxruntime if form == "onnx" else by_llama_cpp)(model, kind, folder)
            seconds = time.perf_counter() - started
            vectors = encode(texts)
            cosines = (vectors * expected).sum(1)
            row = {"weights": kind, "bytes": size, "seconds": seconds, "mean_cosine": float(cosines.mean())}
            row |= {"difference": float(np.abs(vectors - expected).max()), "lowest_cosine": float(cosines.min())}
            rows.append(row)
    said = about(name)
    said["versions"][RUNTIMES[form]] = version(RUNTIMES[form])
    return {"about": said, "rows": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("model")
    asked = parser.parse_args()
    write_json(RESULTS / f"export-{asked.format}.json", measured(asked.format, asked.model))
