"""A run that is killed before any of its file operations ends as one that never was, bit for bit.

Run as a script, this file trains in forked children (so that torch is imported once) and kills each where it is told.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NOT_ALIKE = ("seconds", "waited", "peak_mb")
TEXTS = ["how do tides work?", "the moon", "a dog that does not mind, and a longer text after it"]
SOME = 4  # boundaries of the default suite


def recipe(folder: Path, decoder: Path) -> dict[str, Any]:
    """Two stages that end on their best weights; the second mines twice; checkpoints fall between evaluations."""
    random = np.random.default_rng(0)
    words = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox"]

    def text(about: str) -> str:
        return " ".join([about, *random.choice(words, random.integers(1, 9))])

    def write(name: str, rows: list[dict[str, Any]]) -> str:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    def stage(name: str, **more: Any) -> dict[str, Any]:
        optim = {"lr": 3e-2, "steps": 3, "batch_queries": 4}
        made = {"name": name, "data": [{"path": pairs}], "in_batch_negatives": "all", "hard_negatives": 1}
        return made | {"temperature": 0.1, "optim": optim} | more

    pairs = write(
        "pairs.jsonl",
        [{"query": text(f"q{i}"), "positives": [text(f"p{i}")], "negatives": [text(f"n{i}")]} for i in range(15)],
    )
    write("suite/sts.jsonl", [{"text1": text("a"), "text2": text("b"), "score": i % 6} for i in range(12)])
    return {
        "name": "boundaries",
        "seed": 3,
        "model": {"base": str(decoder), "layers": 2, "pooling": "mean", "max_tokens": 40},
        "tune": {"rank": 2, "alpha": 4, "dropout": 0.2},
        "stages": [
            stage("first", save=True),
            {"kind": "mine", "negatives": 2, "rule": "naive", "every": 2},
            stage("second"),
        ],
        "run": {"out": "unset", "checkpoint_every": 2, "keep": 1, "tracker": "none", "workers": 0},
        "eval": {"every": 1, "suites": [str(folder / "suite")], "best": True},
    }


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)], ids=["some", "every"])
def test_killed_at_any_file_operation_a_run_ends_as_it_would_have(
    tmp_path: Path, tiny_decoder: Callable[..., Path], every: bool
) -> None:
    job = {"recipe": recipe(tmp_path / "data", tiny_decoder("llama")), "every": every}
    (tmp_path / "job.json").write_text(json.dumps(job))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= {"EMBEDWRIGHT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000 if every else 900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == {} and found["operations"] > 60
    assert len(found["killed"]) == (found["operations"] if every else SOME)


# ---- in the process that trains


def result(out: Path) -> dict[str, Any]:
    """All that a run is, but for what was measured."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{key: value for key, value in r.items() if key not in NOT_ALIKE} for r in records],
        "evaluations": [
            (r["stage"], r["step"], r["results"]["rows"])
            for r in map(json.loads, (out / "evaluations.jsonl").read_text().splitlines())
        ],
        "vectors": (out / "vectors.npy").read_bytes().hex(),
        "best": {file.name: file.read_bytes().hex() for file in sorted((out / "best").glob("*.safetensors"))},
        "kept": {file.name: file.read_bytes().hex() for file in sorted(out.glob("stages/first/*.*"))},
        "mined": {
            str(file.relative_to(out)): file.read_bytes().hex() for file in sorted(out.glob("mined/*/[0-9]*/*.parquet"))
        },
        "files": sorted(str(path.relative_to(out)) for path in out.rglob("*")),
    }


def count_operations(before: Callable[[int], None]) -> None:
    """Call `before` with the number of each operation that changes something on disk, just before it."""
    import builtins
    import io

    from embedwright.training.run import checkpoint
    from embedwright.training.run import scores as judge

    calls = 0

    def watch(owner: Any, name: str, changes: Callable[..., bool] = lambda *_, **__: True) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if changes(*args, **kwargs):
                calls += 1
                before(calls)
            return function(*args, **kwargs)

        setattr(owner, name, watched)

    def writes(file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
        return any(letter in mode for letter in "wax+")

    for name in ("rename", "replace", "unlink", "mkdir", "rmdir"):
        watch(os, name)
    for owner in (io, builtins):
        watch(owner, "open", writes)
    watch(checkpoint, "write_tensors")
    watch(judge, "save_file")


def main(folder: Path) -> None:
    import scipy.stats  # noqa: F401  evaluation imports it when it is called
    from transformers.utils import logging as transformers_logging

    from embedwright.training.recipe import Recipe
    from embedwright.training.train import train

    transformers_logging.disable_progress_bar()
    os.fsync = lambda handle: None  # type: ignore[assignment]  what is killed is the process, not the machine
    job = json.loads((folder / "job.json").read_text())
    run = Recipe.parse(job["recipe"])
    gc.freeze()  # children neither look through what the imports left nor copy its pages

    def in_child(out: Path, kill_at: int | None) -> tuple[int, int]:
        """How the child ended, and how many operations it had begun."""
        read_end, write_end = os.pipe()
        child = os.fork()
        if child:
            os.close(write_end)
            with os.fdopen(read_end, "rb") as stream:
                begun = len(stream.read())
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), begun
        status = 1
        try:

            def before(number: int) -> None:
                if number == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                os.write(write_end, b".")

            count_operations(before)
            model = train(run.with_out(out))
            np.save(out / "vectors.npy", model.encode(TEXTS, task="Find its answer"))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    warm = train(run.with_out(folder / "warm"))  # the table is in the cache, and all is imported
    np.save(folder / "warm" / "vectors.npy", warm.encode(TEXTS, task="Find its answer"))
    expected = result(folder / "warm")
    status, operations = in_child(folder / "whole", None)
    assert status == 0 and result(folder / "whole") == expected
    numbers = range(1, operations + 1)
    if not job["every"]:  # spread over the run, at other places than a checkpoint's own rhythm
        numbers = sorted(int(n) for n in np.random.default_rng(5).choice(operations, SOME, replace=False) + 1)
    wrong, killed = {}, []
    for number in numbers:
        out = folder / f"killed-{number}"
        status, begun = in_child(out, number)
        assert status == -signal.SIGKILL and begun == number - 1, (status, begun)
        killed.append(number)
        if in_child(out, None)[0] != 0:
            wrong[number] = "it does not go on"
        elif (ended := result(out)) != expected:
            wrong[number] = ", ".join(key for key in expected if ended[key] != expected[key])
    print(json.dumps({"operations": operations, "killed": killed, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
