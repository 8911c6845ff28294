"""Training examples without what does harm: unwanted rows, repeats, leaks from evaluation data.

The rules, in this order: licence, language, length, repeats of an earlier row, repeats within a row, leaks. A query
that breaks one takes its row along; a passage that does is cut out of its row, and the row goes where no positive is
left.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from embedwright.data.clean.filters import Filters, length_fault, row_fault
from embedwright.data.clean.leaks import SHOWN, EvalTexts, Leak
from embedwright.data.clean.repeats import repeats
from embedwright.data.files.folders import stem_of
from embedwright.data.files.table import open_as_named, write_examples
from embedwright.data.keys import NEAR, both_keys, jaccard, shingles
from embedwright.data.schema import DataError, Example
from embedwright.files import whole_file

By = Literal["query", "positive", "both", "none"]
Leaked = dict[str, Any]  # a line of the leakage report

_BATCH = 256  # rows
_REMEMBERED = 1 << 15  # texts: passages of labels and mined negatives come again and again
# What can be wrong with a row as a whole; its number is kept between the two readings, one byte a row.
_FAULTS = ("", "licence", "licence_unknown", "language", "length", "repeated_exact", "repeated_near")


@dataclass(slots=True)
class Report:
    """What `clean` did: rows kept, rows removed and passages cut by reason, leaking texts by evaluation file."""

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
) -> Iterator[Example]:
    """Those of `examples` that break no rule, in order, without their passages that break one; counts go to `report`.

    `examples` are read twice, so they are a table or a list. A row repeats an earlier one of its task if their queries
    repeat the same text and so does one positive of each (`by="both"`); `query` and `positive` look at that side alone,
    `none` leaves the rule out. What texts repeat is said in `repeats`. Within a row, a positive goes that repeats an
    earlier one, and a negative that repeats the query, a positive or an earlier negative.

    `on_leak` gets every text that leaks: `row` (from 1) and `id` of its example, side, rule, score, the evaluation file
    and its row, both texts cut to 200 characters. Memory: what `repeats` takes for the queries and positives, 200 bytes
    a row, and `held_out`.
    """
    filters = filters or Filters()
    faults = _row_faults(examples, filters, by)
    rows = _unrepetitive(_faultless(examples, faults, filters, report), report)
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
) -> dict[str, Any]:
    """`clean` of the training data at `path` (any kind), written to `out`; None only counts. Returns all counts: those
    of the table, its rows by task, and those of `clean`.

    `leaks_to` gets the leakage report (JSONL). Both files are written whole or not at all. Raises what `open_examples`
    raises, and DataError where no row is left to write.
    """
    table, report = open_as_named(path), Report()
    filters = filters or Filters()
    licences = {task.name: task.licence for task in table.tasks.values() if task.licence}
    licences |= filters.licences
    licences.setdefault("", licences.get(stem_of(path), ""))  # of rows that name no task: that of the file's name
    filters = replace(filters, licences=licences)
    with _leak_lines(path, leaks_to) as on_leak:
        cleaned = clean(table, report, filters=filters, by=by, held_out=held_out, on_leak=on_leak)
        if out is None:
            deque(cleaned, maxlen=0)
        else:
            write_examples(out, _require_any(cleaned, path, report), table.tasks)
    tasks = {task or stem_of(path): len(rows) for task, rows in table.rows_by_task().items()}
    return {**table.report, "tasks": tasks, **report.to_json()}


# ---------------------------------------------------------------------------------------------------- rows


def _row_faults(examples: Iterable[Example], filters: Filters, by: By) -> bytearray:
    """(rows,): what is wrong with each row as a whole, as a number of _FAULTS."""
    faults, tasks, shapes = bytearray(), dict[str, int](), array("q")

    def texts() -> Iterator[str]:
        for example in examples:
            fault = row_fault(example, filters)
            left = None if fault else _judged(example, _too_short_or_long(example, filters))
            faults.append(_FAULTS.index(fault or ("" if left else "length")))
            if left is None:
                continue
            compared = [] if by == "positive" else [left.query]
            compared += [] if by == "query" else [passage.text for passage in left.positives]
            shapes.extend((tasks.setdefault(left.task, len(tasks)), len(compared)))
            yield from compared

    if by == "none":
        deque(texts(), maxlen=0)
        return faults
    found, seen, end = repeats(texts()), set[tuple[int, ...]](), 0
    rows = (row for row, fault in enumerate(faults) if not fault)
    for row, task, count in zip(rows, shapes[::2], shapes[1::2], strict=True):
        start, end = end, end + count
        # One of these keys must have been seen to make the row a repeat: what its texts, or text, are the copies of.
        sides = [(i,) for i in range(start, end)] if by != "both" else [(start, i) for i in range(start + 1, end)]
        keys = {(task, *(found[i].first if i in found else i for i in side)): side for side in sides}
        if repeated := keys.keys() & seen:
            exact = any(all(i not in found or found[i].exact for i in keys[key]) for key in repeated)
            faults[row] = _FAULTS.index("repeated_exact" if exact else "repeated_near")
        else:
            seen.update(keys)
    return faults


def _faultless(
    examples: Iterable[Example], faults: bytearray, filters: Filters, report: Report
) -> Iterator[tuple[int, Example]]:
    """(number from 1, example) of the rows without a fault."""
    for number, (example, fault) in enumerate(zip(examples, faults, strict=True), start=1):
        if fault:
            report.removed[_FAULTS[fault]] += 1
        elif left := _judged(example, _too_short_or_long(example, filters), "length", report):
            yield number, left


def _unrepetitive(rows: Iterable[tuple[int, Example]], report: Report) -> Iterator[tuple[int, Example]]:
    for number, example in rows:
        if left := _judged(example, _repeats_inside(example), "repeated", report):
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
                side = _side(example, place)
                report.leaks.setdefault(leak.held.file, Counter())[f"{side} {leak.rule}"] += 1
                if on_leak is not None:
                    on_leak({"row": number, "id": example.id, "side": side, **_line(leak, _texts(example)[place])})
            if left := _judged(example, leaks.keys(), "leaked", report):
                yield number, left


def _line(leak: Leak, text: str) -> Leaked:
    held = {"evaluation_file": leak.held.file, "evaluation_row": leak.held.row}
    return {
        "rule": leak.rule,
        "score": leak.score,
        **held,
        "text": text[:SHOWN],
        "evaluation_text": leak.held.text,
    }


# ---------------------------------------------------------------------------------------------------- one row


def _texts(example: Example) -> list[str]:
    """Query, positives, negatives. The place of a text in this list names it below."""
    return [example.query, *(passage.text for passage in (*example.positives, *example.negatives))]


def _side(example: Example, place: int) -> str:
    return "query" if place == 0 else "positive" if place <= len(example.positives) else "negative"


def _judged(
    example: Example, faulty: Collection[int], reason: str = "", report: Report | None = None
) -> Example | None:
    """`example` without the passages at the `faulty` places; None if the query is, or all positives are, among them."""
    if not faulty:
        return example
    left = cut(example, faulty)
    if report is not None:
        if left is None:
            report.removed[reason] += 1
        else:
            report.cut[reason] += len(faulty)
    return left


def cut(example: Example, faulty: Collection[int]) -> Example | None:
    """`example` without the passages, and their scores, at the `faulty` places: 0 is the query, then positives and
    negatives go on. None where the query is faulty or no positive is left."""
    changes: dict[str, Any] = {}
    start = 1
    for side in ("positive", "negative"):
        passages, scores = getattr(example, f"{side}s"), getattr(example, f"{side}_scores")
        stay = [i for i in range(len(passages)) if start + i not in faulty]
        changes[f"{side}s"] = tuple(passages[i] for i in stay)
        changes[f"{side}_scores"] = None if scores is None else tuple(scores[i] for i in stay)
        start += len(passages)
    return None if 0 in faulty or not changes["positives"] else replace(example, **changes)


def _too_short_or_long(example: Example, filters: Filters) -> set[int]:
    return {place for place, text in enumerate(_texts(example)) if length_fault(text, filters)}


def _repeats_inside(example: Example) -> set[int]:
    """Places of positives that repeat an earlier one, of negatives that repeat the query, a positive or an earlier
    negative."""
    faulty: set[int] = set()
    seen: dict[str, set[str]] = {}
    query, *passages = map(both_keys, _texts(example))
    for place, (exact, near) in enumerate(passages, start=1):
        if place == len(example.positives) + 1:
            seen[query[0]] = shingles(query[1])
        own = shingles(near)
        if exact in seen or any(jaccard(own, other) >= NEAR for other in seen.values()):
            faulty.add(place)
        else:
            seen[exact] = own
    return faulty


# ---------------------------------------------------------------------------------------------------- files


def _require_any(cleaned: Iterator[Example], path: Path, report: Report) -> Iterator[Example]:
    yield from cleaned
    if not report.kept:
        raise DataError(f"{path}: no row is left ({', '.join(f'{k} {n}' for k, n in report.removed.items())})")


@contextmanager
def _leak_lines(source: Path, file: Path | None) -> Iterator[Callable[[Leaked], None] | None]:
    if file is None:
        yield None
        return
    with whole_file(file) as part, part.open("w", encoding="utf-8") as stream:

        def note(leaked: Leaked) -> None:
            stream.write(json.dumps({"file": str(source), **leaked}, ensure_ascii=False) + "\n")

        yield note
