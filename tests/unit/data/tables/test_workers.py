"""Conversion by several processes: the bytes, the messages and the counts are those of one process."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from embedwright.data.files import pieces as pieces_module
from embedwright.data.files.beir import read_corpus
from embedwright.data.files.pieces import Piece
from embedwright.data.schema import DataError
from embedwright.data.tables import convert, documents, workers
from embedwright.data.tables.documents import open_corpus
from embedwright.data.tables.table import ExampleTable, open_examples
from embedwright.errors import InputError

ROWS = [
    {
        "query": f"q{i} 漢字 {'x' * (i % 90)}",
        "positives": [f"p{i}", {"id": i, "text": f"p{i}b"}],
        "negatives": [f"n{k}" for k in range(i % 4)] + [f"p{i}"] * (i % 7 == 0),
        **({"positive_scores": [0.5, 1 / 3]} if i % 3 == 0 else {}),
        **({"language": "en"} if i > 600 else {}),
    }
    for i in range(900)
]
BAD = {4: '{"query": ', 301: "[]", 302: '{"query": "q", "positives": "p"}', 700: '{"query": "", "positives": ["p"]}'}
BAD |= {800 + i: f'{{"i": {i}}}' for i in range(5)}


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Turns on what large data has: two processes, pieces of a few rows."""
    monkeypatch.setattr(pieces_module, "_LARGE", 0)
    monkeypatch.setattr(pieces_module, "_BYTES", 20_000)
    monkeypatch.setattr(pieces_module, "cores", lambda: 2)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    return monkeypatch


def files_of(cache: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((cache / "data").iterdir())}


def test_examples_are_byte_for_byte_those_of_one_process(
    tmp_path: Path, several: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [BAD.get(i, json.dumps(row)) + "\n" for i, row in enumerate(ROWS)]
    (folder / "a.jsonl").write_text("".join(lines[:500]))
    (folder / "b.jsonl").write_text("".join(lines[500:]))
    started: list[str] = []
    popen = subprocess.Popen
    several.setattr(subprocess, "Popen", lambda *words, **how: started.append("one") or popen(*words, **how))
    found: list[tuple[ExampleTable, list[str]]] = []
    for cache, large in (("many", 0), ("one", 1 << 60)):
        several.setattr(pieces_module, "_LARGE", large)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            table = open_examples(folder, cache=tmp_path / cache)
        found.append((table, [message.replace(cache, "") for message in caplog.messages]))
    assert started == ["one", "one"]  # and none by the second conversion
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one") and len(files_of(tmp_path / "one")) == 2
    (many, said), (one, said_by_one) = found
    assert list(many) == list(one) and many.report == one.report
    assert said == said_by_one and any(f"{folder / 'a.jsonl'}:302: " in message for message in said)
    assert many.quarantined == len(BAD) and len(many.bad_lines) == 5
    assert many.quarantine.read_text().splitlines() == [BAD[i] for i in sorted(BAD)]


def test_counts_are_those_of_all_pieces(tmp_path: Path, several: pytest.MonkeyPatch) -> None:
    rows = [{"text1": f"a{i}", "text2": f"b{i}" if i % 9 else f"a{i}", "score": i % 6} for i in range(900)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    several.setattr(workers, "cores", lambda: 1)
    table = open_examples(path, cache=tmp_path / "cache")
    assert table.report == {"rows": 900, "examples": 1800, "below_threshold": 600, "quarantined": 0}
    assert [row.id for row in table] == [f"x:{i}:{end}" for i in range(1, 901) for end in ("ab", "ba")]


def write_corpus(path: Path, *more: dict[str, object]) -> Path:
    rows = [{"_id": i, "title": f"T{i}" * (i % 2), "text": f"text {i}"} for i in range(900)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    return path


def test_a_corpus_is_byte_for_byte_that_of_one_process(tmp_path: Path, several: pytest.MonkeyPatch) -> None:
    several.setattr(documents, "_ROWS", 64)
    path = write_corpus(tmp_path / "c.jsonl")
    for cache, large in (("many", 0), ("one", 1 << 60)):
        several.setattr(pieces_module, "_LARGE", large)
        several.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / cache))
        assert list(open_corpus(path).items()) == list(read_corpus(path).items())
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([{"_id": 17, "text": "again"}, {"_id": 3, "text": "again"}], r"c\.jsonl:901: id '17' twice"),
        ([{"_id": "x"}, {"text": "no id"}], r"c\.jsonl:901: no text"),
    ],
)
def test_an_error_names_file_and_line_and_leaves_nothing(
    more: list[dict[str, object]], said: str, tmp_path: Path, several: pytest.MonkeyPatch
) -> None:
    several.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    several.setattr(workers, "cores", lambda: 1)
    with pytest.raises(DataError, match=said):
        open_corpus(write_corpus(tmp_path / "c.jsonl", *more))
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def die(*_: object) -> dict[str, object]:
    os._exit(9)


