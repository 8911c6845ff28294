"""Finds mined negatives that are in truth positives, by a judge: a language model or a cross-encoder.

Of the negatives of naive mining, 39 % (Natural Questions) and 47 % (StackExchange) answer the query, as a language
model judges it. The best mining rule leaves about half of them (NV-Retriever, arXiv 2407.15831).
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedwright.data.answers import AnswerMarks, among, marks_of, question_of, text_mark
from embedwright.data.files.folders import stem_of
from embedwright.data.files.parts import Shard, write_part
from embedwright.data.files.tasks import Tasks, digest_of
from embedwright.data.schema import Example, Passage, Task
from embedwright.data.sources.catalog import find_task
from embedwright.data.tables.table import PartOfTable, open_as_named, write_examples
from embedwright.errors import InputError
from embedwright.llm.client import Answer, Client, Failure, Question

log = logging.getLogger(__name__)

Action = Literal["drop", "promote"]
_CHUNK = 256  # examples in memory at a time
_NAMED = 5  # negatives without a verdict that are named one by one
_NEGATIVE, _POSITIVE, _UNDECIDED, _KNOWN = range(4)
_CODES = {False: _NEGATIVE, True: _POSITIVE, None: _UNDECIDED}

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
    """A negative that may be a positive, with the task, the query and the first positive of its example."""

    task: str
    query: str
    positive: str
    passage: str


Judge = Callable[[Sequence[Candidate]], Sequence[bool | None]]
"""Says for each candidate whether it is a positive, or None without a verdict. Equal candidates come once a chunk."""


class _Verdict(Answer):
    verdict: Literal["positive", "negative"]


COUNTED = (
    *("examples", "negatives", "positive", "known", "kept", "undecided"),
    *("without_negatives", "scores_removed"),
)


def relabel_file(
    path: Path,
    out: Path,
    judge: Judge,
    action: Action = "drop",
    *,
    tasks: Tasks | None = None,
    progress: Callable[[int, int], None] | None = None,
    shard: Shard | None = None,
    judged_by: str = "",
    client: Client | None = None,
) -> dict[str, Any]:
    """Runs `relabel` from file to file, for data of any size, and returns its counts as JSON.

    `tasks` are written beside `out`, together with the tasks beside `path`. Raises InputError if no row has one of
    these `tasks`: a row that names none has that of the file's name.

    With `shard`, `out` is a folder of parts (`write_part`), which together have all rows in order; `judged_by` says
    which judge it is. The answers to a question are still those of all rows, which each part reads; what the judge
    calls a positive is one in the rows of the part. `client` is that of a judge by model: its counts are reported, and
    a part with `unanswered` questions is not done.
    """
    table = open_as_named(path, tasks)
    if tasks and tasks.keys().isdisjoint(named := table.rows_by_task()):
        of_rows = ", ".join(map(repr, islice(filter(None, named), _NAMED))) or f"none; {stem_of(path)!r} would fit them"
        raise InputError(f"{path}: no row has a task that --tasks describes ({', '.join(tasks)}); rows name {of_rows}")
    described = {**table.tasks, **(tasks or {})}
    given = PartOfTable(table, (shard or Shard(0, 1)).rows(len(table)))

    def relabelled(file: Path) -> dict[str, Any]:
        count = Counter(dict.fromkeys(COUNTED, 0))

        done = 0

        def advance(rows: int) -> None:
            nonlocal done
            done += rows
            if progress is not None:
                progress(done, len(given))

        write_examples(file, relabel(given, judge, action, count, AnswerMarks(table), advance), described)
        asked = {"client": dict(client.counts), "unanswered": client.unanswered} if client else {}
        return {"read": table.report, "action": action, **count, **asked}

    if shard is None:
        return relabelled(out)
    settings = {"command": "data relabel", "rows": table.fingerprint, "action": action, "judge": judged_by}
    settings["tasks"] = digest_of(described)
    return write_part(out, shard, settings, relabelled)


def relabel(
    examples: Iterable[Example],
    judge: Judge,
    action: Action,
    count: Counter[str],
    answers: AnswerMarks | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Iterator[Example]:
    """Yields `examples` in order, without the negatives that `judge` calls positives; `promote` makes them positives.

    All examples stay: one that has no negative left, and a scored pair without a positive, as it is. A negative without
    a verdict stays a negative. A passage that answers the question in any of the examples (`data.answers`) is a
    positive, and the judge is not asked about it. One that the judge calls a positive beside one of the question's
    positives is a positive in all examples of that question.

    `examples` is a list or a table; it is read four times, or twice with the `answers`. Memory holds 256 examples, a
    byte for each negative and 8 or 16 for each that is a positive. `advance(n)` is told of n more that are judged,
    which all are before the first comes out.

    `count` gets `negatives` = `kept` + `positive`. `known` of the positive answer the question in some row, and
    `undecided` of the kept have no verdict. `without_negatives` counts examples that lost all negatives, and
    `scores_removed` those whose scores no longer fit, because a promoted passage had none.
    """
    if action not in ("drop", "promote"):
        raise InputError(f"action must be drop or promote, not {action!r}")
    codes, positives = _judged(examples, judge, answers or AnswerMarks(examples), advance)
    place = 0
    for example in examples:
        verdicts: list[bool | None] = []
        own = codes[place : place + (len(example.negatives) if example.positives else 0)]
        place += len(own)
        for passage, code in zip(example.negatives, own, strict=bool(own)):
            positive = code in (_POSITIVE, _KNOWN) or bool(among(positives, np.array(_keys(example, passage))).any())
            verdicts.append(True if positive else None if code == _UNDECIDED else False)
            if verdicts[-1] is None and (count["undecided"] + verdicts.count(None)) <= _NAMED:
                shown = len(passage.text), passage.text[:60]
                log.warning("example %r: no verdict on a negative of %d characters: %r", example.id, *shown)
        count["known"] += own.count(_KNOWN)
        yield _relabelled(example, verdicts, action, count)


def _judged(
    examples: Iterable[Example], judge: Judge, answers: AnswerMarks, advance: Callable[[int], None]
) -> tuple[bytearray, NDArray[np.int64]]:
    """Returns the verdict on each negative, in order, and the keys of the judge's positives, ascending."""
    codes, positives, rows = bytearray(), array("q"), iter(examples)
    while chunk := list(islice(rows, _CHUNK)):
        pairs = [
            list(zip(_candidates(example), _known(example, answers), strict=True)) if example.positives else []
            for example in chunk
        ]
        asked = list(dict.fromkeys(candidate for own in pairs for candidate, known in own if not known))
        verdicts = dict(zip(asked, judge(asked) if asked else [], strict=True))
        for example, own in zip(chunk, pairs, strict=True):
            for passage, (candidate, known) in zip(example.negatives, own, strict=bool(own)):
                codes.append(_KNOWN if known else _CODES[verdicts[candidate]])
                if codes[-1] == _POSITIVE:
                    positives.extend(_keys(example, passage))
        advance(len(chunk))
    return codes, np.unique(np.frombuffer(positives, dtype=np.int64))


