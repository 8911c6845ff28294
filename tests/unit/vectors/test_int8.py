"""The int8 nominator by itself: nothing that may be of the best is left out, and most of the rest is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embedwright.vectors import int8
from embedwright.vectors.int8 import Int8Nominator


def nominated(queries: torch.Tensor, corpus: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    parts = list(Int8Nominator(queries, corpus[:200].mean(0), 3).nominate(corpus, floor))
    assert [start for start, _ in parts] == list(range(0, len(queries), 3))
    return torch.cat([part for _, part in parts])


@pytest.mark.parametrize("kind", ["plain", "one way", "outliers"])
def test_all_that_reach_the_floor_are_named_and_few_others(kind: str) -> None:
    if not int8.available(64):
        pytest.skip("no products of int8 here")
    random = np.random.default_rng(0)
    queries, corpus = (torch.from_numpy(random.standard_normal((n, 64), dtype=np.float32)) for n in (8, 2000))
    if kind == "one way":  # without the mean taken away, int8 could tell none of these apart
        corpus += 100
    elif kind == "outliers":
        corpus[::3, 5] *= 1e4
    exact = queries.double() @ corpus.double().t()
    floor = exact.topk(10).values[:, -1]
    found = nominated(queries, corpus, floor.float())
    assert found[exact >= floor[:, None]].all()
    if kind != "outliers":
        assert found.float().mean() < 0.03
