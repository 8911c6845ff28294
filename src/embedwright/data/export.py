"""Writes examples in the columns that other trainers read: `anchor`, `positive`, `negative_1`, ..."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedwright.data.files.tasks import tasks_file, write_tasks
from embedwright.data.schema import DataError, Example
from embedwright.data.tables.table import open_examples
from embedwright.errors import InputError
from embedwright.files import whole_file

Format = Literal["sentence-transformers"]

_BATCH = 4096  # rows in memory


def to_columns(examples: Iterable[Example], negatives: int, report: Counter[str]) -> Iterator[dict[str, str]]:
    """Yields rows `anchor`, `positive`, `negative_1` .. `negative_<negatives>`, with each example's first negatives.

    sentence-transformers' losses take one positive and the same number of negatives in every row. So an example gives a
    row for each of its positives, and one with fewer negatives gives none. The instruction is not in the texts: it is a
    prompt of their trainer. `report` counts `examples`, `rows`, `fewer_negatives` and `below_threshold` (examples left
    out, the latter for a score too low for a positive), `more_positives` (rows beyond the first of an example),
    `negatives_cut` (passages).
    """
    for example in examples:
        report["examples"] += 1
        if not example.positives:
            report["below_threshold"] += 1
            continue
        if len(example.negatives) < negatives:
            report["fewer_negatives"] += 1
            continue
        report["negatives_cut"] += len(example.negatives) - negatives
        report["more_positives"] += len(example.positives) - 1
        wrong = {f"negative_{i}": passage.text for i, passage in enumerate(example.negatives[:negatives], start=1)}
        for positive in example.positives:
            report["rows"] += 1
            yield {"anchor": example.query, "positive": positive.text, **wrong}


def export(
    path: Path,
    out: Path,
    *,
    format: Format = "sentence-transformers",
    negatives: int | None = None,
    task: str | None = None,
) -> dict[str, int]:
    """Writes the training data at `path` to the Parquet file `out`, whole or not at all. Returns `to_columns`' counts.

    `negatives`: how many each row has; default: as many as every example has. `task`: the only one to write, since a
    prompt of sentence-transformers' trainer goes with a whole data set; default: all. Raises what `open_examples`
    raises, ValueError for another format or suffix, DataError if no row comes out.
    """
    if format != "sentence-transformers":
        raise InputError(f"no format {format!r}; known: sentence-transformers")
    if out.suffix != ".parquet":
        raise InputError(f"{out}: the name of a Parquet file ends in .parquet")
    if negatives is not None and negatives < 0:
        raise InputError(f"negatives is {negatives}, less than 0")
    table = open_examples(path)
    tasks = table.rows_by_task()
    if task is not None and task not in tasks:
        raise DataError(f"{path}: no task {task!r}; it has {', '.join(tasks)}")
    chosen = np.arange(len(table)) if task is None else tasks[task]
    had = table.negatives_per_row()[chosen[table.positives_per_row()[chosen] > 0]]
    if not len(had):
        raise DataError(f"{path}: no scored pair reaches the threshold, so that none has a positive")
    negatives = int(had.min()) if negatives is None else negatives
    report = Counter(dict.fromkeys(("examples", "rows", "fewer_negatives", "more_positives", "negatives_cut"), 0))
    rows = to_columns((example for example in table if task in (None, example.task)), negatives, report)
    columns = ["anchor", "positive", *(f"negative_{i}" for i in range(1, negatives + 1))]
    schema = pa.schema({column: pa.large_string() for column in columns})
    with whole_file(out) as part:
        with pq.ParquetWriter(part, schema) as writer:
            while batch := list(islice(rows, _BATCH)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
        if not report["rows"]:
            raise DataError(f"{path}: no example has {negatives} negatives; the most is {had.max()}")
        write_tasks(
            tasks_file(out), (table.tasks[name] for name in tasks if name in table.tasks and task in (None, name))
        )
    return dict(report)
