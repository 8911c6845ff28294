"""What `embedwright demo` runs: the whole system on real weights and real text, in minutes on two cores.

Every step leaves a file behind and is skipped where that file is whole, so a demo that was killed goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedwright.cli.display import counter, say, training
from embedwright.data.files.beir import read_corpus
from embedwright.data.files.table import open_examples, write_examples
from embedwright.demo import docstrings
from embedwright.encoders.open import RawMean, open_encoder
from embedwright.evaluation.results import Results, render, table
from embedwright.evaluation.suite import evaluate
from embedwright.files import write_text
from embedwright.mining.mine import mine, positives_of
from embedwright.model.embedder import Embedder
from embedwright.training.recipe import Recipe, expand
from embedwright.training.run.scores import read_evaluations
from embedwright.training.train import train
from embedwright.vectors.search import top_k

QUESTIONS = (
    "multiply two matrices",
    "split a data set into a training and a test part",
    "find the shortest way between two nodes of a graph",
)


def run(recipe: Recipe) -> dict[str, Any]:
    """The demo of this recipe. Returns what it also writes to `<run.out>/demo.json`: table rows and seconds.

    RuntimeError where a row is not better after the last stage than before the first, or the saved model gives
    other vectors than the trained one.
    """
    started = time.perf_counter()
    out = Path(recipe.run.out)
    data = out / "data"
    suite = expand(recipe.eval.suites[0])
    task = recipe.stages[0].data[0].task
    instruction = "" if task is None or isinstance(task, str) else task.instruction

    say("1/6  data from the docstrings of the installed libraries")
    _build_data(data)
    say("2/6  hard negatives, mined with MiniLM, positive-aware: score < 95 % of the positive's")
    _mine(data, instruction)
    say(f"3/6  training {recipe.model.name}, first {recipe.model.layers} layers, in {len(recipe.stages)} stages")
    model = train(recipe, on_step=training(recipe), on_evaluation=lambda line: say(f"  {line}"))
    say("4/6  baselines on the same held-out part: the decoder as released, and the teacher")
    baselines = {
        "raw_mean": _baseline(
            out / "raw_mean.json", suite, lambda: RawMean(recipe.model.name, recipe.model.max_tokens, "bfloat16")
        ),
        "teacher": _baseline(out / "teacher.json", suite, lambda: open_encoder("minilm")),
    }
    rows = table({**_stage_results(out, recipe), **baselines})
    say()
    say(render(rows))
    say()
    say(f"5/6  the model, saved to {out / 'model'}, opened again")
    opened = _save_and_open(model, out / "model")
    say("6/6  search over the held-out documentation")
    _search(opened, data / "heldout" / "retrieval" / "corpus.jsonl", instruction)
    result = {"rows": rows, "seconds": round(time.perf_counter() - started, 1)}
    (out / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    last = f"stage{len(recipe.stages)}"
    worse = [f"{row['task']} {row['metric']}" for row in rows if not float(row[last] or 0) > float(row["before"] or 0)]
    if worse:
        raise RuntimeError(f"not better than before training: {', '.join(worse)}")
    say(f"\ndone in {result['seconds']} s: every row is better after {last} than before; {out / 'demo.json'}")
    return result


def _build_data(data: Path) -> None:
    if not (data / "report.json").exists():
        docstrings.build(data)
    report = json.loads((data / "report.json").read_text())
    for key, value in report.items():
        say(f"  {key}: {value}")


def _mine(data: Path, instruction: str) -> None:
    mined, counts = data / "train" / "mined.jsonl", data / "train" / "mined.report.json"
    if not mined.exists():
        table = open_examples(data / "train" / "pairs.jsonl")
        examples = list(table)
        found, report = mine(
            examples,
            positives_of(examples),
            open_encoder("minilm"),
            task=instruction,
            negatives=4,
            progress=counter("texts"),
        )
        counts.write_text(json.dumps(report.to_json(), indent=2) + "\n")
        write_examples(mined, found, table.tasks)
    report = json.loads(counts.read_text())
    say(
        f"  {report['queries']} queries: the rule removed {report['removed_by_rule']} of {report['candidates']} "
        f"candidates as likely positives, {report['removed_same_text']} had the positive's text; "
        f"{report['negatives']} negatives kept, {report['queries_short']} queries short of 4"
    )


def _baseline(file: Path, suite: Path, make: Any) -> Results:
    if not file.exists():
        text = evaluate(make(), suite, progress=lambda line: say(f"  {file.stem} {line}")).to_json()
        write_text(file, text)
    return Results.from_json(file.read_text())


def _stage_results(out: Path, recipe: Recipe) -> dict[str, Results]:
    """`before`, `stage1`, `stage2`, ...: the run's own evaluations, at its start and at the end of each stage."""
    ends = {("start", 0): "before"}
    ends |= {(stage.name, stage.optim.steps): f"stage{i}" for i, stage in enumerate(recipe.stages, start=1)}
    found = {ends[r["stage"], r["step"]]: r for r in read_evaluations(out) if (r["stage"], r["step"]) in ends}
    return {name: Results.from_json(json.dumps(found[name]["results"])) for name in ends.values()}


def _save_and_open(model: Embedder, folder: Path) -> Embedder:
    if not folder.exists():
        model.save(folder)
    opened = Embedder.load(folder)
    texts = ["a text", "another text, to compare", *QUESTIONS]
    difference = float(np.abs(opened.encode(texts) - model.encode(texts)).max())
    if difference > 1e-5:
        raise RuntimeError(f"{folder} gives other vectors than the model that was trained ({difference:.1e})")
    say(f"  Embedder.load gives the same vectors (largest difference {difference:.1e})")
    return opened


def _search(model: Embedder, corpus_file: Path, instruction: str) -> None:
    corpus = read_corpus(corpus_file)
    ids: Sequence[str] = list(corpus)
    scores, indices = top_k(model.encode(QUESTIONS, task=instruction), model.encode(list(corpus.values())), k=2)
    for question, row_scores, row in zip(QUESTIONS, scores, indices, strict=True):
        say(f"  {question}")
        for score, i in zip(row_scores, row, strict=True):
            say(f"    {score:.3f}  {ids[i]}: {corpus[ids[i]][:90]}")
