from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from embedwright.errors import InputError
from embedwright.studies.report import map as report_map
from embedwright.studies.report.map import text_map


class Blobs:
    """Vectors around one of three centres, which the first letter of a text names."""

    def __init__(self) -> None:
        self.asked: list[str | None] = []

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        self.asked.append(task)
        random = np.random.default_rng(len(texts))
        vectors = np.array([np.eye(12)["abc".index(text[0])] + random.normal(0, 0.2, 12) for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def labelled(file: Path, count: int) -> Path:
    rows = [{"text": f"{'aaabbc'[i % 6]} {i}", "label": "aaabbc"[i % 6]} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(("count", "method"), [(60, "PCA"), (150, "t-SNE")])
def test_texts_of_one_label_lie_together(tmp_path: Path, count: int, method: str) -> None:
    encoder = Blobs()
    found = text_map(encoder, labelled(tmp_path / "rows.jsonl", count), "Name it")
    assert found["method"].startswith(method) and encoder.asked == ["Name it"]
    assert found["labels"] == [{"name": n, "count": count // k} for n, k in (("a", 2), ("b", 3), ("c", 6))]
    assert [text[0] for text in found["texts"]] == ["abc"[label] for _, _, label in found["points"]]
    layout, labels = np.array(found["points"])[:, :2], np.array(found["points"])[:, 2]
    assert layout.min() == 0 and layout.max() == 1
    centres = np.array([layout[labels == k].mean(axis=0) for k in range(3)])
    nearest = np.linalg.norm(layout[:, None] - centres, axis=2).argmin(axis=1)
    assert np.mean(nearest == labels) > 0.9


def test_the_neighbours_are_counted_as_sklearn_finds_them(tmp_path: Path) -> None:
    file = labelled(tmp_path / "rows.jsonl", 60)
    found = text_map(Blobs(), file, "")
    vectors = Blobs().encode(found["texts"])
    labels = np.array([label for _, _, label in found["points"]])
    near = NearestNeighbors(n_neighbors=11, metric="cosine").fit(vectors).kneighbors(vectors)[1][:, 1:]
    assert found["near"] == pytest.approx(np.mean(labels[near] == labels[:, None]))
    assert found["chance"] == pytest.approx((30 * 29 + 20 * 19 + 10 * 9) / (60 * 59))


def test_of_many_texts_a_sample_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_map, "POINTS", 20)
    found = text_map(Blobs(), labelled(tmp_path / "rows.jsonl", 60), "")
    assert len(found["points"]) == len(found["texts"]) == 20 and found["of"] == 60
    assert found["texts"][-1].split()[1] > "19"  # of the whole file


def test_a_file_without_labels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="no label"):
        text_map(Blobs(), tmp_path / "rows.jsonl", "")


@pytest.mark.parametrize("count", [0, 1])
def test_a_file_of_fewer_than_two_rows_is_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(InputError, match=f"two labelled rows, the file has {count}"):
        text_map(Blobs(), labelled(tmp_path / "rows.jsonl", count), "")


class Flat(Blobs):
    """One vector for all texts, or almost."""

    noise = 0.0

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        vectors = np.tile(np.eye(1, 12, dtype=np.float32), (len(texts), 1))
        vectors[0, 1] += self.noise
        return vectors


@pytest.mark.parametrize("count", [2, 20, 120])  # by PCA and by t-SNE, which ends the process
def test_equal_vectors_are_refused(tmp_path: Path, count: int) -> None:
    encoder, file = Flat(), labelled(tmp_path / "rows.jsonl", count)
    with pytest.raises(InputError, match=rf"vectors of all {count} texts of rows\.jsonl are equal"):
        text_map(encoder, file, "")
    encoder.noise = 1e-5
    assert np.isfinite(text_map(encoder, file, "")["points"]).all()
