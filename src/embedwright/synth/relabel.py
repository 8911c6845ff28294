"""Mined negatives that are in truth positives, found by a judge: a language model, or a cross-encoder.

Of what naive mining calls negative, 39 % (Natural Questions) and 47 % (StackExchange) answer the query by the word of a
language model, and the best rule leaves about half of those (NV-Retriever, arXiv 2407.15831).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from embedwright.data.answers import AnswerMarks, marks_of, text_mark
from embedwright.data.files.table import open_as_named, write_examples
from embedwright.data.files.tasks import Tasks
from embedwright.data.schema import Example, Passage, Task
from embedwright.data.sources.catalog import find_task
from embedwright.errors import InputError
from embedwright.llm.client import Answer, Client, Failure, Question

Action = Literal["drop", "promote"]
_CHUNK = 256  # examples in memory at a time

_PROMPT = """\
You judge search results. {task}
Query:
{query}

A text that is known to be a right result:
{positive}

Another text:
{passage}

Is the other text a right result for the query, as good as the known one or nearly so? A text on the same subject that \
does not give what the query asks for is not right.
Answer with a JSON object with the key "verdict", which is "positive" for a right result and "negative" for any other, \
and nothing else."""


class Candidate(NamedTuple):
    """A negative that is in question: of an example's task and query, beside its first positive."""

    task: str
    query: str
    positive: str
    passage: str


Judge = Callable[[Sequence[Candidate]], Sequence[bool | None]]
"""For each candidate whether it is a positive; None where there is no verdict. Equal candidates come once a chunk."""


class CrossEncoder(Protocol):
    """Such as sentence-transformers' CrossEncoder: one score for each (query, passage)."""

    def predict(self, sentences: list[tuple[str, str]], /) -> Any: ...


class _Verdict(Answer):
    verdict: Literal["positive", "negative"]


@dataclass(frozen=True)
class Report:
    """`negatives` = `kept` + those dropped or promoted (`positive`). `undecided` of the kept had no verdict.

    `known`: of the positive, those that answer the question in some row; nobody was asked about them.

    `without_negatives`: examples that had some before and have none now. `scores_removed`: examples whose score lists
    no longer fit, as a promoted passage had none.
    """

    action: Action
    examples: int = 0
    negatives: int = 0
    positive: int = 0
    known: int = 0
    kept: int = 0
    undecided: int = 0
    without_negatives: int = 0
    scores_removed: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def relabel(examples: Iterable[Example], judge: Judge, action: Action = "drop") -> tuple[list[Example], Report]:
    """`examples`, in order, without the negatives that `judge` calls positives; `promote` makes them positives.

    No example is left out, one without a negative left neither. A negative without a verdict stays one. What answers
    the question in any of the examples (`data.answers`) is a positive without a judge.
    """
    count: Counter[str] = Counter()
    rows = list(examples)
    relabelled = list(relabel_stream(rows, AnswerMarks(rows), judge, action, count))
    return relabelled, Report(action, **count)


