"""Runs functions of a test file in real groups of processes: gloo, on a CPU, as torchrun starts them.

Run as a script, this file imports the test file once and forks the processes of each group.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any


def run(file: str, folder: Path, counts: dict[str, tuple[int, ...]], *arguments: str) -> dict[str, dict[int, Any]]:
    """Calls functions of a test file, `function(folder, *arguments)`, in each process of groups of so many processes.

    Returns what each process returned (JSON), by function, size of the group, and rank; None for one that raised or
    died. A group that hangs fails the test.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= {"OMP_NUM_THREADS": "1", "EMBEDWRIGHT_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, file, str(folder), json.dumps(counts), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
    print(done.stderr[-6000:])  # shown where a test fails

    def of(name: str, count: int) -> list[Any]:
        files = [_returned(folder, name, count, rank) for rank in range(count)]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]

    return {name: {count: of(name, count) for count in sizes} for name, sizes in counts.items()}


def _returned(folder: Path, name: str, count: int, rank: int) -> Path:
    return folder / f"{name}-{count}-{rank}.json"


def raised(call: Any) -> str | None:
    """Returns the error that a call raises, as `Kind: message`; None if it raises none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _main(file: str, folder: str, counts: str, *arguments: str) -> None:
    spec = importlib.util.spec_from_file_location("tested", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, count in [(name, count) for name, sizes in json.loads(counts).items() for count in sizes]:
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
                found = getattr(module, name)(Path(folder), *arguments)
                _returned(Path(folder), name, count, rank).write_text(json.dumps(found))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
