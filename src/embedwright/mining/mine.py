"""Hard negatives: what a teacher ranks high for a query and that, by a rule, is not one of its answers.

The rules are those of NV-Retriever (arXiv 2407.15831); `perc` at 0.95 is the one NV-Embed v2 used (paper, 4.1.1).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from embedwright.data.answers import Answers, marks_of, text_mark
from embedwright.data.schema import DataError, Example, Passage, Task, text_of
from embedwright.data.sources.catalog import find_task
from embedwright.data.tables.table import PartOfTable, write_examples
from embedwright.encoders.http import HttpEncoder
from embedwright.encoders.protocol import as_encoder
from embedwright.encoders.sharded import itself
from embedwright.errors import InputError
from embedwright.mining.choose import Miner, MiningSettings
from embedwright.mining.pool import Corpus, Pool
from embedwright.mining.rank import MiningQuery, Teacher, teacher_of_pool
from embedwright.mining.report import MiningReport
from embedwright.mining.rules import (
    NAMED,
    RANDOM,
    Ensemble,
    Positives,
    Rule,
    check_sampling,
    check_settings,
    check_teachers,
)
from embedwright.vectors.store import StoredPrecision, encode_texts

logger = logging.getLogger(__name__)

AT_ONCE = 2**17  # queries searched in one pass over the corpus
SEARCHED_PER_SAMPLED = 10  # candidates looked at for each that may be drawn: the rule takes most away


def mine(
    examples: Iterable[Example],
    corpus: Corpus,
    teacher: Any,
    *,
    rule: Rule = "perc",
    margin: float | None = None,
    negatives: int = 7,
    depth: int = 100,
    task: str | None = "",
    tasks: Mapping[str, Task] | None = None,
    sampled: bool = False,
    sample_from: int | None = None,
    seed: int = 0,
    ensemble: Ensemble = "cross-sample",
    positives: Positives = "lowest",
    answers: Answers | None = None,
    vectors: Path | str | None = None,
    precision: StoredPrecision = "float32",
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Example], MiningReport]:
    """Fills each example up to `negatives` hard negatives from the exact top `depth` of a corpus.

    Never a negative, under any rule: a document without text; one with the id or the exact key of an answer; one with
    the exact key of the query; nor a near-duplicate of an answer, of the query, of a negative that the example came
    with or of one taken before. The answers to a question are those of all its rows, and ids are compared within a task
    only. Equal scores rank in the order of the corpus.

    Negatives that an example came with stay in front, unless they are equal to an answer or to the query.
    Scored pairs below the threshold, which have no positive (`Example`), stay as they are.

    Memory: 40 bytes a document (and its id, where `corpus` is a mapping), 8 an example, 32 for each id of its passages;
    131,072 examples in progress with their vectors; and per teacher the vectors of the corpus, unless they are on disk.
    `bm25` holds its index, the texts that the corpus lacks and, while it counts them, the words of all documents.
    Examples and corpus may be tables on disk, `open_examples` and `open_corpus`.

    Args:
        examples: queries with their positives. A list or a table is read a few times; anything else is held. Of a
            `PartOfTable`, the answers and ids of the whole table count, so that parts that are mined one by one are
            what all are together.
        corpus: document id -> text. It is read in order, a few times, one text at a time.
        teacher: anything that `as_encoder` takes, or a list of such. A score is the inner product of its vectors.
            By name: `bm25` ranks by its own scores over the words of the bare query, and a document that shares no word
            with it is not a candidate; `random` draws from the whole corpus, seeded per example id. It has no scores,
            so its rule is `naive`, and it mines alone.
        rule: of a query's ranked candidates, its answers taken away, `naive` keeps all; `shift` ignores the first
            `margin` (10); `abs` keeps score <= `margin` (0.7); `margin` keeps score < positive - `margin` (0.05);
            `perc` keeps score < positive x `margin` (0.95). A positive below zero is multiplied by 2 - `margin`
            instead, else the threshold would lie above it.
        margin: of the rule; default: the best one of NV-Retriever's ablation.
        negatives: how many an example has in the end.
        depth: how many candidates of a query are looked at.
        task: the instruction for all queries. None: queries are read as documents are. Empty: each query gets the
            instruction of its row's task, where `tasks` or the catalogue has one, else the teacher's own. Documents
            get none.
        tasks: the tasks of the examples, by name.
        sampled: negatives are drawn by softmax over the scores without replacement, seeded per example id. They stay in
            the order drawn, so that a trainer which uses the first few has a fair draw too. Else the best are taken.
        sample_from: with `sampled`, how many of the first candidates that may be negatives are drawn from: 10, from
            which the paper draws and finds that more hurts, or `negatives` where that is more. At least ten times as
            many are looked at, whatever `depth`.
        seed: of all draws.
        ensemble: of several teachers, `cross-sample` draws one per example, seeded by its id; `intra-sample` has each
            rank for every query, by its own threshold, and takes the best of each in turn, no text twice;
            `intra-sample-duplicates` takes a text as often as teachers propose it.
        positives: of several positives, `lowest`: the lowest score sets the threshold, the safe side (as in
            sentence-transformers' `mine_hard_negatives` and in NeMo). `each`: an example for each of them, as
            NV-Retriever has one positive per query, with its own threshold and negatives, and the id `<id>:p<number>`;
            the others are not its negatives either, nor in a batch that holds their examples.
        answers: the answers to all questions; default: those of `examples`.
        vectors: a folder to keep the vectors in (`encode_texts`), of which memory then holds one shard. A run that was
            stopped goes on at the next shard; one by another rule encodes queries alone.
        precision: of stored vectors, in memory or on disk. `float16` halves them: scores are those of the rounded ones.
        out: a file to write the examples to as they come (`write_examples`, with `tasks`), in place of a list.
        progress: `progress(done, total)` counts encoded texts.

    Returns:
        The examples in the order given, with the teacher's `positive_scores` and `negative_scores` (without them where
        several teachers ranked for one query, or `random` did), and a report.

    Raises:
        ValueError: a margin that does not fit the rule, a rule that does not fit the teacher, a `depth` too small for
            what is asked, a vector that is not finite.
        DataError: a corpus without text; with its id, an example without a query or positives.
    """
    started = time.perf_counter()
    given = [
        one if one in NAMED else as_encoder(one)
        for one in (teacher if isinstance(teacher, list | tuple) else [teacher])
    ]
    check_teachers(given, rule, margin, sampled)
    margin = check_settings(rule, margin, negatives, depth)
    sample_from = check_sampling(sampled, sample_from, negatives)
    _check_choices(given, ensemble, positives)
    if seed < 0:
        raise InputError(f"seed must be 0 or more, not {seed}")
    rows = examples if isinstance(examples, Sized) else list(examples)
    first_of: dict[str, str] = {}
    wanted = sum(_number_of_queries(_checked(row, first_of), positives) for row in rows)
    everything = rows.table if isinstance(rows, PartOfTable) else rows
    all_answers = answers or Answers(everything)
    of_others = (p for row in everything for p in answers.of(row)) if answers else ()
    instruction_of = cache(lambda name: _instruction(name, task, tasks or {}))
    _check_instructions(given, {name: id for name, id in first_of.items() if instruction_of(name) == ""})

    def queries_of(row: Example) -> list[MiningQuery]:
        return list(_queries(row, all_answers.of(row), positives, instruction_of(row.task)))

    pool = Pool(corpus, everything, of_others)
    total = (0 if RANDOM in given else len(given)) * len(pool) + wanted * (
        1 if ensemble == "cross-sample" else len(given)
    )
    read = written = 0

    def advance(texts: int) -> None:
        nonlocal read
        read += texts
        if progress:
            progress(read, total)

    settings = MiningSettings(rule, margin, negatives, sample_from, seed, ensemble, RANDOM not in given)
    miner = Miner(pool, [], settings)

    def open_teachers() -> list[Teacher]:
        folder = None if vectors is None else Path(vectors)
        encode = partial(encode_texts, folder=folder, precision=precision, advance=advance)
        searched = max(depth, SEARCHED_PER_SAMPLED * sample_from) if sampled else depth

        def passages() -> Iterator[Example]:
            return (query.example for row in everything for query in queries_of(row))

        return [teacher_of_pool(one, pool, passages, searched, seed, encode, advance) for one in given]

    def mined() -> Iterator[Example]:
        nonlocal total, written
        coming = iter(rows)
        while chunk := list(islice(coming, AT_ONCE)):
            asked = [queries_of(row) for row in chunk]
            queries = [query for own in asked for query in own]
            pool.take(query.example for query in queries)
            total += sum(one not in NAMED for one in given) * len(pool.lacking)
            miner.teachers = miner.teachers or open_teachers()
            filled = miner.fill(queries)
            for row, own in zip(chunk, asked, strict=True):
                found = list(islice(filled, len(own))) if own else [row]
                written += len(found)
                yield from found

    found: list[Example] = []
    if out is None:
        found = list(mined())
    else:
        write_examples(out, mined(), tasks)
    report = MiningReport(
        rule,
        margin,
        len(given),
        ensemble if len(given) > 1 else None,
        round(time.perf_counter() - started, 3),
        wanted,
        len(pool),
        **miner.count,
        without_positive=written - wanted,
        scores=miner.histogram.to_json(),
    )
    logger.info("mined %s", report.counts())
    return found, report


def _check_choices(teachers: Sequence[Any], ensemble: str, positives: str) -> None:
    if not teachers:
        raise InputError("no teacher")
    if ensemble not in get_args(Ensemble):
        raise InputError(f"ensemble must be one of {', '.join(get_args(Ensemble))}, not {ensemble!r}")
    if positives not in get_args(Positives):
        raise InputError(f"positives must be lowest or each, not {positives!r}")


def _check_instructions(teachers: Sequence[Any], first_of: Mapping[str, str]) -> None:
    """Raises InputError if a teacher cannot do without an instruction. `first_of` are tasks that have none, with the id
    of an example of each.
    """
    for encoder in map(itself, teachers):
        if isinstance(encoder, HttpEncoder) and "{task}" in encoder.query_template and first_of:
            name, id = next(iter(first_of.items()))
            raise InputError(
                f"example {id!r}: its task {name!r} has no instruction, and the teacher's template for queries has a "
                "{task}: describe the task in the file of the tasks, give an instruction (--task), or a template "
                "without {task} (--query-template)"
            )


def _checked(example: Example, first_of: dict[str, str]) -> Example:
    """Raises DataError if query or positives are missing, the latter without the score of a pair.

    `first_of` gets the id of the first example with positives of each task.
    """
    if example.positives:
        first_of.setdefault(example.task, example.id)
    text_of(example.query, f"example {example.id!r}: query")
    if not example.positives and example.score is None:
        raise DataError(f"example {example.id!r}: no positive, so that its answers cannot be told from negatives")
    return example


def _number_of_queries(example: Example, positives: Positives) -> int:
    return len(example.positives) if positives == "each" else bool(example.positives)


def _instruction(name: str, task: str | None, tasks: Mapping[str, Task]) -> str | None:
    """Returns the instruction of rows of the task `name`: `task`, or else its own, which is empty if it is unknown."""
    if task != "":
        return task
    known = tasks.get(name) or find_task(name)
    return known.instruction if known else ""


def _queries(
    example: Example, answers: tuple[Passage, ...], positives: Positives, instruction: str | None
) -> Iterator[MiningQuery]:
    """Gives the queries of an example: one, or one for each positive; none if it has no positive."""
    if not example.positives:
        return
    left = example.negatives
    if left:
        marks = marks_of(example.task, answers) | {text_mark(example.query)}
        left = tuple(p for p in left if marks.isdisjoint(marks_of(example.task, [p])))
    removed = len(example.negatives) - len(left)
    if positives == "lowest" or len(example.positives) == 1:
        yield MiningQuery(replace(example, negatives=left), answers, removed, instruction)
        return
    for number, positive in enumerate(example.positives):
        own = replace(example, id=f"{example.id}:p{number}", positives=(positive,), negatives=left)
        yield MiningQuery(own, answers, removed if number == 0 else 0, instruction)
