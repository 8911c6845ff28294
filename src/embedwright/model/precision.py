"""Vectors as a caller asks for them: fewer dimensions, int8 or bits. What is not finite is found here.

N vectors, E embedding.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from embedwright.errors import InputError

Precision = Literal["float32", "int8", "binary"]


def quantize(vectors_NE: NDArray[np.float32], precision: Precision) -> NDArray[Any]:
    """float32 as it is; int8 scaled per vector, which leaves cosines; binary: signs packed eight to a uint8."""
    check_precision(precision)
    if (bad := first_not_finite(vectors_NE)) is not None:
        raise InputError(f"vector {bad} is not finite")
    if precision == "float32":
        return vectors_NE
    if precision == "int8":
        largest = np.abs(vectors_NE).max(axis=1, keepdims=True)
        scaled: NDArray[np.int8] = np.rint(vectors_NE * (127 / np.maximum(largest, 1e-12))).astype(np.int8)
        return scaled
    bits: NDArray[np.uint8] = np.packbits(vectors_NE > 0, axis=1)
    return bits


def shortened(vectors_NE: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """The first `dim` numbers of each vector, at unit length again. InputError where nothing of a vector is left."""
    cut = vectors_NE[:, :dim]
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    lost = (lengths[:, 0] == 0) & vectors_NE.any(axis=1)
    if lost.any():
        raise InputError(f"texts[{lost.argmax()}]: the first {dim} numbers of its vector are zero: give a larger dim")
    scaled: NDArray[np.float32] = cut / np.maximum(lengths, 1e-12)
    return scaled


def first_not_finite(vectors_NE: NDArray[np.float32]) -> int | None:
    """The index of a vector with a number that is not finite, or None."""
    finite = np.isfinite(vectors_NE).all(axis=1)
    return None if finite.all() else int(finite.argmin())


def check_precision(precision: str) -> None:
    """InputError for a name that `quantize` does not know."""
    if precision not in get_args(Precision):
        raise InputError(f"precision={precision!r} is none of {', '.join(get_args(Precision))}")
