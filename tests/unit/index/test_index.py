from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_index import Rounded, small_corpus

from embedwright.index.build import build_index
from embedwright.index.change import compact, delete, reencode
from embedwright.index.faiss_file import write_faiss
from embedwright.index.index import Hit, Index
from embedwright.index.layout import Layout
from embedwright.model.embedder import Embedder
from embedwright.vectors.corpus import encode_corpus
from embedwright.vectors.store import encode_texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return encode_corpus(Rounded(), small_corpus(tmp_path / "corpus.jsonl"), tmp_path / "out", shard_rows=10)


def whole(id: str, score: float, text: str) -> Hit:
    return Hit(id, score, text, "", 0, len(text), {})


def test_search_equals_brute_force_across_shards(folder: Path) -> None:
    queries = [f"query {i}" for i in range(9)]
    hits = Index.open(folder).search(Rounded(), queries, k=12, task="find")
    scores = Rounded().encode(queries, "find") @ Rounded().encode([f"text {i}" for i in range(57)]).T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :12]
    assert hits == [[whole(f"d{j}", scores[i, j], f"text {j}") for j in rows] for i, rows in enumerate(best)]
    assert type(hits[0][0].score) is float


def test_queries_without_a_task_are_queries(folder: Path) -> None:
    index = Index.open(folder)
    assert index.search(Rounded(), ["query"]) == index.search(Rounded(), ["query"], task="")
    assert index.search(Rounded(), ["query"]) == index.search_vectors(Rounded().encode(["query"], ""))
    with pytest.raises(ValueError, match="list of texts"):
        index.search(Rounded(), "query")


def test_facts_are_those_of_the_folder(folder: Path) -> None:
    assert Index.open(folder).facts() == {
        "documents": 57,
        "chunks": 57,
        "model": "",
        "dimension": 6,
        "precision": "float32",
        "fingerprint": None,
        "metadata": {},
    }


def test_k_is_cut_to_the_corpus_and_no_query_is_no_hit(folder: Path) -> None:
    (hits,) = Index.open(folder).search(Rounded(), ["query"], k=1000)
    assert len({hit.id for hit in hits}) == 57
    assert Index.open(folder).search(Rounded(), []) == []


def test_a_change_while_an_index_is_opened_is_seen_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = build_index(Rounded(), small_corpus(tmp_path / "c.jsonl"), tmp_path / "i")
    delete(out, ["d1"])
    read, changes = Layout.read, [lambda: compact(out), lambda: reencode(Rounded("other"), out)]

    def read_before_a_change(folder: Path) -> Layout | None:
        found = read(folder)
        if changes:
            changes.pop(0)()  # between the reading of index.json and that of the files that it names
        return found

    monkeypatch.setattr(Layout, "read", read_before_a_change)
    index = Index.open(out)
    assert not changes and len(index.search(Rounded("other"), ["query"], 99)[0]) == 56


def test_what_cannot_be_searched(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        Index.open(folder / "nothing")
    with pytest.raises(ValueError, match="another model"):
        Index.open(folder).search(Rounded(salt="other"), ["query"])
    (folder / "shard-00003.arrow").unlink()
    with pytest.raises(ValueError, match="unfinished, 1 of 6"):
        Index.open(folder)


def test_vectors_of_mining_are_no_index(tmp_path: Path) -> None:
    encode_texts(Rounded(), lambda: ["a", "b"], 2, folder=tmp_path)
    (home,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="vectors without documents"):
        Index.open(home)


def test_an_index_of_other_vectors_is_not_read(folder: Path, tmp_path: Path) -> None:
    """What `search` reads are the vectors themselves; `index.faiss` is for other programs."""
    expected = Index.open(folder).search(Rounded(), ["query"])
    other = encode_corpus(Rounded(salt="other"), tmp_path / "corpus.jsonl", tmp_path / "other", shard_rows=10)
    write_faiss(other).replace(folder / "index.faiss")
    assert Index.open(folder).search(Rounded(), ["query"]) == expected


def test_queries_without_any_instruction_are_said(
    tmp_path: Path, tiny_embedder: Callable[..., Embedder], caplog: pytest.LogCaptureFixture
) -> None:
    """They are read as documents; a model with an instruction of its own reads them under that."""
    plain = tiny_embedder("mean")
    build_index(plain, small_corpus(tmp_path / "corpus.jsonl"), tmp_path / "plain")
    index = Index.open(tmp_path / "plain")
    found = index.search(plain, ["the sea"], 4)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "no instruction" in caplog.text
    caplog.clear()
    assert found == index.search(plain, ["the sea"], 4, "") and found != index.search(plain, ["the sea"], 4, "Find it")
    contract = plain.contract.model_copy(update={"default_task": "Find it"})
    plain.network.contract, plain.network.config.contract = contract, contract.model_dump()
    told = Embedder(plain.network, plain.tokenizer)
    build_index(told, tmp_path / "corpus.jsonl", tmp_path / "told")
    own = Index.open(tmp_path / "told")
    assert own.search(told, ["the sea"], 4) == own.search(told, ["the sea"], 4, "Find it")
    assert not caplog.records
