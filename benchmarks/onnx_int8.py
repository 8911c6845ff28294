"""ONNX Runtime on our export of a model with int8 weights: a peer of our int8, in sorted batches of a token budget."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from common import CORES, bind_main_thread
from numpy.typing import NDArray

from embedwright.model.embedder import Embedder
from embedwright.model.formats.folder import read_object
from embedwright.text import Contract, TextTokenizer, load_tokenizer, tokenize_checked

GRAPH, SETTINGS = "onnx/model.onnx", "embedwright.json"  # in the folder of an export
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def export(folder: Path, out: Path) -> str | None:
    """Exports the model in `folder` with int8 weights to the new folder `out`. Returns why not, where it cannot."""
    if lacking := [name for name in NEEDED if find_spec(name) is None]:
        return f"{', '.join(lacking)} not installed: pip install 'embedwright[onnx]'"
    from embedwright.export.onnx import export_onnx

    print(export_onnx(Embedder.load(folder, device="cpu", dtype="float32"), out, "int8"), flush=True)
    return None


class Model:
    """The export in ONNX Runtime, with the tokens of our own side, as many threads, and each of them on its core."""

    def __init__(self, folder: Path, out: Path) -> None:
        from embedwright.export.onnx import session_of

        self.tokenizer = TextTokenizer(load_tokenizer(folder).backend_tokenizer)
        self.contract = Contract(**read_object(out / SETTINGS)["contract"])
        os.sched_setaffinity(0, CORES - {min(CORES)} or CORES)  # its threads inherit these; this one works on the first
        self.session = session_of(out / GRAPH)
        bind_main_thread()

    def encode(self, texts: list[str], prefix: str | None, batch_tokens: int) -> NDArray[np.float32]:
        """Encodes in batches of at most so many tokens, padding included."""
        from embedwright.export.onnx import vectors_of

        rows = tokenize_checked(self.tokenizer, self.contract, texts, prefix or "", None)
        found: dict[int, NDArray[np.float32]] = {}
        for batch in padded_batches([len(row.ids) for row in rows], batch_tokens):
            found |= zip(batch, vectors_of(self.session, [rows[i] for i in batch]), strict=True)
        return np.stack([found[i] for i in range(len(texts))])


def padded_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yields indices of texts, the longest first. A batch has at most so many tokens once it is padded, or one text."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
