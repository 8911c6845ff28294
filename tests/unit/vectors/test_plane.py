from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from embedwright.errors import InputError
from embedwright.vectors.plane import in_plane


def blobs(count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Vectors around three centres, with the number of the centre of each."""
    random, kinds = np.random.default_rng(0), np.arange(count) % 3
    return (np.eye(12)[kinds] + random.normal(0, 0.1, (count, 12))).astype(np.float32), kinds


def test_few_vectors_lie_where_their_two_main_components_put_them() -> None:
    vectors, _ = blobs(30)
    found, method = in_plane(vectors, "texts")
    centred = vectors - vectors.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    wanted = u[:, :2] * s[:2]
    distances = [np.linalg.norm(x[:, None] - x, axis=2) for x in (found, wanted)]
    np.testing.assert_allclose(distances[0] / distances[0].max(), distances[1] / distances[1].max(), atol=1e-4)
    assert method == f"PCA; the two axes hold {(s[:2] ** 2).sum() / (s**2).sum():.0%} of the variance"
    assert found.min() == 0 and found.max() == 1


def test_many_vectors_keep_their_neighbours() -> None:
    vectors, kinds = blobs(120)
    found, method = in_plane(vectors, "texts")
    distance = np.linalg.norm(found[:, None] - found, axis=2) + 9 * np.eye(120)
    assert method.startswith("t-SNE") and np.mean(kinds[distance.argmin(axis=1)] == kinds) > 0.95


@pytest.mark.parametrize("count", [20, 120])
def test_equal_vectors_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=f"vectors of all {count} texts of a are equal"):
        in_plane(np.ones((count, 4), np.float32), "texts of a")


def test_one_vector_is_refused() -> None:
    with pytest.raises(InputError, match="at least two"):
        in_plane(np.ones((1, 4), np.float32), "texts")
