"""The tasks of a file of examples, in a file beside it: for rows whose tasks are in no recipe and no catalogue."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from embedwright.config import validate
from embedwright.data.example import DataError, Task
from embedwright.data.readers import aside, read_rows


def tasks_file(examples: Path) -> Path:
    """Where the tasks of the examples in this file are: one `Task` a line."""
    return examples.with_name(f"{examples.name}.tasks.jsonl")


def read_tasks(path: Path) -> dict[str, Task]:
    """Name -> Task, from one JSON object a line. FileNotFoundError, DataError or ConfigError name file and line."""
    tasks: dict[str, Task] = {}
    for number, _, row in read_rows(path):
        if isinstance(row, DataError):
            raise DataError(f"{path}:{number}: {row}")
        task = validate(Task, row, f"{path}:{number}")
        if tasks.setdefault(task.name, task) != task:
            raise DataError(f"{path}:{number}: another task {task.name!r} is above")
    return tasks


def write_tasks(path: Path, tasks: Iterable[Task]) -> None:
    """One JSON object a line, without what a Task has by default; the file is whole or not there."""
    part = aside(path)
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(t.model_dump(exclude_defaults=True), ensure_ascii=False) + "\n" for t in tasks)
    part.replace(path)