def test_a_process_that_dies_is_named_and_leaves_nothing(tmp_path: Path, several: pytest.MonkeyPatch) -> None:
    several.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    several.setitem(sys.modules, "killed", sys.modules[__name__])
    (tmp_path / "killed.py").write_text("import os\n\n\ndef die(*_):\n    os._exit(9)\n")
    several.syspath_prepend(tmp_path)
    several.setattr(die, "__module__", "killed")
    several.setattr(documents, "convert_piece", die)
    with pytest.raises(RuntimeError, match=r"c\.jsonl: the process that read it has ended with status 9"):
        open_corpus(write_corpus(tmp_path / "c.jsonl"))
    assert list((tmp_path / "cache" / "data").iterdir()) == []


@pytest.mark.parametrize("large", [0, 1 << 60], ids=["several", "one"])
@pytest.mark.parametrize("opened", [open_examples, open_corpus])
def test_a_file_that_is_replaced_while_it_is_read_is_refused(
    opened: Callable[..., Any], large: int, tmp_path: Path, several: pytest.MonkeyPatch
) -> None:
    """Its pieces open it anew: a table of old and new rows would lie in the cache as that of the old file."""

    def row(word: str, i: int) -> str:
        example = {"query": f"{word} {i}", "positives": [f"p{i}"]}
        return json.dumps({"_id": i, "text": f"{word} {i}"} if opened is open_corpus else example) + "\n"

    path, new, find = tmp_path / "x.jsonl", tmp_path / "new", pieces_module.pieces_of
    path.write_text("".join(row("old", i) for i in range(900)))

    def replaced(files: list[Path]) -> list[Piece]:
        found = find(files)
        if not new.exists():
            new.write_text("".join(row("new", i) for i in range(900)))
            new.replace(path)
        return found

    several.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    several.setattr(pieces_module, "_LARGE", large)
    several.setattr(workers, "cores", lambda: 1)
    for module in (convert, documents):
        several.setattr(module, "unchanged", lambda files: both(files, replaced))
    with pytest.raises(DataError, match=r"x\.jsonl was replaced while it was read: run"):
        opened(path)
    assert list((tmp_path / "cache" / "data").iterdir()) == []
    several.setattr(convert, "unchanged", pieces_module.unchanged)
    several.setattr(documents, "unchanged", pieces_module.unchanged)
    assert len(opened(path)) == 900


@contextmanager
def both(files: Any, act: Callable[..., Any]) -> Iterator[None]:
    with pieces_module.unchanged(files):
        act(files)
        yield


