"""The int8 nominator of the exact search: four times as fast as products in float32, where the processor has it.

Vectors are rounded to int8, so their product is off. The nominator knows by how much at most, and names every document
whose score may reach a query's floor. The search then scores these exactly.

`Q` queries, `N` documents of a block, `E` embedding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from embedwright.cpu import kernels, onednn

_WIDEST = 2**17  # numbers of a vector, for the product of two in int8 to stay within int32
# More than a length loses where the squares of tiny numbers vanish; and its square more than a product does.
TINY = 2.0**-50


def available(width: int) -> bool:
    """Returns whether vectors of this width are multiplied in int8 here."""
    # torch leaves the int8 product of one column unset (_int_mm, torch 2.13)
    return kernels.available() and onednn.int8_matmul_available() and 1 < width <= _WIDEST


def slack(width: int) -> float:
    """Returns what a float32 sum of so many products is off at most, in whatever order, relative to the two lengths'
    product.

    It covers the rounding of lengths, bounds and scores as well; 1 % is for the lengths themselves.
    """
    return float(1.01 * 2.0**-24 * (width + 64))


class Int8Nominator:
    """Names the documents of a block that may reach a floor. `queries` of them are multiplied at once."""

    def __init__(self, query_QE: Tensor, mean_E: Tensor, queries: int) -> None:
        """`mean_E` is taken from every document before it is rounded, which moves all scores of a query alike.

        Where all texts of a model point in nearly one direction, little is left, and rounding loses little.
        """
        self.mean_E, self.queries = mean_E, queries
        self.whole_QE, factor_Q, length_Q, lost_Q = kernels.quantised(query_QE, torch.zeros_like(mean_E))
        # With q = a + d and x = m + b + e, where a and b are what is multiplied, q x is a b + q m, and |d| |b + e| +
        # |a| |e| by Cauchy-Schwarz; beside it what float32 loses of |q| |x - m|. 1 % is for the lengths themselves.
        length_Q, lost_Q, off = length_Q + TINY, lost_Q + TINY, slack(len(mean_E))
        self.bounds = factor_Q, 1.01 * lost_Q + off * length_Q, 1.01 * (length_Q + lost_Q)
        self.shift_Q = (query_QE.double() @ mean_E.double()).float() + off * length_Q * mean_E.norm()

    def nominate(self, document_NE: Tensor, floor_Q: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Gives the number of the first query of each part, and bool (q, N): whose score may be `floor_Q` or more."""
        whole_NE, scale_N, length_N, lost_N = kernels.quantised(document_NE, self.mean_E)
        columns = scale_N, length_N + TINY, lost_N + TINY
        bounds = (*self.bounds, floor_Q - self.shift_Q)
        for start in range(0, len(floor_Q), self.queries):
            own = slice(start, start + self.queries)
            product_QN = onednn.int8_matmul(self.whole_QE[own], whole_NE)
            yield start, kernels.reaches(product_QN, columns, tuple(bound_Q[own] for bound_Q in bounds))
