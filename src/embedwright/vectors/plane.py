"""Lays vectors out in two dimensions, for maps.

`N` vectors, `E` embedding.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from embedwright.errors import InputError, MissingPackageError

FEWEST = 100  # texts that t-SNE needs with its usual perplexity of 30; fewer are laid out by PCA
SEED = 0
_ROUNDING = 1e-6  # error of a unit vector in float32; t-SNE crashes the process if no vector differs from the others


def in_plane(vectors_NE: NDArray[np.float32], what: str) -> tuple[NDArray[np.float64], str]:
    """Returns coordinates between 0 and 1, with one scale for both axes, and the name of the method.

    t-SNE keeps neighbours together, while distances between groups mean little; fewer than 100 vectors are laid out by
    PCA. `what` names the vectors in errors, as "texts of FILE". Raises InputError if there is nothing to tell apart.
    """
    if find_spec("sklearn") is None:
        raise MissingPackageError("a map needs scikit-learn: pip install scikit-learn")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count, width = vectors_NE.shape
    if count < 2:
        raise InputError(f"a map needs at least two vectors: the {what} give {count}")
    if np.ptp(vectors_NE, axis=0).max() < _ROUNDING:
        raise InputError(f"the vectors of all {count} {what} are equal, so a map has one point")
    if count < FEWEST:
        found = PCA(2, random_state=SEED)
        layout_N2 = found.fit_transform(vectors_NE)
        method = f"PCA; the two axes hold {found.explained_variance_ratio_.sum():.0%} of the variance"
    else:
        method = f"t-SNE (perplexity 30, seed {SEED}), which keeps neighbours; distances between groups mean little"
        reduced_NE = PCA(min(50, width), random_state=SEED).fit_transform(vectors_NE)
        layout_N2 = TSNE(2, perplexity=30, init="pca", random_state=SEED).fit_transform(reduced_NE)
    low = layout_N2.min(axis=0)
    span = float((layout_N2.max(axis=0) - low).max()) or 1.0
    return (layout_N2 - low) / span, method
