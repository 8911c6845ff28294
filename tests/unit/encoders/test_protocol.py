"""Queries of any encoder get the model's own instruction, or an error; never the vectors of documents, unsaid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from embedwright.encoders.open import open_encoder
from embedwright.encoders.protocol import encode_queries, task_for
from embedwright.encoders.sharded import ShardedEncoder
from embedwright.model.embedder import Embedder
from embedwright.processes import ALONE

TEXTS = ["how do tides work?", "the moon"]


class Plain:
    """A user's own object, without a method for queries."""

    def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        return np.array([[{None: 0.0, "": 1.0}.get(task, 2.0), 1.0] for _ in texts])


def test_queries_of_any_encoder(family_folder: Callable[[str], Path], tiny_embedder: Callable[..., Embedder]) -> None:
    family = open_encoder(str(family_folder("qwen3-embedding")))
    assert isinstance(family, Embedder)
    own = family.encode(TEXTS, task=family.contract.default_task)
    assert np.array_equal(encode_queries(family, TEXTS), own)
    assert np.array_equal(encode_queries(family, TEXTS, "Find"), family.encode(TEXTS, task="Find"))
    assert encode_queries(Plain(), TEXTS)[:, 0].tolist() == [1.0, 1.0]
    assert encode_queries(Plain(), TEXTS, "Find")[:, 0].tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="no instruction of its own"):
        encode_queries(tiny_embedder("mean"), TEXTS)


def test_what_data_does_not_state_is_the_models_own(family_folder: Callable[[str], Path]) -> None:
    family = Embedder.load(family_folder("qwen3-embedding"))
    own = family.contract.default_task
    for encoder, expected in ((family, own), (ShardedEncoder(family, 0, ALONE), own), (Plain(), "")):
        assert [task_for(encoder, stated) for stated in ("", "Find", None)] == [expected, "Find", None]
    assert np.array_equal(encode_queries(family, TEXTS, ""), family.encode(TEXTS, prefix=""))


def test_what_comes_back_is_checked() -> None:
    class Short(Plain):
        def encode_query(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
            return np.ones((1, 3))

    with pytest.raises(ValueError, match="for 2 texts"):
        encode_queries(Short(), TEXTS)