def relabel_file(
    path: Path,
    out: Path,
    judge: Judge,
    action: Action = "drop",
    *,
    tasks: Tasks | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The same from file to file (any that `open_examples` reads), for data of any size; the counts as JSON.

    `tasks` of the rows, to be written with them, besides those that are described beside `path`.
    """
    table = open_as_named(path)
    count: Counter[str] = Counter()

    def relabelled() -> Iterator[Example]:
        for example in relabel_stream(table, AnswerMarks(table), judge, action, count):
            if progress is not None:
                progress(count["examples"], len(table))
            yield example

    write_examples(out, relabelled(), {**table.tasks, **(tasks or {})})
    return {"read": table.report, **Report(action, **count).to_json()}


def relabel_stream(
    examples: Iterable[Example], answers: AnswerMarks, judge: Judge, action: Action, count: Counter[str]
) -> Iterator[Example]:
    """The same for data of any size: 256 examples in memory, `count` filled on the way with what Report has."""
    if action not in ("drop", "promote"):
        raise InputError(f"action must be drop or promote, not {action!r}")
    rows = iter(examples)
    while chunk := list(islice(rows, _CHUNK)):
        known = [_answering(example, answers) for example in chunk]
        pairs = [list(zip(_candidates(example), own, strict=True)) for example, own in zip(chunk, known, strict=True)]
        asked = list(dict.fromkeys(candidate for own in pairs for candidate, answers_it in own if not answers_it))
        verdicts = dict(zip(asked, judge(asked) if asked else [], strict=True))
        for example, own in zip(chunk, pairs, strict=True):
            count["known"] += sum(answers_it for _, answers_it in own)
            yield _relabelled(example, [answers_it or verdicts[c] for c, answers_it in own], action, count)


def _answering(example: Example, answers: AnswerMarks) -> list[bool]:
    """Which negatives answer the question in some row."""
    marks = answers.of(example) if example.negatives else set()
    return [not marks.isdisjoint(marks_of(example.task, [passage])) for passage in example.negatives]


def judge_by_scores(model: CrossEncoder, threshold: float) -> Judge:
    """A passage is a positive from this score on, on the model's own scale."""

    def judge(candidates: Sequence[Candidate]) -> list[bool | None]:
        scores = np.asarray(model.predict([(c.query, c.passage) for c in candidates]), dtype=np.float64)
        if scores.shape != (len(candidates),):
            raise InputError(f"the cross-encoder gave {scores.shape} for {len(candidates)} pairs, not one score each")
        if not (finite := np.isfinite(scores)).all():
            raise InputError(f"the cross-encoder's score is not finite for {candidates[int(finite.argmin())]}")
        return list((scores >= threshold).tolist())

    return judge


def judge_by_model(client: Client, model: str, tasks: Mapping[str, Task] | None = None) -> Judge:
    """A language model is asked. It is told the instruction of the row's task, from `tasks` or the catalogue."""

    def judge(candidates: Sequence[Candidate]) -> list[bool | None]:
        answers = client.ask(_question(candidate, model, tasks or {}) for candidate in candidates)
        return [None if isinstance(answer, Failure) else answer["verdict"] == "positive" for answer in answers]

    return judge


def _question(candidate: Candidate, model: str, tasks: Mapping[str, Task]) -> Question:
    known = tasks.get(candidate.task) or find_task(candidate.task)
    told = f"The task: {known.instruction}" if known and known.instruction else ""
    prompt = _PROMPT.format(task=told, query=candidate.query, positive=candidate.positive, passage=candidate.passage)
    return Question(model, prompt, _Verdict, seed="verdict", temperature=0.0)


def _candidates(example: Example) -> list[Candidate]:
    positive = example.positives[0].text
    return [Candidate(example.task, example.query, positive, passage.text) for passage in example.negatives]


def _relabelled(example: Example, verdicts: Sequence[bool | None], action: Action, count: Counter[str]) -> Example:
    wrong = [i for i, verdict in enumerate(verdicts) if verdict]
    right = [i for i, verdict in enumerate(verdicts) if not verdict]
    count.update(
        examples=1,
        negatives=len(verdicts),
        positive=len(wrong),
        kept=len(right),
        undecided=verdicts.count(None),
        without_negatives=bool(verdicts) and not right,
    )
    if not wrong:
        return example
    scores = example.negative_scores
    negative_scores = None if scores is None else tuple(scores[i] for i in right)
    changed = replace(example, negatives=_pick(example.negatives, right), negative_scores=negative_scores)
    if action == "drop":
        return changed
    own = {text_mark(passage.text) for passage in example.positives}
    new = [i for i in wrong if text_mark(example.negatives[i].text) not in own]
    positive_scores = example.positive_scores
    if positive_scores is not None and new:
        positive_scores = None if scores is None else (*positive_scores, *(scores[i] for i in new))
        count["scores_removed"] += positive_scores is None
    promoted = (*example.positives, *_pick(example.negatives, new))
    return replace(changed, positives=promoted, positive_scores=positive_scores)


def _pick(passages: Sequence[Passage], places: Sequence[int]) -> tuple[Passage, ...]:
    return tuple(passages[i] for i in places)
