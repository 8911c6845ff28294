from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from small_index import Rounded, small_corpus

from embedwright.index.faiss_file import write_faiss
from embedwright.vectors.corpus import encode_corpus
from embedwright.vectors.store import open_vectors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return encode_corpus(Rounded(), small_corpus(tmp_path / "corpus.jsonl"), tmp_path / "out", shard_rows=10)


def test_the_index_is_plain_faiss(folder: Path) -> None:
    assert write_faiss(folder) == folder / "index.faiss"
    index = faiss.read_index(str(folder / "index.faiss"))
    assert type(index) is faiss.IndexFlatIP
    np.testing.assert_array_equal(index.reconstruct_n(0, index.ntotal), next(open_vectors(folder).tiles(57))[1])


def test_an_unfinished_folder_gets_no_index(folder: Path) -> None:
    (folder / "shard-00003.arrow").unlink()
    with pytest.raises(ValueError, match="unfinished, 1 of 6"):
        write_faiss(folder)
