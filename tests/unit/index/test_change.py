from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_llm import command
from small_index import Counted, Rounded

from embedwright.index.build import build_index, cost
from embedwright.index.change import add, compact, delete, reencode
from embedwright.index.index import Index
from embedwright.model.embedder import Embedder
from embedwright.vectors.corpus import open_encoded
from embedwright.vectors.shards import read_shard

Rows = dict[str, str]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps({"_id": id, "text": text, "n": len(text)}) + "\n" for id, text in rows.items()))
    return path


def content(folder: Path) -> dict[str, list[tuple[str, list[float]]]]:
    """The live documents by id, each with its chunks and their vectors."""
    index, found = Index.open(folder), dict[str, list[tuple[str, list[float]]]]()
    table, rows = index.documents.to_pydict(), index.live_rows()
    vectors = index.vectors.take(rows)
    for vector, (document, start, end) in zip(
        vectors,
        zip(*(index.chunks[name].to_numpy()[rows] for name in index.chunks.column_names), strict=True),
        strict=True,
    ):
        own = (table["text"][document][start:end], vector.tolist())
        found.setdefault(table["id"][document], []).append(own)
    return found


def hits(folder: Path, model: Rounded | None = None) -> list[set[tuple[object, ...]]]:
    """All hits, as sets: equal scores come in the order of the rows, which a change moves."""
    found = Index.open(folder).search(model or Rounded(), ["a", "b", "c"], 99, where=["n>=0"])
    return [{(hit.id, hit.score, hit.text, hit.start, hit.end, hit.metadata["n"]) for hit in own} for own in found]


@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_a_chain_of_changes_equals_a_fresh_index(tmp_path: Path, chunk_tokens: int | None) -> None:
    first = {f"d{i}": f"text {i} of the first" for i in range(25)}
    more, other = {f"e{i}": f"more {i} of it" for i in range(12)}, {f"d{i}": f"other {i}" for i in range(5, 9)}
    out = build_index(
        Rounded(),
        write(tmp_path / "a", first),
        tmp_path / "i",
        chunk_tokens=chunk_tokens,
        metadata=["n"],
        shard_rows=10,
    )
    model = Counted()
    assert add(model, write(tmp_path / "b", more | {"d0": first["d0"]}), out) == (12, 0)
    assert not any("first" in text for text in model.asked[4:])  # the probes alone are encoded again
    assert delete(out, ["d1", "e2", "d20", "d1"]) == 3
    with pytest.raises(ValueError, match="another document 'd5': take --replace"):
        add(Rounded(), write(tmp_path / "c", other), out)
    assert add(Rounded(), tmp_path / "c", out, replace=True) == (0, 4)
    final = {id: text for id, text in (first | more | other).items() if id not in ("d1", "e2", "d20")}
    fresh = build_index(
        Rounded(),
        write(tmp_path / "d", final),
        tmp_path / "f",
        chunk_tokens=chunk_tokens,
        metadata=["n"],
        shard_rows=10,
    )
    assert content(out) == content(fresh) and hits(out) == hits(fresh)
    assert delete(out, ["d1"]) == 0 and add(Rounded(), tmp_path / "c", out) == (0, 0)  # done before: nothing to do
    reader = Index.open(out)
    expected = reader.search_vectors(Rounded().encode(["a"], ""), 9)
    compact(out)
    assert reader.search_vectors(Rounded().encode(["a"], ""), 9) == expected  # a reader outlives the files of before
    assert content(out) == content(fresh) and hits(out) == hits(fresh)
    (part,) = out.glob("part-*")
    assert {path.name for path in out.iterdir()} == {"index.json", part.name}
    if chunk_tokens is None:
        assert dict(open_encoded(out).items()) == final
    with pytest.raises(ValueError, match="changed since it was made"):
        build_index(Rounded(), tmp_path / "a", out, chunk_tokens=chunk_tokens, metadata=["n"], shard_rows=10)
    assert add(Rounded(), write(tmp_path / "g", {"d1": first["d1"]}), out) == (1, 0)
    assert content(out) == content(fresh) | {"d1": content(out)["d1"]}


