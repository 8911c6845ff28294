"""Runs the cells of the twins one at a time: two systems, two recipes, equal examples or equal seconds (README.md).

    TWINS_DATA=runs/twins-data python benchmarks/twins/run.py benchmarks/twins/plan.yaml --out docs/results/twins
    ... --only t2 --only t1/st-ours        # the cells whose names begin so

The plan has all cells, the trials of rates too, before the first one runs. A cell is a process. One that is done never
runs again, one that was killed begins anew. OUT/twins.json holds all results and the comparisons.
git keeps each cell's scores, too, so that another machine goes on, if it has made the same rows.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import table
from pydantic import Field, model_validator

from embedwright.config import load_yaml, validate
from embedwright.errors import InputError
from embedwright.evaluation.about import processor
from embedwright.files import sha256_of, write_json
from embedwright.training.parts import Part, Positive, PositiveNumber, Text

HERE = Path(__file__).resolve().parent
CORES = os.sched_getaffinity(0)  # before torch is loaded: with OMP_PROC_BIND it keeps this thread on one core
CORNERS = ("ours-ours", "st-ours", "ours-plain", "st-plain")  # SYSTEM-RECIPE
KNOWN_BY = ("seed", "setting", "steps", "seconds", "shares", "suite", "st")  # what makes another cell
OF_ALL = ("content", "processor")  # what all cells must share; the processor where seconds count
Spec = dict[str, Any]


class Setting(Part):
    """What a trial changes: factors of the recipe's rates and batches, and the weights that are trained."""

    lr: PositiveNumber = 1.0
    batch: PositiveNumber = 1.0
    method: Literal["lora", "full"] = "lora"


class Test(Part):
    """One test: the pairs of corners that it compares, and its length: a factor of the recipe's steps, or seconds.

    `shares` gives the part of the seconds that each stage of a recipe gets. Each corner tries all `settings` on the
    tuning seed at `trial` of the length, and takes the best.
    """

    pairs: tuple[tuple[Literal[CORNERS], Literal[CORNERS]], ...] = Field(min_length=1)
    steps: PositiveNumber = 1.0
    seconds: PositiveNumber | None = None
    shares: dict[Literal["ours", "plain"], tuple[PositiveNumber, ...]] = Field({})
    trial: PositiveNumber = 1.0
    settings: tuple[Setting, ...] = (Setting(),)

    @property
    def corners(self) -> list[str]:
        return list(dict.fromkeys(corner for pair in self.pairs for corner in pair))

    @model_validator(mode="after")
    def _is_whole(self) -> Test:
        if self.seconds is None and any(setting.batch != 1 for setting in self.settings):
            raise InputError("settings: equal examples in equal steps leave no other batch: drop `batch`")
        if self.seconds is not None and not {c.partition("-")[2] for c in self.corners} <= self.shares.keys():
            raise InputError("shares: say how the stages of each recipe share the seconds")
        return self


class Base(Part):
    decoder: Text
    layers: Positive
    max_tokens: Positive


