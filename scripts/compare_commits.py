"""Show that two commits give the same results, bit for bit, on this machine:

    python scripts/compare_commits.py OLD [NEW] [--only PART ...] [--fixtures FOLDER]

NEW is the working tree when it is left out. Both run the parts of `compare_parts.py` with one thread, in folders of the
same name, so nothing but the code differs. Nothing is stored: floats of one processor do not hold for another. Prints
one line per compared file, and exits 1 when anything differs. Both together take about three minutes of one free core.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from compare_parts import PARTS

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "scripts" / "compare_parts.py"
FIXED = {
    "OMP_NUM_THREADS": "1",
    "OMP_PROC_BIND": "false",  # the command would bind itself to the first core
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


# ---- running


@contextmanager
def checked_out(commit: str | None, folder: Path) -> Iterator[Path]:
    """The source folder of `commit` in a worktree that is removed afterwards; of the working tree for None."""
    if commit is None:
        yield ROOT / "src"
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder / "src"
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def run_part(part: str, source: Path, work: Path, fixtures: Path | None) -> str | None:
    """Runs a part in its folder below `work`, with the code of `source`. Returns the error's last line if it failed."""
    environment = os.environ | FIXED | {"PYTHONPATH": str(source), "EMBEDWRIGHT_CACHE": str(work / "cache")}
    (work / part).mkdir()
    words = [sys.executable, str(PROGRAM), part]
    environment |= {"FIXTURES": str(fixtures)}
    done = subprocess.run(words, cwd=work / part, env=environment, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else None


# ---- comparing


def values(file: Path) -> dict[str, Any]:
    """What is in a file, by place: arrays of .npy and .safetensors, leaves of JSON, rows of Parquet, else lines."""
    if file.suffix == ".npy":
        return {"": np.load(file)}
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {name: tensor.float().numpy() for name, tensor in load_file(file).items()}
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return dict(leaves(parquet.read_table(file).to_pylist()))
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".json":
        return dict(leaves(json.loads(text)))
    if file.suffix == ".jsonl":
        return dict(leaves([json.loads(line) for line in text.splitlines()]))
    return {f"line {number}": line for number, line in enumerate(text.splitlines(), 1)}


def leaves(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (place, value) of everything in `tree` that is no mapping and no list."""
    if isinstance(tree, dict | list) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{place}.{key}".lstrip("."))
    else:
        yield place, tree


def distance(old: Any, new: Any) -> float | None:
    """The largest difference of two numbers or arrays, 0 for equal bits; None for values that are no such pair."""
    if type(old) is not type(new) or not isinstance(old, float | int | np.ndarray):
        return None
    a, b = np.asarray(old), np.asarray(new)
    if a.shape != b.shape or a.dtype != b.dtype:
        return None
    if a.tobytes() == b.tobytes():
        return 0.0
    apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(np.nan_to_num(apart, nan=np.inf).max())


def difference(old: Path, new: Path) -> str | None:
    """How two files differ: how many values, and the largest difference or the first one that is no number."""
    if old.read_bytes() == new.read_bytes():
        return None
    ours, theirs = values(old), values(new)
    for there, lacking, side in ((ours, theirs, "NEW"), (theirs, ours, "OLD")):
        if missing := [place for place in there if place not in lacking]:
            return f"{len(missing)} values are missing in {side}, first {missing[0] or 'the whole'}"
    apart = {place: distance(value, theirs[place]) for place, value in ours.items()}
    unlike = [p for p in ours if apart[p] != 0.0 and not (apart[p] is None and repr(ours[p]) == repr(theirs[p]))]
    if not unlike:
        return "other bytes, though all values are equal"
    for place in unlike:
        if apart[place] is None:
            return (
                f"{len(unlike)} of {len(ours)} values, first {place}: {_short(ours[place])} -> {_short(theirs[place])}"
            )
    worst = max(unlike, key=lambda place: apart[place] or 0.0)
    return (
        f"{len(unlike)} of {len(ours)} values, largest difference {apart[worst]:.3e} {'at ' + worst if worst else ''}"
    )


def _short(value: Any) -> str:
    return f"shape {value.shape}" if isinstance(value, np.ndarray) else repr(value)[:60]


def compare(old: Path, new: Path) -> Iterator[tuple[str, str | None]]:
    """Yields (file, how it differs or None) for every file below either folder."""
    found = {file.relative_to(folder) for folder in (old, new) for file in folder.rglob("*") if file.is_file()}
    for name in sorted(found):
        absent = [side for side, folder in (("OLD", old), ("NEW", new)) if not (folder / name).is_file()]
        yield str(name), f"missing in {absent[0]}" if absent else difference(old / name, new / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", help="default: the working tree")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="may be given again")
    parser.add_argument("--fixtures", type=Path, help="folder of small NV-Embed folders")
    options = parser.parse_args()
    parts: list[str] = options.only or list(PARTS)
    fixtures = options.fixtures and options.fixtures.resolve()
    if "fixtures" in parts and not (fixtures and fixtures.is_dir()):
        parts.remove("fixtures")
        print(
            f"fixtures: skipped, {fixtures or '--fixtures'} is {'no folder' if fixtures else 'not given'}", flush=True
        )
    different = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktrees are removed then, too
    with tempfile.TemporaryDirectory(prefix="compare-") as made, ExitStack() as worktrees:
        folder = Path(made)
        run = folder / "run"
        (run / "inputs").mkdir(parents=True)
        subprocess.run([sys.executable, str(PROGRAM), "inputs"], cwd=run / "inputs", env=os.environ | FIXED, check=True)
        sources = {}
        for side, commit in (("OLD", options.old), ("NEW", options.new)):
            (folder / side).mkdir()
            sources[side] = worktrees.enter_context(checked_out(commit, folder / f"{side}-code"))
        for part in parts:
            for side, source in sources.items():
                (folder / side).rename(run / "work")  # both sides run in a folder of this name
                error = run_part(part, source, run / "work", fixtures)
                (run / "work").rename(folder / side)
                if error:
                    different += 1
                    print(f"{part}: FAILED in {side}: {error}", flush=True)
            for name, how in compare(folder / "OLD" / part / "results", folder / "NEW" / part / "results"):
                different += how is not None
                print(f"{part}/{name}: {how or 'equal'}", flush=True)
    print(f"{different} differences" if different else "all equal")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
