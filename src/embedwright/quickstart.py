"""`embedwright train --data my_pairs.jsonl`: the two-stage defaults on a user's own pairs, with before and after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedwright.config import ConfigError
from embedwright.data.example import Example
from embedwright.data.mine import mine, positives_of
from embedwright.data.repeats import drop_duplicates, leaks
from embedwright.data.table import open_examples, write_examples
from embedwright.display import counter, say
from embedwright.model.opening import open_encoder
from embedwright.training.blend import permuted
from embedwright.training.recipe import Recipe

INSTRUCTION = "Given a query, retrieve the passage that answers it"


def recipe_for(
    data: Path,
    base: str,
    out: Path,
    *,
    layers: int | None = None,
    instruction: str = INSTRUCTION,
    teacher: str = "minilm",
) -> Recipe:
    """Prepare the user's pairs below `out/data` (once) and return the recipe that trains on them.

    A tenth of the queries, 500 at most, is held out, and what repeats it is taken out of training; hard negatives are
    mined with `teacher`. ConfigError where too little is left, or `out` is of other data.
    """
    prepared = out / "data"
    if not (prepared / "report.json").exists():
        _prepare(data, prepared, instruction, teacher)
    report = json.loads((prepared / "report.json").read_text())
    before, now = report.pop("source", None), _source(data, teacher, instruction)
    if not isinstance(before, dict):
        raise ConfigError(f"{out} was prepared by another version: choose another --out")
    if changed := [key for key in now if before.get(key) != now[key]]:
        key = changed[0]
        change = f"{before.get(key)!r}, now {now[key]!r}"
        raise ConfigError(f"{out} holds a run of another {key} ({change}): choose another --out")
    say("  " + ", ".join(f"{key} {value}" for key, value in report.items()))
    # about one pass over the data in stage 1 and half of one in stage 2, within what a laptop does in an hour
    queries = min(32, report["train"])
    steps = max(10, min(report["train"] // queries, 1000))
    task = {"name": "own", "family": "retrieval", "instruction": instruction}
    entry = {"path": str(prepared / "train.jsonl"), "task": task}
    return Recipe.parse(
        {
            "name": out.name or "own",
            "model": {"base": base, "layers": layers, "pooling": "latent", "latents": 128, "max_tokens": 256},
            "tune": {"method": "lora", "rank": 16, "alpha": 32, "dropout": 0.0},
            "stages": [
                {
                    "name": "retrieval",
                    "data": [entry],
                    "in_batch_negatives": "all",
                    "hard_negatives": 1,
                    "optim": {"lr": 3e-4, "warmup_steps": steps // 10, "steps": steps, "batch_queries": queries},
                },
                {
                    "name": "generalist",
                    "data": [entry],
                    "in_batch_negatives": "none",
                    "hard_negatives": 4,
                    "optim": {"lr": 1e-4, "steps": max(5, steps // 2), "batch_queries": max(1, queries // 2)},
                },
            ],
            "run": {"out": str(out), "precision": "bf16", "checkpoint_every": 50},
            "eval": {"suites": [str(prepared / "heldout" / "suite.yaml")]},
        }
    )


def _prepare(data: Path, out: Path, instruction: str, teacher: str) -> None:
    table = open_examples(data, task="own")
    read, described = list(table), table.tasks
    kept, duplicates = drop_duplicates([f"{e.query}\n{e.positives[0].text}" for e in read])
    examples = [read[i] for i in kept]
    held = min(max(len(examples) // 10, 1), 500)
    order = [permuted(i, len(examples), "held out") for i in range(len(examples))]
    heldout, train = [examples[i] for i in order[:held]], [examples[i] for i in order[held:]]
    leaked, _ = leaks([e.query for e in train], [e.query for e in heldout])
    leaked_set = set(leaked) | set(
        leaks([e.positives[0].text for e in train], [e.positives[0].text for e in heldout])[0]
    )
    train = [e for i, e in enumerate(train) if i not in leaked_set]
    _refuse_few(data, len(train), "after cleaning")
    passages = list(dict.fromkeys(p.text for e in examples for p in e.positives))
    pool = positives_of(train)
    mined, report = mine(
        train,
        pool,
        open_encoder(teacher),
        task=instruction,
        negatives=4,
        depth=min(100, len(pool)),
        progress=counter("texts"),
    )
    with_negatives = [e for e in mined if e.negatives]
    _refuse_few(data, len(with_negatives), "with a hard negative")
    out.mkdir(parents=True, exist_ok=True)
    write_examples(out / "train.jsonl", with_negatives, described)
    _write_suite(out / "heldout", heldout, passages, instruction)
    counts = {
        "read": len(read),
        "exact_duplicates": duplicates.exact,
        "near_duplicates": duplicates.near,
        "leaks": len(leaked_set),
        "heldout": len(heldout),
        "likely_positives_removed": report.removed_by_rule,
        "without_negatives": len(mined) - len(with_negatives),
        "train": len(with_negatives),
        "source": _source(data, teacher, instruction),
    }
    (out / "report.json").write_text(json.dumps(counts, indent=2) + "\n")  # last: it marks the folder as whole


def _source(data: Path, teacher: str, instruction: str) -> dict[str, str]:
    """All that the prepared data depends on."""
    table = open_examples(data, task="own")
    described = json.dumps({name: task.model_dump() for name, task in table.tasks.items()})
    return {"data": table.fingerprint[:16], "teacher": teacher, "instruction": instruction, "tasks": described}


def _refuse_few(data: Path, count: int, which: str) -> None:
    if count < 20:
        raise ConfigError(f"{data}: {count} pairs are left to train on {which}; 20 is the least")


def _write_suite(folder: Path, heldout: Sequence[Example], passages: Sequence[str], instruction: str) -> None:
    """The held-out queries against all passages, as a BEIR folder in a suite."""
    beir = folder / "own"
    (beir / "qrels").mkdir(parents=True, exist_ok=True)
    place = {text: f"d{i}" for i, text in enumerate(passages)}
    _write_lines(beir / "corpus.jsonl", [{"_id": id, "text": text} for text, id in place.items()])
    _write_lines(beir / "queries.jsonl", [{"_id": f"q{i}", "text": e.query} for i, e in enumerate(heldout)])
    judged = [f"q{i}\t{place[p.text]}\t1\n" for i, e in enumerate(heldout) for p in e.positives]
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    task = {"name": "own", "kind": "retrieval", "path": "own", "instruction": instruction}
    (folder / "suite.yaml").write_text(json.dumps({"name": "heldout", "tasks": [task]}) + "\n")  # JSON is YAML


def _write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
