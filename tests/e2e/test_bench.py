"""`embedwright bench` as a command: real data sets in the hub's cache, killed, by two processes, and of a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import mteb
import numpy as np
import pytest
from bench_cache import TASKS, fill
from datasets import Dataset
from mteb._create_dataloaders import create_dataloader
from mteb.models import OpenAIAPIEncodeWrapper
from mteb.types import PromptType

from embedwright.encoders.http import HttpEncoder
from embedwright.evaluation.mteb import MtebEncoder
from embedwright.model.embedder import Embedder

# The command itself, with small shards, no way out but to this machine, and a count of the documents that are encoded.
SCRIPT = """
import socket, sys
from embedwright.evaluation import mteb
from embedwright.model.embedder import Embedder
from embedwright.vectors import store

connect = socket.socket.connect
def local(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        raise SystemExit(f"network: {address}")
    return connect(self, address)
socket.socket.connect = local
mteb.LARGE, store._SHARD = 8, 4
encode, count = Embedder.encode, 0
def counted(self, texts, task=None, **options):
    global count
    count += len(texts) if task is None else 0
    return encode(self, texts, task=task, **options)
Embedder.encode = counted
from embedwright.cli.main import main
try:
    main()
finally:
    sys.stderr.write(f"documents: {count}\\n")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("hf")
    fill(home / "hub")
    (home / "command.py").write_text(SCRIPT)
    return home


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_embedder: Callable[..., Embedder]) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_embedder("latent", max_tokens=128).save(folder)
    return folder


def environment(place: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "HF_"))}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HOME": str(place), "HF_HUB_OFFLINE": "1"}


