from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_index import Counted, Rounded, small_corpus

from embedwright.errors import InputError
from embedwright.index import build
from embedwright.index import documents as docs
from embedwright.index.build import build_index
from embedwright.index.change import add, compact, delete, reencode
from embedwright.index.index import Index
from embedwright.model.embedder import Embedder
from embedwright.vectors.corpus import encode_corpus, open_encoded

ROWS = [
    {"_id": "a", "title": "The moon", "text": "The moon pulls at the sea and makes tides twice a day.", "lang": "en"},
    {
        "_id": "b",
        "title": "",
        "text": "Une marée monte et descend.  Elle suit la lune \N{WATER WAVE} deux fois par jour.",
    },
    {"_id": "c", "text": "short", "lang": "en"},
    {"_id": "d", "title": "a long title " * 40, "text": "What is it that such a title leaves of the room? Little."},
]


def write(path: Path, rows: Sequence[dict[str, object]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_whole_documents_give_the_vectors_that_encode_gives(tmp_path: Path) -> None:
    source = write(tmp_path / "corpus.jsonl")
    plain = Index.open(encode_corpus(Rounded(), source, tmp_path / "plain"))
    index = Index.open(build_index(Rounded(), source, tmp_path / "index"))
    np.testing.assert_array_equal(next(plain.vectors.tiles(9))[1], next(index.vectors.tiles(9))[1])
    (hit, *_), (old, *_) = (one.search(Rounded(), ["moon"])[0] for one in (index, plain))
    row = next(row for row in ROWS if row["_id"] == hit.id)
    assert (hit.id, hit.score) == (old.id, old.score)
    assert hit[2:] == (row["text"], row.get("title", ""), 0, len(str(row["text"])), {})
    assert list(open_encoded(tmp_path / "index").items()) == list(open_encoded(tmp_path / "plain").items())  # mining


def test_all_sources_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "beir").mkdir()
    for name, rows in (("corpus", ROWS), ("queries", [{"_id": "q", "text": "moon"}])):
        write(tmp_path / "beir" / f"{name}.jsonl", rows)
    (tmp_path / "beir" / "qrels").mkdir()
    (tmp_path / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\n")
    pages = tmp_path / "pages" / "sea"
    pages.mkdir(parents=True)
    (pages / "tides.md").write_text("# Of tides\n\nThe sea.\n")
    (pages / "moon.txt").write_text("Moon.\n")
    expected = Index.open(build_index(Rounded(), write(tmp_path / "r.jsonl"), tmp_path / "a")).documents
    for i, source in enumerate((tmp_path / "rows.parquet", tmp_path / "beir")):
        assert Index.open(build_index(Rounded(), source, tmp_path / f"of{i}")).documents == expected
    table = Index.open(build_index(Rounded(), tmp_path / "pages", tmp_path / "p")).documents.to_pydict()
    assert table == {
        "id": ["sea/moon.txt", "sea/tides.md"],
        "title": ["moon", "Of tides"],
        "text": ["Moon.\n", "The sea.\n"],
    }


def test_chunks_cover_the_text_and_fit_the_model(tmp_path: Path, tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("mean")
    index = Index.open(build_index(model, write(tmp_path / "c.jsonl"), tmp_path / "i", chunk_tokens=9, overlap=3))
    texts, titles = index.documents["text"].to_pylist(), index.documents["title"].to_pylist()
    chunks = list(zip(*(index.chunks[name].to_pylist() for name in ("document", "start", "end")), strict=True))
    tokens = lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    read = []
    for row, text in enumerate(texts):
        own = [(a, b) for document, a, b in chunks if document == row]
        covered = {place for a, b in own for place in range(a, b)}
        assert all(char.isspace() for place, char in enumerate(text) if place not in covered)
        assert all(b2 > a2 and a2 <= b1 + 1 for (_, b1), (a2, b2) in itertools.pairwise(own))
        assert len(own) == 1 or any(a2 < b1 for (_, b1), (a2, _) in itertools.pairwise(own))  # they overlap
        assert all(len(tokens(text[a:b])) <= 10 for a, b in own)  # a cut may split one token in two
        read += [f"{titles[row]} {text[a:b]}".strip() for a, b in own]
    fits = [model.tokenize([text]).ids_T.numel() <= model.max_tokens for text in read]
    assert len(chunks) > len(texts) + 4
    short = [i for i, (row, *_) in enumerate(chunks) if ROWS[row]["_id"] != "d"]
    assert all(fits[i] for i in short)
    vectors = next(index.vectors.tiles(99))[1]
    np.testing.assert_allclose(vectors[short], model.encode([read[i] for i in short]), atol=1e-6)


def test_one_hit_a_document_is_its_best_chunk_as_faiss_ranks_it(tmp_path: Path) -> None:
    words = np.random.default_rng(0).integers(0, 30, (40, 25))
    rows = [{"_id": f"d{i}", "text": " ".join(f"w{w}" for w in own[: 1 + i % 25])} for i, own in enumerate(words)]
    index = Index.open(build_index(Rounded(), write(tmp_path / "c.jsonl", rows), tmp_path / "i", chunk_tokens=2))
    queries = [f"query {i}" for i in range(7)]
    flat = faiss.IndexFlatIP(6)
    flat.add(next(index.vectors.tiles(9999))[1])
    scores, places = flat.search(Rounded().encode(queries, ""), flat.ntotal)
    document = index.chunks["document"].to_numpy()
    for k in (1, 5, 40, 99):
        for q, hits in enumerate(index.search(Rounded(), queries, k)):
            best: dict[str, float] = {}
            for score, place in zip(scores[q], places[q], strict=True):
                best.setdefault(f"d{document[place]}", float(score))
            assert [hit.score for hit in hits] == sorted(best.values(), reverse=True)[:k]
            assert all(best[hit.id] == hit.score for hit in hits) and len({hit.id for hit in hits}) == len(hits)
            for hit in hits:
                (again,) = Rounded().encode([hit.text[hit.start : hit.end]]) @ Rounded().encode([queries[q]], "")[0]
                assert again == hit.score
    each = index.search(Rounded(), queries[:1], 60, each_chunk=True)[0]
    assert [hit.score for hit in each] == scores[0][:60].tolist()


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = small_corpus(tmp_path / "corpus.jsonl"), tmp_path / "out"

    class Stops(Counted):
        def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
            if "text 25" in texts and len(texts) == 10:
                raise KeyboardInterrupt
            return super().encode(texts, task)

    with pytest.raises(KeyboardInterrupt):
        build_index(Stops(), source, out, shard_rows=10)
    with pytest.raises(ValueError, match="run the same `index` command"):
        Index.open(out)
    with pytest.raises(ValueError, match="chunk_tokens None, this is 3"):
        build_index(Rounded(), source, out, shard_rows=10, chunk_tokens=3)
    model = Counted()
    build_index(model, source, out)  # whose own shard size stays
    probes = ["text 0", "text 1", "text 55", "text 56"]
    assert model.asked == [*probes, *(f"text {i}" for i in range(20, 57))]
    fresh = build_index(Rounded(), source, tmp_path / "fresh", shard_rows=10)
    files = lambda folder: {path.name: path.read_bytes() for path in folder.glob("*.arrow")}  # noqa: E731
    assert files(out) == files(fresh)
    source.write_text(source.read_text() + '{"text": "more"}\n')
    with pytest.raises(ValueError, match=r"other documents.*--append"):
        build_index(Rounded(), source, out, shard_rows=10)


def test_no_index_is_begun_over_documents_that_are_none_of_an_index(tmp_path: Path) -> None:
    source = tmp_path / "documents.arrow"  # as the file of an index is named
    with pa.ipc.new_file(str(source), pa.schema({"text": pa.string()})) as writer:
        writer.write_batch(pa.RecordBatch.from_pydict({"text": ["one", "two"]}))
    before = source.read_bytes()
    with pytest.raises(InputError, match=r"holds a documents\.arrow that is of no index: take a new"):
        build_index(Rounded(), source, tmp_path)
    assert source.read_bytes() == before
    assert len(Index.open(build_index(Rounded(), source, tmp_path / "index")).live_rows()) == 2


@pytest.mark.parametrize("change", ["none", "compact", "reencode"])
def test_encode_refuses_the_folder_of_an_index(tmp_path: Path, change: str) -> None:
    source, model = small_corpus(tmp_path / "corpus.jsonl"), Rounded("other" if change == "reencode" else "")
    out = build_index(Rounded(), source, tmp_path / "out")
    if change != "none":
        delete(out, ["d0"])
        compact(out) if change == "compact" else reencode(model, out)
    before = sorted(out.rglob("*"))
    with pytest.raises(InputError, match="out is an index: take a new or empty folder, or add"):
        encode_corpus(model, source, out)
    assert sorted(out.rglob("*")) == before


def test_another_model_is_refused_before_a_document_is_read(
    tmp_path: Path, tiny_embedder: Callable[..., Embedder]
) -> None:
    source, model = write(tmp_path / "c.jsonl"), tiny_embedder("mean")
    build_index(model, source, tmp_path / "i", chunk_tokens=100)
    model.contract = model.contract.model_copy(update={"max_tokens": 40})  # it reads less than such a chunk
    with pytest.raises(
        ValueError, match=r"another model.*contract\.max_tokens.*same --max-tokens.*--reencode.* 4 docu"
    ):
        build_index(model, source, tmp_path / "i", chunk_tokens=100)


@pytest.mark.parametrize("held_up", ["docs.digest_of", "encode_part"])
def test_a_slower_run_of_the_same_build_undoes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_up: str
) -> None:
    source, more, out = write(tmp_path / "c.jsonl"), tmp_path / "more.jsonl", tmp_path / "i"
    more.write_text('{"_id": "z", "text": "more"}\n')
    name, waiting = f"embedwright.index.build.{held_up}", [True]
    real = {"docs.digest_of": docs.digest_of, "encode_part": build.encode_part}[held_up]

    def slow(*given: Any, **how: Any) -> Any:
        if waiting:
            waiting.clear()  # another process is faster, and its index is changed
            build_index(Rounded(), source, out)
            add(Rounded(), more, out)
        return real(*given, **how)

    monkeypatch.setattr(name, slow)
    build_index(Rounded(), source, out)
    assert not waiting and Index.open(out).documents["id"].to_pylist() == ["a", "b", "c", "d", "z"]


def test_a_refused_setting_leaves_the_folder_free(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for how, said in (
        ({"chunk_tokens": 3, "overlap": 3}, "overlap must be smaller"),
        ({"dim": 7}, "--dim 7"),
        ({"overlap": 2}, "overlap 2: whole"),
    ):
        with pytest.raises(ValueError, match=said):
            build_index(Rounded(), small_corpus(tmp_path / "corpus.jsonl"), out, **how)  # type: ignore[arg-type]
    build_index(Rounded(), write(tmp_path / "other.jsonl"), out, chunk_tokens=3, overlap=1)
    assert Index.open(out).facts()["documents"] == len(ROWS)
    (out / "documents.arrow").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be opened as an index"):
        Index.open(out)
