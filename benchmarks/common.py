"""What every benchmark needs: bound threads, A B A B rounds, peak memory of a process of its own, records.

A results file (`results/NAME.json`) is the record of the newest run, as `record` makes it; those of processors that ran
before lie in `results/earlier/PROCESSOR/`. Its `goals` are what `report.py` puts beside the goals:
`{name: [{"of": what was measured, "value": ...}]}`, with the names of `report.GOALS`. A record without `goals` is not
about speed, and `report.py` leaves it out.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

RESULTS = Path(__file__).parent / "results"
BOUND = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
MB = 2**20
SHORT = {"float32": "fp32", "bfloat16": "bf16"}  # types in the names of goals
EXTENSIONS = ("avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")  # for products of few bits
CORES = os.sched_getaffinity(0)  # of this process, before any OpenMP runtime is loaded


# ---- the process


def bind_threads() -> None:
    """Start this script again with OpenMP threads bound to cores, where they are not: both sides get the same.

    To be called before torch is imported: OpenMP reads the variables once.
    """
    if os.environ.get("OMP_PROC_BIND", "false").lower() == "false":
        if "torch" in sys.modules:
            raise RuntimeError("bind_threads comes before the import of torch")
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **BOUND})
    from embedwright import threads

    threads.set_up_process()  # as in the `embedwright` command


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    capable: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "cpu": cpu_name(),
        "cores": len(CORES),
        "threads": torch.get_num_threads(),
        "bound": os.environ.get("OMP_PROC_BIND", "false"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "extensions": [name for name in EXTENSIONS if capable.get(name)],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
    }


def cpu_name() -> str:
    """As the processor names itself, with family and model: names alone are coarse on rented machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    return (
        f"{facts.get('model name', platform.machine())} (family {facts.get('cpu family')}, model {facts.get('model')})"
    )


def bind_main_thread() -> None:
    """This thread to its first core, where a bound OpenMP takes it to be; to be called behind all imports.

    A main thread that moves shares a core with one of its own workers whenever another process is busy. ValueError
    where torch has fewer threads than this process has cores: before anything is measured.
    """
    import torch

    siblings = [Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") for core in CORES]
    cores = len({path.read_text() if path.is_file() else path for path in siblings})
    if torch.get_num_threads() < cores and "OMP_NUM_THREADS" not in os.environ:
        raise ValueError(f"torch has {torch.get_num_threads()} threads on {cores} cores: not a fair measurement")
    os.sched_setaffinity(0, {min(CORES)})


# ---- time


def rounds(variants: Mapping[str, Callable[[], Any]], count: int) -> dict[str, list[float]]:
    """Seconds by variant and round, A B A B: what else the machine does meets all of them. Warmed up by the caller."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(count):
        for name, run in variants.items():
            seconds[name].append(timed(run))
    return seconds


def timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times faster: the median of the rounds' ratios, and the smallest and largest of them."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(each), "least": min(each), "most": max(each)}


def own_seconds(run: Callable[[], Any], parts: Sequence[tuple[Any, str, str]], rest: str) -> dict[str, float]:
    """Seconds of one run by part, each without those of other parts in it. `parts`: where a function is, its name
    there, and the part that its time counts as; `rest` is the part of all else."""
    seconds = dict.fromkeys([*(part for *_, part in parts), rest], 0.0)
    around, since = [rest], time.perf_counter()  # the innermost part is the last

    def switched() -> None:
        nonlocal since
        now = time.perf_counter()
        seconds[around[-1]] += now - since
        since = now

    def watched(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            switched()
            around.append(part)
            try:
                return function(*arguments, **named)
            finally:
                switched()
                around.pop()

        return call

    with ExitStack() as patches:
        for place, name, part in parts:
            patches.enter_context(mock.patch.object(place, name, watched(getattr(place, name), part)))
        since = time.perf_counter()
        run()
        switched()
    return seconds


# ---- memory


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return _status("VmRSS")


def peak_during(run: Callable[[], Any]) -> int:
    """Bytes of memory that this process held at most while `run` ran, counted by the kernel."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    run()
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the kernel does not give {key}")


def in_own_process(arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON that this script prints last when it is run again with these arguments. RuntimeError where it fails."""
    command = [sys.executable, sys.argv[0], *arguments]
    os.sched_setaffinity(0, CORES)  # the child inherits them
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    bind_main_thread()
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))}: exit {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# ---- results


def record(name: str, figures: Mapping[str, Any], goals: Mapping[str, list[dict[str, Any]]] | None) -> None:
    """Write `results/NAME.json`: the command, the machine, the goals that this run has a figure for, the figures.

    A record of another processor moves to `results/earlier/PROCESSOR/` first, so that each processor keeps its newest.
    """
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    content: dict[str, Any] = {"command": command, "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    content |= figures if goals is None else {"goals": goals, **figures}
    file = RESULTS / f"{name}.json"
    _earlier(content, name).unlink(missing_ok=True)
    if file.is_file() and (other := _earlier(json.loads(file.read_text()), name)) != _earlier(content, name):
        other.parent.mkdir(parents=True, exist_ok=True)
        file.rename(other)
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(rounded(content), indent=1) + "\n")
    print(f"results/{name}.json")


def processor(content: Mapping[str, Any]) -> str:
    """What a record was measured on: a GPU by its name, else the CPU."""
    name: str = content.get("gpu") or content["machine"]["cpu"]
    return name


def _earlier(content: Mapping[str, Any], name: str) -> Path:
    """Where this record goes once another processor has a newer one."""
    return RESULTS / "earlier" / re.sub(r"[^a-z0-9]+", "-", processor(content).lower()).strip("-") / f"{name}.json"


def rounded(value: Any) -> Any:
    """Floats to five significant digits, everywhere in a nested record."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value
