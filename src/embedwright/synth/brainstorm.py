"""Step 1 of synthesis: tasks that a language model thinks of, frozen in a file that only grows.

Examples are asked for by task, so tasks that moved to other examples would have all of these paid for again. So the
tasks of an answered prompt are read from the file from then on, in its order, whatever a later run, server or version
makes of the answers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from embedwright.data.keys import near_key, word_key
from embedwright.data.schema import DataError, text_of
from embedwright.files import append_line, whole_lines
from embedwright.llm.client import Answer, Client, Failure, Question

log = logging.getLogger(__name__)

_TASK_WORDS = range(3, 101)  # what is shorter or longer is no instruction
_ROUNDS = 4  # of brainstorming: models repeat themselves, and past this it is no use to ask on


@dataclass(frozen=True, slots=True)
class Subject:
    """What tasks are asked for: `prompt` wants `per_prompt` of them from one of `models`, drawn by `seed`."""

    kind: str
    prompt: str
    per_prompt: int
    models: tuple[str, ...]
    seed: int

    def question(self, number: int) -> Question:
        seed = f"{self.seed}:{self.kind}:tasks:{number}"
        return Question(random.Random(seed).choice(self.models), self.prompt, _Tasks, seed)

    def key(self) -> str:
        named = [self.kind, self.prompt, self.models, self.seed]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


class _Tasks(Answer):
    """The answer to a brainstorm."""

    tasks: list[str]


class _Line(BaseModel):
    """What became of one prompt's answer. `prompt` None: tasks that serve again, as there were no more."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str
    kind: str
    prompt: int | None
    tasks: list[str]
    left_out: dict[str, int] = {}


def brainstorm(client: Client, file: Path, subject: Subject, needed: int) -> tuple[list[str], dict[str, int]]:
    """Up to `needed` tasks, in the order of `file`, and what became of the model's suggestions.

    Prompts that got no answer are not in the file, and are asked again in the next run; until then tasks are lacking.
    Where all were answered and the tasks are still too few, these serve again, in turn.
    """
    lines = _read(file, subject)
    found = {line.prompt: line for line in lines if line.prompt is not None}
    failed = Counter[str]()
    known = {word_key(task) for line in lines for task in line.tasks}
    asked = 0
    most = -(-needed // subject.per_prompt)
    while _count(found.values()) < needed and asked < _ROUNDS * most:
        # by what earlier rounds gave: the same rounds for a run that goes on as for one in one go
        before = _count(found[number] for number in range(asked) if number in found)
        round_ = range(asked, asked + -(-(needed - before) // subject.per_prompt))
        new = [number for number in round_ if number not in found]
        for number, answer in zip(new, client.ask(map(subject.question, new)), strict=True):
            if isinstance(answer, Failure) and answer.reason != "no_valid_answer":
                failed[f"brainstorm_{answer.reason}"] += 1
                continue
            found[number] = _line(subject, number, answer, known)
            lines.append(found[number])
            append_line(file, found[number].model_dump_json())
        asked = round_.stop
    tasks = [task for line in lines for task in line.tasks]
    own = list(dict.fromkeys(tasks))
    if len(own) < needed:
        log.warning("%s: %d tasks where %d were wanted: %s", subject.kind, len(own), needed, _what_now(failed))
    if own and not failed and len(tasks) < needed:
        again = list(islice(cycle(own), len(tasks), needed))
        append_line(file, _Line(subject=subject.key(), kind=subject.kind, prompt=None, tasks=again).model_dump_json())
        tasks += again
    left_out = sum((Counter(line.left_out) for line in found.values()), failed)
    prompts = len(found) + failed.total()
    return tasks[:needed], {"prompts": prompts, "tasks": len(set(tasks[:needed])), **left_out}


def _count(lines: Iterable[_Line]) -> int:
    return sum(len(line.tasks) for line in lines)


def _what_now(failed: Counter[str]) -> str:
    if failed:
        return f"{failed.total()} prompts got no answer; run the same again to ask for the rest"
    return "each serves more examples"


def _line(subject: Subject, number: int, answer: object, known: set[str]) -> _Line:
    """The answer's usable tasks; `known` takes them in."""
    tasks: list[str] = []
    left_out = Counter[str]()
    if isinstance(answer, Failure):
        left_out[f"brainstorm_{answer.reason}"] += 1
    else:
        assert isinstance(answer, dict)
        for said in answer["tasks"]:
            task = " ".join(said.split())
            if not is_text(task) or len(near_key(task).split()) not in _TASK_WORDS:
                left_out["unusable"] += 1
            elif (key := word_key(task)) in known:
                left_out["repeated"] += 1
            else:
                known.add(key)
                tasks.append(task)
    return _Line(subject=subject.key(), kind=subject.kind, prompt=number, tasks=tasks, left_out=left_out)


def _read(file: Path, subject: Subject) -> list[_Line]:
    """The lines of this subject, the first one of each prompt. DataError names file and line."""
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
        if line.subject == subject.key() and not seen:
            lines.append(line)
    return lines


def is_text(value: str) -> bool:
    """Whether a model's word for a task or a text is one that a row may hold."""
    try:
        text_of(value, "")
    except DataError:
        return False
    return True
