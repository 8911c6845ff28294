"""Step 1 of synthesis: a language model thinks of tasks, and a file that only grows keeps them.

The prompt of an example holds its task. If a task moved to another example, that example would be paid for again. So
once a prompt is answered, its tasks always come from the file, in its order, whatever a later run, server or version
reads in the answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterable
from itertools import cycle, islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from embedwright.data.keys import near_key, word_key
from embedwright.data.schema import DataError, text_of
from embedwright.files import append_line, whole_lines
from embedwright.llm.client import Answer, Client, Question
from embedwright.synth.plan import Kind, Plan

log = logging.getLogger(__name__)

_TASK_WORDS = range(3, 101)  # a shorter or longer text is not an instruction
_ROUNDS = 4  # models repeat themselves, and more rounds bring no new tasks


class _Tasks(Answer):
    """The schema of an answer."""

    tasks: list[str]


class _Line(BaseModel):
    """The tasks of one prompt's answer. With `prompt` None, they are earlier tasks that are used again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str  # what was asked for: kind, prompt, models and seed
    kind: str
    prompt: int | None
    tasks: list[str]
    left_out: dict[str, int] = {}


def brainstorm(client: Client, file: Path, plan: Plan, kind: Kind) -> tuple[list[str], dict[str, int]]:
    """Returns the tasks of a kind, in the order of `file`, and counts of prompts, tasks and suggestions left out.

    A kind without a `brainstorm` prompt has one task, its instruction. A prompt without an answer is not in the file:
    the next run asks it again, or, if its answers were cut off, one with a larger `max_tokens`. Until then tasks are
    missing. If none is to come from these prompts and the tasks are still too few, they are used again, in turn.
    """
    part, per_prompt = plan.prompts.kinds[kind], plan.prompts.tasks_per_prompt
    if part.brainstorm is None:
        return [part.instruction], {"prompts": 0, "tasks": 1}
    prompt = part.brainstorm.format(number=per_prompt)
    named = [kind, prompt, plan.models, plan.seed]
    subject = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]

    def question(number: int) -> Question:
        seed = f"{plan.seed}:{kind}:tasks:{number}"
        return Question(random.Random(seed).choice(plan.models), prompt, _Tasks, seed)

    def keep(number: int | None, tasks: list[str], left_out: dict[str, int]) -> None:
        lines.append(_Line(subject=subject, kind=kind, prompt=number, tasks=tasks, left_out=left_out))
        append_line(file, lines[-1].model_dump_json())

    needed = -(-plan.counts[kind] // plan.per_task)
    lines = _read(file, subject)
    failed = Counter[str]()
    known = {word_key(task) for line in lines for task in line.tasks}
    asked = 0
    most = -(-needed // per_prompt)
    while asked < _ROUNDS * most and _count(found := _by_prompt(lines), found) < needed:
        # counts earlier rounds only, so that a resumed run has the same rounds as an uninterrupted one
        before = _count(found, range(asked))
        round_ = range(asked, asked + -(-(needed - before) // per_prompt))
        new = [number for number in round_ if number not in found]
        for number, answer in zip(new, client.ask(map(question, new)), strict=True):
            if isinstance(answer, dict):
                keep(number, *_usable(answer["tasks"], known))
            elif answer.reason == "no_valid_answer":
                keep(number, [], {"brainstorm_no_valid_answer": 1})
            else:
                failed[f"brainstorm_{answer.reason}"] += 1
        asked = round_.stop
    found = _by_prompt(lines)
    tasks = [task for line in lines for task in line.tasks]
    own = list(dict.fromkeys(tasks))
    cut = failed["brainstorm_truncated"]
    to_come = []
    if unanswered := failed.total() - cut:
        to_come.append(f"{unanswered} prompts got no answer; run the same again to ask for the rest")
    # some models never come to an end: cut prompts are waited for only where their tasks could be enough
    if 0 < needed - len(own) <= cut * per_prompt:
        to_come.append(f"the answers to {cut} prompts were cut off; run the same again with a larger max_tokens")
    if len(own) < needed:
        what_now = "; ".join(to_come) or "each serves more examples"
        log.warning("%s: %d tasks where %d were wanted: %s", kind, len(own), needed, what_now)
    if own and not to_come and len(tasks) < needed:
        keep(None, list(islice(cycle(own), len(tasks), needed)), {})
        tasks += lines[-1].tasks
    left_out = sum((Counter(line.left_out) for line in lines), failed)
    prompts = len(found) + failed.total()
    return tasks[:needed], {"prompts": prompts, "tasks": len(set(tasks[:needed])), **left_out}


def _by_prompt(lines: list[_Line]) -> dict[int, _Line]:
    return {line.prompt: line for line in lines if line.prompt is not None}


def _count(found: dict[int, _Line], numbers: Iterable[int]) -> int:
    """Counts the tasks that `found` holds for the prompts with these numbers."""
    return sum(len(found[number].tasks) for number in numbers if number in found)


def _usable(suggested: list[str], known: set[str]) -> tuple[list[str], dict[str, int]]:
    """Returns the usable tasks of an answer, and counts the others by reason. Adds the tasks to `known`."""
    tasks: list[str] = []
    left_out = Counter[str]()
    for task in (" ".join(words.split()) for words in suggested):
        if not is_text(task) or len(near_key(task).split()) not in _TASK_WORDS:
            left_out["unusable"] += 1
        elif (key := word_key(task)) in known:
            left_out["repeated"] += 1
        else:
            known.add(key)
            tasks.append(task)
    return tasks, left_out


def _read(file: Path, subject: str) -> list[_Line]:
    """Reads the lines of this subject, and of several with one prompt the first. DataError names file and line."""
    lines: list[_Line] = []
    for number, raw in enumerate(whole_lines(file), 1):
        try:
            line = _Line.model_validate_json(raw)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise DataError(
                f"{file}:{number}: no line of a brainstorm ({problem}): delete the file to ask anew"
            ) from None
        seen = line.prompt is not None and any(other.prompt == line.prompt for other in lines)
        if line.subject == subject and not seen:
            lines.append(line)
    return lines


def is_text(value: str) -> bool:
    """Returns whether a row may hold this text."""
    try:
        text_of(value, "")
    except DataError:
        return False
    return True
