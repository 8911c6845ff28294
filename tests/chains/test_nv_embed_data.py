"""`recipes/nv-embed-v2.sh` on local copies of sets of every kind, whose files and columns are those of the sets' own
cards and scripts (`stand_ins.nv_embed` cites them): no hub, but the script and all commands are the real ones.

The script runs as it is. Its `embedwright` hands each command to this process, which has imported everything already.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import groups
import pytest
import yaml
from fake_llm import Body, FakeLLM, Reply
from stand_ins import nv_embed, words, write

from embedwright.cli import main as cli
from embedwright.data.files.beir import read_corpus
from embedwright.data.schema import Example
from embedwright.data.sources.catalog import find_task, load_catalog
from embedwright.data.tables.table import open_examples
from embedwright.model.embedder import Embedder
from embedwright.training.plan import plan
from embedwright.training.recipe import Recipe
from embedwright.training.train import train

RECIPES = Path(__file__).parents[2] / "recipes"
PROCESSES = Path(__file__).with_name("test_processes.py")  # runs a command in each process of a group
MINED = ["scifact", "hover", "nq", "squad", "miracl", "nli", "multi_nli", "sts22"]
LABELLED = ["amazon_polarity", "biorxiv_p2p", "reddit_s2s"]
HELD_OUT = [f"report {i} {words('report', i)}" for i in range(1, 10)] + [f"AFL 4 &amp; {words('AFL', 4, count=5)}"]
CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    server.sendall(json.dumps(sys.argv[1:]).encode())
    server.shutdown(socket.SHUT_WR)
    code, out, err = json.loads(b"".join(iter(lambda: server.recv(65536), b"")) or '[1, "", ""]')
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


class Script:
    """Runs the script in a folder, and keeps the commands that it calls."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.calls, self.patch = folder, list[list[str]](), monkeypatch
        for name in (
            "TRANSFORMERS_VERBOSITY",
            "HF_HUB_DISABLE_PROGRESS_BARS",
            "TQDM_DISABLE",
            "TOKENIZERS_PARALLELISM",
        ):
            monkeypatch.setenv(name, "error" if name == "TRANSFORMERS_VERBOSITY" else "1")  # so that main leaves none
        monkeypatch.chdir(folder)
        monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(folder / "cache"))
        (folder / "bin").mkdir()
        client = folder / "bin" / "embedwright"
        client.write_text(CLIENT.format(python=sys.executable, path="socket"))
        client.chmod(0o755)

    def run(self, *, kill_at: int = 0, kill: str = "", **settings: str) -> tuple[int, str, str]:
        """Returns exit status, table and messages. The `kill_at`-th command is killed `before` or `after` its work."""
        self.calls.clear()
        Path("socket").unlink(missing_ok=True)
        environment = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "EVAL": "eval", "SOURCES": "sources"}
        environment |= {"OUT": "out", "SHARE": "0.001", "TEACHER": "bm25", "LLM_URL": "none"} | settings
        with (
            socket.socket(socket.AF_UNIX) as server,
            Path("said").open("w+") as said,
            Path("table").open("w+") as table,
        ):
            server.bind("socket")
            server.listen()
            server.settimeout(0.05)
            script = subprocess.Popen(
                [RECIPES / "nv-embed-v2.sh"], env=environment, stdout=table, stderr=said, start_new_session=True
            )
            while script.poll() is None:
                try:
                    asked, _ = server.accept()
                except TimeoutError:
                    continue
                with asked:
                    command = json.loads(b"".join(iter(partial(asked.recv, 65536), b"")))
                    counted = command[1:2] != ["list"]
                    self.calls += [command] if counted else []
                    fatal = counted and len(self.calls) == kill_at
                    answer = None if fatal and kill == "before" else self.command(command)
                    if fatal:
                        os.killpg(script.pid, signal.SIGKILL)
                    else:
                        asked.sendall(json.dumps(answer).encode())
            said.seek(0)
            table.seek(0)
            return script.returncode, table.read(), said.read()

    def command(self, words: list[str]) -> tuple[int, str, str]:
        if words[0] == "two":  # LAUNCH: `two embedwright mine ...`
            found = groups.run(str(PROCESSES), self.folder, {"given": (2,)}, *words[2:])["given"][2]
            errors = [str(one["error"]) for one in found if one["error"]]
            return bool(errors), "".join(one["said"] for one in found), "\n".join(errors)
        self.patch.setattr(sys, "argv", ["embedwright", *words])
        code, out, err = 0, io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        return code, out.getvalue(), err.getvalue()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    nv_embed(tmp_path / "sources")
    leaked = [{"text1": text, "text2": f"nothing else {i}", "score": 1.0} for i, text in enumerate(HELD_OUT[:-1])]
    write(tmp_path / "eval" / "sts.jsonl", leaked)
    write(tmp_path / "eval" / "topics.jsonl", [{"text": HELD_OUT[-1], "label": "x"}])
    return Script(tmp_path, monkeypatch)


