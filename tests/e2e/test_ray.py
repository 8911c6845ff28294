"""Ray and an S3 server: `make ray` runs this in an environment of its own, and elsewhere it is skipped.

Ray runs two actors on this machine. One is killed inside a part, and what comes out is what one run without Ray gives.
The S3 server is moto's, a mock: it shows that paths, listings and whole files fit, and nothing about a real store.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_llm import command

from embedwright.data.tables.table import open_examples
from embedwright.model.embedder import Embedder
from embedwright.remote import fetched
from embedwright.vectors.corpus import encode_corpus, open_encoded
from embedwright.vectors.store import open_vectors

ROOT = Path(__file__).parents[2]
WHY = "it is not in this environment: `make ray` makes one with the extra [ray], s3fs and moto"
N = 4
TEXTS = [f"tide {i} of the moon" for i in range(60)]
IDS = [f"e{i}" for i in range(20)]  # of the rows that are mined
SHARD = 5  # texts: 12 shards, three a part
DEADLY = TEXTS[37]  # in the second shard of the third part


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray on this machine. Its agents get fixed ports: it waits 15 s for one that chooses its own, and then dies."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip(WHY)
    with (
        tempfile.TemporaryDirectory(prefix="ray") as temp,
        ExitStack() as sockets,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("RAY_AUTH_MODE", "token")  # else a file of the user's home is written
        environment.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        import ray

        names = ("port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
        ports = {}
        for name in (*names, "metrics-export-port"):
            free = sockets.enter_context(socket.socket())
            free.bind(("127.0.0.1", 0))
            ports[name] = free.getsockname()[1]
        sockets.close()
        start = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--temp-dir={temp}"]
        start += ["--num-cpus=2", "--object-store-memory=80000000", "--include-dashboard=false"]
        start += ["--disable-usage-stats"]
        node = subprocess.Popen([*start, *(f"--{name}={number}" for name, number in ports.items())])
        try:
            for _ in range(60):  # it tries to connect for some seconds each time
                with suppress(ConnectionError):
                    ray.init(address=f"127.0.0.1:{ports['port']}", logging_level="ERROR")
                    break
            assert ray.is_initialized() and node.poll() is None
            yield ray
        finally:
            ray.shutdown()
            node.terminate()
            node.wait()


def script(ray: Any, name: str) -> ModuleType:
    """A script of examples/ as a module. The actors get it and this file by value, since neither is installed."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for one in (module, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(one)
    return module


