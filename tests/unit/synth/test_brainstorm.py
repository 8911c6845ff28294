"""Tasks stay where they are, whatever fails, grows or changes between two runs; and only what is missing is asked."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_llm import Body, FakeLLM, Reply

from embedwright.data.schema import DataError
from embedwright.llm.client import Client, Server
from embedwright.synth.brainstorm import brainstorm
from embedwright.synth.plan import Plan, Prompts

PROMPT = "Think of {number} tasks."
Serve = Callable[[Callable[[Body, int], Reply]], FakeLLM]
Run = Callable[..., tuple[list[str], dict[str, int]]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    running: list[FakeLLM] = []

    def start(reply: Callable[[Body, int], Reply]) -> FakeLLM:
        running.append(FakeLLM(reply).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__(None, None, None)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def call(fake: FakeLLM, needed: int, answers: str = "a", **changed: Any) -> tuple[list[str], dict[str, int]]:
        """`answers`: the file of answers; another one knows nothing of what was answered."""
        kind = changed.get("kind", "short-long")
        part = Prompts.load().kinds[kind].model_copy(update={"brainstorm": changed.get("prompt", PROMPT)})
        prompts = Prompts(languages={"en": "English"}, tasks_per_prompt=2, kinds={kind: part})
        models, seed = changed.get("models", ("m",)), changed.get("seed", 0)
        plan = Plan({kind: needed}, models, per_task=1, seed=seed, prompts=prompts)
        server = Server(base_url=fake.url, retries=0, attempts=2, max_tokens=changed.get("max_tokens", 100))
        with Client(server, tmp_path / f"{answers}.sqlite") as client:
            return brainstorm(client, tmp_path / "tasks.jsonl", plan, kind)

    return call


def two(body: Body, n: int) -> Reply:
    return Reply(json.dumps({"tasks": [f"Find text {body['seed']} {side} for it" for side in ("left", "right")]}))


def failing(*numbers: int) -> tuple[Callable[[Body, int], Reply], set[int]]:
    """`two`, but 500 for the seeds in the set, which holds the ones that came as these numbers."""
    seeds: set[int] = set()

    def reply(body: Body, n: int) -> Reply:
        if n in numbers:
            seeds.add(body["seed"])
        return Reply(status=500) if body["seed"] in seeds else two(body, n)

    return reply, seeds


def test_a_prompt_that_failed_moves_no_task(serve: Serve, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    reply, seeds = failing(0)
    fake = serve(reply)
    first, count = run(fake, 20)
    assert count["tasks"] == 20 and count["brainstorm_server_error"] >= 1  # another prompt made up for it
    seeds.clear()
    asked = len(fake.requests)
    again, _ = run(fake, 20)
    assert again == first and len(fake.requests) == asked
    more, count = run(fake, 24)
    assert more[:20] == first and len(set(more)) == 24 and count["prompts"] == 12
    assert not caplog.records or "got no answer" not in caplog.text


def test_what_is_lacking_is_asked_again_and_comes_last(
    serve: Serve, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    down = True
    fake = serve(lambda body, n: Reply(status=500) if down and n % 8 != 3 else two(body, n))
    few, count = run(fake, 6)
    assert 0 < len(few) < 6 and count["brainstorm_server_error"] > 0
    assert "run the same again" in caplog.text
    down = False
    whole, count = run(fake, 6)
    assert whole[: len(few)] == few and len(set(whole)) == 6 and "brainstorm_server_error" not in count


def test_tasks_that_serve_again_keep_their_places(serve: Serve, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    fake = serve(lambda body, n: Reply(json.dumps({"tasks": ["Find the one.", "Find the other.", "find the ONE"]})))
    first, count = run(fake, 5)
    assert first == ["Find the one.", "Find the other."] * 2 + ["Find the one."]
    assert count["tasks"] == 2 and count["repeated"] == 3 * count["prompts"] - 2
    assert "each serves more examples" in caplog.text
    asked = len(fake.requests)
    assert run(fake, 5)[0] == first and len(fake.requests) == asked
    fake.reply = two
    more, _ = run(fake, 30)
    assert more[:5] == first and len(set(more[5:])) == 25


def test_tasks_do_not_depend_on_the_answers_once_they_are_written(serve: Serve, run: Run) -> None:
    """Such as an answer that a later version reads in another way."""
    fake = serve(two)
    first, count = run(fake, 6)
    other = serve(lambda body, n: Reply("nothing"))
    assert run(other, 6, answers="b") == (first, count) and not other.requests
    assert run(fake, 3) == (first[:3], count | {"tasks": 3})


@pytest.mark.parametrize(
    "changed", [{"prompt": "{number} other tasks."}, {"models": ("n",)}, {"seed": 1}, {"kind": "short-short"}]
)
def test_what_is_asked_for_now_counts(serve: Serve, run: Run, changed: dict[str, Any]) -> None:
    fake = serve(two)
    run(fake, 4)
    asked = len(fake.requests)
    run(fake, 4, **changed)
    assert len(fake.requests) == 2 * asked == 4
    run(fake, 4)
    assert len(fake.requests) == 4


def test_a_torn_line_is_asked_again(serve: Serve, run: Run, tmp_path: Path) -> None:
    fake = serve(two)
    first, _ = run(fake, 6)
    file = tmp_path / "tasks.jsonl"
    whole = file.read_bytes()
    for cut in (1, 30, len(whole.splitlines()[-1])):
        file.write_bytes(whole[:-cut])
        assert run(fake, 6)[0] == first and file.read_bytes() == whole
    assert len(fake.requests) == 3


def test_a_file_of_something_else_is_refused(serve: Serve, run: Run, tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"query": "why?"}\n')
    with pytest.raises(DataError, match=r"tasks\.jsonl:1: no line of a brainstorm"):
        run(serve(two), 2)


def cut_below(limit: int, eighths: int) -> Callable[[Body, int], Reply]:
    """`two`, but under a lower limit so many of the answers are cut off."""

    def reply(body: Body, n: int) -> Reply:
        cut = body["seed"] % 8 < eighths and body["max_tokens"] < limit
        return Reply("Let me see", finish="length") if cut else two(body, n)

    return reply


@pytest.mark.parametrize(("cut", "enough"), [(8, False), (7, False), (5, True)])
def test_answers_that_were_cut_off_are_asked_for_again_under_a_larger_limit(
    serve: Serve, run: Run, cut: int, enough: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """No task is used again meanwhile, and those that are there stay in their places."""
    server = serve(cut_below(200, cut))
    first, count = run(server, 20)
    assert len(set(first)) == len(first) and (len(first) == 20) == enough and (len(first) == 0) == (cut == 8)
    assert count["brainstorm_truncated"] > 0 and "brainstorm_no_valid_answer" not in count
    assert ("were cut off; run the same again with a larger max_tokens" in caplog.text) != enough
    assert "each serves more" not in caplog.text
    asked = len(server.requests)
    assert run(server, 20)[0] == first and len(server.requests) == asked
    whole, count = run(server, 20, max_tokens=200)
    assert whole[: len(first)] == first and len(set(whole)) == 20
    assert enough == (len(server.requests) == asked)


def test_a_few_prompts_that_are_cut_off_at_any_limit_hold_nothing_up(serve: Serve, run: Run) -> None:
    """They cannot give what a model that repeats itself lacks."""
    fake = serve(
        lambda body, n: Reply("so" if body["seed"] % 4 == 0 else '{"tasks": ["Find it now."]}', finish="length")
    )
    found, count = run(fake, 20)
    assert found == ["Find it now."] * 20 and 0 < count["brainstorm_truncated"] < 10


def test_useless_answers_are_not_asked_for_again(serve: Serve, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    fake = serve(lambda body, n: Reply("I cannot."))
    assert run(fake, 2) == ([], {"prompts": 4, "tasks": 0, "brainstorm_no_valid_answer": 4})
    asked = len(fake.requests)
    run(fake, 2, answers="b")
    assert asked == 8 == len(fake.requests)