def file_of(name: str) -> Path:
    retrieval = name.startswith("synthetic") or load_catalog()[name].family == "retrieval"
    return Path("out", "retrieval" if retrieval else "others", f"{name}.parquet")


def examples(name: str) -> list[Example]:
    return list(open_examples(file_of(name)))


def verbs(script: Script) -> list[str]:
    return [call[1] if call[0] == "data" else call[0] for call in script.calls]


def rows_of(table: str) -> dict[str, dict[str, int]]:
    header, *lines = (line.split() for line in table.splitlines() if not line[:2].isdigit())
    return {
        line[0]: dict(zip(header[1:], (int(cell.replace(",", "")) for cell in line[1:]), strict=True)) for line in lines
    }


def test_sets_of_every_kind_from_their_files_to_mined_examples(
    script: Script, tiny_embedder: Callable[..., Embedder]
) -> None:
    tiny_embedder("mean").save("teacher")
    status, table, said = script.run(SETS=" ".join(MINED + LABELLED), TEACHER="teacher")
    assert status == 0, said
    counts = rows_of(table)
    assert list(counts) == [*MINED, *LABELLED, "all"]
    for name in MINED:
        made, corpus, task = examples(name), read_corpus(Path("out/corpus") / f"{name}.arrow"), load_catalog()[name]
        assert counts[name]["out"] == len(made) > 5 and counts[name]["corpus"] == len(corpus)
        negatives = [negative for example in made for negative in example.negatives]
        texts = set(corpus.values())
        assert negatives and {negative.text for negative in negatives} <= texts
        assert all(find_task(example.task) in task.tasks() for example in made)
        for example in made:
            known = {p.text for p in example.positives}
            assert not known & {n.text for n in example.negatives}
    # mined from documents that no row is answered by
    answers = {p.text for example in examples("scifact") for p in example.positives}
    assert any(n.text not in answers for example in examples("scifact") for n in example.negatives)
    assert counts["squad"] | {"drawn": 30, "corpus": 10} == counts["squad"]
    assert counts["hover"] | {"drawn": 30, "corpus": 60} == counts["hover"]
    assert counts["nli"]["rows"] == 120 and counts["nli"]["drawn"] == 30
    for example in examples("nli"):
        assert [p.text[0] for p in example.positives] == ["0"] and {n.text[0] for n in example.negatives} >= {"1", "2"}
    assert {e.positives[0].text for e in examples("amazon_polarity")} == {"positive", "negative"}
    assert len({e.query for e in examples("biorxiv_p2p")}) == counts["biorxiv_p2p"]["out"] == 60
    # what is in the evaluation sets is in no file, whichever way it came
    assert counts["reddit_s2s"]["leaks"] >= 1 and counts["sts22"]["leaks"] == 18
    assert counts["sts22"]["cut"] >= 1  # they are in the corpus, and were mined
    for name in MINED + LABELLED:
        for example in examples(name):
            some = [example.query, *(p.text for p in (*example.positives, *example.negatives))]
            assert not set(some) & set(HELD_OUT)
    assert counts["all"]["out"] == sum(counts[name]["out"] for name in MINED + LABELLED)
    # recipes read the two folders as a whole, too
    folders = [open_examples(Path("out") / place) for place in ("retrieval", "others")]
    assert sum(map(len, folders)) == counts["all"]["out"]
    assert {"nli", "nli.2", "scifact"} <= folders[0].tasks.keys() and folders[1].tasks["sts22"].symmetric


