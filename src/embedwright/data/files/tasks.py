"""Keeps the tasks of a file of examples in a file beside it.

Every command that writes examples writes the tasks of its rows there, and every reader takes them from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from embedwright.config import validate
from embedwright.data.files.rows import read_rows
from embedwright.data.schema import DataError, Task
from embedwright.files import write_text

Tasks = Mapping[str, Task]  # by name


def tasks_file(examples: Path) -> Path:
    """Returns the path of the file with the tasks of these examples: one `Task` a line."""
    examples = examples if examples.name else examples.absolute()
    return examples.with_name(f"{examples.name}.tasks.jsonl")


def tasks_beside(examples: Path) -> dict[str, Task]:
    """Reads the tasks in the file beside these examples, and those beside the files of a folder, if there are any."""
    files = [tasks_file(examples), *sorted(examples.glob("*.tasks.jsonl"))]
    return merge_tasks((file, read_tasks(file)) for file in files if file.is_file())


def read_tasks(path: Path) -> dict[str, Task]:
    """Reads tasks by name, one JSON object a line. FileNotFoundError, DataError or ConfigError name file and line."""
    tasks: dict[str, Task] = {}
    for number, _, row in read_rows(path):
        if isinstance(row, DataError):
            raise DataError(f"{path}:{number}: {row}")
        task = validate(Task, row, f"{path}:{number}")
        if tasks.setdefault(task.name, task) != task:
            raise DataError(f"{path}:{number}: another task {task.name!r} is above")
    return tasks


def merge_tasks(described: Iterable[tuple[Path, Tasks]]) -> dict[str, Task]:
    """Merges the tasks of several files. Raises DataError, naming both files, if two describe one name differently."""
    merged: dict[str, Task] = {}
    first: dict[str, Path] = {}
    for path, tasks in described:
        for name, task in tasks.items():
            if merged.setdefault(name, task) != task:
                change = _change(merged[name], task)
                raise DataError(f"task {name!r} is another in {path} than in {first[name]} ({change}): rename one")
            first.setdefault(name, path)
    return merged


def over(task: Task, given: Task) -> Task:
    """Returns the task with the fields that were set in `given` in the place of its own."""
    return task.model_copy(update={name: getattr(given, name) for name in given.model_fields_set})


def by_form(task: Task, form: str | None) -> Task:
    """Returns the task of labelled rows of this form: what it leaves out is as `data labels` says of the form."""
    return over(Task(name=task.name, family="classification", symmetric=form == "example"), task) if form else task


def digest_of(tasks: Tasks) -> str:
    """Returns a SHA-256 (hex) of all that these tasks say, whatever their order."""
    said = {name: task.model_dump() for name, task in tasks.items()}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def write_tasks(path: Path, tasks: Iterable[Task]) -> None:
    """Writes one JSON object a line, without default values. Without tasks it writes no file and removes an old one."""
    lines = [json.dumps(task.model_dump(exclude_defaults=True), ensure_ascii=False) + "\n" for task in tasks]
    if lines:
        write_text(path, "".join(lines))
    else:
        path.unlink(missing_ok=True)


def _change(a: Task, b: Task) -> str:
    before, after = a.model_dump(), b.model_dump()
    key = next(key for key in before if before[key] != after[key])
    return f"{key} {before[key]!r} and {after[key]!r}"
