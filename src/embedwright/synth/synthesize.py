"""Synthetic examples from a language model, in the two steps of E5-Mistral (arXiv 2401.00368) as NV-Embed takes them.

Step 1 brainstorms tasks; step 2 makes an example of a task, in a new session (NV-Embed, arXiv 2405.17428, section 4.3).
The prompts, their placeholders and values are `synthesis.yaml`. All draws are seeded per example: a longer run has the
rows of a shorter one, and pays for the others alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from embedwright.config import load_yaml, validate
from embedwright.data.clean.repeats import DiskList, repeats
from embedwright.data.files.table import write_examples
from embedwright.data.keys import word_key
from embedwright.data.schema import Example, Family, Passage, Task, parse_example, to_row
from embedwright.errors import InputError
from embedwright.llm.client import Answer, Client, Failure, Question
from embedwright.synth.brainstorm import Subject, brainstorm, is_text
from embedwright.synth.diversity import Diversity

Kind = Literal["short-long", "long-short", "short-short", "long-long", "sts", "bitext"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PROMPTS = Path(__file__).with_name("synthesis.yaml")


# ---------------------------------------------------------------------------------------------------- prompts


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AnswerKeys(_Part):
    """Which key of the JSON object is what."""

    query: str
    positive: str
    negative: str | None = None

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.query, self.positive, self.negative) if name)


class KindPrompts(_Part):
    """One kind of task: `brainstorm` for its tasks, or the one `instruction`; `generate` for an example."""

    family: Family
    symmetric: bool = False
    brainstorm: str | None = None
    instruction: str = ""
    generate: str
    answer: AnswerKeys
    values: dict[str, Annotated[tuple[str | int | float, ...], Field(min_length=1)]] = {}

    @model_validator(mode="after")
    def _placeholders_are_known(self) -> KindPrompts:
        if (self.brainstorm is None) != bool(self.instruction):
            raise InputError("either `brainstorm` or `instruction`, not both")
        named = set(self.values) | ({"task"} if self.brainstorm else set())
        used = _placeholders(self.generate)
        if wrong := sorted((used - named - {"language"}) | (named - used)):
            raise InputError(f"generate: placeholder {wrong[0]!r} has no values, or is not used")
        if self.brainstorm and _placeholders(self.brainstorm) != {"number"}:
            raise InputError("brainstorm: needs the placeholder {number} and no other")
        if missing := [name for name in self.answer.names() if f'"{name}"' not in self.generate]:
            raise InputError(f'generate: does not ask for the key "{missing[0]}" of the answer')
        return self


class Prompts(_Part):
    """What `synthesis.yaml` holds."""

    languages: Annotated[dict[str, str], Field(min_length=1)]
    tasks_per_prompt: Annotated[int, Field(ge=1)]
    kinds: dict[Kind, KindPrompts]

    @classmethod
    def load(cls, path: Path = PROMPTS) -> Prompts:
        """FileNotFoundError, or ConfigError that names the file and the key."""
        return validate(cls, load_yaml(path), str(path))


# ---------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True, slots=True)
class Draw:
    """What is drawn for one example."""

    placeholders: dict[str, str]
    language: str | None  # code
    model: str


@dataclass(frozen=True)
class Plan:
    """What to make: `counts` examples of each kind, `per_task` of each task, by one of `models` each."""

    counts: dict[Kind, int]
    models: tuple[str, ...]
    per_task: int = 2  # NV-Embed: 120,000 examples over 60,000 tasks
    seed: int = 0
    prompts: Prompts = field(default_factory=Prompts.load)

    def __post_init__(self) -> None:
        if not self.models or not self.counts or min(*self.counts.values(), self.per_task) < 1:
            raise InputError("a plan needs a model, a kind, and counts of 1 or more")
        if unknown := [kind for kind in self.counts if kind not in self.prompts.kinds]:
            raise InputError(f"no prompts of kind {unknown[0]!r}; there are {', '.join(self.prompts.kinds)}")

    def draw(self, kind: Kind, number: int) -> Draw:
        """Of example `number`. Each placeholder has a draw of its own: a new one leaves the others as they were."""

        def choose(name: str, values: Sequence[Any]) -> Any:
            return random.Random(f"{self.seed}:{kind}:{number}:{name}").choice(values)

        part = self.prompts.kinds[kind]
        placeholders = {name: str(choose(name, values)) for name, values in part.values.items()}
        language = None
        if "language" in _placeholders(part.generate):
            language = choose("language", list(self.prompts.languages))
            placeholders["language"] = self.prompts.languages[language]
        return Draw(placeholders, language, choose("model", self.models))

    def question(self, kind: Kind, number: int, task: Task) -> Question:
        part, draw = self.prompts.kinds[kind], self.draw(kind, number)
        values = draw.placeholders | ({"task": task.instruction} if part.brainstorm else {})
        prompt = part.generate.format_map(values)
        return Question(draw.model, prompt, _answer_schema(part), f"{self.seed}:{kind}:{number}")

    def rows(self) -> Iterator[tuple[Kind, int]]:
        """(kind, number) of each example, the kinds in turn: a run that ends early has some of each."""
        for number in range(max(self.counts.values())):
            yield from ((kind, number) for kind, count in self.counts.items() if number < count)


def split_evenly(count: int, kinds: Sequence[str]) -> dict[Kind, int]:
    """`count` examples over `kinds`, the first ones taking the remainder. ValueError on an unknown or repeated kind."""
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"no kind of task {wrong[0]!r}; known: {', '.join(KINDS)}")
    if len(set(kinds)) < len(kinds) or not 1 <= len(kinds) <= count:
        raise InputError(
            f"{count} examples of {', '.join(kinds) or 'no kind'}: name each kind once, with one or more each"
        )
    chosen = [kind for kind in KINDS if kind in kinds]
    return {kind: count // len(chosen) + (n < count % len(chosen)) for n, kind in enumerate(chosen)}


# ---------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Report:
    """`asked` rows = `written` + the sum of `dropped`, which is by kind and reason. `tasks`: of step 1, by kind.

    `client`: what the server was asked and what came back (`Client.counts`). `diversity`: of the rows written.
    """

    asked: int
    written: int
    dropped: dict[str, dict[str, int]]
    tasks: dict[str, dict[str, int]]
    client: dict[str, int]
    diversity: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def synthesize(
    out: Path, client: Client, plan: Plan, *, licence: str = "", progress: Callable[[int, int], None] | None = None
) -> Report:
    """Make the plan's examples and write those that are usable to `out`, in the plan's order; their tasks beside it.

    An example's task is a name; `tasks_file(out)` holds the `Task` of each, with the brainstormed instruction. `out`
    is written whole or not at all, and not where nothing usable came. Rows wait in a temporary file; memory is bounded
    by the tasks, about 1 KB each, and by `repeats`, about 250 bytes a row. Raises ServerError where the server is gone:
    what was paid for is in the client's cache, and the tasks are in `brainstorm_file(out)`, for a run that goes on.
    """
    tasks: dict[Kind, list[Task]] = {}
    brainstormed: dict[str, dict[str, int]] = {}
    for kind, count in plan.counts.items():
        tasks[kind], brainstormed[kind] = _tasks(
            client, plan, kind, -(-count // plan.per_task), licence, brainstorm_file(out)
        )
    dropped: dict[str, Counter[str]] = {kind: Counter() for kind in plan.counts}
    spool = DiskList()
    for kind, number, made in _made(client, plan, tasks, progress):
        if isinstance(made, str):
            dropped[kind][made] += 1
        else:
            spool.add(json.dumps([kind, number, to_row(made)]))
    copies = repeats(example.query for _, _, example in _read(spool))
    diversity = Diversity()

    def kept() -> Iterator[Example]:
        for index, (kind, number, example) in enumerate(_read(spool)):
            if match := copies.get(index):
                dropped[kind]["duplicate" if match.exact else "near_duplicate"] += 1
                continue
            draw = plan.draw(kind, number)
            diversity.add(kind, example, draw.placeholders | {"model": draw.model})
            yield example

    written = 0
    if len(spool):
        written = write_examples(out, kept(), {task.name: task for of_kind in tasks.values() for task in of_kind})
    reasons = {kind: dict(sorted(count.items())) for kind, count in dropped.items()}
    asked = sum(plan.counts.values())
    return Report(asked, written, reasons, brainstormed, dict(client.counts), diversity.to_json())


def brainstorm_file(out: Path) -> Path:
    """Where the tasks of step 1 are kept for later runs to the same `out`."""
    return out.with_name(f"{out.name}.brainstorm.jsonl")


def _tasks(
    client: Client, plan: Plan, kind: Kind, needed: int, licence: str, file: Path
) -> tuple[list[Task], dict[str, int]]:
    """Step 1: the tasks of a kind, each for `per_task` examples, or its only one; and how they came about."""
    part = plan.prompts.kinds[kind]
    wordings, count = [part.instruction], {"prompts": 0, "tasks": 1}
    if part.brainstorm:
        prompt = part.brainstorm.format(number=plan.prompts.tasks_per_prompt)
        subject = Subject(kind, prompt, plan.prompts.tasks_per_prompt, plan.models, plan.seed)
        wordings, count = brainstorm(client, file, subject, needed)
    tasks = [
        Task(
            name=f"synthetic-{kind}-{hashlib.sha256(wording.encode()).hexdigest()[:16]}",
            family=part.family,
            instruction=wording,
            symmetric=part.symmetric,
            licence=licence,
            source=f"synthetic: {', '.join(plan.models)}",
        )
        for wording in wordings
    ]
    return tasks, count


def _made(
    client: Client, plan: Plan, tasks: Mapping[Kind, Sequence[Task]], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[Kind, int, Example | str]]:
    """Step 2: (kind, number, the example or why there is none) for each row of the plan, in order."""
    asked: deque[tuple[Kind, int, Task]] = deque()  # what `ask` has taken and not yet answered
    done, total = 0, sum(plan.counts.values())

    def task_of(kind: Kind, number: int) -> Task | None:
        # neighbours share a task, so that a longer run keeps the tasks of a shorter one
        place = number // plan.per_task if plan.prompts.kinds[kind].brainstorm else 0
        return tasks[kind][place] if place < len(tasks[kind]) else None

    def questions() -> Iterator[Question]:
        for kind, number in plan.rows():
            if (task := task_of(kind, number)) is not None:
                asked.append((kind, number, task))
                yield plan.question(kind, number, task)

    for kind, number in plan.rows():
        if task_of(kind, number) is None:
            done += 1
            yield kind, number, "no_task"
    for answer in client.ask(questions()):
        kind, number, task = asked.popleft()
        made = answer.reason if isinstance(answer, Failure) else _example(plan, kind, number, task, answer)
        done += 1
        if progress is not None:
            progress(done, total)
        yield kind, number, made


def _example(plan: Plan, kind: Kind, number: int, task: Task, answer: Mapping[str, str]) -> Example | str:
    """The example, or why it is of no use."""
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


def _read(spool: DiskList) -> Iterator[tuple[Kind, int, Example]]:
    for index in range(len(spool)):
        kind, number, row = json.loads(spool[index])
        yield kind, number, parse_example(row, default_task="")


def _answer_schema(part: KindPrompts) -> type[BaseModel]:
    fields: dict[str, Any] = {name: (str, ...) for name in part.answer.names()}
    return create_model("Answer", __base__=Answer, **fields)


def _placeholders(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}