def test_what_cannot_be_changed(tmp_path: Path) -> None:
    out = build_index(Rounded(), write(tmp_path / "a", {"d1": "one", "d2": "two"}), tmp_path / "i", metadata=["n"])
    with pytest.raises(ValueError, match=r"no document 'd11' .did you mean"):
        delete(out, ["d1", "d11"])
    assert len(content(out)) == 2
    with pytest.raises(ValueError, match="another model, Rounded, than Rounded"):
        add(Rounded("other"), tmp_path / "a", out)
    with pytest.raises(ValueError, match="not an index that can be changed"):
        delete(tmp_path, ["d1"])
    with pytest.raises(ValueError, match="changed: run `index --compact`"):
        delete(out, ["d1"])
        open_encoded(out)
    delete(out, ["d2"])
    assert hits(out) == [set(), set(), set()]
    with pytest.raises(ValueError, match="all documents are deleted"):
        compact(out)
    assert add(Rounded(), tmp_path / "a", out) == (2, 0)


def test_the_number_of_a_line_never_makes_a_document_another_ones_successor(tmp_path: Path) -> None:
    sources = {"a.jsonl": '{"text": "one"}\n{"text": "two"}\n', "a.txt": "one\ntwo\n"}
    for name, content in sources.items():
        source, out = tmp_path / name, tmp_path / f"index of {name}"
        source.write_text(content)
        build_index(Rounded(), source, out)
        before = Index.open(out).documents
        source.write_text(content.replace("one", "other"))
        for replace in (True, False):
            with pytest.raises(
                ValueError, match=rf"{name}:1: this row has no id but its number, '1'.*`_id`.*JSONL"
            ) as found:
                add(Rounded(), source, out, replace=replace)
            assert "--replace" not in str(found.value)
        assert Index.open(out).documents == before
        source.write_text(content + content.splitlines()[0].replace("one", "three") + "\n")
        assert add(Rounded(), source, out) == (1, 0)  # the same file, grown


def test_another_model_encodes_an_index_anew_and_says_its_cost(tmp_path: Path) -> None:
    source = write(tmp_path / "a", {"d1": "one two three", "d2": "four", "d3": "five six"})
    out = build_index(Rounded(), source, tmp_path / "i", chunk_tokens=2, metadata=["n"])
    delete(out, ["d3"])
    with pytest.raises(ValueError, match=r"another model.*--reencode.* 2 documents"):
        build_index(Rounded("other"), source, out, chunk_tokens=2, metadata=["n"])
    assert cost(Rounded("other"), Index.open(out)) == (3, 4)
    reencode(Rounded("other"), out)
    fresh = write(tmp_path / "b", {"d1": "one two three", "d2": "four"})
    build_index(Rounded("other"), fresh, tmp_path / "f", chunk_tokens=2, metadata=["n"])
    assert content(out) == content(tmp_path / "f") and hits(out, Rounded("other")) == hits(
        tmp_path / "f", Rounded("other")
    )
    with pytest.raises(ValueError, match="another model"):
        Index.open(out).search(Rounded(), ["a"])


def test_the_commands_say_what_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("embedwright.encoders.open.open_encoder", lambda name, **how: Rounded(name))
    first, more = write(tmp_path / "a", {"d1": "one", "d2": "two"}), write(tmp_path / "b", {"d2": "2", "d3": "three"})
    out = tmp_path / "i"

    def run(*words: object) -> str:
        assert command(monkeypatch, *words) == 0
        return "".join(capsys.readouterr())

    assert "2 documents, 2 chunks, int8\nrecall@10" in run(
        "index", "m", first, out, "--metadata", "all", "--precision", "int8"
    )
    assert "1 documents added, 1 replaced" in run("index", "m", more, out, "--replace")
    assert "1 documents deleted" in run("index", "m", out, "--delete", "d1")
    assert "2 documents, 2 chunks, int8" in run("index", "m", out, "--compact")
    said = run("index", "n", out, "--reencode")
    assert "nothing to encode" in run("index", "n", out, "--reencode")
    assert "to encode: 2 texts, 2 tokens" in said and "first 2 texts, all 2 take 0:00" in said
    assert {line.split()[1] for line in run("search", "n", out, "q", "--where", "n>1").splitlines()[1:]} == {"d3"}
    for words in (
        [more, out, "--append", "--replace"],
        [more, out, "--append", "--chunk-tokens", "9"],
        [out],
        [more, out, "--compact"],
    ):
        assert command(monkeypatch, "index", "n", *words) == 2
    error = capsys.readouterr().err
    assert all(said in error for said in ("separate changes", "keeps the settings", "give MODEL SOURCE OUT"))


