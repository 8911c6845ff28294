from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import pytest

from embedwright.search.corpus import encode_corpus, read_vectors
from embedwright.search.index import Hit, build_index, search, top_k


class Rounded:
    """A model with small whole numbers as vectors: every inner product is exact, and many are equal."""

    def __init__(self, salt: str = "") -> None:
        self.salt = salt

    def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        seeds = [zlib.crc32(f"{self.salt}{task}{text}".encode()) for text in texts]
        vectors = [np.random.default_rng(seed).integers(-3, 4, 6) for seed in seeds]
        return np.asarray(vectors, np.float32).reshape(len(texts), 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"_id": f"d{i}", "text": f"text {i}"}) + "\n" for i in range(57)))
    return encode_corpus(Rounded(), source, tmp_path / "out", shard_rows=10)


def test_search_equals_brute_force_across_shards(folder: Path) -> None:
    assert build_index(folder) == folder / "index.faiss"
    queries = [f"query {i}" for i in range(9)]
    hits = search(folder, Rounded(), queries, k=12, task="find")
    ids, texts, vectors = read_vectors(folder)
    scores = Rounded().encode(queries, "find") @ vectors.T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :12]
    assert hits == [[Hit(ids[j], scores[i, j], texts[j]) for j in rows] for i, rows in enumerate(best)]
    assert type(hits[0][0].score) is float


def test_the_index_is_plain_faiss(folder: Path) -> None:
    index = faiss.read_index(str(build_index(folder)))
    assert type(index) is faiss.IndexFlatIP
    np.testing.assert_array_equal(index.reconstruct_n(0, index.ntotal), read_vectors(folder)[2])


def test_k_is_cut_to_the_corpus_and_no_query_is_no_hit(folder: Path) -> None:
    build_index(folder)
    (hits,) = search(folder, Rounded(), ["query"], k=1000)
    assert len({hit.id for hit in hits}) == 57
    assert search(folder, Rounded(), []) == []


def test_what_cannot_be_searched(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="build_index makes it"):
        search(folder, Rounded(), ["query"])
    build_index(folder)
    with pytest.raises(ValueError, match="another model"):
        search(folder, Rounded(salt="other"), ["query"])
    faiss.write_index(faiss.IndexFlatIP(6), str(folder / "index.faiss"))
    with pytest.raises(ValueError, match="not the index of this corpus"):
        search(folder, Rounded(), ["query"])
    (folder / "shard-00003.parquet").unlink()
    with pytest.raises(ValueError, match="unfinished"):
        build_index(folder)


@pytest.mark.parametrize("queries", [3, 50])  # faiss scans below 20 queries and multiplies matrices from there
def test_top_k_is_exact_on_real_numbers(queries: int) -> None:
    random = np.random.default_rng(1)
    query_vectors, corpus_vectors = (random.standard_normal((n, 32)).astype(np.float32) for n in (queries, 3000))
    exact = query_vectors.astype(np.float64) @ corpus_vectors.T.astype(np.float64)
    scores, indices = top_k(query_vectors, corpus_vectors, 10)
    np.testing.assert_array_equal(indices, np.argsort(-exact, axis=1)[:, :10])
    np.testing.assert_allclose(scores, np.take_along_axis(exact, indices, axis=1), atol=1e-5)


def test_top_k_at_its_edges() -> None:
    one = np.ones((1, 4), np.float32)
    scores, indices = top_k(one, np.repeat(one, 3, axis=0), 5)
    assert indices.tolist() == [[0, 1, 2]] and scores.tolist() == [[4, 4, 4]]
    assert top_k(one[:0], one, 5)[0].shape == (0, 1) and top_k(one, one[:0], 5)[1].shape == (1, 0)
    with pytest.raises(ValueError, match="k must be"):
        top_k(one, one, 0)
    with pytest.raises(ValueError, match=r"\(Q, E\) and \(C, E\)"):
        top_k(one, one[:, :3], 1)
    with pytest.raises(ValueError, match="not finite"):
        top_k(one * np.nan, one, 1)
