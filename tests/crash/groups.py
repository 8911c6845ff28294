"""Runs functions of a test file in real groups of processes: gloo, on a CPU, as torchrun starts them.

Run as a script, this file imports test files and forks the processes of each group, so that torch is imported once for
all of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import socket
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

_LIMIT_S = 240


def run(file: str, folder: Path, counts: dict[str, tuple[int, ...]], *arguments: str) -> dict[str, dict[int, Any]]:
    """Calls functions of a test file, `function(folder, *arguments)`, in each process of groups of so many processes.

    Returns what each process returned (JSON), by function, size of the group, and rank; None for one that raised or
    died. A group that hangs fails the test.
    """
    server, errors = _server()
    assert server.stdin is not None and server.stdout is not None
    began = errors.seek(0, os.SEEK_END)
    request = [file, str(folder), counts, [*arguments]]
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answered, _, _ = select.select([server.stdout], [], [], _LIMIT_S)
    errors.seek(began)
    print(errors.read()[-6000:])  # shown where a test fails
    if not answered or not server.stdout.readline():
        server.kill()
        _server.cache_clear()
        raise AssertionError("the group hung" if not answered else "the file cannot be imported")

    def of(name: str, count: int) -> list[Any]:
        files = [_returned(folder, name, count, rank) for rank in range(count)]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]

    return {name: {count: of(name, count) for count in sizes} for name, sizes in counts.items()}


def raised(call: Any) -> str | None:
    """Returns the error that a call raises, as `Kind: message`; None if it raises none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@cache
def _server() -> tuple[subprocess.Popen[str], IO[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    errors = TemporaryFile("w+")  # noqa: SIM115  as long as the server
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    return server, errors


def _returned(folder: Path, name: str, count: int, rank: int) -> Path:
    return folder / f"{name}-{count}-{rank}.json"


def _main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a test prints is no answer
    for line in sys.stdin:
        file, folder, counts, arguments = json.loads(line)
        spec = importlib.util.spec_from_file_location("tested", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, sizes in counts.items():
            for count in sizes:
                _group(getattr(module, name), count, Path(folder), arguments)
        answer.write("done\n")
        answer.flush()


def _group(function: Any, count: int, folder: Path, arguments: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        if child := os.fork():
            children.append(child)
            continue
        try:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ |= {key: str(value) for key, value in group.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            found = function(folder, *arguments)
            _returned(folder, function.__name__, count, rank).write_text(json.dumps(found))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    _main()
