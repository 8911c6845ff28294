"""A run that is killed again and again equals one that never was, bit for bit.

Run as a script, this file trains in forked children (so that torch is imported once) and kills them as it is told.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FIRST, SECOND = 9, 7  # steps of the two stages
NOT_ALIKE = ("seconds", "waited", "peak_mb")
TEXTS = ["how do tides work?", "the moon", "a dog that does not mind, and a longer text behind it"]


def recipe(folder: Path, decoder: Path) -> dict[str, Any]:
    """Dropout, a batch beyond the token budget, and a checkpoint every two steps, so that one falls on no border."""
    random = np.random.default_rng(0)
    words = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox"]

    def write(name: str, rows: list[dict[str, Any]]) -> str:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    def text(about: str) -> str:
        return " ".join([about, *random.choice(words, random.integers(1, 9))])

    def stage(name: str, path: str, in_batch: str, steps: int) -> dict[str, Any]:
        optim = {"lr": 5e-3, "steps": steps, "batch_queries": 6, "warmup_steps": 2}
        rest = {"in_batch_negatives": in_batch, "hard_negatives": 2, "temperature": 0.1, "optim": optim}
        return {"name": name, "data": [{"path": path}]} | rest

    pairs = [{"query": text(f"q{i}"), "positives": [text(f"p{i}"), text(f"r{i}")]} for i in range(25)]
    labelled = [{"text": text(f"kind{i % 4}"), "label": f"kind {i % 4}"} for i in range(24)]
    write("suite/sts.jsonl", [{"text1": text("a"), "text2": text("b"), "score": i % 6} for i in range(20)])
    return {
        "name": "crash",
        "seed": 3,
        "model": {"base": str(decoder), "latents": 8, "heads": 4, "multiple": 1, "max_tokens": 40},
        "tune": {"rank": 4, "alpha": 8, "dropout": 0.2},
        "stages": [
            {"kind": "mine", "negatives": 2, "rule": "naive", "every": 4},
            stage("retrieval", write("pairs.jsonl", pairs), "all", FIRST),
            stage("generalist", write("labels.jsonl", labelled), "none", SECOND),
        ],
        "run": {"out": str(folder / "unset"), "checkpoint_every": 2, "batch_tokens": 150, "tracker": "none"},
        "eval": {"every": 3, "suites": [str(folder / "suite")]},
    }


# ---- in the test's process


def start(folder: Path, content: dict[str, Any], plan: list[dict[str, Any]]) -> subprocess.Popen[str]:
    """A process that trains below `folder` under the given plan of kills."""
    folder.mkdir()
    (folder / "job.json").write_text(
        json.dumps({"recipe": content | {"run": content["run"] | {"out": str(folder / "out")}}, "plan": plan})
    )
    # one thread, and not the one core that every process of one thread would be bound to
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= {"EMBEDWRIGHT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def outcome(process: subprocess.Popen[str]) -> list[int]:
    """How each child ended: minus the signal, or its exit status."""
    stdout, stderr = process.communicate(timeout=540)
    assert process.returncode == 0, stderr
    ends: list[int] = json.loads(stdout.splitlines()[-1])
    return ends


def metrics(folder: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (folder / "out" / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key not in NOT_ALIKE} for record in records]


def evaluations(folder: Path) -> list[Any]:
    records = map(json.loads, (folder / "out" / "evaluations.jsonl").read_text().splitlines())
    return [(r["stage"], r["step"], r["suite"], r["results"]["rows"]) for r in records]


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.long)])
def test_a_run_that_is_killed_again_and_again_equals_an_unbroken_one(
    tmp_path: Path, tiny_decoder: Callable[..., Path], kills: int
) -> None:
    pytest.importorskip("peft")
    content = recipe(tmp_path / "data", tiny_decoder("llama"))
    random = np.random.default_rng(11)
    steps = [0, *random.choice(range(1, FIRST + SECOND), kills), FIRST - 1, FIRST, FIRST, FIRST + 1]
    moments = [{"after": int(step), "wait": float(random.uniform(0, 0.08))} for step in sorted(steps)]
    # and in the middle of what a checkpoint and a log are written with
    calls = [("fsync", 2), ("rename", 1), ("fsync", 5), ("fsync", 6), ("rmtree", 1), ("replace", 1), ("replace", 2)]
    inside = [{"call": name, "number": number} for name, number in calls]
    plan = [kill for pair in itertools.zip_longest(moments, inside) for kill in pair if kill]

    broken = start(tmp_path / "broken", content, plan)
    unbroken = start(tmp_path / "unbroken", content, [])
    ends = outcome(broken)
    assert outcome(unbroken) == [0]
    assert ends[-1] == 0 and len(ends) == len(plan) + 1 and set(ends) <= {0, -signal.SIGKILL}
    assert ends.count(-signal.SIGKILL) >= kills + 8  # a child may be done before its time

    assert len(metrics(tmp_path / "unbroken")) == FIRST + SECOND
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "unbroken")
    assert evaluations(tmp_path / "broken") == evaluations(tmp_path / "unbroken")
    vectors = [(tmp_path / name / "vectors.npy").read_bytes() for name in ("broken", "unbroken")]
    assert vectors[0] == vectors[1]
    mined = [
        sorted((tmp_path / name / "out" / "mined" / "retrieval").glob("*/*.parquet")) for name in ("broken", "unbroken")
    ]
    assert [file.read_bytes() for file in mined[0]] == [file.read_bytes() for file in mined[1]] and len(mined[0]) == 3
    left = {path.name for path in (tmp_path / "broken" / "out" / "checkpoints").iterdir()}
    assert left == {"01-0000006", "01-0000007"}


# ---- in the process that trains


def main(folder: Path) -> None:
    import scipy.stats  # noqa: F401  evaluation imports it when it is called
    from kills import die_in
    from transformers.utils import logging as transformers_logging

    from embedwright.training.engine.optim import make_optimizer
    from embedwright.training.recipe import Recipe
    from embedwright.training.run.start import start_model
    from embedwright.training.train import train

    transformers_logging.disable_progress_bar()
    owners: dict[str, Any] = {"fsync": os, "rename": Path, "replace": Path, "rmtree": shutil}
    job = json.loads((folder / "job.json").read_text())
    run = Recipe.parse(job["recipe"])
    make_optimizer(start_model(run).network, run.tune, run.stages[0].optim)  # imports the rest, once for all children
    gc.freeze()  # children neither look through what the imports left nor copy its pages

    def train_in_child(kill: dict[str, Any], write_end: int) -> None:
        if "call" in kill:
            die_in(owners[kill["call"]], kill["call"], kill["number"])

        def tell(record: dict[str, Any]) -> None:
            os.write(write_end, bytes([record["step"] + (FIRST if record["stage"] == "generalist" else 0)]))

        model = train(run, on_step=tell)
        np.save(folder / "vectors.npy", model.encode(TEXTS, task="Find its answer"))

    ends = []
    for kill in [*job["plan"], {}]:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(read_end)
                train_in_child(kill, write_end)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(write_end)
        if "after" in kill:
            done = 0
            while done < kill["after"] and (byte := os.read(read_end, 1)):
                done = byte[0]
            time.sleep(kill["wait"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(read_end)
        ends.append(os.waitstatus_to_exitcode(status))
        if ends[-1] == 1:
            sys.exit(1)
    print(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
