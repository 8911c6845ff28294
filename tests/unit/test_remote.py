"""Paths of stores: in memory here, and in `tests/e2e/test_ray.py` by a server that speaks S3."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from fake_llm import command

from embedwright.data.files.parts import Shard, folder_of_part, write_part
from embedwright.data.files.tasks import write_tasks
from embedwright.data.schema import Task
from embedwright.data.tables.table import open_examples
from embedwright.errors import InputError, MissingPackageError, NotFoundError, OutputExistsError
from embedwright.model.embedder import Embedder
from embedwright.remote import RemoteFolder, fetched, local_folder
from embedwright.vectors.corpus import encode_corpus

TEXTS = [f"tide {i}" for i in range(23)]


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


def put(store: fsspec.AbstractFileSystem, path: str, rows: list[dict[str, object]]) -> str:
    store.pipe_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return f"memory://{path}"


def content(store: fsspec.AbstractFileSystem, folder: str) -> dict[str, bytes]:
    return {path.rpartition("/")[2]: store.cat_file(path) for path in store.find(folder)}


# ---- reading


def test_a_file_is_fetched_once_with_its_tasks_and_again_when_it_has_changed(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.pipe_file("/b/data/rows.jsonl", b"one")
    store.pipe_file("/b/data/rows.jsonl.tasks.jsonl", b"tasks")
    store.pipe_file("/b/data/other.jsonl", b"other")
    here = fetched("memory://b/data/rows.jsonl")
    assert here.name == "rows.jsonl" and here.is_relative_to(os.environ["EMBEDWRIGHT_CACHE"])
    assert {path.name: path.read_bytes() for path in here.parent.glob("[!.]*")} == {
        "rows.jsonl": b"one",
        "rows.jsonl.tasks.jsonl": b"tasks",
    }
    with monkeypatch.context() as without:
        without.setattr(type(store), "get", None)
        assert fetched("memory://b/data/rows.jsonl") == here
    store.pipe_file("/b/data/rows.jsonl", b"two")
    assert fetched("memory://b/data/rows.jsonl").read_bytes() == b"two" and here.read_bytes() == b"one"


def test_a_folder_is_fetched_with_what_lies_below_it(store: fsspec.AbstractFileSystem) -> None:
    for name in ("corpus.jsonl", "qrels/test.tsv"):
        store.pipe_file(f"/b/beir/{name}", name.encode())
    store.pipe_file("/b/beirut/x", b"another folder")
    here = fetched("memory://b/beir/")
    found = {path.relative_to(here).as_posix(): path.read_text() for path in here.rglob("*") if path.is_file()}
    assert here.name == "beir" and found == {"corpus.jsonl": "corpus.jsonl", "qrels/test.tsv": "qrels/test.tsv"}


def test_of_a_folder_that_has_grown_only_what_is_new_is_copied(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of vectors of which a part was missing: the others are tens of gigabytes."""
    copied, get = list[str](), type(store).get

    def noted(self: fsspec.AbstractFileSystem, names: list[str], *rest: object, **options: object) -> None:
        copied.extend(name.rpartition("/")[2] for name in names)
        get(self, names, *rest, **options)

    monkeypatch.setattr(type(store), "get", noted)
    for name in ("manifest.json", "below/shard-0", "shard-1"):
        store.pipe_file(f"/b/vectors/{name}", name.encode())
    first = fetched("memory://b/vectors")
    store.pipe_file("/b/vectors/shard-2", b"new")
    store.pipe_file("/b/vectors/shard-1", b"changed")
    second = fetched("memory://b/vectors")
    assert sorted(copied) == ["manifest.json", "shard-0", "shard-1", "shard-1", "shard-2"]
    found = {path.relative_to(second).as_posix(): path.read_bytes() for path in second.rglob("*") if path.is_file()}
    assert found.keys() == {"manifest.json", "below/shard-0", "shard-1", "shard-2"}
    assert found["shard-1"] == b"changed" and found["below/shard-0"] == b"below/shard-0"
    assert (first / "shard-1").read_bytes() == b"shard-1"
    (first / "manifest.json").unlink()  # an earlier copy that is being removed
    (second / "manifest.json").unlink()
    store.pipe_file("/b/vectors/shard-3", b"newer")
    assert (fetched("memory://b/vectors") / "manifest.json").read_bytes() == b"manifest.json"
    store.pipe_file("/other/vectors/shard-1", b"of another folder")
    assert (fetched("memory://other/vectors") / "shard-1").read_bytes() == b"of another folder"


def test_what_cannot_be_read_is_named(store: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    assert fetched(tmp_path) == tmp_path == fetched(str(tmp_path))
    with pytest.raises(NotFoundError, match="memory://b/nothing does not exist"):
        fetched("memory://b/nothing")
    with pytest.raises(InputError, match="nosuch://b/x cannot be opened: Protocol not known"):
        fetched("nosuch://b/x")
    store.pipe_file("/b/evil/../../x", b"")
    with pytest.raises(InputError, match="leads out of its folder"):
        fetched("memory://b/evil")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "adlfs", None)
    with pytest.raises(MissingPackageError, match="Install adlfs"):
        RemoteFolder("abfs://box/folder", Path())