def test_what_is_there_by_the_same_settings_is_not_made_again(
    script: Script, tiny_embedder: Callable[..., Embedder]
) -> None:
    first = script.run(SETS="nq imbd")
    assert first[0] == 1 and "did you mean" in first[2] and "not done: imbd" in first[2]
    assert verbs(script)[:4] == ["build", "clean", "mine", "clean"]
    made = file_of("nq").read_bytes()
    status, table, _ = script.run(SETS="nq")
    assert (status, script.calls, rows_of(table)["nq"]) == (0, [], rows_of(first[1])["nq"])
    Path("sources/nq/README.md").rename("sources/nq/card")  # mining with another teacher does not build again
    tiny_embedder("mean").save("teacher")
    script.run(SETS="nq", TEACHER="teacher")
    assert verbs(script) == ["mine", "clean"]
    Path("sources/nq/card").rename("sources/nq/README.md")
    assert file_of("nq").read_bytes() != made
    script.run(SETS="nq", SHARE="0.5")
    assert verbs(script) == ["build", "clean", "mine", "clean"]
    Path("out/mined/nq.parquet").unlink()
    script.run(SETS="nq", SHARE="0.5")
    assert verbs(script) == ["mine"]
    shutil.copytree("eval", "eval/more")  # what leaks is looked for again when there is more that must not
    script.run(SETS="nq", SHARE="0.5")
    assert verbs(script) == ["clean", "mine", "clean"]
    status, _, said = script.run(SETS="nq", SHARE="0.5", EVAL="absent")
    assert status == 1 and "absent does not exist" in said and verbs(script) == ["clean"]


def kill(script: Script, sets: str, points: list[tuple[int, str]]) -> None:
    """Kills the script at each point of its way, starts it again, and compares what it made with an unbroken run."""
    assert script.run(SETS=sets)[0] == 0
    names, commands = sets.split(), len(script.calls)
    files = [file for name in names for file in (file_of(name), Path("out/corpus") / f"{name}.arrow")]
    whole = {file: file.read_bytes() for file in files if file.exists()}
    for number, when in points or [(n, when) for n in range(1, commands + 1) for when in ("before", "after")]:
        shutil.rmtree("out")
        assert script.run(SETS=sets, kill_at=number, kill=when)[0] == -signal.SIGKILL
        assert script.run(SETS=sets)[0] == 0
        assert (
            len(script.calls) == commands + 1 - number
        )  # the killed one is done again, whether its file is there or not
        assert {file: file.read_bytes() for file in files if file.exists()} == whole


def test_killed_it_goes_on_and_makes_the_same(script: Script) -> None:
    kill(script, "nq", [(2, "before"), (3, "after")])


@pytest.mark.long
def test_killed_anywhere_it_goes_on_and_makes_the_same(script: Script) -> None:
    kill(script, "scifact amazon_polarity", [])


def test_nothing_begins_without_what_it_needs(script: Script) -> None:
    for settings, said in (
        ({"EVAL": ""}, "EVAL: set it"),
        ({"LLM_URL": ""}, "LLM_URL: set it"),
        ({"LLM_URL": "x"}, "LLM_MODEL: set it"),
    ):
        status, _, message = script.run(SETS="nq", **settings)
        assert status and said in message and not Path("out").exists()


def test_version_one_has_labels_by_their_texts_and_other_sts_negatives(script: Script) -> None:
    status, _, said = script.run(SETS="biorxiv_p2p sts22", VERSION="v1")
    assert status == 0, said
    assert {e.positives[0].text for e in examples("biorxiv_p2p")} == {"cell biology", "genetics", "neuroscience"}
    assert "bm25" in script.calls[4]


