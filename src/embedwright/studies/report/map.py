"""The map of the report: texts of a labelled file as points, laid out in two dimensions by a run's model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedwright.data.schema import label_of, text_of
from embedwright.encoders.protocol import Encoder, encode_finite
from embedwright.errors import InputError
from embedwright.evaluation.tasks import rows_of
from embedwright.studies.report.hits import shortened
from embedwright.vectors.plane import SEED, in_plane

POINTS = 2_000
NEIGHBOURS = 10

Vectors = NDArray[np.float32]


def text_map(encoder: Encoder, path: Path, instruction: str) -> dict[str, Any]:
    """Encodes a sample of labelled rows, lays it out, and returns points, texts and labels, the largest label first.

    `near` is the part of the nearest neighbours in all dimensions that have the same label, and `chance` what random
    neighbours would give. Raises InputError if the file cannot be read, or if there is nothing to tell apart: fewer
    than two rows, or equal vectors.
    """
    rows = list(rows_of(path, "test", _text_and_label))
    if len(rows) < 2:
        raise InputError(f"{path}: a map needs at least two labelled rows, the file has {len(rows)}")
    drawn = np.sort(np.random.default_rng(SEED).permutation(len(rows))[:POINTS])
    texts, labels = [rows[i][0] for i in drawn], [rows[i][1] for i in drawn]
    vectors_NE = encode_finite(encoder, texts, instruction or None)
    names = [name for name, _ in Counter(labels).most_common()]
    place = {name: number for number, name in enumerate(names)}
    label_N = np.array([place[label] for label in labels])
    layout_N2, method = in_plane(vectors_NE, f"texts of {path.name}")
    return {
        "method": method,
        "labels": [{"name": shortened(name, 60), "count": int(n)} for name, n in Counter(labels).most_common()],
        "points": [
            [round(float(x), 4), round(float(y), 4), int(k)] for (x, y), k in zip(layout_N2, label_N, strict=True)
        ],
        "texts": [shortened(text, 180) for text in texts],
        "of": len(rows),
        "near": _same_label(vectors_NE, label_N),
        "chance": float(np.mean((np.bincount(label_N)[label_N] - 1) / (len(label_N) - 1))),
    }


def _text_and_label(row: Mapping[str, Any], _: str) -> tuple[str, str]:
    return text_of(row.get("text"), "text"), label_of(row.get("label"), "label")


def _same_label(vectors_NE: Vectors, label_N: NDArray[np.int64]) -> float:
    """Returns the part of each text's nearest neighbours that have its label, in the mean over texts."""
    cosine_NN = vectors_NE @ vectors_NE.T
    np.fill_diagonal(cosine_NN, -np.inf)
    count = min(NEIGHBOURS, len(label_N) - 1)
    near_NK = np.argpartition(-cosine_NN, count - 1, axis=1)[:, :count]
    return float(np.mean(label_N[near_NK] == label_N[:, None]))
