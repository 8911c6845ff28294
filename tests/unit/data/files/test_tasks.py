from __future__ import annotations

import ast
from pathlib import Path

import pytest

import embedwright
from embedwright.config import ConfigError
from embedwright.data.files.tasks import read_tasks, tasks_beside, tasks_file, write_tasks
from embedwright.data.schema import DataError, Task


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tasks = [Task(name="a", family="sts", instruction="é", symmetric=True), Task(name="b")]
    path = tasks_file(tmp_path / "rows.jsonl.gz")
    assert path.name == "rows.jsonl.gz.tasks.jsonl"
    write_tasks(path, tasks)
    assert list(read_tasks(path).values()) == tasks and len(list(tmp_path.iterdir())) == 1


def test_tasks_are_read_with_care(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"name": "a", "instruction": "x"}\n{"name": "a", "instruction": "y"}\n')
    with pytest.raises(DataError, match=r"tasks\.jsonl:2: another task 'a' is above"):
        read_tasks(path)
    path.write_text('{"instruction": "x"}\n')
    with pytest.raises(ConfigError, match=r"tasks\.jsonl:1: name: Field required"):
        read_tasks(path)
    path.write_text('{"name": "a"}\n[1]\n')
    with pytest.raises(DataError, match=r"tasks\.jsonl:2: "):
        read_tasks(path)


def test_no_tasks_are_no_file(tmp_path: Path) -> None:
    path = tasks_file(tmp_path / "rows.jsonl")
    write_tasks(path, [Task(name="a")])
    write_tasks(path, [])
    assert not path.exists() and tasks_beside(tmp_path / "rows.jsonl") == {}


def test_every_writer_of_examples_says_what_they_mean() -> None:
    """`write_examples` without tasks loses what the rows are for; a test or an example of use may do without."""
    source = Path(embedwright.__file__).parent
    calls = [
        (file.name, ast.unparse(node))
        for file in source.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "write_examples"
    ]
    assert len(calls) >= 7
    assert [call for call in calls if len(ast.parse(call[1], mode="eval").body.args) != 3] == []


def test_a_byte_order_mark_is_no_part_of_tasks(tmp_path: Path) -> None:
    path = tmp_path / "x.tasks.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"name": "a"}\n')
    assert read_tasks(path) == {"a": Task(name="a")}