@pytest.fixture
def work(tmp_path: Path, tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_embedder("mean").save("model")
    documents = [{"_id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
    rows = [{"id": f"e{i}", "query": f"moon {i}", "positives": [text]} for i, text in enumerate(TEXTS[:20])]
    for name, each in (("docs", documents), ("rows", rows)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    monkeypatch.setitem(encode_corpus.__kwdefaults__, "shard_rows", SHARD)
    encode_corpus(Embedder.load("model"), Path("docs.jsonl"), Path("one"), precision="float16")
    return tmp_path


class Mortal:
    """A model that notes the texts of each call, and kills its process at a text, once."""

    def __init__(self, model: Any, folder: Path, deadly: str) -> None:
        self.model, self.folder, self.deadly = model, folder, deadly

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode(self, texts: list[str], task: str | None = None) -> Any:
        with (self.folder / f"asked-{os.getpid()}").open("a") as file:
            file.write(json.dumps(list(texts)) + "\n")
        if self.deadly in texts and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.model.encode(texts, task=task)


def asked(folder: Path, size: int) -> Counter[str]:
    """How often each text was asked for, in calls of so many texts, by processes that live or are dead."""
    calls = [json.loads(line) for file in folder.glob("asked-*") for line in file.read_text().splitlines()]
    return Counter(text for call in calls if len(call) == size for text in call)


def test_a_killed_actor_costs_its_shard_and_the_vectors_are_those_of_one_run(
    ray: Any, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script(ray, "ray_encode")

    class MortalEncoder(module.Encoder):  # type: ignore[name-defined]
        def __init__(self, options: Any) -> None:
            super().__init__(options)
            encode_corpus.__kwdefaults__["shard_rows"] = SHARD
            self.model = Mortal(self.model, work, DEADLY)

    monkeypatch.setattr(module, "Encoder", MortalEncoder)
    call = [str(work / "model"), str(work / "docs.jsonl"), str(work / "out"), "--parts", str(N)]
    module.main(call)
    assert f"{N} of {N} parts are done" in capsys.readouterr().out
    assert (work / "killed").exists() and len([*work.glob("asked-*")]) == 3  # two actors, and one in place of the dead
    shard = TEXTS[35:40]
    assert asked(work, SHARD) == Counter({text: 1 + (text in shard) for text in TEXTS})
    assert [id_ for id_, _ in open_encoded(Path("out")).items()] == [f"d{i}" for i in range(60)]
    one, out = ({f.name: f.read_bytes() for f in Path(name).iterdir()} for name in ("one", "out"))
    assert out == one
    module.main(call)
    assert sum(asked(work, SHARD).values()) == 65  # nothing is encoded again


def test_mining_by_ray_is_mining_by_the_command_though_an_actor_is_killed(
    ray: Any, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script(ray, "ray_mine")

    class MortalMiner(module.Miner):  # type: ignore[name-defined]
        def __init__(self, options: Any) -> None:
            super().__init__(options)
            self.teacher = Mortal(self.teacher, work, "moon 12")

    monkeypatch.setattr(module, "Miner", MortalMiner)
    where = [str(work / name) for name in ("rows.jsonl", "one", "mined.parquet")]
    module.main([*where, "--teacher", str(work / "model"), "--negatives", "3", "--parts", str(N)])
    assert (work / "killed").exists()
    mine = ("mine", "rows.jsonl", "--corpus", "one", "--teacher", "model", "--negatives", 3, "--precision", "float16")
    for index in range(N):  # the same parts, since a query's vector moves in the last place with those beside it
        assert command(monkeypatch, *mine, "--out", "alone/mined.parquet", "--shard", f"{index}/{N}") == 0
    mined = [*open_examples(Path("mined.parquet"))]
    assert mined == [*open_examples(Path("alone/mined.parquet"))] and [row.id for row in mined] == IDS


def test_the_recipe_of_the_docs_for_object_stores_gives_the_vectors_of_the_model(ray: Any, work: Path) -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "map_batches" in block)
    import pyarrow.parquet as pq

    table = __import__("pyarrow").table({"id": [f"d{i}" for i in range(60)], "text": TEXTS})
    (work / "corpus").mkdir()
    pq.write_table(table, work / "corpus" / "a.parquet")
    for given, here in (("s3://bucket/", f"{work}/"), ('"my-model"', f'"{work}/model"'), ("size=8", "size=1")):
        assert given in code
        code = code.replace(given, here)
    assert code.count("num_gpus=1") == 1
    exec(code.replace("num_gpus=1", "num_cpus=1"), {"__name__": "__main__"})
    found = pq.read_table(work / "vectors").sort_by("id").to_pylist()
    want = {text: row for text, row in zip(TEXTS, Embedder.load("model").encode(TEXTS), strict=True)}
    assert sorted(row["id"] for row in found) == sorted(f"d{i}" for i in range(60))
    assert all(abs(want[row["text"]] - row["vector"]).max() < 1e-5 for row in found)


@pytest.mark.skipif(not (importlib.util.find_spec("s3fs") and importlib.util.find_spec("moto")), reason=WHY)
def test_s3_by_a_mock_server(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    try:
        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem()
        store.mkdir("bucket")
        store.pipe_file("bucket/corpus/", b"")  # an empty file by which some programs mark a folder
        for name in ("rows.jsonl", "docs.jsonl"):
            store.put_file(name, f"bucket/{'corpus/' if name[0] == 'd' else ''}{name}")
        s3 = "s3://bucket"
        for index in (1, 0):
            encode = ("encode", "model", f"{s3}/corpus", f"{s3}/vectors", "--precision", "float16")
            assert command(monkeypatch, *encode, "--shard", f"{index}/2") == 0
        there = fetched(f"{s3}/vectors")
        assert open_vectors(there).shape == open_vectors(Path("one")).shape
        shards = [{f.name: f.read_bytes() for f in at.glob("shard-*")} for at in (there, Path("one"))]
        assert len(shards[0]) == 12 and shards[0].keys() == shards[1].keys()
        mine = ("mine", f"{s3}/rows.jsonl", "--corpus", f"{s3}/vectors", "--teacher", "model", "--negatives", 3)
        for index in (0, 1):
            for out in (f"{s3}/mined.parquet", "mined.parquet"):
                assert command(monkeypatch, *mine, "--out", out, "--shard", f"{index}/2") == 0
        mined = [*open_examples(fetched(f"{s3}/mined.parquet"))]
        assert mined == [*open_examples(Path("mined.parquet"))] and [row.id for row in mined] == IDS
        assert command(monkeypatch, "encode", "model", f"{s3}/nothing.txt", "out") == 2
        assert command(monkeypatch, "encode", "model", "docs.jsonl", "s3://nobucket/x") == 2
    finally:
        server.stop()
