"""Kills inside every change of an index: a reader finds the index of before or of after, and the same call ends it.

Run as a script, this file changes an index in forked children and kills each at one of its writes.
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
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def test_a_killed_change_of_an_index_counts_whole_or_not_at_all(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for change, (before, after) in json.loads(done.stdout).items():
        assert before > 0 and after > 0, change  # kills on both sides of the moment from which it counts


# ---- in the process that changes


def main(folder: Path) -> None:
    import numpy as np
    from kills import die_in

    from embedwright.index.build import build_index
    from embedwright.index.change import add, compact, delete, reencode
    from embedwright.index.index import Index

    class Model:
        def __init__(self, salt: str = "") -> None:
            self.salt = salt

        def encode(self, texts: Sequence[str], task: str | None = None) -> Any:
            return np.array([np.random.default_rng(zlib.crc32((self.salt + t).encode())).normal(size=4) for t in texts])

    def source(name: str, ids: range, text: str) -> Path:
        path = folder / name
        path.write_text("".join(json.dumps({"_id": f"d{i}", "text": f"{text} {i}"}) + "\n" for i in ids))
        return path

    def content(home: Path) -> Any:
        index, rows = Index.open(home), Index.open(home).live_rows()
        ids = index.documents["id"].take(index.chunks["document"].take(rows)).to_pylist()
        return sorted(zip(ids, index.vectors.take(rows).tolist(), strict=True))

    def killed(change: Callable[[], Any], owner: Any, name: str, number: int) -> bool:
        child = os.fork()
        if child == 0:
            die_in(owner, name, number)
            change()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    gc.freeze()  # children neither look through what the imports left nor copy its pages
    other = source("other", range(10, 20), "other")  # half of them are new
    start, out, done = (folder / name for name in ("start", "out", "done"))
    build_index(Model(), source("first", range(12), "text"), start, shard_rows=8, precision="int8")
    add(Model(), source("second", range(12, 15), "text"), start)
    delete(start, ["d7"])
    changes: dict[str, Callable[[Path], Any]] = {
        "replace": lambda home: add(Model(), other, home, replace=True),
        "delete": lambda home: delete(home, ["d1", "d13"]),
        "compact": compact,
        "reencode": lambda home: reencode(Model("other"), home),
    }
    counts = {}
    for name, change in changes.items():
        shutil.rmtree(done, ignore_errors=True)
        shutil.copytree(start, done)
        change(done)
        before, after, seen = content(start), content(done), [0, 0]
        for owner, call in ((os, "fsync"), (Path, "rmdir"), (Path, "unlink")):
            for number in itertools.count(1):
                shutil.rmtree(out, ignore_errors=True)
                shutil.copytree(start, out)
                if not killed(lambda change=change: change(out), owner, call, number):  # type: ignore[misc]
                    break
                now, finished = content(out), (out / "index.json").read_bytes() != (start / "index.json").read_bytes()
                assert now == (after if finished else before), (name, call, number)
                seen[finished] += 1
                change(out)
                assert content(out) == after
                visible = lambda home: {p.name for p in home.iterdir() if not p.name.startswith(".")}  # noqa: E731
                assert visible(out) == visible(done), (name, call, number)
        counts[name] = seen
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
