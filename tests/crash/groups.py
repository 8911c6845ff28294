"""Runs functions of a test file in real groups of processes: gloo, on a CPU, as torchrun starts them.

Run as a script, this file imports test files and forks the processes of each group, so that torch is imported once for
all of them. No launcher watches them: whatever ends is ended by the library itself.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

_LIMIT_S = 900  # so that what hangs ends: no test should take half as long


def run(
    file: str, folder: Path, counts: dict[str, tuple[int, ...]], *arguments: str, stuck: Sequence[int] = ()
) -> dict[str, dict[int, Any]]:
    """Calls functions of a test file, `function(folder, *arguments)`, in each process of groups of so many processes.

    Returns what each process returned (JSON), by function, size of the group, and rank; None for one that raised or
    died (`ends` tells which). The ranks of `stuck` are killed once all others have ended. A group that hangs fails the
    test.
    """
    server, errors = _server()
    assert server.stdin is not None and server.stdout is not None
    began = errors.seek(0, os.SEEK_END)
    request = [file, str(folder), counts, [*arguments], [*stuck]]
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answered, _, _ = select.select([server.stdout], [], [], _LIMIT_S)
    errors.seek(began)
    print(errors.read()[-12000:])  # shown where a test fails
    if not answered or not server.stdout.readline():
        os.killpg(server.pid, signal.SIGKILL)
        _server.cache_clear()
        raise AssertionError("the group hung" if not answered else "the file cannot be imported")

    def of(name: str, count: int) -> list[Any]:
        files = [_returned(folder, name, count, rank) for rank in range(count)]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]

    return {name: {count: of(name, count) for count in sizes} for name, sizes in counts.items()}


def ends(folder: Path, name: str, count: int) -> list[int]:
    """Returns how each process of a group ended, by rank: 0, 1 if it raised, its exit status, or minus the signal."""
    found: list[int] = json.loads(_ended(folder, name, count).read_text())
    return found


def raised(call: Any) -> str | None:
    """Returns the error that a call raises, as `Kind: message`; None if it raises none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def limit() -> float:
    """Returns how many seconds this process waits for the others of its group in a step."""
    import torch
    import torch.distributed as dist

    backend: Any = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    found: float = backend.options._timeout.total_seconds()
    return found


def forbid_messages() -> None:
    """Makes it an error, in this process, that a block of `Processes.together` asks the others for something."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from embedwright.processes import Processes

    class NoMessages(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace in ("c10d", "_c10d_functional"):
                raise AssertionError(f"{func} inside of together()")
            if any(kind.__name__ == "DTensor" for kind in types):  # which calls its own functions, seen here in turn
                return NotImplemented
            return func(*args, **(kwargs or {}))

    together = Processes.together

    @contextmanager
    def watched(self: Processes) -> Iterator[None]:
        with together(self), NoMessages():
            yield

    Processes.together = watched  # type: ignore[method-assign,assignment]


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
        process_group=0,
    )
    return server, errors


def _returned(folder: Path, name: str, count: int, rank: int) -> Path:
    return folder / f"{name}-{count}-{rank}.json"


def _ended(folder: Path, name: str, count: int) -> Path:
    return folder / f"{name}-{count}-ends.json"


def _main() -> None:
    import accelerate  # noqa: F401  once for all processes
    import peft  # noqa: F401
    import torch.distributed.checkpoint.state_dict_saver
    import torch.distributed.fsdp  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.utils import logging

    logging.disable_progress_bar()
    faulthandler.enable()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a test prints is no answer
    for line in sys.stdin:
        file, folder, counts, arguments, stuck = json.loads(line)
        spec = importlib.util.spec_from_file_location("tested", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        gc.freeze()  # children neither look through what the imports left nor copy its pages
        for name, sizes in counts.items():
            for count in sizes:
                ended = _group(getattr(module, name), count, Path(folder), arguments, stuck)
                _ended(Path(folder), name, count).write_text(json.dumps(ended))
        answer.write("done\n")
        answer.flush()


def _group(function: Any, count: int, folder: Path, arguments: list[str], stuck: list[int]) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        if child := os.fork():
            children.append(child)
            continue
        status = 1
        try:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ |= {key: str(value) for key, value in group.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            found = function(folder, *arguments)
            _returned(folder, function.__name__, count, rank).write_text(json.dumps(found))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    waits = {rank: os.waitpid(child, 0)[1] for rank, child in enumerate(children) if rank not in stuck}
    for rank in stuck:
        os.kill(children[rank], signal.SIGKILL)
        waits[rank] = os.waitpid(children[rank], 0)[1]
    return [os.waitstatus_to_exitcode(waits[rank]) for rank in range(count)]


if __name__ == "__main__":
    _main()
