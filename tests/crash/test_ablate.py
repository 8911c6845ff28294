"""Two commands run one study at once while one of its cells is killed: each cell runs once, and all ends as unbroken.

Run as a script, this file is such a command, whose cells are forked children, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

STEPS = 8
NOT_ALIKE = ("seconds", "peak_mb", "command")


def write_study(folder: Path, decoder: Path) -> Path:
    random = np.random.default_rng(0)
    words = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox"]

    def text(about: str) -> str:
        return " ".join([about, *random.choice(words, random.integers(1, 9))])

    def write(name: str, rows: list[dict[str, Any]]) -> str:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    pairs = write("pairs.jsonl", [{"query": text(f"q{i}"), "positives": [text(f"p{i}")]} for i in range(30)])
    write("suite/sts.jsonl", [{"text1": text("a"), "text2": text("b"), "score": i % 6} for i in range(20)])
    stage = {"name": "only", "data": [{"path": pairs}], "in_batch_negatives": "all", "hard_negatives": 0}
    stage |= {"temperature": 0.1, "optim": {"lr": 5e-3, "steps": STEPS, "batch_queries": 6, "warmup_steps": 2}}
    base = {
        "name": "base",
        "model": {"base": str(decoder), "pooling": "mean", "max_tokens": 40},
        "tune": {"rank": 4, "alpha": 8, "dropout": 0.2},
        "stages": [stage],
        "run": {"checkpoint_every": 2, "tracker": "none"},
    }
    arms = {"plain": {}, "hot": {"stages.only.temperature": 0.5}}
    study = {"name": "study", "base": "base.yaml", "baseline": "plain", "arms": arms, "seeds": [1], "suite": "suite"}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder / "study.yaml"


def results(out: Path) -> dict[str, Any]:
    found = {str(file.parent.relative_to(out)): json.loads(file.read_text()) for file in out.rglob("result.json")}
    return {name: {key: value for key, value in of.items() if key not in NOT_ALIKE} for name, of in found.items()}


def losses(out: Path) -> dict[str, list[Any]]:
    return {
        str(file.parent.relative_to(out)): [
            (record["step"], record["loss"]) for record in map(json.loads, file.read_text().splitlines())
        ]
        for file in out.rglob("metrics.jsonl")
    }


def test_a_study_of_two_commands_with_a_killed_cell_equals_an_unbroken_one(
    tmp_path: Path, tiny_decoder: Callable[..., Path]
) -> None:
    file = write_study(tmp_path, tiny_decoder("llama"))
    whole, out = tmp_path / "whole", tmp_path / "broken"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= {"EMBEDWRIGHT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, str(file), str(whole), str(out)]
    commands = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    killed = kill_a_cell(out)
    stdout, stderr = commands.communicate(timeout=900)
    assert commands.returncode == 0, stderr[-3000:]
    unbroken, *told = map(json.loads, stdout.splitlines())
    assert unbroken == {"started": 2, "failed": [], "missing": []}

    assert sum(each["started"] for each in told) == 3  # two cells, and one of them again
    assert any(not each["missing"] for each in told)
    assert {name for each in told for name in each["failed"]} <= {killed}  # told by the command that had started it
    assert results(out) == results(whole) and len(results(out)) == 2
    assert losses(out) == losses(whole)
    assert all([step for step, _ in found] == [*range(1, STEPS + 1)] for found in losses(out).values())
    studies = [json.loads((folder / "study" / "study.json").read_text()) for folder in (out, whole)]
    assert studies[0]["comparison"]["rows"] == studies[1]["comparison"]["rows"] != []


def kill_a_cell(out: Path) -> str:
    """Kills the first cell that has a checkpoint, in the middle. Returns its name."""
    until = time.monotonic() + 600
    while time.monotonic() < until:
        for file in out.glob("study/*/*/pid"):
            if any(file.parent.glob("checkpoints/00-*")):
                os.kill(int(file.read_text()), signal.SIGKILL)
                return str(file.parent.relative_to(out))
        time.sleep(0.002)
    raise AssertionError("no cell has begun")


# ---- the commands


class Forked:
    """Stands for `subprocess.Popen` of a cell: a forked child does its work."""

    started = 0

    def __init__(self, words: list[str], *, stdout: Any, pass_fds: list[int], **_: Any) -> None:
        from embedwright.studies.ablate import cell as ablate_cell

        Forked.started += 1
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            folder = Path(words[-2])
            temp = folder / f"pid.{os.getpid()}"
            temp.write_text(str(os.getpid()))
            temp.replace(folder / "pid")
            ablate_cell.main(folder, float(words[-1]))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.01)


def main(file: Path, whole: Path, broken: Path) -> None:
    """Forks one command for the first folder and two for the second, and prints what each of them says, in order."""
    from types import SimpleNamespace

    import scipy.stats  # noqa: F401  evaluation imports it when it is called
    from transformers.utils import logging as transformers_logging

    from embedwright.studies.ablate import jobs as ablate_jobs
    from embedwright.studies.ablate.study import ablate
    from embedwright.training.engine.optim import make_optimizer
    from embedwright.training.recipe import Recipe
    from embedwright.training.run.start import start_model

    transformers_logging.disable_progress_bar()
    os.fsync = lambda handle: None  # type: ignore[assignment]  what is killed is the process, not the machine
    tree = yaml.safe_load((file.parent / "base.yaml").read_text())
    run = Recipe.parse(tree | {"run": {"out": "."}})
    make_optimizer(start_model(run).network, run.tune, run.stages[0].optim)  # imports the rest, once for all children
    ablate_jobs.subprocess = SimpleNamespace(Popen=Forked, DEVNULL=None)  # type: ignore[assignment]
    children = []
    for out, jobs in ((whole, 2), (broken, 1), (broken, 1)):
        read_end, write_end = os.pipe()
        if not (child := os.fork()):
            try:
                study = ablate(file, out, side_by_side=jobs)
                facts = {"started": Forked.started, "failed": [*study["failed"]], "missing": study["missing"]}
                os.write(write_end, json.dumps(facts).encode())
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(write_end)
        children.append((child, read_end))
    for child, read_end in children:
        os.waitpid(child, 0)
        print(os.read(read_end, 10_000).decode())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
