"""A tiny run as `embedwright train` leaves it, whose data holds texts that would break a careless page; an ablation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import numpy as np
import pytest
import yaml

from embedwright.studies.ablate import cell as ablate_cell
from embedwright.studies.ablate import jobs as ablate_jobs
from embedwright.training.recipe import Recipe
from embedwright.training.train import train

SCRIPT = "<script>alert(1)</script> & </script>\u2028 tide"  # as HTML and as JSON in a script
SUITE = "held out </script>\u2028"
KINDS = ("sea", "dog", "sun & moon", *"abcdefgh")


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: Callable[..., Path]) -> Path:
    """The folder of a run of two stages, 4 and 2 steps, with a suite of all kinds and a saved model. Do not change."""
    at = tmp_path_factory.mktemp("reported")
    rows = [
        {"query": f"q{i} tide", "positives": [f"p{i} the moon"], "negatives": [f"n{i} a dog", f"m{i} fox"]}
        for i in range(12)
    ]
    rows[0]["query"] = SCRIPT
    pairs = write(at / "pairs.jsonl", rows)
    labelled = [{"text": f"{kind} {i}", "label": kind} for i in range(5) for kind in KINDS]
    labels = write(at / "labels.jsonl", labelled)
    scored = [{"text1": f"a tide {i}", "text2": f"moon {i * i}", "score": i % 5} for i in range(10)]
    write(at / "suite" / "sts.jsonl", scored)
    write(at / "suite" / "kinds.jsonl", [*labelled, {"text": SCRIPT, "label": "sea"}])
    beir = at / "suite" / "docs"
    write(beir / "queries.jsonl", [{"_id": f"q{i}", "text": SCRIPT if i == 0 else f"q{i} tide"} for i in range(6)])
    write(beir / "corpus.jsonl", [{"_id": f"d{i}", "title": f"T{i}", "text": f"p{i} the moon"} for i in range(12)])
    (beir / "qrels").mkdir()
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(6))
    (beir / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    tasks = [
        {"name": name, "kind": kind, "path": path}
        for name, kind, path in (
            ("docs", "retrieval", "docs"),
            ("kinds", "clustering", "kinds.jsonl"),
            ("alike", "sts", "sts.jsonl"),
        )
    ]
    suite = at / "suite" / "suite.yaml"
    suite.write_text(yaml.safe_dump({"name": SUITE, "tasks": tasks}))
    find = {"name": "pairs", "instruction": "Find it", "licence": "CC0 <b>"}
    stage = {"hard_negatives": 1, "temperature": 0.1}
    recipe = Recipe.parse({
        "name": "tiny & small",
        "model": {"base": str(tiny_decoder("llama")), "pooling": "mean", "max_tokens": 60},
        "tune": {"rank": 2, "alpha": 4},
        "stages": [
            {"name": "first", "data": [{"path": pairs, "task": find}], "in_batch_negatives": "all", **stage,
             "optim": {"lr": 1e-2, "steps": 4, "batch_queries": 4}},
            {"name": "second", "data": [{"path": labels}], "in_batch_negatives": "none", **stage,
             "optim": {"lr": 1e-3, "steps": 2, "batch_queries": 4}},
        ],
        "run": {"out": str(at / "run"), "tracker": "none", "workers": 0},
        "eval": {"suites": [str(suite)], "every": 2},
    })  # fmt: skip
    train(recipe)
    return at / "run"


# ---- a tiny ablation

WORDS = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox"]


def _stage(name: str, pairs: str) -> dict[str, Any]:
    optim = {"lr": 1e-2, "steps": 6, "batch_queries": 4, "warmup_steps": 2}
    rest = {"in_batch_negatives": "all", "hard_negatives": 1, "temperature": 0.1, "optim": optim}
    return {"name": name, "data": [{"path": pairs}], **rest}


@pytest.fixture
def ablation(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> Callable[..., Path]:
    """`ablation(**changes)`: the file of an ablation whose keys are changed; None takes a key away."""
    random = np.random.default_rng(0)

    def text(about: str) -> str:
        return " ".join([about, *random.choice(WORDS, random.integers(2, 9))])

    def write(name: str, rows: list[dict[str, Any]]) -> str:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    rows = [{"query": text(f"q{i}"), "positives": [text(f"p{i}")], "negatives": [text(f"n{i}")]} for i in range(40)]
    pairs = write("pairs.jsonl", rows)
    write("suite/sts.jsonl", [{"text1": text("a"), "text2": text("b"), "score": i % 6} for i in range(30)])
    base = {
        "name": "base",
        "model": {"base": str(tiny_decoder("llama")), "layers": 1, "pooling": "mean", "max_tokens": 40},
        "tune": {"rank": 2, "alpha": 4, "dropout": 0.0},
        "stages": [_stage("first", pairs), _stage("second", pairs)],
        "run": {"tracker": "none", "checkpoint_every": 3, "workers": 0},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    said = {
        "name": "tiny",
        "base": "base.yaml",
        "baseline": "plain",
        "arms": {"plain": {}, "warm": {"stages.second.temperature": 0.5}},
        "seeds": [1, 2],
        "suite": "suite",
    }

    def make(**changes: Any) -> Path:
        file = tmp_path / "tiny.yaml"
        content = {key: value for key, value in (said | changes).items() if value is not None}
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return file

    return make


class _InProcess:
    """Stands for `subprocess.Popen` of a cell: does its work here, at once, so that torch is imported once."""

    started: ClassVar[list[Path]] = []

    def __init__(self, words: list[str], *, stdout: IO[bytes], **_: Any) -> None:
        folder, began = Path(words[-2]), float(words[-1])
        self.started.append(folder)
        self.returncode = 0
        try:
            ablate_cell.main(folder, began)
        except Exception as error:
            stdout.write(f"{type(error).__name__}: {error}\n".encode())
            self.returncode = 1

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the cells that were started, in order. Cells run in this process."""
    monkeypatch.setattr(ablate_jobs, "subprocess", SimpleNamespace(Popen=_InProcess, DEVNULL=None))
    monkeypatch.setattr(ablate_cell.threads, "set_up_process", lambda: None)
    monkeypatch.setattr(ablate_jobs, "_POLL_S", 0.0)
    _InProcess.started = []
    return _InProcess.started
