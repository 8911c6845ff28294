from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_llm import command

from embedwright.data.files.parts import Shard
from embedwright.data.schema import DataError
from embedwright.index.build import build_index
from embedwright.index.faiss_file import write_faiss
from embedwright.index.index import Index
from embedwright.model.embedder import Embedder
from embedwright.model.encode import NotFiniteError
from embedwright.vectors.corpus import encode_corpus, is_encoded, open_encoded, read_source
from embedwright.vectors.shards import read_shard, vectors_of, write_shard
from embedwright.vectors.store import Manifest, encode_texts, open_vectors


class Hashed:
    """A model with a random but fixed unit vector for each text and task; `fail_at` stops it, as a crash would."""

    def __init__(self, dimension: int = 8, salt: str = "", fail_at: str | None = None) -> None:
        self.dimension, self.salt, self.fail_at = dimension, salt, fail_at
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        if self.fail_at in texts:
            raise KeyboardInterrupt
        self.asked += texts
        return np.stack([self.vector(text, task) for text in texts])

    def vector(self, text: str, task: str | None = None) -> np.ndarray:
        seed = zlib.crc32(f"{self.salt}|{task}|{text}".encode())
        vector = np.random.default_rng(seed).standard_normal(self.dimension)
        return (vector / np.linalg.norm(vector)).astype(np.float32)