# ---- writing


class Letters:
    """A vector for each text; `stop` ends the work at a text, as a killed process does."""

    def __init__(self, stop: str = "") -> None:
        self.stop, self.asked = stop, list[str]()

    def encode(self, texts: list[str], task: str | None = None) -> list[list[float]]:
        if self.stop in texts:
            raise KeyboardInterrupt
        self.asked += texts
        return [[len(text), ord(text[-1]), 1.0] for text in texts]

    def fingerprint(self) -> dict[str, str]:
        return {"weights": "letters"}


def ends_with(name: str, end: str) -> None:
    if name.endswith(end):
        raise KeyboardInterrupt


def test_a_shard_is_sent_when_it_is_whole_and_never_encoded_again(
    store: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    """On machines that share the store alone: the first is stopped, a cut file lies there, the second goes on."""
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(TEXTS))
    one = encode_corpus(Letters(), source, tmp_path / "one", shard_rows=5)

    def run(model: Letters, shard: Shard | None = None, **options: str) -> None:
        with local_folder("memory://b/vectors") as (folder, remote):
            encode_corpus(model, source, folder, shard_rows=5, shard=shard, remote=remote, **options)
            assert not [*folder.glob("shard-*")]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # after its first file
        put_file = type(store).put_file
        patch.setattr(type(store), "put_file", lambda *words: ends_with(words[-1], "manifest.json") or put_file(*words))
        run(Letters())
    assert [*content(store, "/b/vectors")] == ["probes.arrow"]
    with pytest.raises(KeyboardInterrupt):
        run(Letters(stop=TEXTS[12]))
    assert sorted(content(store, "/b/vectors")) == [
        "manifest.json",
        "probes.arrow",
        "shard-00000.arrow",
        "shard-00001.arrow",
    ]
    store.pipe_file("/b/vectors/shard-00002.arrow", (one / "shard-00002.arrow").read_bytes()[:-20])
    run(other := Letters(), Shard(1, 2))
    assert other.asked == TEXTS[10:]
    run(again := Letters())
    assert again.asked == []
    assert content(store, "/b/vectors") == {path.name: path.read_bytes() for path in one.iterdir()}
    with pytest.raises(InputError, match=r"^memory://b/vectors was encoded with precision"):
        run(Letters(), precision="float16")
    store.rm("/b/vectors/manifest.json")
    with pytest.raises(OutputExistsError, match=r"memory://b/vectors holds shard-00000.arrow and no manifest.json"):
        run(Letters())


def test_a_part_may_begin_between_the_two_files_by_which_another_takes_the_folder(
    store: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(TEXTS))
    one = encode_corpus(Letters(), source, tmp_path / "one", shard_rows=5)

    def run(index: int) -> None:
        with local_folder("memory://b/vectors") as (folder, remote):
            encode_corpus(Letters(), source, folder, shard_rows=5, shard=Shard(index, 2), remote=remote)

    put_file = type(store).put_file

    def slow(self: fsspec.AbstractFileSystem, local: str, path: str, **options: object) -> None:
        if path.endswith("manifest.json"):
            monkeypatch.setattr(type(store), "put_file", put_file)
            assert list(content(store, "/b/vectors")) == ["probes.arrow"]
            run(1)
        put_file(self, local, path, **options)

    monkeypatch.setattr(type(store), "put_file", slow)
    run(0)
    assert content(store, "/b/vectors") == {path.name: path.read_bytes() for path in one.iterdir()}


