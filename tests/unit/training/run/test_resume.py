"""One process decides and all hear it: a run in two processes of which the second sees other numbers, clocks and files.

Whatever a later change lets each process decide for itself should fail here: the second process reports every file of
the run's folder that it opens or looks for, and hangs or ends otherwise where it goes its own way.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import groups
import numpy as np
import pytest
from groups import raised

from embedwright.evaluation.results import Result, Results
from embedwright.model.embedder import Embedder
from embedwright.processes import start
from embedwright.training.recipe import Recipe
from embedwright.training.run import resume, scores
from embedwright.training.run.signals import Interrupted
from embedwright.training.steps import Steps
from embedwright.training.train import train

TEXTS = ["how do tides work?", "the moon"]
# What the others must read of the run's folder: rank 0 has told them that it is there.
MAY_READ = r"checkpoints/\d\d-\d{7}(/.*)?|mined/(?!.*run\.json).*|best/\w+\.safetensors|\.processes\.[0-9a-f]{12}"


def pairs(file: Path, count: int) -> str:
    rows = [{"query": f"q{i} tide", "positives": [f"p{i} the moon and {i}"]} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, tiny_decoder: Callable[..., Path], tiny_embedder: Callable[..., Embedder]
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("g")
    for seed, place in enumerate(("one", "other")):
        tiny_embedder("mean", layers=1 + seed).save(folder / place / "teacher")
    pairs(folder / "pairs.jsonl", 20)
    scored = [{"text1": f"a tide {i}", "text2": f"the moon {i % 5}", "score": i % 6} for i in range(12)]
    (folder / "suite").mkdir()
    (folder / "suite" / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    sizes = {"a_run": (2,), "other_places": (2,)}
    return groups.run(__file__, folder, sizes, str(tiny_decoder("llama"))) | {"folder": folder}


def test_all_do_what_the_first_process_decides(found: dict[str, Any]) -> None:
    first, second = found["a_run"][2]
    assert first["stopped"] == "signal after stage retrieval, step 2"
    assert second["stopped"] == "SIGTERM after stage retrieval, step 2"  # the signal came to this process alone
    np.testing.assert_allclose(first["vectors"], second["vectors"], atol=1e-4)  # rank 0 alone has merged its adapters
    records = [json.loads(line) for line in (found["folder"] / "run" / "evaluations.jsonl").read_text().splitlines()]
    # no better score in two evaluations after that of step 2, by the numbers of the first process
    assert [record["step"] for record in records] == [0, 2, 4, 6]
    assert second["scored"] == 0
    steps = [json.loads(line) for line in (found["folder"] / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    skipped = [json.loads(line) for line in (found["folder"] / "run" / "nonfinite.jsonl").read_text().splitlines()]
    # the second process alone had a loss that is not finite
    assert [(line["step"], line["what"]) for line in skipped] == [(4, "the loss of another process is not finite")]


def test_no_other_process_looks_for_itself_into_the_folder_of_the_run(found: dict[str, Any]) -> None:
    seen = found["a_run"][2][1]["seen"]
    assert [path for path in seen if not re.fullmatch(MAY_READ, path)] == []
    assert any(path.endswith("state.json") for path in seen)  # it does see what is looked at
    assert any(path.startswith("mined/") for path in seen)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("another folder", "run.out: .* is another folder here than in process 0"),
        ("an older folder", "run.out: .* is another folder here than in process 0"),
        ("other data", r"its data \(.*\) differs from that of process 0"),
        ("another recipe", r"its recipe \(.*batch_queries: 4 -> 5.*\) differs from that of process 0"),
        ("another miner", r"its teacher \(\./teacher: \w+ -> \w+\) differs from that of process 0"),
        ("no data", r"no such file|does not exist|No such file"),
        ("no suite", "no suite .*gone.yaml"),
    ],
)
def test_what_one_process_lacks_is_an_error_in_all(found: dict[str, Any], case: str, message: str) -> None:
    first, second = (one[case] for one in found["other_places"][2])
    assert first is not None and second is not None
    assert re.search(message, second) and re.search(f"process 1: .*({message})", first), (first, second)


def test_a_disk_that_fails_rank_0_is_an_error_in_all(found: dict[str, Any]) -> None:
    first, second = (one["no disk"] for one in found["other_places"][2])
    assert first == "OSError: no space left" and second == "OtherProcessError: process 0: no space left"


# ---- in the processes


def content(folder: Path, decoder: str) -> dict[str, Any]:
    return {
        "name": "decided",
        "model": {"base": decoder, "pooling": "mean", "max_tokens": 40},
        "tune": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "stages": [
            {"kind": "mine", "negatives": 2, "rule": "naive", "every": 4},
            {
                "name": "retrieval",
                "data": [{"path": str(folder / "pairs.jsonl")}],
                "in_batch_negatives": "all",
                "hard_negatives": 1,
                "temperature": 0.1,
                "optim": {"lr": 1e-2, "steps": 12, "batch_queries": 4},
            },
        ],
        "run": {"out": str(folder / "run"), "checkpoint_every": 2, "tracker": "none"},
        "eval": {"suites": [str(folder / "suite")], "every": 2, "best": True, "patience": 2},
    }


def watch(out: Path, seen: set[str]) -> None:
    """Notes every path below `out` that this process opens, lists or looks for."""
    stat = os.stat

    def look(path: Any) -> None:
        if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(out):
            seen.add(str(Path(path).relative_to(out)))

    def looked(path: Any, *given: Any, **options: Any) -> os.stat_result:
        look(path)
        return stat(path, *given, **options)

    os.stat = looked
    sys.addaudithook(lambda event, given: look(given[0]) if event in ("open", "os.listdir", "os.scandir") else None)


def a_run(folder: Path, decoder: str) -> dict[str, Any]:
    """Trains, is stopped by a signal to one process, and goes on."""
    rank, out = start().rank, folder / "run"
    scored, taken, seen, stopped = 0, 0, set[str](), ""
    accumulate, now = Steps._accumulate, time.time

    def score(model: Any, suite: str, say: Any) -> Results:
        nonlocal scored
        scored += 1
        model.encode(TEXTS)
        value = [0.1, 0.5, 0.4, 0.5, 0.9][scored - 1] if rank == 0 else float(scored)  # there, each is the best
        items = {"cosine": np.array([value, 0.5]), "gold": np.array([1.0, 0.0])}
        return Results("suite", (Result("t", "sts", "spearman", value, items=items),), 0.0)

    def odd(self: Steps, number: int, local: Any, seed: int) -> tuple[float, int, float]:
        nonlocal taken
        taken += 1
        if rank == 1 and taken == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        loss, tokens, known = accumulate(self, number, local, seed)
        return (np.nan if rank == 1 and taken == 4 else loss), tokens, known

    scores.score_suite = score  # type: ignore[assignment]
    Steps._accumulate = odd  # type: ignore[method-assign]
    if rank == 1:
        resume.newest = lambda folder: None
        for clock in ("time", "perf_counter", "monotonic"):
            setattr(time, clock, lambda: 1e6 + 7 * now())
        watch(out, seen)
    try:
        train(Recipe.parse(content(folder, decoder)))
    except Interrupted as error:
        stopped = str(error)
    model = train(Recipe.parse(content(folder, decoder)))
    vectors = model.encode(TEXTS).ravel().tolist()
    return {"stopped": stopped, "vectors": vectors, "scored": scored, "seen": sorted(seen)}


def other_places(folder: Path, decoder: str) -> dict[str, str | None]:
    """Begins runs in which the second process has something else than the first."""
    rank = start().rank
    found: dict[str, str | None] = {}

    def ends(case: str, change: Callable[[dict[str, Any]], None], mined: dict[str, Any] | None = None) -> None:
        own = content(folder, decoder)
        own["run"]["out"] = str(folder / case)
        own["stages"][0] |= mined or {}
        if rank == 1:
            change(own)
        found[case] = raised(lambda: train(Recipe.parse(own)))

    def older(own: dict[str, Any]) -> None:
        own["run"]["out"] = str(folder / "run")

    def other_data(own: dict[str, Any]) -> None:
        (folder / "there").mkdir()
        own["stages"][1]["data"][0]["path"] = pairs(folder / "there" / "pairs.jsonl", 21)

    ends("another folder", lambda own: own["run"].update(out=str(folder / "elsewhere")))
    ends("an older folder", older)
    ends("other data", other_data)
    ends("another recipe", lambda own: own["stages"][1]["optim"].update(batch_queries=5))
    os.chdir(folder / ("other" if rank else "one"))
    ends("another miner", lambda own: None, {"teacher": "./teacher", "every": None})
    ends("no data", lambda own: own["stages"][1]["data"][0].update(path=str(folder / "gone.jsonl")))
    ends("no suite", lambda own: own["eval"].update(suites=[str(folder / "gone.yaml")]))

    def full(*given: Any) -> None:
        raise OSError("no space left")

    if rank == 0:
        scores.write_items = full
    ends("no disk", lambda own: None)
    return found