def test_a_last_line_without_a_newline_is_a_line_of_the_quarantine(tmp_path: Path, several: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    bad = ['{"a": 1}', '{"b": 1}', '{"c": 1}']
    for name, line in zip("abc", bad, strict=True):
        (tmp_path / "set" / f"{name}.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + line)
    for cache, large in (("many", 0), ("one", 1 << 60)):
        several.setattr(pieces_module, "_LARGE", large)
        assert open_examples(tmp_path / "set", cache=tmp_path / cache).quarantine.read_text() == "\n".join(bad)


def test_what_fails_in_a_process_is_said_as_one_process_says_it(tmp_path: Path, several: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails.py").write_text(
        "from embedwright.errors import NotFoundError\n\n\n"
        "def one(piece, settings, out):\n"
        "    raise NotFoundError('x is gone') if settings['gone'] else OSError(28, 'No space left on device')\n"
    )
    several.syspath_prepend(tmp_path)
    work = importlib.import_module("fails").one
    for gone, error, said in ((1, InputError, "x is gone"), (0, OSError, "No space left")):
        with pytest.raises(error, match=said):
            next(workers.in_processes(work, [Piece(Path("c.jsonl"))], {"gone": gone}, tmp_path))


DIES_ON_THE_SECOND = """
import os
import pyarrow as pa

def one(piece, settings, out):
    if piece.start:
        os._exit(9)
    schema = pa.schema([("n", pa.int64())])
    with pa.OSFile(str(out), "wb") as sink, pa.ipc.new_file(sink, schema):
        return {}
"""


def test_a_process_that_dies_while_the_first_is_behind_is_named(tmp_path: Path, several: pytest.MonkeyPatch) -> None:
    """The next question to it breaks its pipe, which is no word about what has happened."""
    (tmp_path / "dies_on_the_second.py").write_text(DIES_ON_THE_SECOND)
    several.syspath_prepend(tmp_path)
    several.setattr(workers, "cores", lambda: 1)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen
    several.setattr(subprocess, "Popen", lambda *words, **how: started.append(popen(*words, **how)) or started[-1])
    work = importlib.import_module("dies_on_the_second").one
    pieces = [Piece(Path("c.jsonl"), start, start + 1) for start in range(4)]
    made = workers.in_processes(work, pieces, {}, tmp_path)
    next(made)
    assert started[0].wait() == 9
    with pytest.raises(RuntimeError, match=r"c\.jsonl: the process that read it has ended with status 9"):
        next(made)


def test_a_script_without_a_guard_is_not_run_again(tmp_path: Path) -> None:
    """As the processes of `multiprocessing` would, which then wait for the lock of the first."""
    write_corpus(tmp_path / "c.jsonl")
    (tmp_path / "script.py").write_text(
        "from pathlib import Path\n"
        "from embedwright.data.files import pieces\n"
        "from embedwright.data.tables import workers\n"
        "from embedwright.data.tables.documents import open_corpus\n"
        "pieces._LARGE = 0; pieces._BYTES = 20_000; pieces.cores = workers.cores = lambda: 2\n"
        "print(len(open_corpus(Path('c.jsonl'))))\n"
    )
    environment = os.environ | {"EMBEDWRIGHT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("900\n", "")


STUCK = """
import subprocess, time
from pathlib import Path
from embedwright.data.files import pieces
from embedwright.data.tables import workers
from embedwright.data.tables.documents import open_corpus

def popen(*words, _popen=subprocess.Popen, **how):
    process = _popen(*words, **how)
    print(process.pid, flush=True)
    return process

def answer(worker, piece, _answer=workers._answer):
    facts = _answer(worker, piece)
    if piece.start:
        print("second", flush=True)
        time.sleep(600)
    return facts

subprocess.Popen, workers._answer = popen, answer
pieces._LARGE = 0; pieces._BYTES = 20_000; pieces.cores = workers.cores = lambda: 2
open_corpus(Path("c.jsonl"))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux lists processes there")
def test_a_killed_conversion_takes_its_processes_with_it_and_is_made_again(
    tmp_path: Path, several: pytest.MonkeyPatch
) -> None:
    path = write_corpus(tmp_path / "c.jsonl")
    several.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    with subprocess.Popen([sys.executable, "-c", STUCK], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        *started, second = [first.stdout.readline().strip() for _ in range(3)]
        assert second == "second" and all(alive(int(worker)) for worker in started)
        first.kill()
    wait_for_the_end_of(started)
    assert list(open_corpus(path).items()) == list(read_corpus(path).items())


AT_WORK = """
from pathlib import Path
from sleeps import one
from embedwright.data.files.pieces import Piece
from embedwright.data.tables import workers

workers.cores = lambda: 1
next(workers.in_processes(one, [Piece(Path("c.jsonl"))], {}, Path(".")))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux lists processes there")
def test_a_process_in_the_middle_of_a_piece_ends_with_the_one_that_asked(tmp_path: Path) -> None:
    """A piece is a whole file where it is packed, and may take an hour."""
    (tmp_path / "sleeps.py").write_text(
        "import os, time\n\n\ndef one(*_):\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", AT_WORK], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as first:
        assert first.stderr is not None  # to which a process prints, since its answers are on standard output
        worker = first.stderr.readline().strip()
        assert alive(int(worker))
        first.kill()
        wait_for_the_end_of([worker])


def wait_for_the_end_of(processes: list[str]) -> None:
    end = time.monotonic() + 300
    while any(alive(int(process)) for process in processes):
        assert time.monotonic() < end, "they live on"
        time.sleep(0.05)


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended may wait for its parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