def _keys(example: Example, passage: Passage) -> list[int]:
    """Returns numbers that stand for the passage, by its text and by its document, as a result for the question."""
    question = question_of(example.task, example.query)
    return [hash((question, mark)) for mark in marks_of(example.task, [passage])]  # Python salts no hash of numbers


def _candidates(example: Example) -> list[Candidate]:
    positive = example.positives[0].text
    return [Candidate(example.task, example.query, positive, passage.text) for passage in example.negatives]


def _known(example: Example, answers: AnswerMarks) -> list[bool]:
    """Says for each negative whether it answers the question in some row."""
    marks = answers.of(example) if example.negatives else set()
    return [not marks.isdisjoint(marks_of(example.task, [passage])) for passage in example.negatives]


def judge_by_scores(model: Any, threshold: float) -> Judge:
    """Returns a judge by `model`, such as a CrossEncoder: a passage with this score or more is a positive."""

    def judge(candidates: Sequence[Candidate]) -> list[bool | None]:
        scores = np.asarray(model.predict([(c.query, c.passage) for c in candidates]), dtype=np.float64)
        if scores.shape != (len(candidates),):
            raise InputError(f"the cross-encoder gave {scores.shape} for {len(candidates)} pairs, not one score each")
        if not (finite := np.isfinite(scores)).all():
            raise InputError(f"the cross-encoder's score is not finite for {candidates[int(finite.argmin())]}")
        return list((scores >= threshold).tolist())

    return judge


def judge_by_model(
    client: Client, model: str, tasks: Mapping[str, Task] | None = None, max_chars: int | None = None
) -> Judge:
    """Returns a judge that asks a language model, with the instruction of the row's task (`tasks` or the catalogue).

    `max_chars` is how much of each text it reads.
    """

    def judge(candidates: Sequence[Candidate]) -> list[bool | None]:
        shown = (Candidate(one.task, *(text[:max_chars] for text in one[1:])) for one in candidates)
        answers = client.ask(_question(candidate, model, tasks or {}) for candidate in shown)
        return [None if isinstance(answer, Failure) else answer["verdict"] == "positive" for answer in answers]

    return judge


def _question(candidate: Candidate, model: str, tasks: Mapping[str, Task]) -> Question:
    known = tasks.get(candidate.task) or find_task(candidate.task)
    instruction = f"The task: {known.instruction}" if known and known.instruction else ""
    prompt = _PROMPT.format(
        task=instruction, query=candidate.query, positive=candidate.positive, passage=candidate.passage
    )
    return Question(model, prompt, _Verdict, seed="verdict", temperature=0.0)


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
    seen, new = {text_mark(passage.text) for passage in example.positives}, list[int]()
    for i in wrong:
        if (mark := text_mark(example.negatives[i].text)) not in seen:
            seen.add(mark)
            new.append(i)
    positive_scores = example.positive_scores
    if positive_scores is not None and new:
        positive_scores = None if scores is None else (*positive_scores, *(scores[i] for i in new))
        count["scores_removed"] += positive_scores is None
    promoted = (*example.positives, *_pick(example.negatives, new))
    return replace(changed, positives=promoted, positive_scores=positive_scores)


def _pick(passages: Sequence[Passage], places: Sequence[int]) -> tuple[Passage, ...]:
    return tuple(passages[i] for i in places)
