"""Tiled search against brute force in float64: the same rows and the same scores, to the bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwright import onednn
from embedwright.data import topk
from embedwright.data.topk import top_k


def brute_force(queries: np.ndarray, corpus: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = (queries.astype(np.float64) @ corpus.T.astype(np.float64)).astype(np.float32)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


def assert_same(got: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_array_equal(got[0], expected[0])
    assert (got[0].dtype, got[1].dtype) == (np.float32, np.int64)


def real(queries: int, documents: int, width: int = 48, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return tuple(random.standard_normal((n, width)).astype(np.float32) for n in (queries, documents))


def whole(queries: int, documents: int, width: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Small whole numbers: every inner product is exact, and most of them are equal to others."""
    random = np.random.default_rng(1)
    return tuple(random.integers(-2, 3, (n, width)).astype(np.float32) for n in (queries, documents))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a few hundred vectors cross many of them."""
    for name, size in (("_QUERIES", 8), ("_DOCUMENTS", 80), ("_SPARE", 4)):
        monkeypatch.setattr(topk, name, size)


@pytest.mark.parametrize("make", [real, whole])
@pytest.mark.parametrize("k", [1, 7, 100])
@pytest.mark.parametrize("documents", [1, 79, 80, 81, 1003])
def test_equals_brute_force_over_small_tiles(small_tiles: None, make: Any, k: int, documents: int) -> None:
    queries, corpus = make(19, documents)
    assert_same(top_k(queries, corpus, k), brute_force(queries, corpus, k))


@pytest.mark.parametrize("queries", [1, 513])
def test_equals_brute_force_over_tiles_of_the_real_size(queries: int) -> None:
    query_vectors, corpus = real(queries, 3 * topk._DOCUMENTS + 5, seed=2)
    corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    assert_same(top_k(query_vectors, corpus, 100), brute_force(query_vectors, corpus, 100))


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_order_of_the_corpus_does_not_matter(small_tiles: None, order: str) -> None:
    queries, corpus = np.abs(real(5, 600)[0]), np.abs(real(5, 600)[1])
    corpus *= np.linspace(0.1, 9, 600, dtype=np.float32)[:: 1 if order == "rising" else -1, None]
    assert_same(top_k(queries, corpus, 20), brute_force(queries, corpus, 20))


def test_copies_come_in_the_order_of_the_corpus_and_are_not_kept_by_the_thousand(
    small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, corpus = real(5, 2000)
    corpus[200:] = corpus[200:201]
    queries[0] = corpus[200]  # its best are all copies
    widest = 0
    append = topk._Best._append

    def watched(self: topk._Best, *found: Any) -> None:
        nonlocal widest
        append(self, *found)
        widest = max(widest, self.scores_QW.shape[1])

    monkeypatch.setattr(topk._Best, "_append", watched)
    got = top_k(queries, corpus, 10)
    assert_same(got, brute_force(queries, corpus, 10))
    assert got[1][0].tolist() == list(range(200, 210))
    assert widest <= 2 * 10 + 4 + 80


def test_what_rounding_to_float32_confuses_is_told_apart(small_tiles: None) -> None:
    """Large parts that cancel: the float32 sum is off by more than the scores differ."""
    random = np.random.default_rng(3)
    queries, corpus = np.ones((4, 9), np.float32), np.zeros((900, 9), np.float32)
    corpus[:, 0] = random.integers(1, 2**23, 900)
    corpus[:, 8] = -corpus[:, 0]
    corpus[:, 4] = random.permutation(900) / 1024
    in_float32 = np.add.accumulate(corpus, axis=1)[:, -1]
    assert not np.array_equal(np.argsort(-in_float32, kind="stable")[:25], brute_force(queries, corpus, 25)[1][0])
    assert_same(top_k(queries, corpus, 25), brute_force(queries, corpus, 25))


def test_a_product_that_is_off_by_its_bound_is_put_right(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bad a product as float32 allows, other in every tile: E units in the last place of |q| |c|."""
    queries, corpus = whole(11, 700, width=6)
    random = np.random.default_rng(4)

    def poor(x: Any, weight: Any, bias: Any) -> Any:
        bound = 6 * 2.0**-24 * np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(weight, axis=1))
        return (x @ weight.t()) + bound.astype(np.float32) * random.choice([-1, 1], bound.shape).astype(np.float32)

    monkeypatch.setattr(onednn, "available", lambda: True)
    monkeypatch.setattr(onednn, "linear", poor)
    assert_same(top_k(queries, corpus, 30), brute_force(queries, corpus, 30))


def test_a_machine_without_onednn_gives_the_same(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, corpus = real(19, 1003)
    monkeypatch.setattr(onednn, "available", lambda: False)
    monkeypatch.delattr(onednn, "linear")
    assert_same(top_k(queries, corpus, 30), brute_force(queries, corpus, 30))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_a_memory_map_is_read_tile_by_tile(small_tiles: None, tmp_path: Path, dtype: Any) -> None:
    queries, corpus = real(19, 500)
    path = tmp_path / "corpus.npy"
    np.save(path, corpus.astype(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = top_k(queries, np.load(path, mmap_mode="r"), 30)
    assert_same(got, brute_force(queries, corpus.astype(dtype).astype(np.float32), 30))


def test_a_view_of_a_corpus(small_tiles: None) -> None:
    queries, corpus = real(19, 1003)
    assert_same(top_k(queries[::2], corpus[::-1, :48], 30), brute_force(queries[::2], corpus[::-1], 30))


def test_edges() -> None:
    one = np.ones((1, 4), np.float32)
    scores, rows = top_k(one, np.repeat(one, 3, axis=0), 5)
    assert rows.tolist() == [[0, 1, 2]] and scores.tolist() == [[4, 4, 4]]
    assert top_k(one[:0], one, 5)[0].shape == (0, 1) and top_k(one, one[:0], 5)[1].shape == (1, 0)


def test_vectors_of_length_zero(small_tiles: None) -> None:
    """Nothing is rounded, so that there is no slack: what equals the floor must stay."""
    queries, corpus = real(19, 400)
    queries[3] = 0
    for k in (3, 30):
        assert_same(top_k(queries, corpus, k), brute_force(queries, corpus, k))
        assert_same(top_k(queries, 0 * corpus, k), brute_force(queries, 0 * corpus, k))


def test_what_cannot_be_searched(small_tiles: None) -> None:
    queries, corpus = real(19, 200)
    with pytest.raises(ValueError, match="k must be"):
        top_k(queries, corpus, 0)
    with pytest.raises(ValueError, match=r"\(Q, E\) and \(C, E\)"):
        top_k(queries, corpus[:, :3], 1)
    for bad in (np.nan, np.inf, 3e38):
        broken = corpus.copy()
        broken[171, 3] = bad
        with pytest.raises(ValueError, match="document 171: its vector is not finite"):
            top_k(queries, broken, 1)
    queries[17, 0] = np.nan
    with pytest.raises(ValueError, match="query 17: its vector is not finite"):
        top_k(queries, corpus, 1)
