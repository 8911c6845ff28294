"""Two processes, as docs/distributed.md starts them, end where one alone ends: also stopped, and gone on as one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from embedwright.model.embedder import Embedder

TEXTS = ["how do tides work?", "the moon", "a dog that does not mind, and a longer text behind it"]
WARM, STEPS = 2, 16  # of the first stage, which keeps its model, and of both together


@pytest.fixture
def recipe(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> dict[str, Any]:
    random = np.random.default_rng(0)
    words = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox"]
    pairs = [
        {
            "query": " ".join([f"q{i}", *random.choice(words, 3)]),
            "positives": [" ".join([f"p{i}", *random.choice(words, 8)])],
        }
        for i in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    scored = [{"text1": f"a tide {i}", "text2": f"the moon {i % 5}", "score": i % 6} for i in range(12)]
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    return {
        "name": "many",
        "model": {"base": str(tiny_decoder("llama")), "latents": 8, "heads": 4, "multiple": 1, "max_tokens": 40},
        "tune": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "stages": [
            {
                "name": name,
                "data": [{"path": str(tmp_path / "pairs.jsonl")}],
                "in_batch_negatives": "all",
                "hard_negatives": 1,
                "temperature": 0.1,
                "optim": {"lr": 1e-3, "steps": steps, "batch_queries": 8},
                "save": name == "warm",
            }
            for name, steps in (("warm", WARM), ("retrieval", STEPS - WARM))
        ],
        "run": {"out": "unset", "checkpoint_every": 5, "batch_tokens": 60},
        "eval": {"suites": [str(tmp_path / "suite")], "every": 6},
    }


def command(count: int, recipe: Path, out: Path) -> list[str]:
    start = ["torchrun", "--standalone", f"--nproc-per-node={count}"] if count > 1 else ["python"]
    train = ["-m", "embedwright", "train", str(recipe), "--out", str(out)]
    return [str(Path(sys.executable).parent / start[0]), *start[1:], *train]


def run(count: int, recipe: Path, out: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        command(count, recipe, out),
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model: ") == 1, done.stdout  # one process speaks


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("parallel", "method"),
    [
        ("ddp", "lora"),
        pytest.param("fsdp", "lora", marks=pytest.mark.long),
        pytest.param("ddp", "qlora", marks=pytest.mark.long),
    ],
)
def test_two_processes_are_stopped_and_one_ends_where_one_alone_ends(
    recipe: dict[str, Any], tmp_path: Path, parallel: str, method: str
) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="package bitsandbytes is missing (the extra [qlora])")
    recipe["tune"]["method"] = method
    recipe["run"]["parallel"] = parallel
    file, alone, out = tmp_path / "recipe.yaml", tmp_path / "alone", tmp_path / "out"
    file.write_text(yaml.safe_dump(recipe))
    run(1, file, alone)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    two = subprocess.Popen(
        command(2, file, out), env=environment | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 150
        while len(metrics(out)) < 7 and two.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        two.send_signal(signal.SIGTERM)
        _, stderr = two.communicate(timeout=60)
    finally:
        two.kill()
    done = len(metrics(out))
    assert 7 <= done < STEPS, stderr[-3000:]
    newest = sorted((out / "checkpoints").iterdir())[-1]
    assert (
        newest.name == f"01-{done - WARM:07d}" and json.loads((newest / "manifest.json").read_text())["processes"] == 2
    )
    written = sorted((out / "stages").rglob("*"))  # by two processes
    times = [path.stat().st_mtime_ns for path in written]
    run(1, file, out)
    ours, theirs = metrics(out), metrics(alone)
    assert [record["ids"] for record in ours] == [record["ids"] for record in theirs]
    assert [r["tokens"] for r in ours] == [r["tokens"] for r in theirs]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)
    for model in ("model", "stages/warm"):
        vectors = [Embedder.load(folder / model).encode(TEXTS) for folder in (out, alone)]
        np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-4)
    assert written and times == [path.stat().st_mtime_ns for path in written]


_TORCHRUN = "torchrun --nnodes=2 --nproc-per-node=1 --rdzv-id=run1 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{port}"
_ACCELERATE = "accelerate launch --multi_gpu --num_processes 2 --mixed_precision no --dynamo_backend no"
_MACHINES = "--num_machines 2 --main_process_ip 127.0.0.1 --main_process_port {port}"


@pytest.mark.long
@pytest.mark.parametrize(
    "machines",
    [
        ["torchrun --standalone --nproc-per-node=2 --no-python embedwright"],
        [f"{_TORCHRUN} -m embedwright"] * 2,
        [f"{_ACCELERATE} --num_machines 1 -m embedwright"],
        [f"{_ACCELERATE} --num_machines 1 --no_python embedwright"],
        [f"{_ACCELERATE} {_MACHINES} --machine_rank {rank} -m embedwright" for rank in range(2)],
    ],
    ids=["entry point", "torchrun, two machines", "accelerate", "accelerate, entry point", "accelerate, two machines"],
)
def test_every_way_to_start_two_processes_is_the_same_run(
    recipe: dict[str, Any], tmp_path: Path, machines: list[str]
) -> None:
    del recipe["stages"][0]
    recipe["stages"][0]["optim"]["steps"] = 3
    recipe["eval"] = {}
    file, alone, out = tmp_path / "recipe.yaml", tmp_path / "alone", tmp_path / "out"
    file.write_text(yaml.safe_dump(recipe))
    run(1, file, alone)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scripts = Path(sys.executable).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    started = []
    try:
        for number, machine in enumerate(machines):
            program, *words = machine.format(port=port).split()
            words = [str(scripts / program), *words, "train", str(file), "--out", str(out)]
            with (tmp_path / f"{number}.log").open("w") as log:
                started.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
        ends = [process.wait(timeout=200) for process in started]
    finally:
        for process in started:
            process.kill()
    logs = [(tmp_path / f"{number}.log").read_text() for number in range(len(machines))]
    assert ends == [0] * len(machines), logs[0][-3000:]
    assert "".join(logs).count("model: ") == 1  # one process speaks
    assert json.loads((out / "environment.json").read_text())["processes"] == 2
    assert [r["loss"] for r in metrics(out)] == pytest.approx([r["loss"] for r in metrics(alone)], rel=1e-6)
