from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import pytest

from embedwright.vectors.corpus import encode_corpus
from embedwright.vectors.index import Hit, build_index, search
from embedwright.vectors.store import encode_texts, open_vectors


class Rounded:
    """A model with small whole numbers as vectors: every inner product is exact, and many are equal."""

    def __init__(self, salt: str = "") -> None:
        self.salt = salt

    def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        seeds = [zlib.crc32(f"{self.salt}{task}{text}".encode()) for text in texts]
        vectors = [np.random.default_rng(seed).integers(-3, 4, 6) for seed in seeds]
        return np.asarray(vectors, np.float32).reshape(len(texts), 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"_id": f"d{i}", "text": f"text {i}"}) + "\n" for i in range(57)))
    return encode_corpus(Rounded(), source, tmp_path / "out", shard_rows=10)


def test_search_equals_brute_force_across_shards(folder: Path) -> None:
    queries = [f"query {i}" for i in range(9)]
    hits = search(folder, Rounded(), queries, k=12, task="find")
    scores = Rounded().encode(queries, "find") @ Rounded().encode([f"text {i}" for i in range(57)]).T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :12]
    assert hits == [[Hit(f"d{j}", scores[i, j], f"text {j}") for j in rows] for i, rows in enumerate(best)]
    assert type(hits[0][0].score) is float


def test_the_index_is_plain_faiss(folder: Path) -> None:
    assert build_index(folder) == folder / "index.faiss"
    index = faiss.read_index(str(folder / "index.faiss"))
    assert type(index) is faiss.IndexFlatIP
    np.testing.assert_array_equal(index.reconstruct_n(0, index.ntotal), next(open_vectors(folder).tiles(57))[1])


def test_k_is_cut_to_the_corpus_and_no_query_is_no_hit(folder: Path) -> None:
    (hits,) = search(folder, Rounded(), ["query"], k=1000)
    assert len({hit.id for hit in hits}) == 57
    assert search(folder, Rounded(), []) == []


def test_what_cannot_be_searched(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        search(folder / "nothing", Rounded(), ["query"])
    with pytest.raises(ValueError, match="another model"):
        search(folder, Rounded(salt="other"), ["query"])
    (folder / "shard-00003.arrow").unlink()
    for use in (build_index, lambda folder: search(folder, Rounded(), ["query"])):
        with pytest.raises(ValueError, match="unfinished, 1 of 6"):
            use(folder)


def test_vectors_of_mining_are_no_index(tmp_path: Path) -> None:
    encode_texts(Rounded(), lambda: ["a", "b"], 2, folder=tmp_path)
    (home,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="vectors without documents"):
        search(home, Rounded(), ["query"])


def test_an_index_of_other_vectors_is_not_read(folder: Path, tmp_path: Path) -> None:
    """What `search` reads are the vectors themselves; `index.faiss` is for other programs."""
    expected = search(folder, Rounded(), ["query"])
    other = encode_corpus(Rounded(salt="other"), tmp_path / "corpus.jsonl", tmp_path / "other", shard_rows=10)
    build_index(other).replace(folder / "index.faiss")
    assert search(folder, Rounded(), ["query"]) == expected
