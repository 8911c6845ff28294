"""Synthesis that is killed at any place and run again: the files of a run in one go, and no answer paid for twice.

Run as a script, this file synthesizes in forked children, so that all is imported once, and kills them as it is told.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "llm"))

PLACES = ("put", "append_line", "fsync", "replace")
SOME = {"put": (9,), "append_line": (2,)}  # calls


def test_synthesis_that_was_killed_equals_one_in_one_go(tmp_path: Path) -> None:
    assert kills(tmp_path, SOME) == {place: len(calls) for place, calls in SOME.items()}


@pytest.mark.long
def test_synthesis_may_be_killed_at_any_place(tmp_path: Path) -> None:
    killed = kills(tmp_path, {place: tuple(range(1, 200)) for place in PLACES})
    assert all(killed[place] >= least for place, least in zip(PLACES, (8, 3, 5, 2), strict=True)), killed


def kills(folder: Path, plan: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Kills before those calls, as far as there are so many; gives how often, where all went on as it should."""
    from fake_llm import Body, FakeLLM, Reply

    answered: Counter[tuple[str, str, int]] = Counter()
    refused: set[tuple[str, str, int]] = set()

    def reply(body: Body, n: int) -> Reply:
        """Busy at first for some questions; useless for some. The model's name is that of the run."""
        prompt, seed = body["messages"][0]["content"], body["seed"]
        key = (body["model"], prompt, seed)
        if seed % 3 == 0 and key not in refused:
            refused.add(key)
            return Reply(status=429)
        answered[key] += 1
        if '"tasks"' in prompt:
            words = [f"Find the text number {(seed + i) % 5} for a query" for i in range(2)]
            return Reply(json.dumps({"tasks": words}))
        if seed % 5 == 0:
            return Reply("I cannot.")
        return Reply(
            json.dumps({key: f"{key} made by {seed} for {prompt[:40]}" for key in re.findall(r'"(\w+)"', prompt)})
        )

    with FakeLLM(reply) as fake:
        command = [sys.executable, __file__, str(folder), fake.url, json.dumps(plan)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["rows"] >= 5 and found["brainstorms"] >= 3
    assert not found["other"]
    questions: Counter[str] = Counter()
    twice: Counter[str] = Counter()
    for (run, _, _), times in answered.items():
        questions[run] += 1
        twice[run] += times - 1
    assert len(set(questions.values())) == 1  # every run has asked what the one in one go asked
    assert twice["whole"] == 0 and max(twice.values()) <= 1  # the one that was under way when it was killed
    killed: dict[str, int] = found["kills"]
    return killed


# ---- in the process that synthesizes


def main(folder: Path, url: str, plan: dict[str, list[int]]) -> None:
    from kills import die_in

    from embedwright import files
    from embedwright.llm.answers import AnswerFile
    from embedwright.llm.client import Client, Server
    from embedwright.synth import brainstorm
    from embedwright.synth.plan import Plan, Prompts
    from embedwright.synth.synthesize import synthesize

    owners = {"put": AnswerFile, "append_line": brainstorm, "fsync": files.os, "replace": Path}
    prompts = Prompts.load().model_copy(update={"tasks_per_prompt": 2})

    def run(name: str, kill: tuple[str, int] | None = None) -> bool:
        """Whether the child came to its end."""
        if (pid := os.fork()) == 0:
            if kill:
                die_in(owners[kill[0]], *kill)
            server = Server(base_url=url, concurrency=1, attempts=2)
            made = Plan({"short-long": 7, "sts": 2}, (name,), per_task=1, prompts=prompts)
            out = folder / name / "made.jsonl"
            with Client(server, out.with_name("made.jsonl.answers.sqlite")) as client:
                synthesize(out, client, made, licence="mit")
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
        return status == 0

    def written(name: str) -> dict[str, str]:
        left = {path.name: path for path in (folder / name).iterdir() if not path.name.startswith(".")}
        subject = re.compile(r'"subject":"\w+"')  # it goes by the models' names
        return {
            file: subject.sub("", path.read_text()).replace(f": {name}", ": model")
            for file, path in left.items()
            if ".sqlite" not in file
        }

    assert run("whole")
    whole = written("whole")
    kills, other = dict.fromkeys(plan, 0), []
    for place, numbers in plan.items():
        for number in numbers:
            name = f"{place}-{number}"
            if run(name, (place, number)):
                break
            kills[place] += 1
            assert run(name)
            if written(name) != whole:
                other.append(name)
            shutil.rmtree(folder / name)
    lines = whole["made.jsonl.brainstorm.jsonl"].count("\n")
    print(json.dumps({"kills": kills, "other": other, "rows": whole["made.jsonl"].count("\n"), "brainstorms": lines}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
