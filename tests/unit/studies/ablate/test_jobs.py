from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedwright.studies.ablate import jobs as ablate_jobs
from embedwright.studies.ablate.file import Study
from embedwright.studies.ablate.jobs import Job, run_jobs

# Stands for the module of a cell: it says what it was given, and finishes.
CELL = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
spec = json.loads((folder / "cell.json").read_text())
said = {"cores": sorted(os.sched_getaffinity(0)), "threads": os.environ.get("OMP_NUM_THREADS"), "pid": os.getpid()}
(folder / "said.json").write_text(json.dumps(said | {"at": time.monotonic()}))
time.sleep(spec.get("sleeps", 0))
if spec.get("dies"):
    raise SystemExit("it died of " + spec["dies"])
(folder / "result.json").write_text(json.dumps(spec | {"seconds": {"all": 1.0}, "until": time.monotonic()}))
"""


@pytest.fixture
def make(ablation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """`make(name, key="k", **spec)`: a job whose process is a script without torch."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a_cell.py").write_text(CELL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    monkeypatch.setattr(ablate_jobs, "_MODULE", "a_cell")
    recipe = Study(ablation()).recipe("plain", 1)

    def job(name: str, key: str = "k", **spec: Any) -> Job:
        return Job(tmp_path / "jobs" / name, key, recipe, {"name": name} | spec)

    return job


def said(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.folder / "said.json").read_text())
    return found


def quiet(line: str) -> None:
    pass


def test_two_side_by_side_divide_the_cores_and_this_process_stays_as_it_is(
    make: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores, environment = os.sched_getaffinity(0), dict(os.environ)
    if len(cores) < 2:
        pytest.skip("one core cannot be divided")
    jobs = [make(name, sleeps=0.5) for name in "abc"]
    assert run_jobs(jobs, 2, quiet) == {}
    assert os.sched_getaffinity(0) == cores and dict(os.environ) == environment
    first, second = (set(said(job)["cores"]) for job in jobs[:2])
    assert not first & second and first | second == cores
    assert {said(job)["threads"] for job in jobs} == {str(len(first)), str(len(second))}
    ends = [job.result["until"] for job in jobs if job.result]
    assert said(jobs[1])["at"] < ends[0] and said(jobs[2])["at"] >= min(ends[:2])
    [alone] = [make("d")]
    run_jobs([alone], 1, quiet)
    assert set(said(alone)["cores"]) == cores and said(alone)["threads"] is None
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_jobs([few := make("e")], 2, quiet)
    assert said(few)["threads"] == "1"  # fewer than a share were asked for


def test_a_job_that_another_process_runs_is_waited_for_and_not_run(make: Callable[..., Job]) -> None:
    job, other = make("a"), make("b")
    job.folder.mkdir(parents=True)
    held = (job.folder / "lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("[") and "b" in line:  # by then the other one has been run: now the holder is done
            (job.folder / "result.json").write_text(json.dumps({"key": "k", "seconds": {}}))
            held.close()

    assert run_jobs([job, other], 2, say) == {}
    assert not (job.folder / "said.json").exists() and other.result
    assert not any("a: started" in line for line in lines)


def test_the_lock_lives_as_long_as_the_process_of_the_cell(make: Callable[..., Job]) -> None:
    job = make("a", sleeps=30)
    waiting = [job]
    _, process = ablate_jobs._start_one(waiting, 0, 1) or pytest.fail("not started")
    assert waiting == []
    with (job.folder / "lock").open("r+") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process.kill()
        process.wait()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_failure_is_told_with_its_last_line_and_the_others_go_on(make: Callable[..., Job]) -> None:
    bad, good = make("bad", dies="hunger"), make("good")
    lines: list[str] = []
    failed = run_jobs([bad, good], 1, lines.append)
    assert failed == {bad: f"failed (exit code 1): it died of hunger ({bad.folder / 'log.txt'})"}
    assert good.result and lines[-1] == "[2/2] good: done, 1 s"
    assert run_jobs([good], 1, lambda line: pytest.fail(line)) == {}


def test_a_job_of_another_key_gets_a_folder_of_its_own(make: Callable[..., Job], tmp_path: Path) -> None:
    run_jobs([make("a", "k1")], 1, quiet)
    run_jobs([make("a", "k2")], 1, quiet)
    assert [make("a", key).folder.name for key in ("k1", "k2", "k3")] == ["a", "a-k2", "a-k3"]
    assert make("a", "k1").result and make("a", "k2").result and make("a", "k3").result is None


def test_a_signal_stops_the_cells_and_is_told(make: Callable[..., Job], tmp_path: Path) -> None:
    job = make("a", sleeps=30)
    script = f"""
import signal, threading, time, os
from pathlib import Path
from embedwright.studies.ablate import jobs as ablate_jobs
from embedwright.studies.ablate.jobs import Job, run_jobs
from embedwright.training.recipe import Recipe
ablate_jobs._MODULE = "a_cell"
recipe = Recipe.load({str(tmp_path / "recipe.yaml")!r})
job = Job(Path({str(job.wanted)!r}), "k", recipe, {{"name": "a", "sleeps": 30}})
run_jobs([job], 1, lambda line: print(line, flush=True))
"""
    (tmp_path / "recipe.yaml").write_text(ablate_jobs.recipe_text(job.recipe))
    paths = os.pathsep.join([str(tmp_path / "code"), *sys.path])
    command = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    until = time.monotonic() + 300  # on a busy machine
    while not (job.folder / "said.json").exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.1)
    pid = said(job)["pid"]
    command.terminate()
    _, stderr = command.communicate(timeout=30)
    assert "Interrupted: SIGTERM: 1 processes stopped at a checkpoint" in stderr
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
