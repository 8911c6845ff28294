"""A tiny run as `embedwright train` leaves it, whose data holds texts that would break a careless page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedwright.training.recipe import Recipe
from embedwright.training.train import train

SCRIPT = "<script>alert(1)</script> & </script>\u2028 tide"  # as HTML and as JSON in a script
SUITE = "held out </script>\u2028"
KINDS = ("sea", "dog", "sun & moon")


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
    labelled = [{"text": f"{kind} {i}", "label": kind} for i in range(16) for kind in KINDS]
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)  # waiting for the disk is most of a tiny run
        train(recipe).save(at / "run" / "model")
    return at / "run"
