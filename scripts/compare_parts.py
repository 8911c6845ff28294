"""What `compare_commits.py` runs: `inputs` once, then with each of two commits every one of PARTS, by its name.

A part runs in an empty folder, reads `../../inputs`, and writes what is to be compared into `results`. It uses public
names and the command line alone, so it runs over any layout of the package. It writes no times: they always differ.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

INPUTS, RESULTS = Path("../../inputs"), Path("results")
TASK = "Given what a Python function is called, retrieve its documentation"
BASE = "smollm2-135m"
MODULES = [
    "argparse",
    "difflib",
    "heapq",
    "logging",
    "random",
    "shutil",
    "statistics",
    "tarfile",
    "threading",
    "zipfile",
]
GERMAN = [
    "Der Mond und die Sonne ziehen das Wasser der Meere an, und deshalb gibt es Ebbe und Flut.",
    "Diese Funktion gibt eine Liste aller Wörter zurück, die in dem Text mehr als einmal vorkommen.",
]


# ---- data: docstrings of the standard library


def docstrings(module: str) -> Iterator[tuple[str, str]]:
    """Yields (name, first paragraph) of the documented public functions and classes, without importing the module."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            text = " ".join(inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(text) > 20:
                yield f"{module}.{node.name}", text


def write_rows(name: str, rows: Iterable[Any]) -> None:
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def inputs() -> None:
    """Writes the data that all parts read into the current folder."""
    docs = dict(pair for module in MODULES for pair in docstrings(module))
    pairs = [{"query": name.replace(".", " ").replace("_", " "), "positive": text} for name, text in docs.items()]
    labelled = [{"text": text, "label": name.split(".")[0]} for name, text in docs.items()]
    scored = []
    for left, right in pairwise(docs.values()):
        words = [set(text.lower().split()) for text in (left, right)]
        score = round(5 * len(words[0] & words[1]) / len(words[0] | words[1]), 3)
        scored.append({"text1": left, "text2": right, "score": score})
    classes = []
    for i, row in enumerate(labelled):
        after = labelled[i + 1 :] + labelled[:i]
        positive = next(other["text"] for other in after if other["label"] == row["label"])
        others = [other["text"] for other in labelled if other["label"] != row["label"]]
        negatives = [others[(7 * i + k) % len(others)] for k in range(2)]
        classes.append({"query": row["text"], "positives": [positive], "negatives": negatives})
    write_rows("pairs.jsonl", pairs)
    write_rows("corpus.jsonl", ({"_id": name, "text": text} for name, text in docs.items()))
    write_rows("questions.jsonl", ({"query": row["query"], "answer": row["positive"]} for row in pairs))
    write_rows("labelled.jsonl", labelled)
    write_rows("scored.jsonl", scored)
    write_rows("classes.jsonl", classes)
    # To clean: exact repeats, near repeats, texts that are too short, another language.
    repeats = [{**row, "query": row["query"].upper() + "!"} for row in pairs[60:80]]
    near = [{**row, "positive": row["positive"] + " See also there."} for row in pairs[80:120]]
    german = [{"query": text.split(",")[0], "positive": text} for text in GERMAN]
    write_rows("dirty.jsonl", [*pairs, *pairs[20:40], *repeats, *near, {"query": "a", "positive": "b"}, *german])
    # The suite: every fifth document is a query and a text that must not leak into training data.
    held = list(docs.items())[::5]
    write_rows("suite/docs/corpus.jsonl", ({"_id": name, "text": text} for name, text in docs.items()))
    write_rows("suite/docs/queries.jsonl", ({"_id": name, "text": name.replace(".", " ")} for name, _ in held))
    qrels = "query-id\tcorpus-id\tscore\n" + "".join(f"{name}\t{name}\t1\n" for name, _ in held)
    Path("suite/docs/qrels").mkdir()
    Path("suite/docs/qrels/test.tsv").write_text(qrels)
    write_rows("suite/labelled.jsonl", labelled)
    write_rows("suite/scored.jsonl", scored[:100])
    judged = [{"text1": row["text1"], "text2": row["text2"], "label": int(row["score"] > 1)} for row in scored[:100]]
    write_rows("suite/pairs.jsonl", judged)
    kinds = [("retrieval", "docs"), ("classification", "labelled.jsonl"), ("clustering", "labelled.jsonl")]
    kinds += [("sts", "scored.jsonl"), ("pair", "pairs.jsonl")]
    tasks = [{"name": kind, "kind": kind, "path": path, "instruction": TASK} for kind, path in kinds]
    Path("suite/suite.yaml").write_text(json.dumps({"name": "suite", "tasks": tasks}))  # JSON is YAML


