from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_index import Rounded, small_corpus

from embedwright.index.build import build_index, recall
from embedwright.index.change import add, compact, delete
from embedwright.index.codes import read_codes
from embedwright.index.index import Index


class Points:
    """A model with a random unit vector of 64 numbers for each text."""

    def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        seeds = [zlib.crc32(f"{task}{text}".encode()) for text in texts]
        vectors = np.array([np.random.default_rng(seed).normal(size=64) for seed in seeds])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write(path: Path, first: int, end: int) -> Path:
    rows = [{"_id": f"d{i}", "text": f"text {i}", "odd": i % 2 == 1} for i in range(first, end)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Index]:
    at = tmp_path_factory.mktemp("codes")
    source, found = write(at / "c.jsonl", 0, 900), dict[str, Index]()
    for precision in ("float32", "int8", "binary"):
        how: dict[str, Any] = {"precision": precision, "metadata": ["odd"], "shard_rows": 400}
        found[precision] = Index.open(build_index(Points(), source, at / precision, **how))
    return found


@pytest.mark.parametrize(("precision", "at_least", "size"), [("int8", 0.995, 64), ("binary", 0.8, 8)])
def test_codes_nominate_and_the_vectors_score(
    made: dict[str, Index], precision: str, at_least: float, size: int
) -> None:
    index, plain = made[precision], made["float32"]
    queries = [f"query {i}" for i in range(20)]
    found, exact = (one.search(Points(), queries, 10) for one in (index, plain))
    same = [len({hit.id for hit in a} & {hit.id for hit in b}) / 10 for a, b in zip(found, exact, strict=True)]
    assert np.mean(same) >= at_least and recall(index) >= at_least and recall(plain) == 1
    scores = {hit.id: hit.score for hit in plain.search(Points(), queries[:1], 900)[0]}
    assert all(scores[hit.id] == hit.score for hit in found[0])
    assert index.codes is not None and index.codes.blocks[0].code_CB.shape == (900, size)  # type: ignore[union-attr]
    assert index.facts()["precision"] == precision
    (odd,) = index.search(Points(), queries[:1], 450, where=["odd=true"])
    assert len(odd) == 450 and all(int(hit.id[1:]) % 2 for hit in odd)  # never fewer while enough match


def test_int8_codes_are_the_rounded_vectors(made: dict[str, Index]) -> None:
    vectors = next(made["float32"].vectors.tiles(900))[1]
    codes = next(read_codes([made["int8"].folder], 64).tiles(900))[1]
    scale = np.abs(vectors).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(codes, np.rint(vectors / scale) * scale, atol=1e-6)
    signs = next(read_codes([made["binary"].folder], 64).tiles(900))[1]
    np.testing.assert_array_equal(signs, np.where(vectors > 0, 1, -1))


def test_recall_is_below_one_where_codes_lose(made: dict[str, Index], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedwright.index.codes._NOMINATED", {"int8": 1, "binary": 1})
    assert recall(made["binary"]) < 0.7


def test_recall_counts_neither_the_query_itself_nor_which_of_equal_ones_is_found(tmp_path: Path) -> None:
    index = Index.open(build_index(Rounded(), small_corpus(tmp_path / "c.jsonl"), tmp_path / "index"))
    everything = Rounded().encode([f"text {i}" for i in range(57)])
    whole = everything[:, None] == everything[None]
    itself_of = {vector.tobytes(): int(whole[i].all(axis=1).argmax()) for i, vector in enumerate(everything)}

    def backwards(vectors: np.ndarray, count: int) -> list[np.ndarray]:  # of equal scores, the last ones
        scores = vectors @ everything.T
        return [np.lexsort((-np.arange(57), -of_one))[:count] for of_one in scores]

    def itself(vectors: np.ndarray, count: int) -> list[np.ndarray]:
        return [np.array([itself_of[vector.tobytes()]]) for vector in vectors]

    def others(vectors: np.ndarray, count: int) -> list[np.ndarray]:
        own = [itself_of[vector.tobytes()] for vector in vectors]
        return [rows[rows != row][: count - 1] for row, rows in zip(own, backwards(vectors, 57), strict=True)]

    assert recall(index, backwards) == recall(index, others) == recall(index) == 1
    assert recall(index, itself) == 0
    five = recall(index, lambda vectors, count: [rows[:5] for rows in others(vectors, count)])
    assert five == 0.5


def test_codes_follow_changes(tmp_path: Path) -> None:
    out = build_index(Points(), write(tmp_path / "a", 0, 50), tmp_path / "i", precision="int8")
    add(Points(), write(tmp_path / "b", 50, 60), out)
    delete(out, ["d3"])
    changed = Index.open(out).search(Points(), ["q"], 99)[0]
    compact(out)
    assert Index.open(out).search(Points(), ["q"], 99)[0] == changed and len(changed) == 59


def test_a_shorter_vector_is_the_models_own_cut(tmp_path: Path) -> None:
    out = build_index(Points(), write(tmp_path / "a", 0, 30), tmp_path / "i", dim=16)
    index, cut = Index.open(out), lambda x: x[:, :16] / np.linalg.norm(x[:, :16], axis=1, keepdims=True)
    documents, queries = cut(Points().encode([f"text {i}" for i in range(30)])), cut(Points().encode(["q"], ""))
    expected = np.argsort(-(queries @ documents.T)[0], kind="stable")[:7]
    assert [hit.id for hit in index.search(Points(), ["q"], 7)[0]] == [f"d{i}" for i in expected]
    assert index.facts()["dimension"] == 16
    with pytest.raises(ValueError, match="dim 16, this is 8"):
        build_index(Points(), tmp_path / "a", out, dim=8)
    with pytest.raises(ValueError, match="--dim 65: the model's vectors have 64"):
        build_index(Points(), tmp_path / "a", tmp_path / "j", dim=65)