def test_a_model_that_reads_less_than_a_chunk_does_not_encode_an_index_anew(
    tmp_path: Path, tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The end of each chunk would be in no vector."""
    model, rows = tiny_embedder("mean"), {"d0": "the moon pulls at the sea " * 20}
    out = build_index(model, write(tmp_path / "c.jsonl", rows), tmp_path / "i", chunk_tokens=30)
    before = content(out)
    tiny_embedder("mean", "qwen3", max_tokens=24).save(tmp_path / "shorter")
    assert command(monkeypatch, "index", tmp_path / "shorter", out, "--reencode") == 2
    said = capsys.readouterr().err
    assert "chunks of 30 tokens: the model reads 23 of a document" in said and "make a new one" in said
    assert content(out) == before and len(Index.open(out).search(model, ["tides"], 1, "")[0]) == 1


def test_a_stopped_change_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedwright.vectors.store._SHARD", 10)
    out = build_index(Rounded(), write(tmp_path / "a", {"d1": "one"}), tmp_path / "i", metadata=["n"])
    more, before = write(tmp_path / "b", {f"e{i}": f"text {i}" for i in range(35)}), content(out)

    class Stops(Counted):
        def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
            if "text 25" in texts and len(texts) == 10:
                raise KeyboardInterrupt
            return super().encode(texts, task)

    with pytest.raises(KeyboardInterrupt):
        add(Stops(), more, out)
    assert content(out) == before
    model = Counted()
    assert add(model, more, out) == (35, 0)
    assert [text for text in model.asked if text.startswith("text")] == [
        *("text 0", "text 1", "text 33", "text 34"),
        *(f"text {i}" for i in range(20, 35)),
    ]
    assert len(content(out)) == 36
    monkeypatch.setattr("embedwright.vectors.store._SHARD", 20)
    compact(out)
    (part,) = out.glob("part-*")
    assert len(list(part.glob("shard-*"))) == 2 and len(content(out)) == 36


@pytest.mark.parametrize("change", ["add", "delete", "compact", "reencode"])
def test_a_change_leaves_the_users_own_files_alone(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    out, more = tmp_path / "work", write(tmp_path / "b", {"d2": "two", "d3": "three"})
    build_index(Rounded(), write(tmp_path / "a", {"d0": "zero", "d1": "one"}), out, metadata=["n"])
    own = ["part-00000-of-00002/mine.jsonl", "part-00003-of-00010.jsonl", "part-00007-0123456789ab/a", "shard-a.arrow"]
    for name in own:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    delete(out, ["d0"])
    {
        "add": lambda: add(Rounded(), more, out),
        "delete": lambda: delete(out, ["d0", "d1"]),
        "compact": lambda: compact(out),
        "reencode": lambda: reencode(Rounded("other"), out),
    }[change]()
    if change in ("compact", "reencode"):
        own.append("documents.arrow")
        (out / own[-1]).write_text(own[-1])
        assert delete(out, ["d1"]) == 1
    assert all((out / name).read_text() == name for name in own) and not caplog.text


def test_a_change_that_counts_does_not_fail_over_what_it_cannot_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = build_index(Rounded(), write(tmp_path / "a", {"d0": "zero", "d1": "one"}), tmp_path / "i", metadata=["n"])
    delete(out, ["d0"])

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.name == "shard-00000.arrow":
            raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        compact(out)
    assert "cannot be removed" in caplog.text and "Permission denied" in caplog.text
    assert list(content(out)) == ["d1"] and (out / "documents.arrow").exists()
    compact(out)  # this removes them
    assert not (out / "documents.arrow").exists()


@pytest.mark.parametrize("chunk_tokens", [None, 2])
@pytest.mark.parametrize("change", ["delete", "replace"])
def test_a_compacted_index_holds_nothing_of_what_was_deleted(
    tmp_path: Path, change: str, chunk_tokens: int | None
) -> None:
    """The probes are texts, too: the first ones and the longest. They still tell a model without a fingerprint."""
    texts = {f"d{i}": f"text {i}" for i in range(12)} | {"d0": "gone first", "d5": "gone longest " * 9}
    rows = [{"_id": id, "title": f"on {id}", "text": text} for id, text in texts.items()]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    out = build_index(Rounded(), source, tmp_path / "i", chunk_tokens=chunk_tokens, precision="int8")
    if change == "delete":
        delete(out, ["d0", "d5"])
    else:
        add(Rounded(), write(tmp_path / "b", {"d0": "now", "d5": "then"}), out, replace=True)
    compact(out)
    assert not [path for path in out.rglob("*") if path.is_file() and b"gone" in path.read_bytes()]
    (probes,) = out.rglob("probes.arrow")
    assert read_shard(probes).num_rows == 4
    assert add(Rounded(), write(tmp_path / "c", {"e": "more"}), out) == (1, 0)
    with pytest.raises(ValueError, match="another model"):
        add(Rounded("other"), tmp_path / "c", out)