def texts(count: int) -> list[str]:
    rows = [json.loads(line)["positive"] for line in (INPUTS / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    return ["", " ", "naïve café — 東京 😀", "  two spaces on both sides  ", " ".join(rows[:12]), *rows[:count]]


# ---- the parts


def decoder(**options: Any) -> Any:
    """An embedder of the packaged decoder, with a seeded pooling block."""
    import torch

    from embedwright import Embedder

    torch.manual_seed(0)
    return Embedder.from_decoder(BASE, **options)


def save_vectors(name: str, model: Any, rows: list[str]) -> None:
    import numpy as np

    for task, kind in ((None, "document"), (TASK, "query")):
        np.save(RESULTS / f"{name} {kind}.npy", model.encode(rows, task=task))


def fixtures() -> None:
    """Vectors of each folder of $FIXTURES, released NV-Embed models in small."""
    from embedwright import Embedder

    for folder in sorted(path for path in Path(os.environ["FIXTURES"]).iterdir() if (path / "config.json").exists()):
        for dtype in ("float32", "bfloat16"):
            save_vectors(f"{folder.name} {dtype}", Embedder.load(folder, dtype=dtype), texts(40))


def smollm2() -> None:
    """Vectors of the whole SmolLM2 in both types, and what is saved of it, opened again."""
    from embedwright import Embedder

    for dtype, pooling in (("float32", "mean"), ("bfloat16", "latent")):
        save_vectors(f"SmolLM2 {dtype} {pooling}", decoder(pooling=pooling, dtype=dtype), texts(20))
    decoder(pooling="latent", layers=2, latents=16, heads=4, multiple=1).save(RESULTS / "saved")
    save_vectors("SmolLM2 saved", Embedder.load(RESULTS / "saved"), texts(20))


def run_recipe(recipe: dict[str, Any]) -> None:
    from embedwright import Recipe, train

    train(Recipe.parse(recipe)).save(RESULTS / "model")
    steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "grad_norm", "lr", "tokens", "ids"):
        (RESULTS / f"{key}.json").write_text(json.dumps([step[key] for step in steps]))


def data_of(name: str, **task: Any) -> dict[str, Any]:
    described = {"name": name, "instruction": f"{TASK}: {name}", "licence": "PSF", **task}
    return {"path": str(INPUTS / f"{name}.jsonl"), "task": described}


def two_stages() -> None:
    """12 + 8 steps with all weights in float32, negatives mined by the model itself, batches that are cut in pieces."""
    retrieval = {
        "name": "retrieval",
        "data": [data_of("pairs")],
        "in_batch_negatives": "all",
        "hard_negatives": 1,
        "optim": {"lr": 1e-4, "warmup_steps": 2, "steps": 12, "batch_queries": 8},
    }
    generalist = {
        "name": "generalist",
        "data": [
            data_of("classes", family="classification", symmetric=True),
            data_of("pairs", in_batch_negatives="same_task"),
        ],
        "in_batch_negatives": "none",
        "hard_negatives": 2,
        "temperature": 0.05,
        "optim": {"lr": 5e-5, "steps": 8, "batch_queries": 8},
    }
    mining = {"kind": "mine", "negatives": 2, "depth": 30}
    run_recipe(
        {
            "name": "two-stages",
            "seed": 3,
            "model": {"base": BASE, "layers": 2, "latents": 16, "heads": 4, "multiple": 1, "max_tokens": 48},
            "tune": {"method": "full"},
            "stages": [mining, retrieval, generalist],
            "run": {"out": "run", "batch_tokens": 512, "tracker": "none"},
        }
    )


def lora() -> None:
    """8 steps of LoRA in bfloat16, with dropout, rows with scores, and every addition to the loss."""
    loss = {
        "mask_above": 0.1,
        "hardness": 2.0,
        "focal": 0.5,
        "same_tower": "both",
        "dims": [64, 256],
        "scored": "cosent",
    }
    stage = {
        "name": "extras",
        "data": [data_of("classes", family="clustering"), data_of("scored", family="sts", symmetric=True)],
        "in_batch_negatives": "same_task",
        "hard_negatives": 2,
        "batching": "homogeneous",
        "loss": loss,
        "optim": {"lr": 5e-4, "steps": 8, "batch_queries": 8},
    }
    run_recipe(
        {
            "name": "lora",
            "model": {"base": BASE, "layers": 4, "pooling": "mean", "max_tokens": 48},
            "tune": {"method": "lora", "rank": 8, "dropout": 0.1},
            "stages": [stage],
            "run": {"out": "run", "precision": "bf16", "batch_tokens": 1024, "tracker": "none"},
        }
    )


def mining() -> None:
    """Negatives of one teacher and of two, best and sampled, by `mine` and by the command."""
    from embedwright import Example, mine

    passage = typing.get_args(typing.get_type_hints(Example)["positives"])[0]
    rows = [json.loads(line) for line in (INPUTS / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    corpus = {f"d{i}": row["positive"] for i, row in enumerate(rows)}
    examples = [
        Example(f"q{i}", "docs", row["query"], positives=(passage(row["positive"], f"d{i}"),))
        for i, row in enumerate(rows[:150])
    ]
    one, two = decoder(pooling="mean", layers=4), decoder(pooling="last", layers=2)
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "best": (one, {"negatives": 4, "depth": 40}),
        "sampled": (one, {"negatives": 3, "rule": "margin", "sampled": True, "seed": 5}),
        "two teachers": ([one, two], {"negatives": 4, "rule": "shift", "ensemble": "intra-sample"}),
        "drawn teacher": ([one, two], {"negatives": 2, "rule": "naive"}),
    }
    for name, (teacher, options) in ways.items():
        found, report = mine(examples, corpus, teacher, task=TASK, **options)
        counts = {key: value for key, value in report.counts().items() if key != "seconds"}
        write_rows(str(RESULTS / f"{name}.jsonl"), [*map(asdict, found), counts])
    pairs, pool = INPUTS / "pairs.jsonl", INPUTS / "corpus.jsonl"
    command("minilm", "mine", pairs, "--corpus", pool, "--out", RESULTS / "minilm.jsonl", "--task", TASK)


def data() -> None:
    """Files that are built, made of labels, cleaned, checked and exported by the command."""
    built, labels, clean = RESULTS / "nq.jsonl", RESULTS / "labels.parquet", RESULTS / "clean.jsonl"
    command("build", "data", "build", "nq", "--source", INPUTS / "questions.jsonl", "--out", built)
    command("labels", "data", "labels", INPUTS / "labelled.jsonl", "--negatives", 3, "--out", labels)
    options = ["--language", "en", "--min-words", 2, "--repeats", "positive"]
    command(
        "clean", "data", "clean", INPUTS / "dirty.jsonl", "--against", INPUTS / "suite/docs", *options, "--out", clean
    )
    command("clean labels", "data", "clean", labels, "--min-chars", 30, "--out", RESULTS / "clean.parquet")
    command("check", "data", "check", INPUTS / "dirty.jsonl", "--against", INPUTS / "suite/docs", "--corpus", code=1)
    command("export", "data", "export", labels, "--out", RESULTS / "export.parquet")


def scores() -> None:
    """One score of each kind of task."""
    from embedwright import evaluate

    results = json.loads(evaluate(decoder(pooling="mean", layers=4), INPUTS / "suite/suite.yaml").to_json())
    for row in results["rows"]:
        (RESULTS / f"{row['kind']}.json").write_text(json.dumps(row))


def command(name: str, *arguments: Any, code: int = 0) -> None:
    """Runs `embedwright ...`. What it prints is a result too, without its times."""
    words = [sys.executable, "-m", "embedwright", *map(str, arguments)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode != code:
        raise SystemExit(f"{' '.join(words[2:])}: exit code {done.returncode}")
    lines = [line for line in done.stdout.splitlines() if "seconds" not in line and not line.endswith("/s")]
    (RESULTS / f"{name}.printed").write_text("\n".join(lines))


PARTS: dict[str, Callable[[], None]] = {
    part.__name__: part for part in (fixtures, smollm2, two_stages, lora, mining, data, scores)
}

if __name__ == "__main__":
    if sys.argv[1] == "inputs":
        inputs()
    else:
        import embedwright

        assert str(embedwright.__file__).startswith(os.environ["PYTHONPATH"]), embedwright.__file__
        RESULTS.mkdir()
        PARTS[sys.argv[1]]()
