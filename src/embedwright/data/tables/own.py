"""Parquet files that `write_examples` wrote, read in place: their rows are examples, and need no conversion."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedwright.data.files.pieces import identity
from embedwright.data.schema import DataError
from embedwright.data.tables.arrow import MARK, SCHEMA


class OwnParquet:
    """The row groups of such files as batches of Arrow, one after the other.

    `starts` has the number of each batch's first row, and that of all rows at the end. Rows in order are read half as
    fast as from a mapped file (35,000 a second); a single row takes the milliseconds of its group.
    """

    def __init__(self, files: Sequence[Path], task: str) -> None:
        """`task` is that of rows that name none."""
        self.task = task
        self._files = [(file, identity(file), pq.read_metadata(file)) for file in files]
        groups = [(at, group) for at, (*_, meta) in enumerate(self._files) for group in range(meta.num_row_groups)]
        self._groups = groups
        self.starts = [0, *accumulate(self._files[at][2].row_group(group).num_rows for at, group in groups)]
        self.num_record_batches = len(groups)

    def get_batch(self, number: int, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Returns a batch, or some columns of it. Raises DataError if the file was replaced meanwhile."""
        at, group = self._groups[number]
        file, known, meta = self._files[at]
        with pq.ParquetFile(file, metadata=meta) as opened:
            if identity(file) != known:
                raise DataError(f"{file} was replaced while it was read: run the command again")
            batch = opened.read_row_group(group, columns=columns, use_threads=False).combine_chunks().to_batches()[0]
        if self.task and "task" in batch.schema.names:
            place, tasks = batch.schema.get_field_index("task"), batch.column("task")
            named = pc.if_else(pc.equal(tasks, ""), pa.scalar(self.task, pa.large_string()), tasks)
            batch = batch.set_column(place, batch.schema.field(place), named)
        return batch


def are_own(files: Sequence[Path]) -> bool:
    """Returns whether all files were written by `write_examples`, as Parquet, and hold a row."""
    try:
        return all(_is_own(file) for file in files) and any(pq.read_metadata(file).num_rows for file in files)
    except (pa.ArrowInvalid, OSError):
        return False


def _is_own(file: Path) -> bool:
    if file.suffix != ".parquet":
        return False
    schema = pq.read_schema(file)
    return all((schema.metadata or {}).get(key) == value for key, value in MARK.items()) and schema.equals(SCHEMA)