def author(body: Body, n: int) -> Reply:
    """A model that does as it is asked: twenty tasks, or other words for each key of the example."""
    prompt, seed = body["messages"][0]["content"], body["seed"]
    if '"tasks"' in prompt:
        return Reply(json.dumps({"tasks": [f"Given {words(seed, i)}, find it" for i in range(20)]}))
    return Reply(json.dumps({key: words(seed, key) for key in re.findall(r'"(\w+)"', prompt)}))


@pytest.mark.long
def test_the_rehearsal_trains_on_what_the_script_makes(script: Script, tiny_decoder: Callable[..., Path]) -> None:
    """rehearsal-1b.yaml as it is, but for a tiny decoder on a CPU, fewer steps and no suites of the hub."""
    assert script.run(SETS=" ".join(MINED + LABELLED), OUT="data/rehearsal")[0] == 0
    content = yaml.safe_load((RECIPES / "rehearsal-1b.yaml").read_text())
    content["model"] |= {"base": str(tiny_decoder("llama")), "heads": 2, "head_dim": 8, "latents": 6, "max_tokens": 64}
    content["run"] |= {"precision": "fp32", "tracker": "none"}
    content["eval"] = {}
    for stage in content["stages"]:
        stage["optim"] |= {"steps": 3, "warmup_steps": 1, "batch_queries": 16}
    recipe = Recipe.parse(content)
    assert [stage.rows for stage in plan(recipe)] != [8600, 8600 + 12800]  # counted, not those that it expects
    train(recipe)
    assert Embedder.load("runs/rehearsal-1b/model").encode(["a tide"]).shape == (1, 32)


@pytest.mark.long
def test_of_synthetic_examples_those_that_came_without_negatives_are_mined(script: Script) -> None:
    with FakeLLM(author) as server:
        settings = {"SETS": " ", "LLM_URL": server.url, "LLM_MODEL": "m"}
        status, table, said = script.run(**settings)
        assert status == 0, said
        asked = len(server.requests)
        assert script.run(**settings)[0] == 0 and script.calls == [] and len(server.requests) == asked
    written, short = examples("synthetic"), examples("synthetic_short")
    assert rows_of(table)["synthetic"]["out"] == len(written) > 20
    assert {e.id.rpartition(":")[0] for e in written} == {"synthetic-short-long", "synthetic-long-short"}
    assert all(len(example.negatives) == 1 and example.negative_scores is None for example in written)
    assert rows_of(table)["synthetic_short"]["negatives"] == sum(len(example.negatives) for example in short)
    positives = {passage.text for example in short for passage in example.positives}
    assert max(len(e.negatives) for e in short) == 7 and {n.text for e in short for n in e.negatives} <= positives
    assert len({e.task for e in written + short}) > 20 and not [e for e in written + short if find_task(e.task)]


TWO = """#!/bin/sh
exec {client} two "$@"
"""


def test_two_processes_mine_what_one_does(script: Script, tiny_embedder: Callable[..., Embedder]) -> None:
    """LAUNCH starts the real command in a group of two, as torchrun does."""
    tiny_embedder("mean").save("teacher")
    assert script.run(SETS="nq", TEACHER="teacher")[0] == 0
    alone = examples("nq")
    launcher = script.folder / "bin" / "two"
    launcher.write_text(TWO.format(client=script.folder / "bin" / "embedwright"))
    launcher.chmod(0o755)
    status, table, said = script.run(SETS="nq", TEACHER="teacher", LAUNCH="two", OUT="out2")
    assert status == 0, said
    assert [call[0] for call in script.calls if "mine" in call] == ["two"]
    mined = open_examples(Path("out2/retrieval/nq.parquet"))
    assert [row.negatives for row in mined] == [row.negatives for row in alone] and alone[0].negatives
    assert rows_of(table)["nq"]["negatives"] > 0
