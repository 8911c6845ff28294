"""A saved model carries proof of what it is: token ids and vectors of a few texts, checked whenever it is loaded.

What only another machine or another library version can break — a tokenizer that is rebuilt with other rules, weights
that were merged twice, a template or a pooling that was edited — shows here, and nowhere else from the inside.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from embedwright.errors import InputError, blaming
from embedwright.model.modes import evaluating
from embedwright.model.network import EmbedwrightModel
from embedwright.model.probe import ProbeError
from embedwright.packing import pack
from embedwright.text import TextTokenizer, TokenizedText, tokenize

FILE = "selftest.json"
TASK = "Given a question, retrieve passages that answer it"
# (text, whether it is a query): capitals, spaces, accents, other scripts, digits, a special token as text
TEXTS = (
    ("How do tides work?", True),
    ("  The Moon's gravity, 1,234 km away,\n\tpulls the oceans.", False),
    ("naïve café 漢字 🙂 </s>", False),
    ("x", True),
)
_DIMS = 64  # of each vector, the first: enough to tell models apart, small enough to read
# Largest difference in one and the same type; lowest cosine otherwise: rounding to 16 bits alone turns short texts of
# an untrained model of thirty layers by that much (0.85 was seen), so only what is plainly another model is refused.
_TIGHT, _LOOSE = 1e-4, 0.7


@dataclass(frozen=True)
class Comparison:
    """The stored ids and vectors against those that this installation gives."""

    other_ids: tuple[str, ...]  # texts whose token ids or pool masks differ
    difference: float  # largest, of components
    cosine: float  # lowest, over the dimensions kept
    same_type: bool  # whether weights are in the type that the model was saved in

    @property
    def ok(self) -> bool:
        close = self.difference <= _TIGHT if self.same_type else self.cosine >= _LOOSE
        return not self.other_ids and close

    def describe(self) -> str:
        if self.other_ids:
            return f"other token ids than when saved, for {self.other_ids[0]!r}"
        return f"largest difference {self.difference:.1e}, lowest cosine {self.cosine:.6f}"


def write(network: EmbedwrightModel, tokenizer: TextTokenizer, folder: Path) -> None:
    """Record the model's ids and vectors in `folder`."""
    rows = []
    for (text, _), tokens, vector in zip(TEXTS, *_computed(network, tokenizer), strict=True):
        kept = [round(float(x), 7) for x in vector[:_DIMS]]
        rows.append({"text": text, "ids": tokens.ids.tolist(), "pooled": int(tokens.pool.sum()), "vector": kept})
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    head = f'"dtype": "{_type(network)}", "task": {json.dumps(TASK)}'
    (folder / FILE).write_text(f'{{{head}, "texts": [\n  {lines}\n]}}\n', encoding="utf-8")


def compare(network: EmbedwrightModel, tokenizer: TextTokenizer, folder: Path) -> Comparison | None:
    """Against what `write` recorded in `folder`; None where nothing was recorded."""
    file = folder / FILE
    if not file.is_file():
        return None
    with blaming(file, "is no record of a model"):
        stored = json.loads(file.read_text(encoding="utf-8"))
        dtype, rows = stored["dtype"], [(row["text"], row["ids"], row["pooled"]) for row in stored["texts"]]
        expected = np.array([row["vector"] for row in stored["texts"]], dtype=np.float32)
        if expected.ndim != 2 or len(expected) != len(TEXTS) or expected.shape[1] > network.backbone.config.hidden_size:
            raise InputError(f"{file} has vectors of the shape {expected.shape}, not those of {len(TEXTS)} texts")
    texts, vectors = _computed(network, tokenizer)
    other = tuple(
        text
        for (text, ids, pooled), tokens in zip(rows, texts, strict=True)
        if ids != tokens.ids.tolist() or pooled != int(tokens.pool.sum())
    )
    got = vectors[:, : expected.shape[1]]
    cosines = (got * expected).sum(1) / np.maximum(np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1), 1e-9)
    return Comparison(other, float(np.abs(got - expected).max()), float(cosines.min()), dtype == _type(network))


def check(network: EmbedwrightModel, tokenizer: TextTokenizer, folder: Path) -> None:
    """ProbeError where ids or vectors are not the recorded ones; nothing where none were recorded."""
    found = compare(network, tokenizer, folder)
    if found is not None and not found.ok:
        raise ProbeError(f"{folder} does not give the vectors that it was saved with: {found.describe()}")


@torch.inference_mode()
def _computed(network: EmbedwrightModel, tokenizer: TextTokenizer) -> tuple[list[TokenizedText], NDArray[np.float32]]:
    contract = network.contract
    # short enough for any model, and never cut: a test of lengths is not what this is
    limit = min(max(contract.max_tokens, 256), network.longest)
    texts = [tokenize(tokenizer, contract, [t], contract.prefix(TASK if q else None), limit)[0] for t, q in TEXTS]
    with evaluating(network):
        vectors: NDArray[np.float32] = network.embed(pack(texts).to(network.device)).float().cpu().numpy()
    return texts, vectors


def _type(network: EmbedwrightModel) -> str:
    return str(next(network.backbone.parameters()).dtype).removeprefix("torch.")
