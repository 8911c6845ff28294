"""Of several processes one is killed, sleeps, or cannot read or write: all end, and another number of them goes on.

Run as a script, this file forks the processes of a group (so that torch is imported once); gloo, on a CPU. No launcher
watches them, so that whatever ends is ended by the library itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STEPS, CHECKPOINT_EVERY = 4, 2
TEXTS = ["how do tides work?", "the moon", "a dog that does not mind, and a longer text after it"]
# of the third step, and the checkpoint after the fourth
PHASES = ("data", "forward", "backward", "optimizer", "checkpoint")
METHODS = {"ddp": "lora", "fsdp": "full"}


def recipe(folder: Path, decoder: Path, parallel: str) -> dict[str, Any]:
    random = np.random.default_rng(0)
    words = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox"]
    pairs = [
        {"query": f"q{i} {random.choice(words)}", "positives": [" ".join([f"p{i}", *random.choice(words, 6)])]}
        for i in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    stage = {
        "name": "first",
        "data": [{"path": str(folder / "pairs.jsonl")}],
        "in_batch_negatives": "all",
        "hard_negatives": 0,
        "temperature": 0.1,
        "optim": {"lr": 1e-3, "steps": STEPS, "batch_queries": 6},
    }
    return {
        "name": "processes",
        "model": {"base": str(decoder), "layers": 2, "latents": 4, "heads": 2, "multiple": 1, "max_tokens": 40},
        "tune": {"method": METHODS[parallel], "dropout": 0.0},
        "stages": [stage],
        "run": {
            "out": "unset",
            "parallel": parallel,
            "checkpoint_every": CHECKPOINT_EVERY,
            "batch_tokens": 100,
            "workers": 0,
            "tracker": "none",
        },
    }


def outcome(folder: Path, decoder: Path, parallel: str, plan: list[dict[str, Any]]) -> list[list[int]]:
    """How the processes of each group ended: minus the signal, or the exit status; by rank."""
    (folder / "job.json").write_text(json.dumps({"recipe": recipe(folder, decoder, parallel), "plan": plan}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= {"OMP_NUM_THREADS": "1", "EMBEDWRIGHT_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]
    ends: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return ends


def losses(out: Path) -> dict[int, float]:
    """By step: a step that was taken again, after a kill, has the loss of the last time."""
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records}


@pytest.mark.parametrize(
    ("parallel", "phases", "counts"),
    [
        ("fsdp", ("checkpoint",), (3,)),
        pytest.param("fsdp", PHASES, (4, 2, 8, 1, 3), marks=pytest.mark.long),
        pytest.param("ddp", PHASES, (2, 4, 1, 3, 8), marks=pytest.mark.long),
    ],
    ids=["some", "fsdp", "ddp"],
)
def test_killed_at_each_phase_of_a_step_a_run_goes_on_with_another_number(
    tmp_path: Path, tiny_decoder: Callable[..., Path], parallel: str, phases: tuple[str, ...], counts: tuple[int, ...]
) -> None:
    """Rank 1 of two is killed. The other ends with an error of its own. Then `counts` processes go on, in turn."""
    plan: list[dict[str, Any]] = [{"count": 1, "out": "alone"}]
    for number, phase in enumerate(phases):
        plan += [
            {"count": 2, "out": phase, "phase": phase, "does": "die"},
            {"count": counts[number], "out": phase},
        ]
    ends = outcome(tmp_path, tiny_decoder("llama"), parallel, plan)
    alone, vectors = losses(tmp_path / "alone"), np.load(tmp_path / "alone" / "vectors.npy")
    assert ends[0] == [0] and alone.keys() == set(range(1, STEPS + 1))
    for number, phase in enumerate(phases):
        assert ends[2 * number + 1] == [1, -signal.SIGKILL], phase
        assert set(ends[2 * number + 2]) == {0}, phase
        found = losses(tmp_path / phase)
        assert found == pytest.approx(alone, rel=1e-4), phase
        np.testing.assert_allclose(np.load(tmp_path / phase / "vectors.npy"), vectors, atol=1e-4, err_msg=phase)
        models = json.loads((tmp_path / phase / "models.json").read_text())
        assert models == [2 if parallel == "fsdp" and len(ends[2 * number + 2]) > 1 else 1] + [1] * (len(models) - 1)


@pytest.mark.long
@pytest.mark.parametrize("parallel", METHODS)
@pytest.mark.parametrize(("phase", "does"), [("forward", "sleep"), ("read", "raise"), ("checkpoint", "raise")])
def test_a_slow_process_or_one_without_its_files_is_an_error_of_all(
    tmp_path: Path, tiny_decoder: Callable[..., Path], parallel: str, phase: str, does: str
) -> None:
    began = time.monotonic()
    plan = [{"count": 3, "out": "out", "phase": phase, "does": does, "minutes": 0.5}]
    [ends] = outcome(tmp_path, tiny_decoder("llama"), parallel, plan)
    assert ends == [1, -signal.SIGKILL if does == "sleep" else 1, 1]
    assert time.monotonic() - began < 300  # a process that sleeps would do so for an hour


# ---- in the processes


def arm(phase: str, does: str, sharded: bool) -> None:
    """Makes this process die, sleep or raise when it comes to a phase after the first checkpoint, or reads its data."""
    import torch

    from embedwright.files import HashedFile
    from embedwright.model.network import EmbedwrightModel
    from embedwright.training import steps, train

    def act() -> None:
        if does == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif does == "sleep":
            time.sleep(3600)
        raise OSError("this process has no such file")

    owners: dict[str, tuple[Any, str]] = {
        "read": (train, "open_checked"),
        "data": (steps, "batch_of_step"),
        "forward": (EmbedwrightModel, "embed"),
        "backward": (torch.Tensor, "backward"),
        "optimizer": (steps, "update"),
        "checkpoint": (HashedFile, "write") if sharded else (train, "save_checkpoint"),
    }
    owner, name = owners[phase]
    kept, done = getattr(owner, name), 0

    def watched(*args: Any, **options: Any) -> Any:
        if phase == "read" or done >= CHECKPOINT_EVERY + (phase == "checkpoint"):
            act()
        return kept(*args, **options)

    def stepped(*args: Any, **options: Any) -> Any:
        nonlocal done
        taken = update(*args, **options)
        done += 1
        return taken

    update = steps.update
    if phase != "optimizer":
        steps.update = stepped
    else:
        kept = stepped
    setattr(owner, name, watched)


def work(run: Any, folder: Path, step: dict[str, Any], rank: int) -> None:
    import torch.distributed as dist

    from embedwright.processes import start
    from embedwright.training import train as module
    from embedwright.training.run import start as models

    opened = 0
    make = models.start_model

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal opened
        opened += 1
        return make(*args, **options)

    models.start_model = module.start_model = counted
    out = folder / step["out"]
    run = run.with_out(out)
    run = run.model_copy(update={"run": run.run.model_copy(update={"timeout_minutes": step.get("minutes", 30.0)})})
    if rank == 1 and "phase" in step:
        arm(step["phase"], step["does"], run.run.parallel == "fsdp")
    model = module.train(run)
    of_each = start().each(opened)
    if rank == 0:
        (out / "models.json").write_text(json.dumps(of_each))
        assert model.device.type == "cpu" and not any(p.requires_grad for p in model.network.parameters())
        np.save(out / "vectors.npy", model.encode(TEXTS, task="Find its answer"))
    if dist.is_initialized():
        start().wait()


def group(run: Any, folder: Path, step: dict[str, Any]) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(step["count"]):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": step["count"], "LOCAL_WORLD_SIZE": step["count"]}
                os.environ |= {name: str(value) for name, value in own.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                work(run, folder, step, rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    asleep = [child for rank, child in enumerate(children) if rank == 1 and step.get("does") == "sleep"]
    ends = {child: os.waitpid(child, 0)[1] for child in children if child not in asleep}
    for child in asleep:
        os.kill(child, signal.SIGKILL)
        ends[child] = os.waitpid(child, 0)[1]
    return [os.waitstatus_to_exitcode(ends[child]) for child in children]


def main(folder: Path) -> None:
    import accelerate  # noqa: F401  once for all children
    import torch.distributed.checkpoint.state_dict_saver
    import torch.distributed.fsdp  # noqa: F401
    from transformers.utils import logging as transformers_logging

    from embedwright.training.recipe import Recipe
    from embedwright.training.train import train

    assert train
    transformers_logging.disable_progress_bar()
    job = json.loads((folder / "job.json").read_text())
    run = Recipe.parse(job["recipe"])
    print(json.dumps([group(run, folder, step) for step in job["plan"]]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