def test_encode_and_mine_read_and_write_stores_as_they_do_folders(
    store: fsspec.AbstractFileSystem,
    tmp_path: Path,
    tiny_embedder: Callable[..., Embedder],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_embedder("mean").save("model")
    documents = [{"_id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
    rows = [{"id": f"e{i}", "task": "t", "query": f"moon {i}", "positives": [TEXTS[i]]} for i in range(9)]
    write_tasks(Path("tasks"), [Task(name="t", instruction="Find the tide")])
    for place in ("memory://b", "."):
        if place != ".":
            put(store, "/b/docs.jsonl", documents)
            put(store, "/b/rows.jsonl", rows)
            store.pipe_file("/b/rows.jsonl.tasks.jsonl", Path("tasks").read_bytes())
        else:
            for name in ("docs.jsonl", "rows.jsonl", "rows.jsonl.tasks.jsonl"):
                Path(name).write_bytes(store.cat_file(f"/b/{name}"))
        assert command(monkeypatch, "encode", "model", f"{place}/docs.jsonl", f"{place}/vectors") == 0
        mine = ("mine", f"{place}/rows.jsonl", "--corpus", f"{place}/vectors", "--teacher", "model", "--rule", "naive")
        for index in (1, 0):
            assert command(monkeypatch, *mine, "--out", f"{place}/mined.jsonl", "--shard", f"{index}/2") == 0
    assert "encodes all" not in capsys.readouterr().err  # the corpus is encoded
    assert content(store, "/b/vectors") == {path.name: path.read_bytes() for path in Path("vectors").iterdir()}
    mined = open_examples(fetched("memory://b/mined.jsonl"))
    assert [*mined] == [*open_examples(Path("mined.jsonl"))] and len(mined) == 9
    assert mined.tasks["t"].instruction == "Find the tide"
    assert content(store, "/b/mined.jsonl").keys() == {path.name for path in Path("mined.jsonl").iterdir()}

    out = ("--out", "memory://b/mined.jsonl", "--shard", "0/2")
    changed = {path: info["created"] for path, info in store.find("/b/mined.jsonl", detail=True).items()}
    assert command(monkeypatch, *mine, *out) == 0  # the part is done: nothing is sent
    assert changed == {path: info["created"] for path, info in store.find("/b/mined.jsonl", detail=True).items()}
    assert command(monkeypatch, *mine, *out, "--negatives", 2) == 2  # parts of other settings


def made(shard: Shard, settings: dict[str, object], inside: Callable[[], object] = lambda: None) -> None:
    """Makes a part of memory://b/parts. `inside` runs while it is at work."""

    def write(file: Path) -> dict[str, int]:
        inside()
        file.write_text('{"query": "q", "positive": "p"}\n')
        return {"rows": 1}

    with folder_of_part("memory://b/parts", shard) as (folder, remote):
        write_part(folder, shard, settings, write, remote)


def test_parts_of_other_settings_are_refused_in_a_store_though_both_begin_before_one_ends(
    store: fsspec.AbstractFileSystem,
) -> None:
    def other() -> None:
        with pytest.raises(InputError, match=r"memory://b/parts holds parts made with seed 0, and this is 1"):
            made(Shard(1, 2), {"seed": 1})

    made(Shard(0, 2), {"seed": 0}, other)
    assert {name for name in content(store, "/b/parts") if name.endswith(".jsonl")} == {"part-00000-of-00002.jsonl"}
    with pytest.raises(InputError, match="made with seed 2"):  # both saw an empty folder; the later settings stand
        made(Shard(1, 2), {"seed": 0}, lambda: store.pipe_file("/b/parts/parts.json", b'{"seed": 2, "parts": 2}'))
    assert {name for name in content(store, "/b/parts") if name.endswith(".jsonl")} == {"part-00000-of-00002.jsonl"}


def test_of_a_part_that_is_done_no_row_is_fetched(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(Shard(0, 1), {})
    before, fetched_files, get_file = content(store, "/b/parts"), list[str](), type(store).get_file

    def noted(self: fsspec.AbstractFileSystem, path: str, *rest: object, **options: object) -> None:
        fetched_files.append(path.rpartition("/")[2])
        get_file(self, path, *rest, **options)

    monkeypatch.setattr(type(store), "get_file", noted)
    made(Shard(0, 1), {}, lambda: pytest.fail("made again"))
    assert set(fetched_files) == {"parts.json", "part-00000-of-00001.jsonl.report.json"}
    assert content(store, "/b/parts") == before


def test_a_store_that_cannot_be_written_is_known_before_the_work_and_later_costs_no_work(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("no key")

    worked: list[bool] = []
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"parts\.json cannot be"):
        patch.setattr(type(store), "put_file", refuse)
        made(Shard(0, 1), {}, lambda: worked.append(True))
    assert not worked
    with monkeypatch.context() as patch, pytest.raises(InputError, match="Its files are in") as error:
        made(Shard(0, 1), {}, lambda: patch.setattr(type(store), "put_file", refuse))
    kept = Path(str(error.value).rpartition("files are in ")[2].partition(": copy")[0])
    try:
        for name in ("part-00000-of-00001.jsonl", "part-00000-of-00001.jsonl.report.json"):
            store.put_file(str(kept / name), f"/b/parts/{name}")
        made(Shard(0, 1), {}, lambda: worked.append(True))
        assert not worked and len(open_examples(fetched("memory://b/parts"))) == 1
    finally:
        shutil.rmtree(kept.parent)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["encode", "minilm", "x.txt", "nosuch://b/x"], "Protocol not known"),
        (["mine", "x.jsonl", "--out", "memory://b/x"], "add --shard 0/1"),
        (["mine", "memory://b/x.jsonl", "--out", "x.jsonl"], "memory://b/x.jsonl does not exist"),
        (["index", "minilm", "x.txt", "memory://b/x"], "this is written on this disk"),
        (["data", "clean", "x.jsonl", "--out", "memory://b/x.jsonl"], "this is written on this disk"),
    ],
)
def test_where_a_store_cannot_be_used_the_command_says_so(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err
