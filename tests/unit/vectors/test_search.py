"""Tiled search against brute force in float64: the same rows and the same scores, to the bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedwright.cpu import kernels, onednn
from embedwright.vectors import int8, search
from embedwright.vectors.int8 import Int8Nominator
from embedwright.vectors.search import pair_scores, top_k
from embedwright.vectors.shards import Vectors, as_vectors, write_shard


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


@pytest.fixture(params=["int8", "float32", "float32, no kernels", "float32, as on a GPU"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What nominates: products of int8 or float32. What a GPU does is done by the CPU here: no test runs on a GPU."""
    dtype, _, where = request.param.partition(", ")
    if where == "as on a GPU":
        monkeypatch.setattr(search, "_on_cpu", lambda x: False)
        monkeypatch.setattr(kernels, "dots", lambda *_: pytest.fail("a kernel for CPUs"))
    elif where:
        monkeypatch.setattr(kernels, "available", lambda: False)
    elif not kernels.available():
        pytest.skip(f"kernels {kernels.described()}")
    if dtype == "float32":
        monkeypatch.setattr(onednn, "int8_matmul_available", lambda: False)
    elif not onednn.int8_matmul_available():
        # a slower machine's products are the same
        monkeypatch.setattr(onednn, "int8_matmul_available", lambda: True)
        monkeypatch.setattr(onednn, "int8_matmul", lambda x, y: (x.double() @ y.double().t()).int())
    return str(dtype)


