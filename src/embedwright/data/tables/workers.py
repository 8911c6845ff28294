"""Converts pieces of files in processes of their own, one a core, and gives what they made in order.

The processes are new ones of this interpreter: forks would copy locks that threads hold, and those of `multiprocessing`
would run a user's script once more.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import pyarrow as pa

from embedwright.data.files.pieces import Piece
from embedwright.data.schema import DataError
from embedwright.errors import InputError
from embedwright.threads import cores, unbound

_MOST = 16  # processes: the one that joins what they made is the limit by then, and each takes 0.1 GB
Facts = dict[str, Any]
Work = Callable[[Piece, Facts, Path], Facts]  # gets the settings, writes an Arrow file, returns counts; Facts are JSON


def in_processes(
    work: Work, pieces: Sequence[Piece], settings: Facts, folder: Path
) -> Iterator[tuple[Facts, Path, Iterator[pa.RecordBatch]]]:
    """Lets `work`, a function of a module, convert each piece. Yields its counts, its file and the batches, in order.

    A file lies in `folder` until the next one is asked for. There are at most two for each process. Raises the
    DataError that `work` raises; any other InputError as one, and OSError.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(work)) for _ in range(min(cores(), len(pieces), _MOST))]
        ahead = 2 * len(workers)
        for number in range(-ahead, len(pieces)):
            if number >= 0:
                facts, file = _answer(workers[number % len(workers)], pieces[number]), folder / str(number)
                with pa.OSFile(str(file)) as source, pa.ipc.open_file(source) as made:
                    yield facts, file, map(made.get_batch, range(made.num_record_batches))
                file.unlink()
            if (later := number + ahead) < len(pieces):
                stdin = workers[later % len(workers)].stdin
                assert stdin is not None
                asked = [pieces[later], settings, folder / str(later)]
                with suppress(BrokenPipeError):  # it has died: `_answer` says so when it comes to its piece
                    stdin.write(json.dumps(asked, default=str).encode() + b"\n")
                    stdin.flush()


@contextmanager
def _worker(work: Work) -> Iterator[subprocess.Popen[bytes]]:
    code = f"from {__name__} import _serve; from {work.__module__} import {work.__name__} as work; _serve(work)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-c", code]
    with unbound():  # else all have one core, that of a bound OpenMP
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
    with process:
        try:
            yield process
        finally:
            process.kill()
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # the worker has ended and did not read it
                process.stdin.close()


def _answer(worker: subprocess.Popen[bytes], piece: Piece) -> Facts:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"{piece.file}: the process that read it has ended with status {worker.wait()}")
    facts: Facts = json.loads(line)
    if "error" in facts:
        raise DataError(facts["error"])
    if "failed" in facts:
        raise OSError(facts["failed"])
    return facts


def _serve(work: Work) -> None:
    """Works in a process of its own until its input ends: each line, in JSON, is a piece to convert."""
    logging.disable()  # the process that asks says it
    answers, sys.stdout = sys.stdout, sys.stderr
    lines = SimpleQueue[str]()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(1)  # the process that asked has ended, maybe by a kill: a piece can take an hour

    Thread(target=listen, daemon=True).start()
    while True:
        (file, *place), settings, out = json.loads(lines.get())
        try:
            facts = work(Piece(Path(file), *place), settings, Path(out))
        except InputError as error:
            facts = {"error": str(error)}
        except OSError as error:  # a full disk
            facts = {"failed": str(error)}
        try:
            answers.write(json.dumps(facts) + "\n")
            answers.flush()
        except BrokenPipeError:  # the process that asked was killed
            os._exit(1)
