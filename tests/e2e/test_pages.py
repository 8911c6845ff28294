"""The tutorial and the agent skill: every command and snippet on them runs, and prints what the page shows.

Tiny models stand in for those that the pages name: folders of their names, which are found before the packaged weights.
So numbers differ; words, keys and shapes must not. In what a page shows, `...` stands for any lines.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedwright import Embedder
from embedwright.cli.main import main

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(bash|python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d[\d.,:]*(?:e[-+]\d+)?")
HIT = re.compile(r"  \d\.\d{4}  \w+  \S")


@pytest.fixture
def stand_ins(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_decoder: Callable[..., Path],
    tiny_embedder: Callable[..., Embedder],
) -> None:
    """An empty folder to work in, but for a decoder `smollm2-135m` and an embedder `minilm`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").symlink_to(tiny_decoder("llama", num_hidden_layers=4))
    tiny_embedder("mean").save("minilm")


@pytest.fixture
def server() -> Iterator[Callable[[list[str]], str]]:
    """Starts a command that serves, at a free port, and returns its address. Stopped in the end, it exits with 0."""
    started: list[subprocess.Popen[str]] = []

    def start(words: list[str]) -> str:
        command = [sys.executable, "-m", *words, "--port", "0"]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        said = started[-1].stdout
        assert said is not None
        found = next((at for line in said if (at := re.search(r"http://[\d.:]+", line))), None)
        assert found, words
        return found.group()

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize("page", ["docs/tutorial.md", "skills/embedwright/SKILL.md"])
def test_the_page_does_what_it_says(
    page: str, stand_ins: None, monkeypatch: pytest.MonkeyPatch, server: Callable[[list[str]], str]
) -> None:
    address = ""
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    printed = ""
    for kind, text in blocks:
        if kind == "text":
            matches(text.splitlines(), printed.splitlines())
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):  # as a terminal shows them
            if kind == "python":
                exec(compile(text.replace("http://127.0.0.1:8000", address), page, "exec"), names)
            else:
                for command in commands(text):
                    if command[1] == "serve":
                        address = server(command)
                    else:
                        run(command, monkeypatch)
        printed = said.getvalue()


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command of a block; a backslash ends a line that goes on."""
    for line in block.replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        assert not words or words[0] == "embedwright", f"not a command of ours: {line}"
        if words:
            yield words


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", words)
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, words


def matches(shown: list[str], printed: list[str]) -> None:
    """Each line of the page is the next line that was printed, up to numbers; after `...` it may come later."""
    place, anywhere = 0, False
    for line in shown:
        if line.strip() == "...":
            anywhere = True
            continue
        found = next((i for i in range(place, len(printed)) if alike(line, printed[i])), None)
        assert found is not None and (anywhere or found == place), f"shown: {line}\nprinted: {printed[place:]}"
        place, anywhere = found + 1, False
    assert anywhere or place == len(printed), f"printed and not shown: {printed[place:]}"


def alike(shown: str, printed: str) -> bool:
    if HIT.match(shown):  # which documents are found depends on the model
        return bool(HIT.match(printed))
    return " ".join(NUMBER.sub("N", shown).split()) == " ".join(NUMBER.sub("N", printed).split())
