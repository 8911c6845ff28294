"""Tiled search against brute force in float64: the same rows and the same scores, to the bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedwright import kernels, onednn
from embedwright.data import topk
from embedwright.data.topk import pair_scores, top_k
from embedwright.data.vectors import Vectors, as_vectors


def brute_force(queries: np.ndarray, corpus: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores and rows of the k best, and all scores."""
    scores = (queries.astype(np.float64) @ corpus.T.astype(np.float64)).astype(np.float32)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows, scores


def assert_same(got: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, ...]) -> None:
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


@pytest.fixture(params=["bfloat16", "float32", "bfloat16, no kernels"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What tiles are multiplied in, whatever this processor is fast at, and scanned by."""
    dtype, _, without = request.param.partition(", ")
    monkeypatch.setattr(topk, "_fast_bfloat16", lambda: dtype == "bfloat16")
    if without:
        monkeypatch.setattr(kernels, "available", lambda: False)
    elif not kernels.available():
        pytest.skip(f"kernels {kernels.described()}")
    return str(dtype)


@pytest.fixture
def small_tiles(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a few hundred vectors cross many of them."""
    for name, size in (("_QUERIES", 8), ("_DOCUMENTS", 80), ("_SPARE", 4), ("_ROWS", 16)):
        monkeypatch.setattr(topk, name, size)


@pytest.mark.parametrize("make", [real, whole])
@pytest.mark.parametrize("k", [1, 7, 100])
@pytest.mark.parametrize("documents", [1, 79, 80, 81, 1003])
def test_equals_brute_force_over_small_tiles(small_tiles: None, make: Any, k: int, documents: int) -> None:
    queries, corpus = make(19, documents)
    assert_same(top_k(queries, corpus, k), brute_force(queries, corpus, k))


@pytest.mark.parametrize("queries", [1, 513])
def test_equals_brute_force_over_tiles_of_the_real_size(product: str, queries: int) -> None:
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


def test_what_rounding_to_bfloat16_confuses_is_told_apart(small_tiles: None) -> None:
    """3 x - 3 x = 0, but x and 3 x are not rounded alike: the difference is far more than the scores differ by."""
    random = np.random.default_rng(3)
    queries, corpus = np.tile(np.array([3, -1, 1], np.float32), (4, 1)), np.zeros((900, 3), np.float32)
    corpus[:, 0] = random.integers(2**18, 2**20, 900)
    corpus[:, 1] = 3 * corpus[:, 0]
    corpus[:, 2] = random.permutation(900) / 4
    rounded = torch.from_numpy(corpus).bfloat16().double().numpy() @ queries[0]
    assert not np.array_equal(np.argsort(-rounded, kind="stable")[:25], brute_force(queries, corpus, 25)[1][0])
    assert_same(top_k(queries, corpus, 25), brute_force(queries, corpus, 25))


def test_a_query_that_is_rounded_is_no_less_exact(small_tiles: None) -> None:
    """Documents that bfloat16 has, a query that it has not: what is best for the rounded one is worst for this one."""
    queries, corpus = np.tile(np.array([1 + 2.0**-10, 1, 1], np.float32), (4, 1)), np.zeros((900, 3), np.float32)
    i = np.arange(820)  # the first tile is zeros, so that the mean that is taken away is
    corpus[80:, 0] = (128 + i % 128) * 2.0 ** (i // 128)
    corpus[80:, 1], corpus[80:, 2] = -corpus[80:, 0], -corpus[80:, 0] / 2**11
    assert_same(top_k(queries, corpus, 25), brute_force(queries, corpus, 25))


def off_by_its_bound(tile_QE: Any, tile_NE: Any) -> Any:
    """As bad a product as is allowed: E units in the last place of |q| |c| up or down, and then rounded."""
    q, c = tile_QE.double(), tile_NE.double()
    bound = q.shape[1] * 2.0**-24 * np.outer(q.norm(dim=1), c.norm(dim=1))
    signs = np.random.default_rng(len(c) + int(c[0].abs().sum())).choice([-1, 1], bound.shape)
    return (q @ c.t() + bound * signs).to(tile_QE.dtype)


def test_a_product_that_is_off_by_its_bound_is_put_right(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, corpus = real(11, 700)
    corpus[::2] = corpus[1::2] + 1e-7 * real(1, 350, seed=4)[1]  # twins, and the cut goes between two
    monkeypatch.setattr(topk, "_product", off_by_its_bound)
    assert_same(top_k(queries, corpus, 31), brute_force(queries, corpus, 31))


def test_scores_between_two_of_bfloat16_may_round_either_way(
    small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All scores are 257, which is as far from 256 as from 258: the first in the corpus are the best."""
    queries, corpus = np.ones((3, 6), np.float32), np.zeros((900, 6), np.float32)
    corpus[80:, :5] = np.random.default_rng(8).integers(1, 50, (820, 5))
    corpus[80:, 5] = 257 - corpus[80:, :5].sum(axis=1)
    monkeypatch.setattr(topk, "_product", off_by_its_bound)
    assert top_k(queries, corpus, 31)[1].tolist() == [list(range(80, 111))] * 3


def test_later_documents_may_be_longer_than_all_before(small_tiles: None) -> None:
    random = np.random.default_rng(7)
    queries, corpus = np.ones((3, 6), np.float32), random.integers(-1000, 1000, (900, 6)).astype(np.float32)
    corpus *= 2.0 ** (np.arange(900) // 100)[:, None]
    corpus[:, 3] += random.permutation(900) - corpus.sum(axis=1)  # parts that grow and cancel: scores 0 to 899
    assert_same(top_k(queries, corpus, 30), brute_force(queries, corpus, 30))


@pytest.mark.parametrize("scale", [1e-22, 1e-12, 1e12])
def test_vectors_of_any_length_are_searched(small_tiles: None, scale: float) -> None:
    queries, corpus = real(9, 400)
    scaled = (corpus * scale).astype(np.float32)
    assert_same(top_k(queries, scaled, 12), brute_force(queries, scaled, 12))


def test_few_are_scored_again_where_all_texts_point_one_way(
    small_tiles: None, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings often do: without the mean taken away, bfloat16 could tell none of these apart."""
    queries, corpus = real(8, 4000)
    corpus += 100
    pairs: list[int] = []

    def counted(*given: Any) -> Any:
        pairs.append(len(given[-1]))
        return pair_scores(*given)

    monkeypatch.setattr(topk, "pair_scores", counted)
    assert_same(top_k(queries, corpus, 10), brute_force(queries, corpus, 10))
    assert sum(pairs) < 8 * 10 * 4


def test_pairs_are_scored_as_the_search_does(small_tiles: None) -> None:
    queries, corpus = real(19, 300)
    random = np.random.default_rng(6)
    query_F, row_F = random.integers(0, 19, 700), random.integers(0, 300, 700)
    scores = pair_scores(queries, as_vectors(corpus), query_F, row_F)
    assert np.array_equal(scores, brute_force(queries, corpus, 300)[2][query_F, row_F])
    one_by_one = [pair_scores(queries, as_vectors(corpus), query_F[[i]], row_F[[i]]) for i in range(40)]
    assert np.array_equal(np.concatenate(one_by_one), scores[:40])
    assert pair_scores(queries, as_vectors(corpus), query_F[:0], row_F[:0]).shape == (0,)


def test_a_machine_without_onednn_gives_the_same(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, corpus = real(19, 1003)
    monkeypatch.setattr(topk, "_fast_bfloat16", lambda: False)
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


def test_vectors_in_blocks_are_one_corpus(small_tiles: None, tmp_path: Path) -> None:
    queries, corpus = real(19, 500)
    parts = np.split(corpus, [7, 30, 31, 300])
    np.save(tmp_path / "part.npy", parts[3])
    blocks = Vectors([*parts[:3], tmp_path / "part.npy", parts[4]], [len(part) for part in parts], 48)
    assert_same(top_k(queries, blocks, 30), brute_force(queries, corpus, 30))


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
