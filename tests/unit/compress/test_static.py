"""Static students: the numbers against NumPy and scikit-learn, the folder against the libraries that open it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA
from tokenizers import Tokenizer

from embedwright.compress.static import principal, save_static, token_vectors, weighted
from embedwright.encoders.open import open_encoder
from embedwright.errors import InputError, MissingPackageError
from embedwright.model.embedder import Embedder

TEXTS = ["how do tides work?", "The moon pulls at the sea,\nand so does the sun.", "été 3.14", "a </s> in a text", "x"]
HOW = "pip install 'embedwright[static]'"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "latent", "last"])
def test_a_tokens_vector_is_that_of_a_text_of_one_token(
    tiny_embedder: Callable[..., Embedder], pooling: str, bos: bool
) -> None:
    model = tiny_embedder(pooling, bos=bos)
    vocabulary = model.tokenizer.get_vocab()
    words = [word for word in vocabulary if word.isascii() and word.isalpha()]
    assert len(words) > 60 and any(len(word) > 2 for word in words)
    found = token_vectors(model, np.array([vocabulary[word] for word in words]))
    assert np.abs(found - model.encode(words)).max() < 1e-5


def test_tokens_are_read_after_what_stands_in_front_of_documents(tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("mean")
    model.contract = model.network.contract = model.contract.model_copy(update={"document_template": "Query:\n"})
    found = token_vectors(model, np.array([model.tokenizer.get_vocab()["T"]]))
    assert np.abs(found - model.encode(["T"])).max() < 1e-5


def test_components_are_those_of_scikit_learn() -> None:
    vectors = np.random.default_rng(0).standard_normal((300, 12)).astype(np.float32) * np.linspace(3, 1, 12)
    found, expected = principal(vectors, 5), PCA(5, svd_solver="full").fit_transform(vectors.astype(np.float64))
    assert np.abs(np.abs(found) - np.abs(expected)).max() < 1e-4  # either direction of an axis is right
    assert np.abs(found @ found.T - expected @ expected.T).max() < 1e-3


def test_frequent_tokens_are_short() -> None:
    found = weighted(np.ones((1000, 2)))[:, 0]
    total = sum(1 / (rank + 2) for rank in range(1000))
    assert np.allclose(found, [1e-4 / (1e-4 + 1 / (rank + 2) / total) for rank in range(1000)])
    assert (np.diff(found) > 0).all()


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "model2vec", None)
    with pytest.raises(MissingPackageError, match=r"embedwright\[static\]"):
        save_static(tiny_embedder("mean"), tmp_path / "student")
    assert not list(tmp_path.iterdir())


# ---- the folder


@pytest.fixture
def student(tmp_path: Path, tiny_embedder: Callable[..., Embedder]) -> Path:
    pytest.importorskip("model2vec", reason=HOW)
    save_static(tiny_embedder("latent"), tmp_path / "student", dim=24, history=[{"step": "static", "teacher": "tiny"}])
    return tmp_path / "student"


def by_hand(folder: Path, texts: list[str]) -> np.ndarray:
    from safetensors.numpy import load_file

    tokenizer, rows = Tokenizer.from_file(str(folder / "tokenizer.json")), load_file(folder / "model.safetensors")
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    means = np.stack([rows["embeddings"][own].mean(0) for own in ids])
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True))


def test_every_door_gives_the_same_vectors(student: Path) -> None:
    from model2vec import StaticModel
    from sentence_transformers import SentenceTransformer

    expected = by_hand(student, TEXTS)
    assert expected.shape == (5, 24)
    opened = StaticModel.from_pretrained(student)
    assert np.abs(opened.encode(TEXTS) - expected).max() < 1e-5
    assert np.abs(SentenceTransformer(str(student), device="cpu").encode(TEXTS) - expected).max() < 1e-5
    ours = open_encoder(str(student))
    assert np.abs(ours.encode(TEXTS) - expected).max() < 1e-5
    assert np.abs(ours.encode(TEXTS, task="Find it") - expected).max() < 1e-5  # it reads no instructions
    assert json.loads((student / "config.json").read_text())["history"] == [{"step": "static", "teacher": "tiny"}]
    assert "1. static: teacher tiny" in (student / "README.md").read_text()


def test_the_vectors_are_the_teachers_reduced_and_weighted(
    student: Path, tiny_embedder: Callable[..., Embedder]
) -> None:
    from safetensors.numpy import load_file

    rows = load_file(student / "model.safetensors")["embeddings"]
    assert not rows[:2].any()  # <s> and </s> are no text
    teacher = token_vectors(tiny_embedder("latent"), np.arange(2, len(rows)))
    reference = PCA(24, svd_solver="full").fit_transform(teacher.astype(np.float64))
    share = 1 / np.arange(2, len(reference) + 2)
    reference *= (1e-4 / (1e-4 + share / share.sum()))[:, None]
    assert np.abs(np.abs(rows[2:]) - np.abs(reference)).max() < 1e-4


def test_what_cannot_be_made(tmp_path: Path, student: Path, tiny_embedder: Callable[..., Embedder]) -> None:
    with pytest.raises(InputError, match="--dim 33: the model has 32 dimensions"):
        save_static(tiny_embedder("mean"), tmp_path / "other", dim=33)
    with pytest.raises(FileExistsError):
        save_static(tiny_embedder("mean"), student, dim=8)
