"""Plans what to synthesize: the prompts of each kind of task (`synthesis.yaml`), and the random draws of each example.

Each example has its own seed. So a longer run has the rows of a shorter one, and pays only for the new ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from embedwright.config import load_yaml, validate
from embedwright.data.schema import Family, Task
from embedwright.errors import InputError
from embedwright.llm.client import Answer, Question

Kind = Literal["short-long", "long-short", "short-short", "long-long", "sts", "bitext"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PROMPTS = Path(__file__).with_name("synthesis.yaml")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AnswerKeys(_Part):
    """Names the keys of the JSON object that hold the query, the positive and the negative."""

    query: str
    positive: str
    negative: str | None = None

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.query, self.positive, self.negative) if name)


class KindPrompts(_Part):
    """The prompts of one kind: `brainstorm` asks for tasks, or `instruction` is the task; `generate` for examples."""

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
    """The content of `synthesis.yaml`."""

    languages: Annotated[dict[str, str], Field(min_length=1)]
    tasks_per_prompt: Annotated[int, Field(ge=1)]
    kinds: dict[Kind, KindPrompts]

    @classmethod
    def load(cls, path: Path = PROMPTS) -> Prompts:
        """Reads a prompts file. FileNotFoundError, or ConfigError that names the file and the key."""
        return validate(cls, load_yaml(path), str(path))


class Draw(NamedTuple):
    """The random draws of one example."""

    placeholders: dict[str, str]
    language: str | None  # code
    model: str


@dataclass(frozen=True)
class Plan:
    """Asks for `counts` examples of each kind, `per_task` of each task. Each is written by one of `models`."""

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
        """Draws for example `number`. Each placeholder has its own draw, so a new one does not change the others."""

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
        fields: dict[str, Any] = {name: (str, ...) for name in part.answer.names()}
        schema = create_model("Answer", __base__=Answer, **fields)
        prompt = part.generate.format_map({"task": task.instruction, **draw.placeholders})
        return Question(draw.model, prompt, schema, f"{self.seed}:{kind}:{number}")

    def rows(self) -> Iterator[tuple[Kind, int]]:
        """Yields (kind, number) of each example, the kinds in turn, so that a run that ends early has some of each."""
        for number in range(max(self.counts.values())):
            yield from ((kind, number) for kind, count in self.counts.items() if number < count)


def split_evenly(count: int, kinds: Sequence[str]) -> dict[Kind, int]:
    """Splits `count` examples over `kinds`; the first ones take the rest. ValueError: an unknown or repeated kind."""
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"no kind of task {wrong[0]!r}; known: {', '.join(KINDS)}")
    if len(set(kinds)) < len(kinds) or not 1 <= len(kinds) <= count:
        raise InputError(
            f"{count} examples of {', '.join(kinds) or 'no kind'}: name each kind once, with one or more each"
        )
    chosen = [kind for kind in KINDS if kind in kinds]
    return {kind: count // len(chosen) + (n < count % len(chosen)) for n, kind in enumerate(chosen)}


def _placeholders(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}