class Plan(Part):
    """All that is run: see plan.yaml."""

    name: Text
    base: Base
    suite: Text
    st: dict[str, Any]
    seeds: tuple[int, ...] = Field(min_length=1)
    tuning_seed: int
    tests: dict[Text, Test]
    smoke: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[], help="cells whose names begin so; repeatable")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process of a cell ends with this one
    try:
        plan, out = read_plan(options.plan), options.out.resolve()
        out.mkdir(parents=True, exist_ok=True)
        with (out / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            run(plan, options.plan, out, options.only)
    except BlockingIOError:
        sys.exit(f"{options.out}: another process runs these cells")
    except InputError as error:
        sys.exit(f"error: {error}")


def read_plan(file: Path) -> Plan:
    return validate(Plan, load_yaml(file), str(file))


def run(plan: Plan, file: Path, out: Path, only: Sequence[str]) -> None:
    specs = list(cells(plan))
    for name in only:
        if not any(spec["id"].startswith(name) for spec in specs):
            raise InputError(f"--only {name}: no cell begins so; cells: {', '.join(spec['id'] for spec in specs)}")
    content = content_of(plan)
    specs = [spec | {"content": content, "processor": processor() if spec["seconds"] else None} for spec in specs]
    for spec in specs:
        refuse_other(spec, OF_ALL, out)
    base = out / f"base-{content}"
    if not base.exists():
        save_base(plan, base)
    for spec in specs:
        if not only or any(spec["id"].startswith(name) for name in only):
            one(plan, spec | {"base": str(base)}, file, out)
            write_json(out / "twins.json", gathered(plan, specs, out))
    print("\n".join(table.render(gathered(plan, specs, out))))


def save_base(plan: Plan, folder: Path) -> None:
    """Converts the decoder to a folder that both systems open."""
    from embedwright import Embedder

    sizes = plan.base.model_dump(exclude={"decoder"})
    Embedder.from_decoder(plan.base.decoder, pooling="mean", **sizes).save(folder)


def cells(plan: Plan) -> Iterator[Spec]:
    """Yields every cell in the order of running: all trials of a test, then seed by seed, the corners in turn.

    A test with one setting has no trials. The setting of a cell is known once its trials are done (`chosen`).
    """
    for name, test in plan.tests.items():
        tried = test.settings if len(test.settings) > 1 else ()
        runs = [("trial-" + "-".join(f"{k}{v}" for k, v in s), plan.tuning_seed, s.model_dump()) for s in tried]
        runs += [(f"seed-{seed}", seed, None) for seed in plan.seeds]
        for place, seed, setting in runs:
            for corner in test.corners:
                system, _, recipe = corner.partition("-")
                length = 1.0 if setting is None else test.trial
                spec = {"id": f"{name}/{corner}/{place}", "corner": corner, "system": system, "seed": seed}
                spec |= {"recipe": str(HERE / f"{recipe}.yaml"), "setting": setting, "trial": setting is not None}
                spec |= {"seconds": test.seconds and length * test.seconds, "shares": test.shares.get(recipe)}
                spec |= {"steps": test.steps * (1.0 if test.seconds else length), "pace": None}
                yield spec | {"suite": plan.suite, "st": plan.st if system == "st" else None, "smoke": plan.smoke}


def content_of(plan: Plan) -> str:
    """Fingerprints the base, the recipes and the rows: where they change, an older result is not taken."""
    data = os.environ.get("TWINS_DATA", "")
    files = sorted(Path(data).glob("*.jsonl")) if data else []
    if not files:
        raise InputError(f"TWINS_DATA={data} has no rows: set it to the folder that benchmarks/twins/data.py has made")
    parts = [plan.base.model_dump_json(), *map(sha256_of, [HERE / "ours.yaml", HERE / "plain.yaml", *files])]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def one(plan: Plan, spec: Spec, file: Path, out: Path) -> None:
    """Runs a cell that has no result, with the setting that its corner's trials have chosen."""
    folder, began = out / spec["id"], time.monotonic()
    if not spec["trial"]:
        if (best := chosen(plan, *spec["id"].split("/")[:2], out)) is None:
            print(f"{spec['id']}: left out, its trials are not done")
            return
        spec = spec | best
    if refuse_other(spec, KNOWN_BY, out):
        return
    shutil.rmtree(folder, ignore_errors=True)
    command = shlex.join(["python", "benchmarks/twins/run.py", str(file), "--only", spec["id"]])
    write_json(folder / "cell.json", spec | {"command": command})
    cores = {"OMP_NUM_THREADS": str(len(CORES)), "TOKENIZERS_PARALLELISM": "false"}
    os.sched_setaffinity(0, CORES)  # the cell inherits them
    with (folder / "log.txt").open("wb") as log:
        words = [sys.executable, str(HERE / "cell.py"), str(folder)]
        code = subprocess.run(words, stdout=log, stderr=log, env=cores | os.environ).returncode
    result = read(folder / "result.json")
    said = f"failed (exit code {code}): {folder / 'log.txt'}" if result is None else result.get("failed", "done")
    print(f"{spec['id']}: {said}, {time.monotonic() - began:,.0f} s", flush=True)


def refuse_other(spec: Spec, keys: Sequence[str], out: Path) -> bool:
    """Returns whether a cell has a result. Raises InputError if that is of another cell."""
    found = read(out / spec["id"] / "result.json")
    if found is None:
        return False
    if differs := [key for key in keys if found.get(key) != json.loads(json.dumps(spec[key]))]:
        raise InputError(f"{out / spec['id']} holds a result of another {', '.join(differs)}: choose another --out")
    return True


def chosen(plan: Plan, test: str, corner: str, out: Path) -> Spec | None:
    """Returns the setting of the best trial and its pace; None while a trial is missing, or where all have failed."""
    if len(plan.tests[test].settings) == 1:
        return {"setting": plan.tests[test].settings[0].model_dump()}
    trials = [spec["id"] for spec in cells(plan) if spec["trial"] and spec["id"].startswith(f"{test}/{corner}/")]
    found = [read(out / name / "result.json") for name in trials]
    scored = [result for result in found if result and "macro" in result]
    if not scored or None in found:
        return None
    best = max(scored, key=lambda result: result["macro"])
    return {"setting": best["setting"], "pace": best["took"]["pace"]}


def read(file: Path) -> Spec | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def gathered(plan: Plan, specs: Sequence[Spec], out: Path) -> Spec:
    """Returns all results, what is missing, and the comparisons of each test's pairs over the seeds of both."""
    results = {spec["id"]: read(out / spec["id"] / "result.json") for spec in specs}
    done = [result for result in results.values() if result]
    scored = {result["id"] for result in done if "macro" in result}
    compared = [
        {"test": name, "corner": ours, "baseline": other, "seeds": seeds, **comparison(out / name, ours, other, seeds)}
        for name, test in plan.tests.items()
        for ours, other in test.pairs
        if (seeds := [n for n in plan.seeds if {f"{name}/{c}/seed-{n}" for c in (ours, other)} <= scored])
    ]
    told = plan.model_dump(mode="json") | {"cells": done, "comparisons": compared}
    return told | {"missing": [name for name, result in results.items() if result is None]}


def comparison(folder: Path, ours: str, other: str, seeds: Sequence[int]) -> Spec:
    """Compares two corners of a test over seeds and items. The scores of a smoke test are read, too."""
    from embedwright.evaluation.compare.compare import Candidate, compare
    from embedwright.evaluation.results import Results, items_file, with_items

    def candidate(corner: str) -> Candidate:
        files = {seed: folder / corner / f"seed-{seed}" / "scores.json" for seed in seeds}
        bare = {seed: Results.from_json(file.read_text(encoding="utf-8")) for seed, file in files.items()}
        return Candidate(corner, {seed: [with_items(bare[seed], items_file(files[seed]))] for seed in seeds})

    found: Spec = json.loads(compare([candidate(other), candidate(ours)]).to_json())
    if found["left_out"]:  # a mean over fewer tasks is another test
        raise InputError(f"{folder}: {'; '.join(found['left_out'])}")
    return {"rows": found["rows"]}


if __name__ == "__main__":
    main()
