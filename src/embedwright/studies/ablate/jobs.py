"""Runs the processes of a study, some side by side, each in a folder that no other process works in.

A process holds an exclusive lock on its folder's file `lock` for as long as it lives, whoever started it. So two
commands never run the same cell, and a command that was killed leaves nothing that has to be cleaned up.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embedwright.errors import InputError
from embedwright.files import write_json, write_text
from embedwright.studies.ablate.file import Study
from embedwright.threads import unbound
from embedwright.training.recipe import Recipe
from embedwright.training.run.folder import recipe_text
from embedwright.training.run.signals import Interrupted, stop_on_signal

Say = Callable[[str], None]
_POLL_S = 0.1
_MODULE = "embedwright.studies.ablate.cell"


@dataclass(frozen=True, eq=False)
class Job:
    """One process: the folder that it fills, what it runs, and what its `cell.json` says.

    `key` is equal for two jobs exactly when their results are. Where `wanted` has a job of another key, whose result
    stays as it is, the folder gets the key as a suffix. `result.json` tells the key, too: a job whose folder came from
    elsewhere with its results alone is done.
    """

    wanted: Path
    key: str
    recipe: Recipe
    spec: dict[str, Any]
    processes: int = 1

    @property
    def folder(self) -> Path:
        other = _read(self.wanted / "cell.json") or _read(self.wanted / "result.json")
        return self.wanted if other is None or other["key"] == self.key else Path(f"{self.wanted}-{self.key}")

    @property
    def result(self) -> dict[str, Any] | None:
        """What `result.json` says, or None if there is none yet, or not with the `scores.json` that it tells of."""
        found = _read(self.folder / "result.json")
        whole = found is None or "scores" not in found or (self.folder / "scores.json").is_file()
        return found if whole else None

    def finish(self, facts: dict[str, Any]) -> None:
        """Writes the result of a job that needs no process."""
        spec, folder = self.spec | {"key": self.key}, self.folder
        write_json(folder / "cell.json", spec)
        write_json(folder / "result.json", spec | facts)


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def processes_of(study: Study, anyway: bool) -> int:
    """Returns how many processes train a cell. Raises InputError if this machine is not the one of `run_on`."""
    asked = study.said.run_on
    gpus = re.match(r"(\d+) GPUs?\b", asked or "")
    if gpus and torch.cuda.device_count() >= int(gpus[1]):
        return int(gpus[1])
    if asked and not anyway:
        raise InputError(
            f"{study.file}: not run: needs {asked}, but this machine has {torch.cuda.device_count()} GPUs; "
            "--anyway runs it here"
        )
    return 1


def run_jobs(jobs: Sequence[Job], side_by_side: int, say: Say) -> dict[Job, str]:
    """Runs the jobs without a result, and returns why some failed. The failure of one does not end the others.

    A job that another command runs is waited for. The first SIGINT or SIGTERM is handed on, so that each run keeps a
    checkpoint; then Interrupted is raised.
    """
    waiting = [job for job in jobs if job.result is None]
    total, failed = len(waiting), dict[Job, str]()
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    with stop_on_signal() as stop_requested:
        try:
            while waiting or running:
                for slot in range(side_by_side):
                    if slot not in running and (started := _start_one(waiting, slot, side_by_side)) is not None:
                        running[slot] = started
                        say(f"{started[0].spec['name']}: started in {started[0].folder}")
                time.sleep(_POLL_S)
                if stop_requested.signal is not None:
                    raise Interrupted(f"{stop_requested.signal}: {len(running)} processes stopped at a checkpoint")
                for slot, (job, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[slot]
                    result = job.result
                    if result is None:
                        failed[job] = _last_line(job.folder / "log.txt", process.returncode)
                    left = len(waiting) + len(running)
                    say(f"[{total - left}/{total}] {job.spec['name']}: {_outcome(result) if result else failed[job]}")
        finally:
            for _, process in running.values():
                process.send_signal(signal.SIGTERM)
            for _, process in running.values():
                process.wait()
    return failed


def _start_one(waiting: list[Job], slot: int, slots: int) -> tuple[Job, subprocess.Popen[bytes]] | None:
    """Starts the first waiting job that nobody runs. Forgets jobs that have been done meanwhile."""
    for job in list(waiting):
        if (lock := _claim(job)) is None:
            continue
        try:
            waiting.remove(job)
            if job.result is None:  # another command may have done it
                return job, _start(job, lock, slot, slots)
        finally:
            os.close(lock)  # the process that was started holds it on
    return None


def _claim(job: Job) -> int | None:
    """Locks a job's folder. Returns the open lock file, or None if another process holds it."""
    folder = job.folder
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if job.folder == folder:  # else another command has put a job of another key there
            return lock
    except BlockingIOError:
        pass
    os.close(lock)
    return None


def _start(job: Job, lock: int, slot: int, slots: int) -> subprocess.Popen[bytes]:
    folder = job.folder
    write_text(folder / "recipe.yaml", recipe_text(job.recipe.with_out(folder)))
    command = shlex.join(["embedwright", *sys.argv[1:]])
    write_json(folder / "cell.json", job.spec | {"key": job.key, "command": command})
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.processes}"]
    words = [sys.executable, *(many if job.processes > 1 else []), "-m", _MODULE, str(folder), str(time.time())]
    with (folder / "log.txt").open("ab") as log, unbound():  # this thread may be bound to one core
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        own = cores[slot::slots] or cores[slot % max(len(cores), 1) :][:1]
        environment = dict(os.environ)
        if slots > 1 and own:
            asked = os.environ.get("OMP_NUM_THREADS", "")
            environment["OMP_NUM_THREADS"] = str(min(len(own), int(asked)) if asked.isdigit() else len(own))
        if own:
            os.sched_setaffinity(0, own)  # of this thread: the new process takes it over
        try:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[lock],
                start_new_session=True,  # a terminal's Ctrl-C reaches it once, through this process
            )
        finally:
            if own:
                os.sched_setaffinity(0, cores)


def _outcome(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"failed: {result['failed']}"
    took = sum(result["seconds"].values())
    shown = f"{100 * result['mean']:.2f}" if "mean" in result and not result["smoke"] else "done"
    return f"{shown}, {took:,.0f} s"


def _last_line(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = re.sub(r"^\w+(\.\w+)*\.(?=\w+: )", "", lines[-1]) if lines else ""
    return f"failed (exit code {code}): {said} ({log})"
