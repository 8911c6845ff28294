"""Writes synthetic examples with a language model, in the two steps of E5-Mistral (arXiv 2401.00368).

Step 1 brainstorms tasks; step 2 asks for an example of a task, in a new session. NV-Embed does the same (arXiv
2405.17428, section 4.3).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from embedwright.data.clean.repeats import DiskList, repeats
from embedwright.data.files.parts import Shard, claim, write_part
from embedwright.data.keys import word_key
from embedwright.data.schema import SYNTHETIC, Example, Passage, Task, parse_example, to_row
from embedwright.data.tables.table import write_examples
from embedwright.files import locked
from embedwright.llm.client import Client, Failure
from embedwright.synth.brainstorm import brainstorm, is_text
from embedwright.synth.diversity import Diversity
from embedwright.synth.plan import Kind, Plan


def synthesize(
    out: Path,
    client: Client,
    plan: Plan,
    *,
    licence: str = "",
    progress: Callable[[int, int], None] | None = None,
    shard: Shard | None = None,
) -> dict[str, Any]:
    """Asks for the plan's examples, and writes the usable ones to `out` in the plan's order, with their tasks beside.

    `out` is written whole or not at all, and not without a usable example. Rows wait in a temporary file. Memory holds
    the tasks, about 1 KB each, and the keys of `repeats`, about 250 bytes a row. Raises ServerError if the server does
    not answer; the client's cache and `OUT.brainstorm.jsonl` keep everything, and the same call goes on from there.

    Returns counts: `asked` rows = `written` + the sum of `dropped`, which is by kind and reason; `tasks` of step 1 by
    kind; `client`, those of `Client.counts`; `unanswered`, of the client, and rows whose tasks were cut off; and the
    `diversity` of the rows written.

    With `shard`, `out` is a folder of parts (`write_part`), which together have the plan's rows in its order. All parts
    share one file of tasks: the first that runs asks for them, the others wait. A part with `unanswered` questions is
    not done. Repeats go within a part alone; `data clean` finds those of several parts.
    """
    if shard is None:
        return _synthesized(out, client, plan, _tasks(out, client, plan, licence), progress)

    def part(file: Path) -> dict[str, Any]:
        return _synthesized(file, client, plan, _tasks(out, client, plan, licence), progress, shard)

    return write_part(out, shard, _settings(plan, licence), part)


def ask_for_tasks(out: Path, client: Client, plan: Plan, licence: str, shard: Shard) -> None:
    """Does step 1 for all parts of the folder `out`, so that the budget of one part need not pay for it.

    Raises as `synthesize` if `out` holds parts of other settings.
    """
    claim(out, {**_settings(plan, licence), "parts": shard.count})
    _tasks(out, client, plan, licence)


def _settings(plan: Plan, licence: str) -> dict[str, Any]:
    prompts = hashlib.sha256(plan.prompts.model_dump_json().encode()).hexdigest()
    settings = {"command": "synth", "counts": plan.counts, "models": plan.models, "per_task": plan.per_task}
    return settings | {"seed": plan.seed, "prompts": prompts, "licence": licence}


class _Tasks(NamedTuple):
    """The tasks of step 1 by kind, and counts of how they came."""

    of: dict[Kind, list[Task]]
    counts: dict[str, dict[str, int]]


def _tasks(out: Path, client: Client, plan: Plan, licence: str) -> _Tasks:
    """Does step 1. One process at a time asks; the others then find the tasks in the file."""
    found = _Tasks({}, {})
    file = out.with_name(f"{out.name}.brainstorm.jsonl")
    with locked(file.with_name(f".{file.name}.lock")):
        for kind in plan.counts:
            wordings, found.counts[kind] = brainstorm(client, file, plan, kind)
            found.of[kind] = [_task(plan, kind, wording, licence) for wording in wordings]
    return found


def _synthesized(
    out: Path,
    client: Client,
    plan: Plan,
    tasks: _Tasks,
    progress: Callable[[int, int], None] | None,
    shard: Shard | None = None,
) -> dict[str, Any]:
    """Does step 2 for all rows of the plan, or for a part, which is written though it be empty."""
    total = sum(plan.counts.values())
    own = shard.rows(total) if shard else range(total)
    numbers = list(islice(plan.rows(), own.start, own.stop))
    dropped: dict[str, Counter[str]] = {kind: Counter() for kind in plan.counts}
    rows = DiskList()
    for kind, number, made in _made(client, plan, numbers, tasks.of, progress):
        if isinstance(made, str):
            dropped[kind][made] += 1
        else:
            rows.add(json.dumps([kind, number, to_row(made)]))
    copies = repeats(example.query for _, _, example in _read(rows))
    diversity = Diversity()

    def kept() -> Iterator[Example]:
        for index, (kind, number, example) in enumerate(_read(rows)):
            if match := copies.get(index):
                dropped[kind]["duplicate" if match.exact else "near_duplicate"] += 1
                continue
            draw = plan.draw(kind, number)
            diversity.add(kind, example, draw.placeholders | {"model": draw.model})
            yield example

    written = 0
    if len(rows) or shard:
        written = write_examples(out, kept(), {task.name: task for of_kind in tasks.of.values() for task in of_kind})
    cut = [kind for kind, count in tasks.counts.items() if count.get("brainstorm_truncated")]
    return {
        "asked": len(numbers),
        "written": written,
        "dropped": {kind: dict(sorted(count.items())) for kind, count in dropped.items()},
        "tasks": tasks.counts,
        "client": dict(client.counts),
        # a larger limit may give the tasks, which all parts wait for
        "unanswered": client.unanswered + sum(dropped[kind]["no_task"] for kind in cut),
        "diversity": diversity.to_json(),
    }


def _task(plan: Plan, kind: Kind, wording: str, licence: str) -> Task:
    part = plan.prompts.kinds[kind]
    return Task(
        name=f"synthetic-{kind}-{hashlib.sha256(wording.encode()).hexdigest()[:16]}",
        family=part.family,
        instruction=wording,
        symmetric=part.symmetric,
        licence=licence,
        source=f"{SYNTHETIC}{', '.join(plan.models)}",
    )


def _made(
    client: Client,
    plan: Plan,
    numbers: Sequence[tuple[Kind, int]],
    tasks: Mapping[Kind, Sequence[Task]],
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[Kind, int, Example | str]]:
    """Yields (kind, number, the example or why there is none) for each of these rows of the plan, in order."""

    def rows() -> Iterator[tuple[Kind, int, Task | None]]:
        for kind, number in numbers:
            # neighbours share a task, so that a longer run gives these rows the same tasks
            place = number // plan.per_task if plan.prompts.kinds[kind].brainstorm else 0
            yield kind, number, tasks[kind][place] if place < len(tasks[kind]) else None

    answers = client.ask(plan.question(kind, number, task) for kind, number, task in rows() if task)
    for done, (kind, number, task) in enumerate(rows(), 1):
        if task is None:
            yield kind, number, "no_task"
            continue
        answer = next(answers)
        if progress is not None:
            progress(done, len(numbers))
        yield kind, number, answer.reason if isinstance(answer, Failure) else _example(plan, kind, number, task, answer)


def _example(plan: Plan, kind: Kind, number: int, task: Task, answer: Mapping[str, str]) -> Example | str:
    """Returns the example, or why the answer is not usable."""
    part = plan.prompts.kinds[kind]
    query, positive, *negatives = (answer[name].strip() for name in part.answer.names())
    if not all(map(is_text, (query, positive, *negatives))):
        return "empty_or_not_text"
    same_query, same_positive, *same_negatives = map(word_key, (query, positive, *negatives))
    if same_query == same_positive:
        return "query_is_positive"
    if {same_query, same_positive} & set(same_negatives):
        return "negative_is_query_or_positive"
    if part.family == "classification":
        padded = f" {same_query} "
        if any(f" {label} " in padded for label in (same_positive, *same_negatives)):
            return "label_in_text"
    return Example(
        id=f"synthetic-{kind}:{number}",
        task=task.name,
        query=query,
        positives=(Passage(positive),),
        negatives=tuple(map(Passage, negatives)),
        language=plan.draw(kind, number).language,
    )


def _read(rows: DiskList) -> Iterator[tuple[Kind, int, Example]]:
    for index in range(len(rows)):
        kind, number, row = json.loads(rows[index])
        yield kind, number, parse_example(row, default_task="")