def command(place: Path, *words: object, processes: int = 1) -> list[str]:
    binary = Path(sys.executable).parent
    start = ["torchrun", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else ["python"]
    return [str(binary / start[0]), *start[1:], str(place / "command.py"), "bench", *map(str, words)]


def run(place: Path, *words: object, processes: int = 1, code: int = 0) -> tuple[str, int]:
    """What a call prints, and how many documents it has encoded."""
    line = command(place, *words, processes=processes)
    done = subprocess.run(line, env=environment(place), capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr[-3000:]
    counts = [int(line.partition(": ")[2]) for line in done.stderr.splitlines() if line.startswith("documents: ")]
    return done.stdout + done.stderr, sum(counts)


def scores(out: Path) -> dict[str, Any]:
    files = [file for file in out.glob("results/*/*/[!.]*.json") if file.name != "model_meta.json"]
    return {file.stem: json.loads(file.read_text())["scores"] for file in files}


def items(out: Path) -> dict[str, Any]:
    found = {}
    for file in out.glob("results/*/*/*.items.npz"):
        with np.load(file) as stored:
            found[file.name] = {name: stored[name].tolist() for name in stored.files}
    return found


class Whole(NamedTuple):
    out: Path
    documents: int


@pytest.fixture(scope="module")
def whole(place: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """One run that nothing has disturbed."""
    out = tmp_path_factory.mktemp("whole") / "results"
    printed, documents = run(place, model, *TASKS, "--out", out)
    assert 120 < documents <= 130  # both corpora, and the probes of the vectors that are kept
    assert "2 tasks, 0 of them done before" in printed
    assert not (out / "unfinished").exists()
    return Whole(out, documents)


def test_minilm_on_a_data_set_of_the_hubs_cache(place: Path, tmp_path: Path) -> None:
    printed, _ = run(place, "minilm", TASKS[0], "--out", tmp_path / "results")
    (file,) = tmp_path.glob("results/results/embedwright__minilm/*/NanoSciFactRetrieval.json")
    (row,) = json.loads(file.read_text())["scores"]["train"]
    assert row["main_score"] > 0.8  # seven words of a text find it: the data really were read
    assert f"{100 * row['main_score']:6.2f}" in printed and "1 tasks, 0 of them done before" in printed
    with np.load(file.with_name("NanoSciFactRetrieval.items.npz")) as stored:
        assert stored["train/default/score"].mean() == pytest.approx(row["main_score"], abs=1e-5)
        assert len(stored["train/default/id"]) == 9
    assert not list(tmp_path.rglob("*.arrow")) and not list(tmp_path.rglob("*predictions*"))


def killed_when(seen: Callable[[], bool], line: list[str], place: Path) -> None:
    process = subprocess.Popen(line, env=environment(place), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 120
        while not seen() and time.monotonic() < until:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        process.kill()


@pytest.mark.long
def test_killed_inside_a_corpus_it_encodes_the_rest(place: Path, model: Path, whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "results"
    killed_when(
        lambda: len(list(out.glob("unfinished/*/*/*/vectors/*/shard-*.arrow"))) >= 5,
        command(place, model, *TASKS, "--out", out),
        place,
    )
    kept = len(list(out.glob("unfinished/*/*/*/vectors/*/shard-*.arrow")))
    assert 5 <= kept < 15 and not scores(out)
    _, documents = run(place, model, *TASKS, "--out", out)
    assert 120 - 4 * kept <= documents <= whole.documents - 4 * kept
    assert scores(out) == scores(whole.out) and items(out) == items(whole.out)
    assert not (out / "unfinished").exists()


@pytest.mark.long
def test_killed_between_two_tasks_it_does_the_second(place: Path, model: Path, whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "results"
    killed_when(lambda: len(scores(out)) == 1, command(place, model, *TASKS, "--out", out), place)
    (done,) = scores(out)
    (file,) = out.glob(f"results/*/*/{done}.json")
    written = file.stat().st_mtime_ns
    printed, documents = run(place, model, *TASKS, "--out", out)
    assert "2 tasks, 1 of them done before" in printed and documents < 70
    assert file.stat().st_mtime_ns == written
    assert scores(out) == scores(whole.out) and items(out) == items(whole.out)


@pytest.mark.long
def test_two_processes_equal_one(place: Path, model: Path, whole: Whole, tmp_path: Path) -> None:
    printed, documents = run(place, model, *TASKS, "--out", tmp_path / "two", processes=2)
    assert printed.count("2 tasks, 0 of them done before") == 1 and "[2/2]" in printed  # one process speaks
    assert scores(tmp_path / "two") == scores(whole.out) and items(tmp_path / "two") == items(whole.out)
    assert documents == whole.documents  # each corpus once


@pytest.mark.long
def test_a_failure_in_one_of_two_processes_is_told_by_the_first(place: Path, model: Path, tmp_path: Path) -> None:
    printed, _ = run(place, model, TASKS[0], "NanoFiQA2018Retrieval", "--out", tmp_path, processes=2, code=1)
    assert "failed: 1." in printed and "hf download mteb/NanoFiQA2018Retrieval" in printed
    assert list(scores(tmp_path)) == [TASKS[0]]
    fill_again = run(place, model, TASKS[0], "NanoFiQA2018Retrieval", "--out", tmp_path, code=1)[0]
    assert "2 tasks, 1 of them done before" in fill_again


# ---- a server


class Server:
    """Answers `/v1/embeddings` with an Embedder: each text as it comes, as a server that knows no instructions does."""

    def __init__(self, model: Embedder) -> None:
        self.inputs: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # mteb's wrapper looks for the list of models
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
                server.inputs += texts
                vectors = model.encode(texts, prefix="").tolist()
                data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
                usage = {"prompt_tokens": 1, "total_tokens": 1}
                answer = {"object": "list", "model": body["model"], "data": data, "usage": usage}
                sent = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *given: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(model: Path) -> Iterator[Server]:
    served = Server(Embedder.load(model))
    thread = threading.Thread(target=served.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.http.shutdown()
    thread.join()
    served.http.server_close()


@pytest.mark.long
def test_a_server_is_asked_with_the_task_in_its_template(place: Path, server: Server, tmp_path: Path) -> None:
    run(place, f"{server.url}#org/served", TASKS[0], "--out", tmp_path)
    instruction = "Given a scientific claim, retrieve documents that support or refute the claim"
    asked = {text for text in server.inputs if text.startswith("Instruct: ")}
    assert len(asked) == 9 and all(text.startswith(f"Instruct: {instruction}\nQuery: ") for text in asked)
    assert len(set(server.inputs) - asked) == 60
    assert list(tmp_path.glob(f"results/org__served/*/{TASKS[0]}.json"))


def test_mtebs_own_wrapper_of_a_server_sends_prompt_and_text_as_one_string(server: Server, model: Path) -> None:
    """As our client does: the vectors are `encode(prefix="")` of prompt + text, which pools the prompt, too."""
    task, texts = mteb.get_task(TASKS[0]).metadata, ["the moon pulls the sea", "a dog"]
    address = server.url.removesuffix("/v1")
    wrapper = OpenAIAPIEncodeWrapper(
        address,
        "served",
        prompt_dict={task.name: "Find it"},
        use_instructions=True,
        instruction_template="Instruct: {instruction}\nQuery: ",
        modalities=["text"],
        use_chat_template=False,
    )
    where: Any = {"task_metadata": task, "hf_split": "train", "hf_subset": "default", "prompt_type": PromptType.query}
    data = Dataset.from_dict({"id": ["a", "b"], "text": texts})
    batches = create_dataloader(data, task_metadata=task, prompt_type=PromptType.query, batch_size=2)
    theirs = wrapper.encode(batches, **where)
    asked = [f"Instruct: Find it\nQuery: {text}" for text in texts]
    assert server.inputs[-2:] == asked
    local = Embedder.load(model)
    np.testing.assert_allclose(theirs, local.encode(asked, prefix=""), atol=1e-5)
    assert np.abs(np.asarray(theirs) - local.encode(texts, task="Find it")).max() > 1e-3
    ours = MtebEncoder(HttpEncoder(server.url, "served"), {task.name: "Find it"})
    np.testing.assert_allclose(ours.encode(batches, **where), theirs, atol=1e-5)
    documents = MtebEncoder(HttpEncoder(server.url, "served")).encode(
        batches, **where | {"prompt_type": PromptType.document}
    )
    np.testing.assert_allclose(documents, local.encode(texts), atol=1e-5)
