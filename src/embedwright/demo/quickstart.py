"""`embedwright train --data my_pairs.jsonl`: the two-stage defaults on a user's own pairs, with before and after."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from embedwright.cli.display import counter, note, tell
from embedwright.config import ConfigError
from embedwright.data.answers import Answers, marks_of, text_mark
from embedwright.data.clean.clean import Report, clean
from embedwright.data.files.tasks import Tasks
from embedwright.data.schema import Example, Task
from embedwright.data.sources.catalog import find_task
from embedwright.data.tables.table import ExampleTable, open_as_named, write_examples
from embedwright.demo.heldout import without_leaks, write_beir, write_suite
from embedwright.encoders.open import open_encoder
from embedwright.files import whole_folder, write_json
from embedwright.mining.mine import mine
from embedwright.mining.pool import positives_of
from embedwright.training.batches.blend import permuted
from embedwright.training.recipe import Recipe

OWN = "own"  # the task of rows that name none
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
    """Prepares the user's pairs below `out/data`, once, and returns the recipe that trains on them.

    A tenth of the queries, 500 at most, is held out. What repeats them or their answers is not trained on. `teacher`
    mines the hard negatives. `instruction` is that of tasks without one. Raises ConfigError if too little is left, and
    where `out` holds a run of other data.
    """
    note(f"your pairs: {data}")
    table = open_as_named(data)
    tasks = _described(table, instruction)
    asked = {task.instruction for task in tasks.values()}
    common = asked.pop() if len(asked) == 1 else instruction
    described = json.dumps({name: task.model_dump() for name, task in tasks.items()})
    # all that the prepared data depends on
    now = {"data": table.fingerprint[:16], "teacher": teacher, "instruction": instruction, "tasks": described}
    prepared = out / "data"
    if not (prepared / "report.json").exists():
        _prepare(table, tasks, prepared, common, now)
    report = json.loads((prepared / "report.json").read_text())
    before = report.pop("source")
    for key in now:
        if before[key] != now[key]:
            change = f"{before[key]!r}, now {now[key]!r}"
            raise ConfigError(f"{out} holds a run of another {key} ({change}): choose another --out")
    tell(report, note)
    note("training in two stages, with scores on the held-out queries before it and after each")
    # about one pass over the data in stage 1 and half of one in stage 2, within what a laptop does in an hour
    rows = report["rows to train on"]
    queries = min(32, rows)
    steps = max(10, min(rows // queries, 1000))
    entry, own = {"path": str(prepared / "train.jsonl")}, {"default_task": common}
    return Recipe.parse(
        {
            "name": out.name or "own",
            "model": {"base": base, "layers": layers, "pooling": "latent", "latents": 128, "max_tokens": 256} | own,
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


def _described(table: ExampleTable, instruction: str) -> dict[str, Task]:
    """Returns the task of each name that rows have, and of `own`, the name of those that have none.

    It is as the file beside the rows or the catalogue says, else retrieval; without an instruction, it gets this one.
    """
    found = {}
    for name in (name or OWN for name in table.rows_by_task()):
        task = table.tasks.get(name) or find_task(name) or Task(name=name)
        found[name] = task if task.instruction else task.model_copy(update={"instruction": instruction})
    return found


def _prepare(table: ExampleTable, tasks: Tasks, out: Path, instruction: str, source: dict[str, str]) -> None:
    data, teacher = table.path, source["teacher"]
    read = [replace(row, task=row.task or OWN) for row in table if row.positives]
    answers = Answers(read)
    duplicates = Report()
    kept = list(clean(read, duplicates, pair_tasks={name for name, task in tasks.items() if task.family == "pair"}))
    heldout, rest = _hold_out(kept, answers)
    if not heldout:
        raise ConfigError(f"{data}: no query has an answer besides its own text: nothing to judge by")
    train, leaked_negatives = without_leaks(rest, [text for asked in heldout for text in asked.texts])
    _refuse_few(data, len(train), "after cleaning")
    note(f"hard negatives, found by {teacher} among all answers")
    pool = positives_of(train)
    mined, report = mine(
        train,
        pool,
        open_encoder(teacher),
        tasks=tasks,
        negatives=4,
        depth=min(100, len(pool)),
        answers=answers,
        progress=counter("texts"),
    )
    with_negatives = [e for e in mined if e.negatives]
    _refuse_few(data, len(with_negatives), "with a hard negative")
    counts = {
        "rows read": len(read),
        "rows left out, since their score is too low for an answer": len(table) - len(read),
        "exact duplicates left out": duplicates.removed["repeated_exact"],
        "near duplicates left out": duplicates.removed["repeated_near"],
        "queries held out, to score the model before and after": len(heldout),
        "rows of these queries": len(kept) - len(rest),
        "rows left out, since they repeat a held-out text": len(rest) - len(train),
        "negatives left out, since they repeat a held-out text": leaked_negatives,
        "candidates left out as hard negatives, since they may be right as well": report.removed_by_rule,
        "rows left out, since no hard negative was found for them": len(mined) - len(with_negatives),
        "rows to train on": len(with_negatives),
        "source": source,
    }
    with whole_folder(out) as temp:
        write_examples(temp / "train.jsonl", with_negatives, tasks)
        _write_heldout(temp / "heldout", heldout, read, instruction)
        write_json(temp / "report.json", counts)


@dataclass(frozen=True)
class HeldOutQuery:
    """A held-out query and all its answers: as marks (`data.answers`) and as texts, its own text among them."""

    query: str
    marks: set[int]
    texts: list[str]


def _hold_out(rows: Sequence[Example], answers: Answers) -> tuple[list[HeldOutQuery], list[Example]]:
    """Returns a tenth of the queries, 500 at most, and the rows of the others.

    A query that only its own text answers is not held out: no search result could be right.
    """
    rows_of: dict[int, list[Example]] = {}
    for row in rows:
        rows_of.setdefault(text_mark(row.query), []).append(row)
    questions = list(rows_of)
    count = min(max(len(questions) // 10, 1), 500)
    heldout: dict[int, HeldOutQuery] = {}
    for question in (questions[permuted(i, len(questions), "held out")] for i in range(len(questions))):
        right = [(row.task, p) for row in rows_of[question] for p in answers.of(row)]
        marks = set().union(*(marks_of(task, [p]) for task, p in right)) - {question}
        if len(heldout) < count and any(text_mark(p.text) != question for _, p in right):
            query = rows_of[question][0].query
            heldout[question] = HeldOutQuery(query, marks, [query, *(p.text for _, p in right)])
    return list(heldout.values()), [row for row in rows if text_mark(row.query) not in heldout]


def _refuse_few(data: Path, count: int, which: str) -> None:
    if count < 20:
        raise ConfigError(f"{data}: {count} pairs are left to train on {which}; 20 is the least")


def _write_heldout(folder: Path, heldout: Sequence[HeldOutQuery], rows: Sequence[Example], instruction: str) -> None:
    """Writes a suite of the held-out queries against all positives of `rows`.

    Each text is there once, whatever its look. A document that is a query's own text has the query's id: it is not a
    hit.
    """
    own = {text_mark(asked.query): f"q{i}" for i, asked in enumerate(heldout)}
    texts: dict[str, str] = {}
    documents_of: dict[int, dict[str, None]] = defaultdict(dict)  # mark -> the documents under it
    for task, passage in ((row.task, p) for row in rows for p in row.positives):
        text = text_mark(passage.text)
        known = next(iter(documents_of[text]), None) or own.get(text) or f"d{len(texts)}"
        texts.setdefault(known, passage.text)
        for mark in marks_of(task, [passage]):
            documents_of[mark][known] = None
    judged = [
        (query, document)
        for query, asked in zip(own.values(), heldout, strict=True)
        for document in dict.fromkeys(d for mark in sorted(asked.marks) for d in documents_of.get(mark, ()))
        if document != query
    ]
    write_beir(folder / "own", texts, {f"q{i}": asked.query for i, asked in enumerate(heldout)}, judged)
    how = {"kind": "retrieval", "path": "own", "instruction": instruction, "ignore_identical_ids": True}
    write_suite(folder, "heldout", [{"name": "own", **how}])