def read_vectors(folder: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Ids, texts and vectors of an encoded corpus, as its files have them."""
    shards = [read_shard(path) for path in open_vectors(folder).blocks if isinstance(path, Path)]
    ids, texts = ([text for shard in shards for text in shard[name].to_pylist()] for name in ("id", "text"))
    return ids, texts, np.concatenate([vectors_of(shard) for shard in shards])


def write_source(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


TEXTS = [f"text {i}" for i in range(25)]


def test_shards_hold_ids_texts_and_vectors_in_order(tmp_path: Path) -> None:
    model, seen = Hashed(), list[tuple[int, int]]()
    source = write_source(tmp_path / "corpus.jsonl", TEXTS)
    out = encode_corpus(
        model, source, tmp_path / "new" / "out", task="t", shard_rows=10, progress=lambda *at: seen.append(at)
    )
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        "probes.arrow",
        *(f"shard-0000{i}.arrow" for i in range(3)),
    ]
    assert seen == [(10, 25), (20, 25), (25, 25)]
    schema = pa.ipc.open_file(out / "shard-00002.arrow").schema
    assert schema.names == ["id", "text", "vector"] and schema.field("vector").type == pa.list_(pa.float32(), 8)
    ids, texts, vectors = read_vectors(out)
    assert ids == [f"d{i}" for i in range(25)] and texts == TEXTS and vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, np.stack([model.vector(text, "t") for text in TEXTS]))
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["count"], manifest["dimension"], manifest["task"], manifest["shard_rows"]) == (25, 8, "t", 10)


def test_a_run_that_stopped_encodes_only_what_is_missing(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "corpus.jsonl", TEXTS), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(Hashed(fail_at="text 21"), source, out, shard_rows=5)
    with pytest.raises(ValueError, match="unfinished, 1 of 5 shards"):
        read_vectors(out)
    cut, short = out / "shard-00001.arrow", out / "shard-00002.arrow"
    cut.write_bytes(cut.read_bytes()[:-100])
    write_shard(short, vectors_of(read_shard(short))[1:], {}, dict(read_shard(short).schema.metadata))
    model = Hashed()
    encode_corpus(model, source, out, shard_rows=5)
    probes = [*TEXTS[:2], *TEXTS[-2:]]  # the first and the longest
    assert [text for text in model.asked if text in TEXTS] == [*probes, *TEXTS[5:15], *TEXTS[20:]]
    assert read_vectors(out)[1] == TEXTS
    np.testing.assert_array_equal(read_vectors(out)[2], np.stack([model.vector(text) for text in TEXTS]))


def test_a_small_corpus_has_shards_too_where_a_run_can_stop_and_shows_how_far_it_is(tmp_path: Path) -> None:
    texts, seen = [f"text {i}" for i in range(1100)], list[tuple[int, int]]()
    source = write_source(tmp_path / "corpus.jsonl", texts)
    for make in (encode_corpus, build_index):
        with pytest.raises(KeyboardInterrupt):
            make(Hashed(fail_at="text 1050"), source, tmp_path / make.__name__)
        model = Hashed()
        make(model, source, tmp_path / make.__name__, progress=lambda *at: seen.append(at))
        assert model.asked[-76:] == texts[1024:] and "text 500" not in model.asked
        assert seen[-3:] == [(512, 1100), (1024, 1100), (1100, 1100)]


class Overflows(Hashed):
    """Has no vector for one text: it raises as an `Embedder`, or returns what is not finite, as others."""

    def __init__(self, text: str, raises: bool) -> None:
        super().__init__()
        self.text, self.raises = text, raises

    def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        if self.text in texts and self.raises:
            raise NotFiniteError(list(texts).index(self.text))
        vectors = super().encode(texts, task)
        vectors[[text == self.text for text in texts]] = np.nan
        return vectors


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize(("number", "named"), [(13, "id 'd13': .*'text 13'"), (24, "'text 24'")])
def test_a_text_without_a_vector_is_named_by_its_id_and_by_itself(
    tmp_path: Path, number: int, named: str, raises: bool
) -> None:
    """Not by its place in a shard, or among the probes, to which the longest belong."""
    source, model = write_source(tmp_path / "corpus.jsonl", TEXTS), Overflows(f"text {number}", raises)
    for make in (encode_corpus, build_index):
        with pytest.raises(ValueError, match=named) as found:
            make(model, source, tmp_path / make.__name__, shard_rows=5)
        assert "texts[" not in str(found.value)
    with pytest.raises(ValueError, match=f"'text {number}'") as found:
        encode_texts(model, lambda: TEXTS, len(TEXTS))
    assert "texts[" not in str(found.value)


def test_a_corpus_in_float16_is_indexed_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_source(tmp_path / "corpus.jsonl", TEXTS), tmp_path / "out"
    encode_corpus(Hashed(), source, out, precision="float16")
    monkeypatch.setattr("embedwright.encoders.open.open_encoder", lambda name: Hashed())
    assert command(monkeypatch, "index", "m", source, out, "--faiss") == 0
    assert command(monkeypatch, "index", "m", source, out, "--chunk-tokens", "9") == 2
    assert Manifest.read(out).precision == "float16" and (out / "index.faiss").is_file()
    with pytest.raises(ValueError, match="with precision 'float16', this is 'float32'"):
        encode_corpus(Hashed(), source, out, precision="float32")


def test_an_unfinished_folder_is_known_as_such_whichever_shard_is_missing(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "corpus.jsonl", TEXTS), tmp_path / "out"
    encode_corpus(Hashed(), source, out, shard_rows=10, shard=Shard(1, 2))
    assert not is_encoded(tmp_path) and is_encoded(out)
    with pytest.raises(ValueError, match="unfinished, 1 of 3 shards"):
        open_encoded(out)


def test_what_changed_in_between_is_refused(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "corpus.jsonl", TEXTS), tmp_path / "out"
    encode_corpus(Hashed(), source, out, shard_rows=10)
    with pytest.raises(ValueError, match="another model"):
        encode_corpus(Hashed(salt="trained"), source, out, shard_rows=10)
    with pytest.raises(ValueError, match="another model"):
        encode_corpus(Hashed(9), source, out, shard_rows=10)
    with pytest.raises(ValueError, match="with task None, this is 't'"):
        encode_corpus(Hashed(), source, out, shard_rows=10, task="t")
    with pytest.raises(ValueError, match="with shard_rows 10"):
        encode_corpus(Hashed(), source, out, shard_rows=11)
    with pytest.raises(ValueError, match="with source_sha256"):
        encode_corpus(Hashed(), write_source(source, [*TEXTS[:-1], "other"]), out, shard_rows=10)
    moved = tmp_path / "same.jsonl.gz"
    moved.write_bytes(gzip.compress(write_source(source, TEXTS).read_bytes()))
    encode_corpus(Hashed(), moved, out, shard_rows=10)  # the same documents in another file are no change
    (out / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no manifest"):
        encode_corpus(Hashed(), source, out, shard_rows=10)


def test_vectors_are_known_by_the_fingerprint_of_their_model(
    tiny_embedder: Callable[..., Embedder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, then resumed: by the same model from elsewhere; never under another contract, type or weights."""
    model = tiny_embedder("latent")
    texts = ["tide", "moon", "sea", *(f"{i} is a text longer than any of those before it" for i in range(9))]
    source, out = write_source(tmp_path / "corpus.jsonl", texts), tmp_path / "out"

    def stop(done: int, _: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_corpus(model, source, out, shard_rows=3, progress=stop)

    def resume(other: Embedder) -> None:
        encode_corpus(other, source, out, shard_rows=3)

    shorter, trained = tiny_embedder("latent", max_tokens=8), tiny_embedder("latent")
    trained.network.backbone.embed_tokens.weight.data[5, 0] += 1e-3
    for other, reason in (
        (shorter, r"another model \(contract.max_tokens \(512, now 8\)\)"),
        (tiny_embedder("latent", dtype="bfloat16"), r"dtype \(float32, now bfloat16\)"),
        (trained, r"another model \(weights\)"),
        (Hashed(trained.embedding_dim), "another model"),
    ):
        with pytest.raises(ValueError, match=reason):
            resume(other)
    assert len(list(out.glob("shard-*"))) == 2
    model.save(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "elsewhere")
    resume(Embedder.load(tmp_path / "elsewhere"))
    np.testing.assert_allclose(read_vectors(out)[2], model.encode(texts), atol=1e-6)

    write_faiss(out)
    folded = Embedder.load(tmp_path / "elsewhere").fold()
    monkeypatch.setattr(folded, "encode", lambda texts, task=None: model.encode(texts, task))
    assert Index.open(out).search(folded, ["moon"], k=1)[0][0].text == "moon"
    with pytest.raises(ValueError, match=r"contract.max_tokens \(512, now 8\)"):
        Index.open(out).search(shorter, ["moon"])


def test_a_bfloat16_model_knows_its_vectors_again(
    tiny_embedder: Callable[..., Embedder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_embedder("mean", dtype="bfloat16")
    first = encode_texts(model, lambda: TEXTS, len(TEXTS), folder=tmp_path)
    monkeypatch.setattr(model, "encode", lambda *_, **__: pytest.fail("encoded again"))
    again = encode_texts(model, lambda: TEXTS, len(TEXTS), folder=tmp_path)
    assert again.blocks == first.blocks


def test_a_shard_of_another_folder_is_not_taken_over(tmp_path: Path) -> None:
    class Named(Hashed):
        def fingerprint(self) -> dict[str, str]:
            return {"weights": self.salt}

    source = write_source(tmp_path / "corpus.jsonl", TEXTS)
    encode_corpus(Named(), source, tmp_path / "a", shard_rows=10)
    encode_corpus(Named(salt="other"), source, tmp_path / "b", shard_rows=10)
    (tmp_path / "b" / "shard-00001.arrow").replace(tmp_path / "a" / "shard-00001.arrow")
    with pytest.raises(ValueError, match="unfinished, 1 of 3 shards"):
        read_vectors(tmp_path / "a")


def test_kinds_of_source_ids_and_titles(tmp_path: Path) -> None:
    lines = tmp_path / "mixed.jsonl"
    lines.write_text('{"_id": 7, "title": "Tides", "text": "rise."}\n\n{"text": "no id"}\n{"id": "x", "text": ""}\n')
    ids, texts, _ = read_vectors(encode_corpus(Hashed(), lines, tmp_path / "a"))
    assert (ids, texts) == (["7", "3", "x"], ["Tides rise.", "no id", ""])
    plain = tmp_path / "plain.txt"
    plain.write_text("first\n\n  third  \r\nfour\n", encoding="utf-8")
    ids, texts, _ = read_vectors(encode_corpus(Hashed(), plain, tmp_path / "b"))
    assert (ids, texts) == (["1", "3", "4"], ["first", "third", "four"])
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"id": ["a", None], "text": ["one", "two"], "title": [None, "2"]}), table)
    ids, texts, _ = read_vectors(encode_corpus(Hashed(), table, tmp_path / "c"))
    assert (ids, texts) == (["a", "2"], ["one", "2 two"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"text": "a"}\n{"text": \n', "bad.jsonl:2: not JSON"),
        ('{"text": "a"}\n{"title": "a"}\n', "bad.jsonl:2: no text"),
        ('{"id": "a", "text": "a"}\n{"_id": "a", "text": "b"}\n', "bad.jsonl:2: id 'a' twice"),
        ('{"id": "a", "text": 5}\n', "bad.jsonl:1: text: expected a text"),
        ("\n", "bad.jsonl: no document"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_encoded(tmp_path: Path, content: str, reason: str) -> None:
    source, model = tmp_path / "bad.jsonl", Hashed()
    source.write_text(content)
    with pytest.raises(DataError, match=reason):
        encode_corpus(model, source, tmp_path / "out")
    assert not model.asked and not (tmp_path / "out").exists()


def test_reading_a_source_holds_eight_bytes_an_id(tmp_path: Path) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text("".join(f'{{"_id": "a long id of a document {i}", "text": "x"}}\n' for i in range(20_000)))
    tracemalloc.start()
    assert sum(1 for _ in read_source(source)) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5e6  # a set of them takes 3 MB


def test_a_bad_byte_in_a_plain_text(tmp_path: Path) -> None:
    source = tmp_path / "bad.txt"
    source.write_bytes(b"fine\n\xff\n")
    with pytest.raises(DataError, match=r"bad\.txt:2: not UTF-8 at byte 0"):
        encode_corpus(Hashed(), source, tmp_path / "out")


def test_a_manifest_that_is_none(tmp_path: Path) -> None:
    old = {"source_sha256": "", "count": 3, "task": None, "shard_rows": 10, "dimension": 8, "model": None}
    for content in ("{", '{"count": 3}', json.dumps(old), json.dumps({"format": 1, **old})):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(DataError, match=r"not the manifest.*take a new folder"):
            read_vectors(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    for name, content in (("a.txt", b"first\nsecond\n"), ("b.csv", b"text\nfirst\nsecond\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        _, texts, _ = read_vectors(encode_corpus(Hashed(), tmp_path / name, tmp_path / f"{name}.vectors"))
        assert texts == ["first", "second"]


def test_a_folder_of_shards_is_a_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for shard in range(2):
        (folder / f"x-0000{shard}-of-00002.jsonl").write_text(f'{{"text": "text {shard}"}}\n')
    ids, texts, _ = read_vectors(encode_corpus(Hashed(), folder, tmp_path / "out"))
    assert texts == ["text 0", "text 1"] and len(set(ids)) == 2


def test_processes_that_begin_at_one_moment_share_a_folder_or_are_refused(tmp_path: Path) -> None:
    """Both find the folder empty. Vectors of the one that comes too late are not taken for those of the other."""
    source = write_source(tmp_path / "corpus.jsonl", TEXTS)

    class Late(Hashed):
        def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
            if len(texts) == 10:  # the folder is claimed, and the first shard comes
                manifest = json.loads((tmp_path / "out/manifest.json").read_text())
                (tmp_path / "out/manifest.json").write_text(json.dumps(manifest | {"task": "of the rival"}))
            return super().encode(texts, task)

    with pytest.raises(ValueError, match="other settings meanwhile"):
        encode_corpus(Late(), source, tmp_path / "out", shard_rows=10, shard=Shard(0, 3))
    with pytest.raises(ValueError, match="3 of 3 shards are missing"):
        open_vectors(tmp_path / "out")
