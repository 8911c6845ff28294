"""Fifty kills inside a save: what is found afterwards is always whole, and never older than the save before.

Run as a script, this file saves in forked children and kills each where it is told.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KILLS = 50
CALLS = ("mkdir", "write_tensors", "write_hashed_text", "fsync", "rename", "rmtree")


def test_fifty_kills_inside_a_save_lose_no_more_than_that_save(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["killed"] >= KILLS and found["inside"] == len(CALLS)
    # of the calls before the rename none is enough, of those behind it each is
    assert found["lost"] > 10 and found["kept"] >= 2
    assert found["left"] <= 2 and not found["damaged"]


# ---- in the process that saves


def main(folder: Path) -> None:
    import numpy as np
    import torch
    from kills import die_in
    from safetensors.torch import load_file

    from embedwright.training.run import checkpoint

    def weights(step: int) -> dict[str, torch.Tensor]:
        return {"a": torch.full((300, 50), float(step)), "b": torch.arange(step + 3.0)}

    def optimizer(step: int) -> torch.optim.Optimizer:
        parameter = torch.nn.Parameter(torch.zeros(200))
        made = torch.optim.AdamW([parameter])
        parameter.grad = torch.full((200,), float(step))
        made.step()
        return made

    def save(step: int) -> None:
        state = checkpoint.RunState(0, step, "r", "d")
        checkpoint.save_checkpoint(folder / "run", state, weights(step), optimizer(step), keep=2)

    def verify() -> int:
        found = checkpoint.newest(folder / "run")
        assert found is not None
        step, had = checkpoint.read_state(found).step, load_file(found / "weights.safetensors")
        assert all(torch.equal(tensor, weights(step)[name]) for name, tensor in had.items()) and len(had) == 2
        checkpoint.restore_optimizer(found, optimizer(0))
        return step

    def save_and_die(step: int, aim: tuple[str, int] | None) -> bool:
        """Whether the child was killed."""
        child = os.fork()
        if child == 0:
            if aim:
                die_in(owners.get(aim[0], Path), *aim)
            save(step)
            os._exit(0)
        if aim is None:
            time.sleep(random.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    owners: dict[str, Any] = {
        "fsync": os,
        "rmtree": shutil,
        "write_tensors": checkpoint,
        "write_hashed_text": checkpoint,
    }
    random = np.random.default_rng(3)
    turns = itertools.chain([(name, number) for name in CALLS for number in range(1, 8)], itertools.repeat(None))
    save(1)
    step, counts, inside = 1, {"killed": 0, "lost": 0, "kept": 0}, set()
    while counts["killed"] < KILLS:
        aim = next(turns)
        killed = save_and_die(step + 1, aim)
        now = verify()
        assert now in (step, step + 1) and (killed or now == step + 1)
        if killed:
            counts["killed"] += 1
            counts["lost" if now == step else "kept"] += 1
            inside |= {aim[0]} if aim else set()
        step = now
    save(step + 1)  # the last kill may have come before the old ones were removed: the next save does that
    left = [path.name for path in (folder / "run").iterdir()]
    damaged = [name for name in left if "damaged" in name]
    print(json.dumps(counts | {"inside": len(inside), "left": len(left), "damaged": damaged}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
