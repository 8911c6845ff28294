"""What `embedwright demo` runs: the whole system on real weights and real text, in minutes on two cores.

Every part leaves a file and is skipped where that file is whole, so a demo that was killed goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from embedwright.cli.display import clock, counter, say, tell, training
from embedwright.data.files.beir import read_corpus
from embedwright.data.tables.table import open_examples, write_examples
from embedwright.demo import docstrings
from embedwright.encoders.open import open_encoder
from embedwright.evaluation.results import Results, Row, read_results, render, table, write_results
from embedwright.evaluation.suite import evaluate, load_suite
from embedwright.files import write_json
from embedwright.mining.mine import mine
from embedwright.mining.pool import positives_of
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
# Seconds of each part on two free cores of an AMD EPYC (family 26): the first guess of how long the whole takes.
SECONDS = (16, 24, 125, 22, 2, 5)


def run(recipe: Recipe) -> list[str]:
    """Runs the demo of this recipe, and writes the rows of its table and the seconds it took to `<run.out>/demo.json`.

    Returns the names of the scores that are not better after the last stage than before the first. Raises RuntimeError
    if the saved model gives other vectors than the trained one.
    """
    started = time.perf_counter()
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"save": ("merged",), "dtype": "float32"})})
    out = recipe.out
    data = out / "data"
    task = recipe.stages[0].data[0].task
    instruction = "" if task is None or isinstance(task, str) else task.instruction
    part = _parts()

    part("data: the docstrings of the installed libraries, whole modules of them held out")
    if not (data / "report.json").exists():
        docstrings.build(data)
    tell(json.loads((data / "report.json").read_text()))
    part("hard negatives: texts that look like the answer and are none, found by a small finished model (MiniLM)")
    if not (counts := data / "train" / "mined.report.json").exists():
        _mine(data / "train", instruction, counts)
    tell(json.loads(counts.read_text()))
    part(f"training {recipe.model.layers} layers of {recipe.model.name}, with scores before it and after each stage")
    model = train(recipe, on_step=training(recipe), on_evaluation=_score)
    part("the same scores for two others: these layers as they were released, and MiniLM")
    others = _others(recipe, out)
    rows = table({"raw": others["raw"], **_stage_results(out, recipe), "minilm": others["minilm"]})
    stages = [f"stage{i + 1}" for i in range(len(recipe.stages))]
    say(f"\n{render(rows)}\n")
    say("  higher is better; raw: as released; before: untrained, but reads both ways and is told the task")
    for before, after in pairwise(["raw", *stages]):
        say(f"  {after}: {len(_higher(rows, before, after))} of {len(rows)} scores are higher than those of {before}")
    part(f"the model, saved to {out / 'model'} and opened again")
    opened = _opened(model, out / "model")
    part("search in the documentation that was held out")
    corpus = data / "heldout" / "retrieval" / "corpus.jsonl"
    _search(opened, corpus, instruction)
    seconds = round(time.perf_counter() - started, 1)
    write_json(out / "demo.json", {"rows": rows, "seconds": seconds})
    better = _higher(rows, "before", stages[-1])
    asked = "" if recipe.model.default_task == instruction else f' --task "{instruction}"'
    say(
        f"\nDone in {clock(seconds)}. Now search with the model:\n"
        f"  embedwright index {out / 'model'} {corpus} {out / 'index'}\n"
        f'  embedwright search {out / "model"} {out / "index"} "{QUESTIONS[0]}"{asked}\n'
        "Or train on pairs of your own, each a line of the form "
        '{"query": "how do tides work", "positive": "The moon ..."}:\n'
        "  embedwright train --data my_pairs.jsonl --out runs/mine"
    )
    return [f"{row['task']} {row['metric']}" for row in rows if row not in better]


def _parts() -> Callable[[str], None]:
    """Returns a function that says which part begins, and about how long the rest of the demo takes.

    The guess is `SECONDS`, corrected by how long the parts so far took. Parts from an earlier run do not count.
    """
    begun: list[float] = []

    def part(title: str) -> None:
        begun.append(time.perf_counter())
        took = [(b - a, expected) for (a, b), expected in zip(pairwise(begun), SECONDS, strict=False) if b - a > 1]
        pace = sum(a for a, _ in took) / sum(b for _, b in took) if took else 1.0
        left = clock(pace * sum(SECONDS[len(begun) - 1 :]))
        say(f"\n{len(begun)}/{len(SECONDS)}  {title} (about {left} to the end of the demo)")

    return part


def _mine(folder: Path, instruction: str, counts: Path) -> None:
    table = open_examples(folder / "pairs.jsonl")
    examples, teacher = list(table), open_encoder("minilm")
    corpus = positives_of(examples)
    found, report = mine(examples, corpus, teacher, task=instruction, negatives=4, progress=counter("texts"))
    usable = [example for example in found if example.negatives]
    write_examples(folder / "mined.jsonl", usable, table.tasks)
    told = {
        "candidates, the first 100 of each summary": report.candidates,
        "of them left out, since they score at least 95 % of what the right text does and may be right, too": (
            report.removed_by_rule
        ),
        "hard negatives kept, at most 4 a summary": report.negatives,
        "summaries left out, since no candidate remains": len(found) - len(usable),
    }
    write_json(counts, told)


def _score(line: str) -> None:
    if ": " in line:  # each task has two lines: this is the one with the score
        say(f"  {line}")


def _others(recipe: Recipe, out: Path) -> dict[str, Results]:
    """Scores the decoder as released (as many layers as are trained; causal, mean, no instruction) and MiniLM."""
    suite = load_suite(expand(recipe.eval.suites[0]))
    plain = tuple(task.model_copy(update={"instruction": ""}) for task in suite.tasks)
    raw: dict[str, Any] = {"layers": recipe.model.layers, "max_tokens": recipe.model.max_tokens, "dtype": "bfloat16"}
    raw |= {"pooling": "mean", "attention": "causal"}
    found = {}
    for name, asked in {"raw": suite.model_copy(update={"tasks": plain}), "minilm": suite}.items():
        file = out / f"{name}.json"
        if not file.exists():
            model = open_encoder(name) if name == "minilm" else Embedder.from_decoder(recipe.model.name, **raw)
            say(f"  {name}")
            write_results(file, evaluate(model, asked, name=name, progress=_score))
        found[name] = read_results(file)
    return found


def _stage_results(out: Path, recipe: Recipe) -> dict[str, Results]:
    """Returns the run's own scores, at its start and at the end of each stage: `before`, `stage1`, `stage2`, ..."""
    ends = {("start", 0): "before"}
    ends |= {(stage.name, stage.optim.steps): f"stage{i}" for i, stage in enumerate(recipe.stages, start=1)}
    found = {ends[r["stage"], r["step"]]: r for r in read_evaluations(out) if (r["stage"], r["step"]) in ends}
    return {name: Results.from_json(json.dumps(found[name]["results"])) for name in ends.values()}


def _higher(rows: list[Row], before: str, after: str) -> list[Row]:
    return [row for row in rows if float(row[after] or 0) > float(row[before] or 0)]


def _opened(model: Embedder, folder: Path) -> Embedder:
    opened = Embedder.load(folder)
    texts = ["a text", "another text, to compare", *QUESTIONS]
    difference = float(np.abs(opened.encode(texts) - model.encode(texts)).max())
    if difference > 1e-5:
        raise RuntimeError(f"{folder} gives other vectors than the model that was trained ({difference:.1e})")
    say(f"  it gives the same vectors as before (largest difference {difference:.1e})")
    return opened


def _search(model: Embedder, corpus_file: Path, instruction: str) -> None:
    corpus = read_corpus(corpus_file)
    ids = list(corpus)
    scores, indices = top_k(model.encode(QUESTIONS, task=instruction), model.encode(list(corpus.values())), k=2)
    for question, row_scores, row in zip(QUESTIONS, scores, indices, strict=True):
        say(f"  {question}")
        for score, i in zip(row_scores, row, strict=True):
            say(f"    {score:.3f}  {ids[i]}: {corpus[ids[i]][:90]}")
