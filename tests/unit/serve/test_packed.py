"""A model cut in two gives the vectors of `encode`."""

from __future__ import annotations

import numpy as np
import pytest

from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.serve.packed import PackedModel


def test_texts_of_different_tasks_in_one_batch_have_the_vectors_of_encode(model: Embedder) -> None:
    packed = PackedModel(model)
    tasks = (None, "Find it", "Find a passage")
    read = [packed.read([f"text {task}", "tides"], task) for task in tasks]
    found = packed.embed([text for texts in read for text in texts])
    expected = np.concatenate([model.encode([f"text {task}", "tides"], task=task) for task in tasks])
    assert np.abs(found - expected).max() < 1e-5


def test_ids_become_their_text_without_special_tokens(model: Embedder) -> None:
    packed = PackedModel(model)
    ids = model.text_tokenizer.plain.encode("naïve café 🙂").ids
    assert packed.text_of([*ids, 1], "input[0]") == "naïve café 🙂"
    with pytest.raises(InputError, match=r"input\[0\] holds the token id 400: the model has 400 tokens"):
        packed.text_of([400], "input[0]")
