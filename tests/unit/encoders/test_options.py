"""Options reach the model's `encode`, and make another fingerprint."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from embedwright.encoders.options import WithOptions
from embedwright.model.embedder import Embedder

TEXTS = ["how do tides work, and why do they come twice a day? " * 4, "the moon"]


def test_options_are_those_of_encode_and_a_part_of_the_model(tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("mean")
    cut = WithOptions(model, {"max_tokens": 24})
    assert np.array_equal(cut.encode(TEXTS, task="a"), model.encode(TEXTS, task="a", max_tokens=24))
    assert not np.array_equal(cut.encode(TEXTS), model.encode(TEXTS))
    assert cut.fingerprint() == model.fingerprint() | {"option.max_tokens": "24"}


def test_a_model_without_a_fingerprint_has_none_with_options_either() -> None:
    assert WithOptions(object(), {"max_tokens": 24}).fingerprint() is None