@pytest.fixture
def small_blocks(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a few hundred vectors cross many of them. No nomination is too much."""
    for name, size in {"_QUERIES": 8, "_DOCUMENTS": 80, "_ROWS": 16}.items():
        monkeypatch.setattr(search, name, size)
        monkeypatch.setattr(search, f"_GPU{name}", size)
    monkeypatch.setattr(search, "_WASTED", 1)


@pytest.mark.parametrize("make", [real, whole])
@pytest.mark.parametrize("k", [1, 7, 100])
@pytest.mark.parametrize("documents", [1, 79, 80, 81, 1003])
def test_equals_brute_force_over_small_blocks(small_blocks: None, make: Any, k: int, documents: int) -> None:
    queries, corpus = make(19, documents)
    assert_same(top_k(queries, corpus, k), brute_force(queries, corpus, k))


@pytest.mark.parametrize("queries", [1, 513])
def test_equals_brute_force_over_tiles_of_the_real_size(product: str, queries: int) -> None:
    query_vectors, corpus = real(queries, 3 * search._DOCUMENTS + 5, seed=2)
    corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    assert_same(top_k(query_vectors, corpus, 100), brute_force(query_vectors, corpus, 100))


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_torchs_own_rounding_of_products_is_no_matter(small_blocks: None, precision: str) -> None:
    """Processors with AMX round them where the host allows it; what the host has set is left alone."""
    queries, corpus = whole(19, 300)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert_same(top_k(queries, corpus, 20), brute_force(queries, corpus, 20))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("allowed", ["bf16", "tf32"])
def test_where_the_host_allows_other_products_torch_multiplies_nothing(
    monkeypatch: pytest.MonkeyPatch, allowed: str
) -> None:
    queries, corpus = real(5, 40, seed=3)
    backend: Any = torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    monkeypatch.setattr(search.onednn, "linear", lambda *_: pytest.fail("multiplied by torch"))
    try:
        backend.matmul.fp32_precision = allowed
        found = search._product(torch.from_numpy(queries), torch.from_numpy(corpus))
    finally:
        backend.matmul.fp32_precision = before
    np.testing.assert_allclose(found.numpy(), queries @ corpus.T, rtol=1e-4, atol=1e-5)


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
def test_the_order_of_the_corpus_does_not_matter(small_blocks: None, order: str) -> None:
    queries, corpus = np.abs(real(5, 600)[0]), np.abs(real(5, 600)[1])
    corpus *= np.linspace(0.1, 9, 600, dtype=np.float32)[:: 1 if order == "rising" else -1, None]
    assert_same(top_k(queries, corpus, 20), brute_force(queries, corpus, 20))


def test_copies_come_in_the_order_of_the_corpus(small_blocks: None) -> None:
    queries, corpus = real(5, 2000)
    corpus[200:] = corpus[200:201]
    queries[0] = corpus[200]  # its best are all copies
    got = top_k(queries, corpus, 10)
    assert_same(got, brute_force(queries, corpus, 10))
    assert got[1][0].tolist() == list(range(200, 210))


def test_what_rounding_to_float32_confuses_is_told_apart(small_blocks: None) -> None:
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
def test_what_rounding_to_int8_confuses_is_told_apart(small_blocks: None, width: int) -> None:
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
def test_what_rounding_loses_may_point_one_way(small_blocks: None, rounded: str) -> None:
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
def test_rows_with_one_huge_number(small_blocks: None, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of all the others is nothing: some rows or all, queries too, in one place or anywhere."""
    random = np.random.default_rng(seed)
    queries, corpus = real(9, 700, 40, seed)
    some = np.flatnonzero(random.random(700) < (0.02, 0.5, 1)[seed % 3])
    corpus[some, random.integers(0, 40, len(some)) if seed < 3 else 7] *= 1e4
    queries[::2, 7] *= 1e4
    for wasted in (1, 0.2):
        monkeypatch.setattr(search, "_WASTED", wasted)
        assert_same(top_k(queries, corpus, 20), brute_force(queries, corpus, 20))


def test_where_int8_tells_too_little_apart_float32_nominates(monkeypatch: pytest.MonkeyPatch) -> None:
    if not int8.available(64):
        pytest.skip("no products of int8 here")
    monkeypatch.setattr(search, "_DOCUMENTS", 200)
    nominated: list[str] = []
    for kind in (Int8Nominator, search._Float32Nominator):

        def noted(self: Any, *given: Any, real: Any = kind.nominate) -> Any:
            nominated.append(type(self).__name__)
            return real(self, *given)

        monkeypatch.setattr(kind, "nominate", noted)
    queries, corpus = real(50, 2000, 64)
    assert_same(top_k(queries, corpus, 10), brute_force(queries, corpus, 10))
    assert nominated == ["Int8Nominator"] * 10
    nominated.clear()
    corpus[:, 0] = 1e3 * np.random.default_rng(0).standard_normal(2000)
    queries[:, 0] = 0
    assert_same(top_k(queries, corpus, 10), brute_force(queries, corpus, 10))
    assert nominated == ["Int8Nominator"] + ["_Float32Nominator"] * 9


@pytest.mark.parametrize("seed", range(12))
def test_any_shape_with_ties(small_blocks: None, seed: int) -> None:
    random = np.random.default_rng(seed)
    queries, documents, width, k = (int(random.integers(1, n)) for n in (20, 700, 70, 60))
    query_vectors, corpus = (whole if seed % 2 else real)(queries, documents, width)
    copied = random.integers(0, documents, documents)
    corpus = np.where(random.random((documents, 1)) < 0.3, corpus[copied], corpus)
    corpus[random.random(documents) < 0.1] *= np.float32(10.0 ** random.integers(-6, 6))
    assert_same(top_k(query_vectors, corpus, k), brute_force(query_vectors, corpus, k))


def off_by_its_bound(query_QE: Any, document_NE: Any) -> Any:
    """As bad a product of float32 as is allowed: E units in the last place of |q| |c| up or down."""
    q, c = query_QE.double(), document_NE.double()
    bound = q.shape[1] * 2.0**-24 * np.outer(q.norm(dim=1), c.norm(dim=1))
    signs = np.random.default_rng(len(c) + int(c[0].abs().sum())).choice([-1, 1], bound.shape)
    return (q @ c.t() + bound * signs).float()


def test_a_product_that_is_off_by_its_bound_is_put_right(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, corpus = real(11, 700)
    corpus[::2] = corpus[1::2] + 1e-7 * real(1, 350, seed=4)[1]  # twins, and the cut goes between two
    monkeypatch.setattr(search, "_product", off_by_its_bound)
    assert_same(top_k(queries, corpus, 31), brute_force(queries, corpus, 31))


def in_tf32(query_QE: Any, document_NE: Any) -> Any:
    """Numbers cut to 10 bits, as a GPU multiplies where the host allows it."""
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (query_QE, document_NE)]
    return cut[0] @ cut[1].T


@pytest.mark.parametrize("product", ["float32, as on a GPU"], indirect=True)
def test_products_of_a_gpu_in_tf32_are_put_right(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, corpus = real(11, 700)
    corpus[::2] = corpus[1::2] + 1e-4 * real(1, 350, seed=4)[1]
    coarse = in_tf32(torch.from_numpy(queries), torch.from_numpy(corpus)).numpy()
    assert not np.array_equal(np.argsort(-coarse, kind="stable")[:, :31], brute_force(queries, corpus, 31)[1])
    monkeypatch.setattr(search, "_product", in_tf32)
    assert_same(top_k(queries, corpus, 31), brute_force(queries, corpus, 31))


def test_later_documents_may_be_longer_than_all_before(small_blocks: None) -> None:
    random = np.random.default_rng(7)
    queries, corpus = np.ones((3, 6), np.float32), random.integers(-1000, 1000, (900, 6)).astype(np.float32)
    corpus *= 2.0 ** (np.arange(900) // 100)[:, None]
    corpus[:, 3] += random.permutation(900) - corpus.sum(axis=1)  # parts that grow and cancel: scores 0 to 899
    assert_same(top_k(queries, corpus, 30), brute_force(queries, corpus, 30))


@pytest.mark.parametrize("scale", [1e-22, 1e-12, 1e12])
def test_vectors_of_any_length_are_searched(small_blocks: None, scale: float) -> None:
    queries, corpus = real(9, 400)
    scaled = (corpus * scale).astype(np.float32)
    assert_same(top_k(queries, scaled, 12), brute_force(queries, scaled, 12))


def test_pairs_are_scored_as_the_search_does(small_blocks: None) -> None:
    queries, corpus = real(19, 300)
    random = np.random.default_rng(6)
    query_F, row_F = random.integers(0, 19, 700), random.integers(0, 300, 700)
    scores = pair_scores(queries, as_vectors(corpus), query_F, row_F)
    assert np.array_equal(scores, brute_force(queries, corpus, 300)[2][query_F, row_F])
    one_by_one = [pair_scores(queries, as_vectors(corpus), query_F[[i]], row_F[[i]]) for i in range(40)]
    assert np.array_equal(np.concatenate(one_by_one), scores[:40])
    assert pair_scores(queries, as_vectors(corpus), query_F[:0], row_F[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_a_memory_map_is_read_tile_by_tile(small_blocks: None, tmp_path: Path, dtype: Any) -> None:
    queries, corpus = real(19, 500)
    path = tmp_path / "corpus.npy"
    np.save(path, corpus.astype(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = top_k(queries, np.load(path, mmap_mode="r"), 30)
    assert_same(got, brute_force(queries, corpus.astype(dtype).astype(np.float32), 30))


def test_vectors_in_blocks_are_one_corpus(small_blocks: None, tmp_path: Path) -> None:
    queries, corpus = real(19, 500)
    parts = np.split(corpus, [7, 30, 31, 300])
    write_shard(tmp_path / "part.arrow", parts[3], {}, {})
    blocks = Vectors([*parts[:3], tmp_path / "part.arrow", parts[4]], [len(part) for part in parts], 48)
    assert_same(top_k(queries, blocks, 30), brute_force(queries, corpus, 30))


def test_a_view_of_a_corpus(small_blocks: None) -> None:
    queries, corpus = real(19, 1003)
    assert_same(top_k(queries[::2], corpus[::-1, :48], 30), brute_force(queries[::2], corpus[::-1], 30))


@pytest.mark.parametrize("width", [1, 2])
def test_vectors_of_one_number(small_blocks: None, width: int) -> None:
    queries, corpus = real(9, 400, width)
    assert_same(top_k(queries, corpus, 12), brute_force(queries, corpus, 12))


def test_edges() -> None:
    one = np.ones((1, 4), np.float32)
    scores, rows = top_k(one, np.repeat(one, 3, axis=0), 5)
    assert rows.tolist() == [[0, 1, 2]] and scores.tolist() == [[4, 4, 4]]
    assert top_k(one[:0], one, 5)[0].shape == (0, 1) and top_k(one, one[:0], 5)[1].shape == (1, 0)


def test_vectors_of_length_zero(small_blocks: None) -> None:
    """Nothing is rounded, so that there is no slack: what equals the floor must stay."""
    queries, corpus = real(19, 400)
    queries[3] = 0
    for k in (3, 30):
        assert_same(top_k(queries, corpus, k), brute_force(queries, corpus, k))
        assert_same(top_k(queries, 0 * corpus, k), brute_force(queries, 0 * corpus, k))


def test_what_cannot_be_searched(small_blocks: None) -> None:
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
