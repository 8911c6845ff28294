"""Two versions of a file are the same code exactly when docstrings, comments and layout alone differ."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("same_code")


PYTHON = '"""Module."""\n\n\ndef f(x):\n    """Does it."""\n    return x + 1  # why\n'


@pytest.mark.parametrize(
    "other", ["def f(x):\n    return x + 1\n", PYTHON.replace("Does it", "Adds"), PYTHON.replace("why", "w")]
)
def test_docstrings_comments_and_layout_do_not_count(script: Any, other: str) -> None:
    assert script.python_code(other) == script.python_code(PYTHON)


@pytest.mark.parametrize("old, new", [("+ 1", "+ 2"), ("x", "y"), ("return x + 1", '"text"\n    return x + 1')])
def test_any_other_change_of_python_counts(script: Any, old: str, new: str) -> None:
    assert script.python_code(PYTHON.replace(old, new)) != script.python_code(PYTHON)


def test_comments_of_c_do_not_count_and_strings_do(script: Any) -> None:
    code = 'int f(void) { /* one */ return puts("// kept"); } // two\n'
    assert script.c_code(code) == script.c_code('int f(void) {\n  return puts("// kept");\n}\n')
    assert script.c_code(code) != script.c_code(code.replace("// kept", "//"))
    assert script.c_code(code) != script.c_code(code.replace("void", "int"))


def test_two_commits_are_compared_file_by_file(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / "src").mkdir()
    for a, b, data in ((PYTHON, "x = 1\n", "a: 1\n"), (PYTHON.replace("why", ""), "x = 2\n", "a: 2\n")):
        for name, text in (("a.py", a), ("b.py", b), ("data.yaml", data)):
            (tmp_path / "src" / name).write_text(text)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", "one"], check=True)
    assert script.main("HEAD~1", "HEAD") == 1
    assert capsys.readouterr().out.split() == ["src/b.py", "src/data.yaml"]
    assert script.main("HEAD", "HEAD") == 0
