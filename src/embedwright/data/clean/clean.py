"""Cleans training examples of unwanted rows, repeats, and leaks from evaluation data.

The rules, in this order: licence, language, length, repeats of an earlier row, repeats within a row, leaks. A query
that breaks a rule removes its row. A passage that breaks one is cut out of its row; a row that loses its last positive
goes, and so does a scored pair below the threshold, which has none, if its other text breaks a rule.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embedwright.data.answers import text_mark
from embedwright.data.clean.filters import Filters, fits, row_fault
from embedwright.data.clean.leaks import SHOWN, EvalTexts, Leak
from embedwright.data.clean.repeats import repeats
from embedwright.data.files.folders import stem_of
from embedwright.data.files.parts import Shard, write_part
from embedwright.data.keys import are_near, both_keys, shingles
from embedwright.data.schema import DataError, Example
from embedwright.data.tables.table import PartOfTable, open_as_named, write_examples
from embedwright.errors import InputError
from embedwright.files import whole_file

By = Literal["query", "positive", "both", "none"]
Leaked = dict[str, Any]  # a line of the leakage report

_BATCH = 256  # rows
_REMEMBERED = 1 << 15  # texts: passages of labels and mined negatives come again and again
# What can be wrong with a row as a whole; its number is kept between the two readings, one byte a row.
_FAULTS = ("", "licence", "licence_unknown", "language", "length", "repeated_exact", "repeated_near")


@dataclass(slots=True)
class Report:
    """Counts rows kept, rows removed and passages cut by reason, and leaking texts by evaluation file."""

    kept: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    leaks: dict[str, Counter[str]] = field(default_factory=dict)  # file -> "side rule" -> texts

    def to_json(self) -> dict[str, Any]:
        return {"kept": self.kept, "rows_removed": self.removed, "passages_cut": self.cut, "leaks": self.leaks}


def clean(
    examples: Iterable[Example],
    report: Report,
    *,
    filters: Filters | None = None,
    by: By = "both",
    held_out: EvalTexts | None = None,
    on_leak: Callable[[Leaked], None] | None = None,
    pair_tasks: Collection[str] = (),
) -> Iterator[Example]:
    """Yields the examples that break no rule, in order, without the passages that break one; `report` gets the counts.

    `examples` are read twice, so they are a table or a list. A row repeats earlier ones of its task if its query and
    each of its positives, as pairs, do (`by="both"`); `query` and `positive` look at that side alone,
    `none` leaves the rule out. A row with a new positive stays, without its repeated ones. Scored pairs below the
    threshold repeat each other alone. `repeats` says what texts repeat. Within a row, a positive goes that repeats an
    earlier one, and a negative that repeats the query, a positive or an earlier negative. In rows of `pair_tasks`
    (those of family `pair`) and in scored pairs below the threshold, a negative may nearly repeat the query or a
    positive: such rows are there to tell the two apart.

    `on_leak` gets every text that leaks: `row` (from 1) and `id` of its example, side, rule, score, the evaluation file
    and its row, both texts cut to 200 characters. Memory: what `repeats` takes for the queries and positives, 200 bytes
    a row, and `held_out`.
    """
    filters = filters or Filters()
    rows = _kept(examples, *_row_faults(examples, filters, by), filters, report, pair_tasks)
    if held_out is not None:
        rows = _unleaked(rows, held_out, report, on_leak)
    for _, example in rows:
        report.kept += 1
        yield example


def clean_file(
    path: Path,
    out: Path | None,
    *,
    leaks_to: Path | None = None,
    filters: Filters | None = None,
    by: By = "both",
    held_out: EvalTexts | None = None,
    shard: Shard | None = None,
) -> dict[str, Any]:
    """Cleans the training data at `path` (any kind) into `out`; None only counts. Returns all counts.

    These are the table's counts, its rows by task, and those of `clean`. `leaks_to` gets the leakage report (JSONL).
    Both files are written whole or not at all. Raises what `open_examples` raises, and DataError if no row is left.

    With `shard`, `out` is a folder of parts (`write_part`), and the leakage report of a part lies beside it. A part has
    the rows whose queries have the same exact key, in their order: exact repeats are found as in one run, near-repeats
    within a part alone. So `by` may not be `positive`.
    """
    table = open_as_named(path)
    filters = filters or Filters()
    licences = {task.name: task.licence for task in table.tasks.values() if task.licence}
    licences |= filters.licences
    licences.setdefault("", licences.get(stem_of(path), ""))  # rows that name no task have that of the file's name
    filters = replace(filters, licences=licences)
    rules: dict[str, Any] = {"filters": filters, "by": by, "held_out": held_out}
    if shard is None:
        return _clean_rows(PartOfTable(table, range(len(table))), out, leaks_to, rules)
    if out is None or by == "positive":
        raise InputError("--shard deals rows by their query: it needs an output, and --repeats other than positive")
    rows = array("q", (row for row, q in enumerate(table.queries()) if text_mark(q) % shard.count == shard.index))

    def cleaned(file: Path) -> dict[str, Any]:
        leaks = file.with_name(f"{file.name}.leaks.jsonl") if held_out else None
        return _clean_rows(PartOfTable(table, rows), file, leaks, rules)

    against = held_out.digest() if held_out else None
    settings = {"command": "data clean", "rows": table.fingerprint, "filters": asdict(filters)}
    return write_part(out, shard, settings | {"repeats": by, "against": against}, cleaned)


def _clean_rows(given: PartOfTable, out: Path | None, leaks_to: Path | None, rules: dict[str, Any]) -> dict[str, Any]:
    """Does the same as `clean_file`, of these rows. A part alone may have none left."""
    table, report = given.table, Report()
    pair_tasks = {task.name for task in table.tasks.values() if task.family == "pair"}
    with ExitStack() as stack:
        lines = stack.enter_context(stack.enter_context(whole_file(leaks_to)).open("wb")) if leaks_to else None

        def note(leaked: Leaked) -> None:
            if lines is not None:
                place = {"file": str(table.path), **leaked, "row": given.rows[leaked["row"] - 1] + 1}
                lines.write(json.dumps(place, ensure_ascii=False).encode() + b"\n")

        def cleaned() -> Iterator[Example]:
            yield from clean(given, report, on_leak=note, pair_tasks=pair_tasks, **rules)
            if not report.kept and len(given) == len(table) and out is not None:
                removed = ", ".join(f"{reason} {count}" for reason, count in report.removed.items())
                raise DataError(f"{table.path}: no row is left ({removed})")

        if out is None:
            deque(cleaned(), maxlen=0)
        else:
            write_examples(out, cleaned(), table.tasks)
    tasks = {
        task or stem_of(table.path): int(np.isin(rows, given.rows).sum()) for task, rows in table.rows_by_task().items()
    }
    return {**table.report, "tasks": tasks, **report.to_json()}


# ---------------------------------------------------------------------------------------------------- rows


def _row_faults(examples: Iterable[Example], filters: Filters, by: By) -> tuple[bytearray, dict[int, set[int]]]:
    """Returns what is wrong with each row as a whole, as a number of _FAULTS, and the repeated positives of the rest.

    The latter are places in rows without misfits, by row.
    """
    faults, tasks, shapes = bytearray(), dict[tuple[str, bool], int](), array("q")
    cut: dict[int, set[int]] = {}

    def texts() -> Iterator[str]:
        for example in examples:
            fault = row_fault(example, filters)
            left = None if fault else _without(example, _misfits(example, filters))
            faults.append(_FAULTS.index(fault or ("" if left else "length")))
            if left is None:
                continue
            compared = [] if by == "positive" else [left.query]
            compared += [] if by == "query" else [passage.text for passage in left.paired]
            shapes.extend((tasks.setdefault((left.task, bool(left.positives)), len(tasks)), len(compared)))
            yield from compared

    if by == "none":
        deque(texts(), maxlen=0)
        return faults, cut
    found, seen, end = repeats(texts()), set[tuple[int, ...]](), 0
    rows = (row for row, fault in enumerate(faults) if not fault)
    for row, task, count in zip(rows, shapes[::2], shapes[1::2], strict=True):
        start, end = end, end + count
        # All of these keys must have been seen to make the row a repeat: what its texts, or text, are the copies of.
        sides = [(i,) for i in range(start, end)] if by != "both" else [(start, i) for i in range(start + 1, end)]
        keys = [(task, *(found[i].first if i in found else i for i in side)) for side in sides]
        repeated = {place: sides[place - 1] for place, key in enumerate(keys, start=1) if key in seen}
        if len(repeated) == len(keys):
            exact = any(all(i not in found or found[i].exact for i in side) for side in repeated.values())
            faults[row] = _FAULTS.index("repeated_exact" if exact else "repeated_near")
        elif repeated:
            cut[row] = {*repeated}
        seen.update(keys)
    return faults, cut


def _kept(
    examples: Iterable[Example],
    faults: bytearray,
    repeated: dict[int, set[int]],
    filters: Filters,
    report: Report,
    pair_tasks: Collection[str],
) -> Iterator[tuple[int, Example]]:
    """Yields (number from 1, example) of rows without a fault, less passages of a wrong length and repeats."""
    for number, (example, fault) in enumerate(zip(examples, faults, strict=True), start=1):
        if fault:
            report.removed[_FAULTS[fault]] += 1
            continue
        left = _judged(example, _misfits(example, filters), "length", report)
        if left is None or (left := _judged(left, repeated.get(number - 1, ()), "repeated", report)) is None:
            continue
        nearly = left.task not in pair_tasks and bool(left.positives)
        if left := _judged(left, _repeats_inside(left, nearly), "repeated", report):
            yield number, left


def _unleaked(
    rows: Iterator[tuple[int, Example]],
    held_out: EvalTexts,
    report: Report,
    on_leak: Callable[[Leaked], None] | None,
) -> Iterator[tuple[int, Example]]:
    leak_of: dict[str, Leak | None] = {}
    while batch := list(islice(rows, _BATCH)):
        if len(leak_of) > _REMEMBERED:
            leak_of.clear()
        new = list(dict.fromkeys(text for _, example in batch for text in _texts(example) if text not in leak_of))
        leak_of.update(zip(new, held_out.find(new), strict=True))
        for number, example in batch:
            leaks = {place: leak for place, text in enumerate(_texts(example)) if (leak := leak_of[text])}
            for place, leak in leaks.items():
                side = "query" if place == 0 else "positive" if place <= len(example.positives) else "negative"
                report.leaks.setdefault(leak.held.file, Counter())[f"{side} {leak.rule}"] += 1
                if on_leak is not None:
                    line = {"row": number, "id": example.id, "side": side, "rule": leak.rule, "score": leak.score}
                    line |= {"evaluation_file": leak.held.file, "evaluation_row": leak.held.row}
                    on_leak(line | {"text": _texts(example)[place][:SHOWN], "evaluation_text": leak.held.text})
            if left := _judged(example, leaks.keys(), "leaked", report):
                yield number, left


# ---------------------------------------------------------------------------------------------------- one row


def _texts(example: Example) -> list[str]:
    """Returns query, positives, negatives. The place of a text in this list names it below."""
    return [example.query, *(passage.text for passage in (*example.positives, *example.negatives))]


def _judged(example: Example, faulty: Collection[int], reason: str, report: Report) -> Example | None:
    """Does the same as `_without`, and counts it under `reason`."""
    left = _without(example, faulty)
    if left is None:
        report.removed[reason] += 1
    elif faulty:
        report.cut[reason] += len(faulty)
    return left


def _without(example: Example, faulty: Collection[int]) -> Example | None:
    """Returns `example` without the passages at the `faulty` places, and their scores.

    It is None if the query is among them, or the last of its `paired` passages.
    """
    if not faulty:
        return example
    changes: dict[str, Any] = {}
    start = 1
    for side in ("positive", "negative"):
        passages, scores = getattr(example, f"{side}s"), getattr(example, f"{side}_scores")
        stay = [i for i in range(len(passages)) if start + i not in faulty]
        changes[f"{side}s"] = tuple(passages[i] for i in stay)
        changes[f"{side}_scores"] = None if scores is None else tuple(scores[i] for i in stay)
        start += len(passages)
    kept = replace(example, **changes)
    return None if 0 in faulty or not (kept.positives if example.positives else kept.negatives) else kept


def _misfits(example: Example, filters: Filters) -> set[int]:
    """Returns the places of texts that are too short or too long."""
    return {place for place, text in enumerate(_texts(example)) if not fits(text, filters)}


def _repeats_inside(example: Example, nearly: bool) -> set[int]:
    """Returns the places of positives that repeat an earlier one, and of negatives that repeat any text before.

    Without `nearly`, query and positives are repeated by equal negatives alone.
    """
    faulty: set[int] = set()
    seen: dict[str, set[str]] = {}
    query, *passages = map(both_keys, _texts(example))
    for place, (exact, near) in enumerate(passages, start=1):
        if place == len(example.positives) + 1:
            seen[query[0]] = shingles(query[1])
            seen = seen if nearly else {key: set() for key in seen}
        own = shingles(near)
        if exact in seen or any(are_near(own, other) for other in seen.values()):
            faulty.add(place)
        else:
            seen[exact] = own
    return faulty
