"""`data pairs` that is killed at any place and run again: the files of a run in one go, and no part made twice.

Run as a script, this file makes pairs in forked children, so that all is imported once, and kills them as it is told.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PLACES = ("_of_document", "fsync", "replace", "rmtree")
SOME = {"_of_document": (31,), "fsync": (1, 30), "replace": (24, 26), "rmtree": (1,)}  # calls
WAYS = ["title", "crops", "bm25", "see-also"]


def test_pairs_that_were_killed_equal_those_in_one_go(tmp_path: Path) -> None:
    assert kills(tmp_path, SOME) == {place: len(calls) for place, calls in SOME.items()}


@pytest.mark.long
def test_pairs_may_be_killed_at_any_place(tmp_path: Path) -> None:
    killed = kills(tmp_path, {place: tuple(range(1, 200)) for place in PLACES})
    assert all(killed[place] >= least for place, least in zip(PLACES, (90, 50, 25, 1), strict=True)), killed


def kills(folder: Path, plan: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Kills before those calls, as far as there are so many; gives how often, where all went on as it should."""
    command = [sys.executable, __file__, str(folder), json.dumps(plan)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["parts"] == len(WAYS) * 6 and not found["other"] and not found["again"]
    killed: dict[str, int] = found["kills"]
    return killed


# ---- in the process that makes pairs


def main(folder: Path, plan: dict[str, list[int]]) -> None:
    from kills import die_in

    from embedwright import files
    from embedwright.pairs import bm25, make  # noqa: F401  # imported once

    owners = {"_of_document": make, "fsync": files.os, "replace": Path, "rmtree": make.shutil}
    make.BLOCK = 4
    source = folder / "docs.jsonl"
    texts = [" ".join(f"word{i * k % 17} of {i}" for k in range(9)) for i in range(23)]
    rows = [{"id": f"d{i}", "title": f"t {i}", "text": f"{text}. See t {i + 1}."} for i, text in enumerate(texts)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{bad\n")

    def run(name: str, kill: tuple[str, int] | None = None) -> bool:
        """Whether the child came to its end."""
        if (pid := os.fork()) == 0:
            if kill:
                die_in(owners[kill[0]], *kill)
            counts = make.make_pairs(source, folder / name / "o.jsonl.gz", WAYS, per_document=2)
            (folder / name / "counts.json").write_text(json.dumps(counts))
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
        return status == 0

    def written(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (folder / name).iterdir() if not path.name.startswith(".")}

    def made(name: str) -> dict[str, int]:
        """The parts that are done, and when they were."""
        found = (folder / name / "o.jsonl.gz.parts").glob("*.report.json")
        return {path.name: path.stat().st_mtime_ns for path in found if not path.name.startswith(".")}

    assert run("whole")
    whole = written("whole")
    assert run("kept", ("rmtree", 1)) is False
    number = len(made("kept"))
    kills, other, again = dict.fromkeys(plan, 0), [], []
    for place, numbers in plan.items():
        for call in numbers:
            name = f"{place}-{call}"
            if run(name, (place, call)):
                break
            kills[place] += 1
            before = made(name)
            assert not run(name, ("rmtree", 1))  # all is made, and the parts are still there
            after = made(name)
            again += [part for part, time in before.items() if after.get(part) != time]
            assert run(name)
            if written(name) != whole:
                other.append(name)
            shutil.rmtree(folder / name)
    print(json.dumps({"kills": kills, "other": other, "again": again, "parts": number}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
