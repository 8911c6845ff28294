"""Tiled search against brute force in float64: the same rows and the same scores, to the bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedwright.cpu import kernels, onednn
from embedwright.vectors import search as topk
from embedwright.vectors.search import pair_scores, top_k
from embedwright.vectors.store import Vectors, as_vectors


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


@pytest.fixture(params=["int8", "float32", "float32, faiss", "float32, torch"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What tiles are multiplied in, and ranked by."""
    dtype, _, without = request.param.partition(", ")
    if without:
        monkeypatch.setattr(kernels, "available", lambda: False)
        if without == "torch":  # for all queries, not for those alone that faiss is not sure of
            found = topk._by_faiss
            monkeypatch.setattr(topk, "_by_faiss", lambda *given: (*found(*given)[:2], np.zeros(len(given[0]), bool)))
    elif not kernels.available():
        pytest.skip(f"kernels {kernels.described()}")
    if dtype == "float32":
        monkeypatch.setattr(onednn, "whole_available", lambda: False)
    elif not onednn.whole_available():
        monkeypatch.setattr(onednn, "whole_available", lambda: True)  # what a slower machine multiplies is the same
        monkeypatch.setattr(onednn, "whole", lambda x, y: (x.double() @ y.double().t()).int())
    return str(dtype)


@pytest.fixture
def small_tiles(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a few hundred vectors cross many of them. What is scored in vain is never too much."""
    sizes = {"_QUERIES": 8, "_DOCUMENTS": 80, "_ROWS": 16, "_VAIN": 1, "_FAISS_DOCUMENTS": 90, "_SPARE": 3}
    for name, size in sizes.items():
        monkeypatch.setattr(topk, name, size)


@pytest.mark.parametrize("make", [real, whole])
@pytest.mark.parametrize("k", [1, 7, 100])
@pytest.mark.parametrize("documents", [1, 79, 80, 81, 1003])
def test_equals_brute_force_over_small_tiles(small_tiles: None, make: Any, k: int, documents: int) -> None:
    queries, corpus = make(19, documents)
    assert_same(top_k(queries, corpus, k), brute_force(queries, corpus, k))


@pytest.mark.parametrize(("make", "some"), [(real, range(19, 20)), (whole, range(1, 19))])
def test_faiss_is_believed_where_nothing_that_it_leaves_out_may_be_as_good(make: Any, some: range) -> None:
    queries, corpus = make(19, 1003)
    scores, rows, sure_Q = topk._by_faiss(queries, as_vectors(corpus), 20)
    assert sure_Q.sum() in some
    assert_same((scores[sure_Q], rows[sure_Q]), brute_force(queries[sure_Q], corpus, 20))
    many = np.repeat(corpus[:1], 500, axis=0)  # whichever it takes of equal ones
    assert not topk._by_faiss(queries, as_vectors(many), 20)[2].any()


@pytest.mark.parametrize("queries", [1, 513])
def test_equals_brute_force_over_tiles_of_the_real_size(product: str, queries: int) -> None:
    query_vectors, corpus = real(queries, 3 * topk._DOCUMENTS + 5, seed=2)
    corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    assert_same(top_k(query_vectors, corpus, 100), brute_force(query_vectors, corpus, 100))


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_products_are_never_those_that_torch_may_round(
    product: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processors with AMX round them; others keep float32, whatever is set."""
    queries, corpus = whole(19, 300)  # faiss is not sure of equal scores
    seen: list[str] = []
    multiplied = topk._product
    backend: Any = torch.backends.mkldnn
    monkeypatch.setattr(
        topk, "_product", lambda q, d: (seen.append(backend.matmul.fp32_precision), multiplied(q, d))[1]
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert_same(top_k(queries, corpus, 20), brute_force(queries, corpus, 20))
        assert torch.get_float32_matmul_precision() == precision  # as it was set
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"ieee"}


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
def test_torchs_defaults_are_no_matter(product: str, default: Any) -> None:
    queries, corpus = real(5, 300)
    expected = top_k(queries, corpus, 20)
    if default == "meta":
        with torch.device("meta"):
            found = top_k(queries, corpus, 20)
    else:
        torch.set_default_dtype(default)
        try:
            found = top_k(queries, corpus, 20)
        finally:
            torch.set_default_dtype(torch.float32)
    assert_same(found, expected)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_order_of_the_corpus_does_not_matter(small_tiles: None, order: str) -> None:
    queries, corpus = np.abs(real(5, 600)[0]), np.abs(real(5, 600)[1])
    corpus *= np.linspace(0.1, 9, 600, dtype=np.float32)[:: 1 if order == "rising" else -1, None]
    assert_same(top_k(queries, corpus, 20), brute_force(queries, corpus, 20))


def test_copies_come_in_the_order_of_the_corpus(small_tiles: None) -> None:
    queries, corpus = real(5, 2000)
    corpus[200:] = corpus[200:201]
    queries[0] = corpus[200]  # its best are all copies
    got = top_k(queries, corpus, 10)
    assert_same(got, brute_force(queries, corpus, 10))
    assert got[1][0].tolist() == list(range(200, 210))


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


@pytest.mark.parametrize("width", [3, 16, 17, 200])
def test_what_rounding_to_int8_confuses_is_told_apart(small_tiles: None, width: int) -> None:
    """Large parts that cancel and are rounded by far more than the scores differ by; queries are rounded too."""
    random = np.random.default_rng(3)
    queries, corpus = random.standard_normal((4, width)).astype(np.float32), np.zeros((900, width), np.float32)
    queries[:, :3] = (3, -1, 1)
    queries[1, 2] = 1 / 1024
    corpus[:, 0] = random.integers(2**8, 2**10, 900)
    corpus[:, 1] = 3 * corpus[:, 0]
    corpus[:, 2] = random.permutation(900) / 4
    assert_same(top_k(queries, corpus, 25), brute_force(queries, corpus, 25))


@pytest.mark.parametrize("rounded", ["queries", "documents"])
def test_what_rounding_loses_may_point_one_way(small_tiles: None, rounded: str) -> None:
    """127 and many of 0.49, which become zeros: no product sees what they add up to, the most that the bound allows."""
    coarse, flat = np.full(100, 0.49, np.float32), np.ones(100, np.float32)
    coarse[0], flat[0] = 127, 0
    corpus = np.zeros((900, 100), np.float32)  # the first tile stays so, and the mean that is taken away
    corpus[80:] = np.random.default_rng(5).random((820, 1)) * flat
    if rounded == "queries":
        corpus[80::2] = np.linspace(0, 0.25, 410)[:, None] * (flat == 0)
    else:
        corpus[80::2] *= 0.49
        corpus[80::2, 0], corpus[81::2] = 127, 0.4 * corpus[81::2]
    queries = np.tile(coarse if rounded == "queries" else flat, (3, 1))
    assert_same(top_k(queries, corpus, 30), brute_force(queries, corpus, 30))


@pytest.mark.parametrize("seed", range(6))
def test_rows_with_one_huge_number(small_tiles: None, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of all the others is nothing: some rows or all, queries too, in one place or anywhere."""
    random = np.random.default_rng(seed)
    queries, corpus = real(9, 700, 40, seed)
    some = np.flatnonzero(random.random(700) < (0.02, 0.5, 1)[seed % 3])
    corpus[some, random.integers(0, 40, len(some)) if seed < 3 else 7] *= 1e4
    queries[::2, 7] *= 1e4
    for vain in (1, 0.2):
        monkeypatch.setattr(topk, "_VAIN", vain)
        assert_same(top_k(queries, corpus, 20), brute_force(queries, corpus, 20))


def test_where_int8_tells_too_little_apart_most_is_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (kernels.available() and onednn.whole_available()):
        pytest.skip("no products of int8 here")
    monkeypatch.setattr(topk, "_DOCUMENTS", 200)
    types: list[Any] = []
    multiply = topk._product

    def noted(*sides: Any) -> Any:
        types.append(sides[0].dtype)
        return multiply(*sides)

    monkeypatch.setattr(topk, "_product", noted)
    queries, corpus = real(50, 2000, 64)
    assert_same(top_k(queries, corpus, 10), brute_force(queries, corpus, 10))
    assert set(types) == {torch.int8}
    types.clear()
    corpus[:, 0] = 1e3 * np.random.default_rng(0).standard_normal(2000)
    queries[:, 0] = 0
    assert_same(top_k(queries, corpus, 10), brute_force(queries, corpus, 10))
    assert [i for i, dtype in enumerate(types) if dtype == torch.int8] == [0, 2, 6]  # of ten tiles


@pytest.mark.parametrize("seed", range(25))
def test_any_shape_with_ties(small_tiles: None, seed: int) -> None:
    random = np.random.default_rng(seed)
    queries, documents, width, k = (int(random.integers(1, n)) for n in (20, 700, 70, 60))
    query_vectors, corpus = (whole if seed % 2 else real)(queries, documents, width)
    copied = random.integers(0, documents, documents)
    corpus = np.where(random.random((documents, 1)) < 0.3, corpus[copied], corpus)
    corpus[random.random(documents) < 0.1] *= np.float32(10.0 ** random.integers(-6, 6))
    assert_same(top_k(query_vectors, corpus, k), brute_force(query_vectors, corpus, k))


def off_by_its_bound(tile_QE: Any, tile_NE: Any) -> Any:
    """As bad a product of float32 as is allowed: E units in the last place of |q| |c| up or down."""
    q, c = tile_QE.double(), tile_NE.double()
    if tile_QE.dtype == torch.int8:
        return (q @ c.t()).int()
    bound = q.shape[1] * 2.0**-24 * np.outer(q.norm(dim=1), c.norm(dim=1))
    signs = np.random.default_rng(len(c) + int(c[0].abs().sum())).choice([-1, 1], bound.shape)
    return (q @ c.t() + bound * signs).to(tile_QE.dtype)


def test_a_product_that_is_off_by_its_bound_is_put_right(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, corpus = real(11, 700)
    corpus[::2] = corpus[1::2] + 1e-7 * real(1, 350, seed=4)[1]  # twins, and the cut goes between two
    monkeypatch.setattr(topk, "_product", off_by_its_bound)
    assert_same(top_k(queries, corpus, 31), brute_force(queries, corpus, 31))


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


def test_few_are_scored_in_vain_where_all_texts_point_one_way(
    product: str, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings often do: without the mean taken away, int8 could tell none of these apart."""
    if product != "int8":
        pytest.skip("float32 is near enough")
    vain: list[int] = []
    add = topk._Best.add
    monkeypatch.setattr(topk._Best, "add", lambda *given: vain.append(add(*given)) or vain[-1])
    queries, corpus = real(8, 4000)
    corpus += 100
    assert_same(top_k(queries, corpus, 10), brute_force(queries, corpus, 10))
    assert sum(vain) < 0.02 * 8 * 4000


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
