"""Of several processes one is killed, sleeps, or cannot read or write: all end, and another number of them goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import groups
import numpy as np
import pytest
import torch

from embedwright.files import HashedFile
from embedwright.model.network import EmbedwrightModel
from embedwright.processes import start
from embedwright.training import steps, train
from embedwright.training.recipe import Recipe
from embedwright.training.run import start as models

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
    """How the processes of each group ended, by rank (`groups.ends`)."""
    content, found = json.dumps(recipe(folder, decoder, parallel)), []
    for step in plan:
        stuck = [1] if step.get("does") == "sleep" else []
        groups.run(__file__, folder, {"work": (step["count"],)}, content, json.dumps(step), stuck=stuck)
        found.append(groups.ends(folder, "work", step["count"]))
    return found


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


def work(folder: Path, content: str, told: str) -> None:
    step, opened, make = json.loads(told), 0, models.start_model

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal opened
        opened += 1
        return make(*args, **options)

    models.start_model = train.start_model = counted
    groups.forbid_messages()
    out = folder / step["out"]
    run = Recipe.parse(json.loads(content)).with_out(out)
    run = run.model_copy(update={"run": run.run.model_copy(update={"timeout_minutes": step.get("minutes", 30.0)})})
    processes = start(run.run.timeout_minutes)
    if processes.rank == 1 and "phase" in step:
        arm(step["phase"], step["does"], run.run.parallel == "fsdp")
    model = train.train(run)
    of_each = processes.all_gather(opened)
    if processes.is_rank_0:
        (out / "models.json").write_text(json.dumps(of_each))
        assert model.device.type == "cpu" and not any(p.requires_grad for p in model.network.parameters())
        np.save(out / "vectors.npy", model.encode(TEXTS, task="Find its answer"))
    processes.barrier()
