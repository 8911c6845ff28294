"""Queries and texts from standard input, results on standard output, and completion in a real shell."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from embedwright.cli.main import app
from embedwright.cli.shell import file_of, queries_of
from embedwright.errors import InputError
from embedwright.index.documents import read_documents
from embedwright.model.embedder import Embedder
from embedwright.vectors.shards import read_shard, vectors_of

TEXTS = ["the moon pulls the sea", "{a text in braces", "naïve 漢字"]


class Shell:
    """Calls the command with this standard input."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, *words: object, stdin: str = "") -> str:
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()):
            app([str(word) for word in words], standalone_mode=False)
        return said.getvalue()


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_embedder: Callable[..., Embedder]) -> Path:
    folder = tmp_path_factory.mktemp("shell") / "model"
    tiny_embedder("mean").save(folder)
    return folder


def test_texts_and_queries_go_through_pipes(shell: Shell, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    lines = "\n".join(TEXTS) + "\n"
    assert shell("index", model, "-", out, stdin=lines).startswith(f"{out}: 3 documents")
    asked = shell("search", model, out, "--json", "--task", "Find it", "--k", 2, stdin="the moon\n\n naïve 漢字 \n")
    found = [json.loads(line) for line in asked.splitlines()]
    assert [one["query"] for one in found] == ["the moon", "naïve 漢字"] and "漢字" in asked
    encoder = Embedder.load(model)
    scores_QC = encoder.encode([one["query"] for one in found], "Find it") @ encoder.encode(TEXTS).T
    for one, scores in zip(found, scores_QC, strict=True):
        assert one["task"] == "Find it" and len(one["hits"]) == 2
        assert [hit["text"] for hit in one["hits"]] == [TEXTS[i] for i in np.argsort(-scores)[:2]]
        assert [hit["score"] for hit in one["hits"]] == pytest.approx(sorted(scores)[:0:-1], abs=1e-6)
    plain = shell("search", model, out, "first", "-", "last", "--task", "", stdin="between\n").splitlines()
    assert [line for line in plain if not line.startswith("  ")] == ["first", "between", "last"]


def test_encode_reads_rows_from_a_pipe_and_goes_on(shell: Shell, model: Path, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS))
    for _ in range(2):  # the same input is the same work, which is done
        assert shell("encode", model, "-", tmp_path / "out", stdin=rows) == f"{tmp_path / 'out'}\n"
    shard = read_shard(tmp_path / "out" / "shard-00000.arrow")
    assert shard["id"].to_pylist() == ["d0", "d1", "d2"]
    np.testing.assert_allclose(vectors_of(shard), Embedder.load(model).encode(TEXTS), atol=1e-6)
    with pytest.raises(InputError, match="source"):
        shell("encode", model, "-", tmp_path / "out", stdin="other\n")


def test_what_begins_as_an_object_is_jsonl(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, name in (
        ('\n{"id":"a","text":"moon"}\n', "stdin.jsonl"),
        ('\ufeff{"id":"a","text":"moon"}\n', "stdin.jsonl"),
        ('{"id":"a","te\n{"id":"b","text":"moon"}\n', "stdin.jsonl"),
        ("\ufeffmoon\n", "stdin.txt"),
        ("{a text in braces}\nmoon\n", "stdin.txt"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        with file_of(Path("-")) as file:
            assert file.name == name and file.read_text().lstrip() == given.lstrip("\ufeff\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffmoon\n"))
    assert queries_of(None) == ["moon"]


ROW = '{"_id": "a", "text": "moon"}\n'


@pytest.mark.parametrize("start", ["\ufeff", "\ufeff\n", " \r\n\r\n", "  "])
def test_a_pipe_is_read_as_the_same_bytes_in_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, start: str
) -> None:
    (tmp_path / "file.jsonl").write_text(start + ROW, encoding="utf-8", newline="")
    monkeypatch.setattr(sys, "stdin", io.StringIO(start + ROW, newline=""))
    with file_of(Path("-")) as piped:
        found, wanted = (list(read_documents(path, {})) for path in (piped, tmp_path / "file.jsonl"))
    assert found == wanted == [("a", "", "moon", {})]


@pytest.mark.parametrize(("number", "rows"), [(1, '{"text": "mo\n' + ROW), (2, ROW + "sun\n")])
def test_a_broken_line_of_a_pipe_is_named(shell: Shell, model: Path, tmp_path: Path, number: int, rows: str) -> None:
    with pytest.raises(InputError, match=f"^standard input:{number}: "):
        shell("index", model, "-", tmp_path / "index", stdin=rows)


@pytest.mark.parametrize("bad", ["", "\n \n"])
def test_no_query_is_an_error(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(bad))
    with pytest.raises(InputError, match="no query"):
        queries_of(None)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_is_not_utf_8_is_an_error(monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors))
    with pytest.raises(InputError, match="not UTF-8"), file_of(Path("-")):
        pass


def test_a_pipe_that_closes_early_ends_the_command_quietly() -> None:
    line = f"{sys.executable} -m embedwright data list | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", f"for i in 1; do :; done; {line}"], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr and len(done.stdout.splitlines()) == 1


def test_a_shell_completes_commands_and_options(tmp_path: Path) -> None:
    start = "import sys; sys.argv[0] = 'embedwright'; from embedwright.cli.main import main; main()"
    program = tmp_path / "embedwright"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}" "$@"\n')
    program.chmod(0o755)
    ask = """
eval "$(_EMBEDWRIGHT_COMPLETE=source_bash embedwright)"
for words in "embedwright sea" "embedwright search m i --ta"; do
  COMP_WORDS=($words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
  _embedwright_completion embedwright; echo "${COMPREPLY[@]}"
done"""
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", ask], capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False
    )
    assert done.stdout.split() == ["search", "--task"], done.stderr
