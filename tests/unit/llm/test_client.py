"""The client against a real HTTP server that stalls, refuses, fails and talks nonsense: what it does and counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from fake_llm import Body, FakeLLM, Reply, faulty_first
from pydantic import BaseModel, Field

from embedwright.llm.client import Answer, Client, Failure, Question, Server, ServerError


class Colour(Answer):
    name: str
    kind: Literal["warm", "cold"] = "warm"


def red(body: Body, n: int) -> Reply:
    return Reply('{"name": "red"}')


def echo(body: Body, n: int) -> Reply:
    return Reply(json.dumps({"name": body["messages"][0]["content"]}))


RED = {"name": "red", "kind": "warm"}


def question(prompt: str = "a colour", seed: str = "0", model: str = "m", temperature: float = 1.0) -> Question:
    return Question(model, prompt, Colour, seed, temperature)


Ask = Callable[..., tuple[list[dict[str, Any] | Failure], Counter[str]]]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Body, int], Reply]], FakeLLM]]:
    running: list[FakeLLM] = []

    def start(reply: Callable[[Body, int], Reply]) -> FakeLLM:
        running.append(FakeLLM(reply).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__(None, None, None)


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    def run(fake: FakeLLM, questions: list[Question], **settings: Any) -> tuple[Any, Counter[str]]:
        server = Server(**{"base_url": fake.url, "timeout_s": 20.0, **settings})
        with Client(server, tmp_path / "answers.sqlite") as client:
            return list(client.ask(questions)), client.counts

    return run


def test_answers_come_in_order_and_what_is_asked_is_said(serve: Any, ask: Ask) -> None:
    fake = serve(lambda body, n: Reply(echo(body, n).text, stall_s=0.3 if n == 0 else 0))  # the first comes last
    answers, counts = ask(fake, [question(f"c{i}", seed=str(i)) for i in range(20)], concurrency=4)
    assert [answer["name"] for answer in answers] == [f"c{i}" for i in range(20)]
    assert counts == {"requests": 20, "answers": 20, "tokens": 200}
    assert 2 <= fake.most_at_once <= 4
    body = next(body for body in fake.requests if body["messages"][0]["content"] == "c7")
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": Colour.model_json_schema()},
    }
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("m", 1.0, 1.0, 2048)
    assert len({body["seed"] for body in fake.requests}) == 20


def test_what_was_answered_is_not_asked_again(serve: Any, ask: Ask) -> None:
    fake = serve(echo)
    questions = [question(f"c{i}", seed=str(i)) for i in range(12)]
    ask(fake, questions[:7])
    assert len(fake.requests) == 7
    answers, counts = ask(fake, questions)
    assert len(fake.requests) == 12 and counts["cached"] == 7 and counts["requests"] == 5
    assert [answer["name"] for answer in answers] == [f"c{i}" for i in range(12)]


@pytest.mark.parametrize(
    "other", [question("b"), question(seed="1"), question(model="n"), question(temperature=0.5)], ids=lambda q: q.prompt
)
def test_another_question_is_asked(serve: Any, ask: Ask, other: Question) -> None:
    fake = serve(echo)
    ask(fake, [question()])
    ask(fake, [other])
    assert len(fake.requests) == 2


def test_useless_answers_are_asked_for_again_with_another_seed(serve: Any, ask: Ask) -> None:
    faults = [Reply("I cannot."), Reply('{"name": 3}'), Reply('{"name": "re', finish="length")]
    fake = serve(faulty_first(faults, red))
    answers, counts = ask(fake, [question(temperature=0.0)], attempts=4)
    assert answers == [RED]
    assert counts == {"requests": 4, "answers": 4, "tokens": 40, "bad_json": 1, "wrong_schema": 1, "truncated": 1}
    assert len({body["seed"] for body in fake.requests}) == 4
    assert [body["temperature"] for body in fake.requests] == [0.0, 0.5, 0.5, 0.5]

    answers, counts = ask(fake, [question(temperature=0.0)], attempts=4)  # the useless ones were paid for, too
    assert answers == [RED] and len(fake.requests) == 4 and counts["cached"] == 4


def test_the_attempts_are_bounded(serve: Any, ask: Ask) -> None:
    fake = serve(lambda body, n: Reply("nonsense" if body["messages"][0]["content"] == "bad" else '{"name": "red"}'))
    answers, counts = ask(fake, [question("bad"), question("good")], attempts=3)
    assert answers == [Failure("no_valid_answer"), RED]
    assert counts["bad_json"] == 3 and counts["requests"] == 4


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        (Reply(status=500), {"http_500": 2}),
        (Reply(status=503), {"http_503": 2}),
        (Reply(status=429), {"http_429": 2}),
        (Reply(status=408), {"http_408": 2}),
        (Reply(status=0), {}),
        (Reply(stall_s=1.5), {}),
    ],
    ids=["500", "503", "429", "408", "connection", "timeout"],
)
def test_a_fault_of_the_server_is_tried_again(serve: Any, ask: Ask, fault: Reply, counted: dict[str, int]) -> None:
    fake = serve(faulty_first([fault, fault], red))
    answers, counts = ask(fake, [question()], timeout_s=0.5 if fault.stall_s else 20.0)
    assert answers == [RED]
    assert counts == {"requests": 3, "answers": 1, "tokens": 10, **counted}
    assert len({json.dumps(body) for body in fake.requests}) == 1  # the same question, not a fresh one


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        (Reply(status=0), "connection"),
        (Reply(stall_s=1.5), "timeout"),
        (Reply(stall_s=5.0, drip=True), "timeout"),
        (Reply(body=b"<html>"), "bad_body"),
        (Reply(body=b"<html>", headers={"content-type": "text/html"}), "bad_body"),
        (Reply(body=b'{"choices": []}'), "bad_body"),
        (Reply(body=b'{"choices": [{}]}'), "bad_body"),
        (Reply(body=b'{"choices": [{"message": null}]}'), "bad_body"),
        (Reply(body=b"[1]"), "bad_body"),
        (Reply(body=b"\xff"), "bad_body"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_question_without_an_answer_is_asked_again_another_time(
    serve: Any, ask: Ask, fault: Reply, counted: str
) -> None:
    fake = serve(faulty_first([fault], red))
    timeout = 0.5 if counted == "timeout" else 20.0
    answers, counts = ask(fake, [question()], timeout_s=timeout, retries=0)
    assert answers == [Failure("server_error")] and counts == {"requests": 1, counted: 1}
    assert ask(fake, [question()])[0] == [RED]


def test_retry_after_is_kept_to(serve: Any, ask: Ask) -> None:
    fake = serve(faulty_first([Reply(status=429, headers={"Retry-After": "1"})], red))
    answers, _ = ask(fake, [question()])
    assert answers == [RED]
    assert fake.times[1] - fake.times[0] >= 1


def test_a_pause_of_hours_is_a_no(serve: Any, ask: Ask) -> None:
    fake = serve(lambda body, n: Reply(status=429, headers={"Retry-After": "7200"}))
    assert ask(fake, [question()])[0] == [Failure("server_error")]
    assert len(fake.requests) == 1


def test_one_question_is_given_up_and_asked_again_another_time(serve: Any, ask: Ask) -> None:
    ill = True
    fake = serve(lambda body, n: Reply(status=500) if ill and "bad" in body["messages"][0]["content"] else red(body, n))
    answers, counts = ask(fake, [question("bad"), question("good")], retries=2)
    assert answers == [Failure("server_error"), RED]
    assert counts["http_500"] == 3 and len(fake.requests) == 4
    ill = False
    answers, counts = ask(fake, [question("bad"), question("good")], retries=2)
    assert answers == [RED, RED] and len(fake.requests) == 5


def test_failures_here_and_there_do_not_end_it(serve: Any, ask: Ask) -> None:
    fake = serve(lambda body, n: Reply(status=500) if n % 2 else red(body, n))
    answers, _ = ask(fake, [question(seed=str(i)) for i in range(24)], retries=0, concurrency=1)
    assert answers == [RED, Failure("server_error")] * 12


def test_a_server_that_is_down_ends_it(serve: Any, ask: Ask, tmp_path: Path) -> None:
    fake = serve(lambda body, n: red(body, n) if n < 3 else Reply(status=502))
    with pytest.raises(ServerError, match=r"http://127.*made-up 502.*answers\.sqlite"):
        ask(fake, [question(seed=str(i)) for i in range(1000)], retries=1, concurrency=2)
    assert len(fake.requests) <= 3 + 2 * (2 + 3) + 2  # each question twice, five in a row, and one slot under way
    fake.reply = red
    answers, counts = ask(fake, [question(seed=str(i)) for i in range(10)])
    assert answers == [RED] * 10 and counts == {"cached": 3, "requests": 7, "answers": 7, "tokens": 70}


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_does_not_let_us_in_ends_it(serve: Any, ask: Ask, status: int) -> None:
    fake = serve(lambda body, n: Reply(status=status))
    with pytest.raises(ServerError, match=f"made-up {status}"):
        ask(fake, [question(seed=str(i)) for i in range(50)], concurrency=1)
    assert len(fake.requests) == 1


@pytest.mark.parametrize("status", [400, 422, 500])
def test_a_server_without_json_schemas_ends_it_and_says_what_to_do(serve: Any, ask: Ask, status: int) -> None:
    said = json.dumps({"error": {"message": "response_format.type: expected 'text'"}}).encode()
    fake = serve(lambda body, n: Reply(status=status, body=said))
    with pytest.raises(ServerError, match=r"expected 'text'.*use one that does, such as vLLM"):
        ask(fake, [question(seed=str(i)) for i in range(50)], concurrency=1, retries=1)
    assert len(fake.requests) == (2 if status == 500 else 1)


def test_a_server_that_has_answered_knows_json_schemas(serve: Any, ask: Ask) -> None:
    said = json.dumps({"error": {"message": "no such text in response_format"}}).encode()
    fake = serve(lambda body, n: red(body, n) if n != 1 else Reply(status=400, body=said))
    answers, _ = ask(fake, [question(seed=str(i)) for i in range(3)], concurrency=1)
    assert answers == [RED, Failure("refused"), RED]


def test_a_bad_request_is_of_its_question_alone(serve: Any, ask: Ask) -> None:
    long = "too long"
    fake = serve(lambda body, n: Reply(status=400) if body["messages"][0]["content"] == long else red(body, n))
    answers, _ = ask(fake, [question(long), question(seed="1"), question(seed="2")], concurrency=1)
    assert answers == [Failure("refused"), RED, RED] and len(fake.requests) == 3


def test_many_bad_requests_in_a_row_do_not_end_it_once_it_has_answered(serve: Any, ask: Ask) -> None:
    """As the prompts of one long text do; a server that refuses all from the beginning is given up."""
    fake = serve(lambda body, n: Reply(status=400) if "long" in body["messages"][0]["content"] else red(body, n))
    long = [question("too long", seed=str(i)) for i in range(30)]
    answers, _ = ask(fake, [question(), *long, question(seed="1")], concurrency=1)
    assert answers == [RED, *[Failure("refused")] * 30, RED]
    assert ask(fake, [question(), *long[:8], question(seed="1")], concurrency=1)[0][-1] == RED  # all of it is kept
    with pytest.raises(ServerError, match="400"):
        ask(fake, [question("long", seed=f"{i}") for i in range(30)], concurrency=1)
    fake.reply = lambda body, n: Reply(status=400)
    with pytest.raises(ServerError, match="400"):
        ask(fake, [question(), *[question("other", seed=str(i)) for i in range(100)]], concurrency=1)


def test_the_budget_is_not_passed(serve: Any, ask: Ask) -> None:
    fake = serve(lambda body, n: Reply('{"name": "red"}', tokens=50, stall_s=0.02))
    questions = [question(seed=str(i)) for i in range(20)]
    # a request may cost 60 tokens: 57 of the answer and 3 of the prompt
    answers, counts = ask(fake, questions, max_tokens=57, token_budget=310, concurrency=4)
    assert counts["tokens"] == 300 == 50 * len(fake.requests)  # all that fits: a request under way is waited for
    assert answers.count(RED) == 6 and answers.count(Failure("budget")) == 14

    again, counts = ask(fake, questions, max_tokens=57, token_budget=310, concurrency=4)
    assert again.count(RED) == 6 and counts["requests"] == 0  # the budget is of the file, not of the run
    more, _ = ask(fake, questions, max_tokens=57, token_budget=410, concurrency=4)
    assert more.count(RED) == 8


def test_tokens_are_estimated_where_the_server_does_not_tell(serve: Any, ask: Ask) -> None:
    content = {"index": 0, "message": {"role": "assistant", "content": '{"name": "red"}'}, "finish_reason": "stop"}
    fake = serve(lambda body, n: Reply(body=json.dumps({"id": "x", "choices": [content]}).encode()))
    answers, counts = ask(fake, [question("x" * 385)])
    assert answers == [RED] and counts["tokens"] == (385 + len('{"name": "red"}')) // 4 + 1


def test_half_a_surrogate_pair_does_not_end_it(serve: Any, ask: Ask) -> None:
    fake = serve(lambda body, n: Reply('{"name": "\ud83d"}'))
    answers, _ = ask(fake, [question()])
    assert answers == [{"name": "?", "kind": "warm"}]


def said(**message: Any) -> Reply:
    """A completion whose message has these fields."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
    return Reply(body=json.dumps({"id": "x", "choices": [choice]}).encode())


@pytest.mark.parametrize(
    "reply",
    [
        said(content='<think>{"name": "blue"}? No.</think>{"name": "red"}'),
        said(content='{"name": "red"}', reasoning_content='{"name": "blue"}', reasoning='{"name": "blue"}'),
        said(
            content=[
                {"type": "thinking", "thinking": [{"type": "text", "text": '{"name": "blue"}'}]},
                {"type": "text", "text": '{"name": "red"}'},
                {"type": "reasoning", "text": '{"name": "blue"}'},
            ]
        ),
    ],
    ids=["in the text", "in a field", "in a part"],
)
def test_a_draft_in_the_reasoning_is_not_the_answer(serve: Any, ask: Ask, reply: Reply) -> None:
    assert ask(serve(lambda body, n: reply), [question()], attempts=1)[0] == [RED]


@pytest.mark.parametrize(
    "reply", [said(content="<think>{}", reasoning='{"name": "blue"}'), said(content=None, reasoning_content="{}")]
)
def test_reasoning_alone_is_asked_for_again(serve: Any, ask: Ask, reply: Reply) -> None:
    fake = serve(faulty_first([reply], red))
    answers, counts = ask(fake, [question()])
    assert answers == [RED] and counts["only_reasoning"] + counts["bad_json"] == 1


def test_limits_schemas_and_addresses_are_no_part_of_an_answers_key(serve: Any, ask: Ask) -> None:
    class Wider(BaseModel):
        """Another spelling of the schema."""

        name: str
        kind: str = Field("warm", description="told to the server")

    first, second = serve(echo), serve(echo)
    ask(first, [question()], max_tokens=100)
    answers, counts = ask(second, [Question("m", "a colour", Wider, "0")], max_tokens=99, concurrency=1, attempts=2)
    assert answers == [{"name": "a colour", "kind": "warm"}] and counts == {"cached": 1} and not second.requests


def test_an_answer_that_was_cut_off_is_asked_again_under_a_larger_limit(serve: Any, ask: Ask) -> None:
    def reply(body: Body, n: int) -> Reply:
        if body["max_tokens"] < 100 or body["messages"][0]["content"] == "short":
            return Reply('{"name": "re', finish="length")
        return Reply('{"name": "red"}', finish="length")  # cut off after the answer, which stays of use

    fake = serve(reply)
    assert ask(fake, [question()], max_tokens=50, attempts=2)[0] == [Failure("truncated")]
    assert ask(fake, [question()], max_tokens=40, attempts=2)[0] == [Failure("truncated")]
    assert len(fake.requests) == 2
    answers, counts = ask(fake, [question()], max_tokens=100, attempts=2, token_budget=1000)
    assert answers == [RED] and counts["requests"] == 1
    assert ask(fake, [question()], max_tokens=200, attempts=2)[1] == {"cached": 1}
    answers, _ = ask(fake, [question(seed="1")], max_tokens=50, attempts=2, token_budget=82)
    assert answers == [Failure("budget")]  # three answers of 10 tokens were paid for, the one that was replaced too


def test_a_good_answer_after_one_that_was_cut_off_is_kept(serve: Any, ask: Ask) -> None:
    fake = serve(faulty_first([Reply('{"name": "re', finish="length")], red))
    assert ask(fake, [question()], max_tokens=50)[0] == [RED]
    answers, counts = ask(fake, [question()], max_tokens=100)
    assert answers == [RED] and counts == {"cached": 2, "truncated": 1}


def test_a_killed_run_pays_only_for_what_is_missing(serve: Any, ask: Ask, tmp_path: Path) -> None:
    fake = serve(lambda body, n: Reply(echo(body, n).text, stall_s=0.03))
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_client import question
        from embedwright.llm.client import Client, Server
        with Client(Server(base_url={fake.url!r}, concurrency=2), Path({str(tmp_path / "answers.sqlite")!r})) as client:
            list(client.ask(question(f"c{{i}}", seed=str(i)) for i in range(2000)))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], env=os.environ)
    deadline = time.monotonic() + 60
    while len(fake.requests) < 40 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    asked = len(fake.requests)
    assert 40 <= asked < 2000

    _, counts = ask(fake, [question(f"c{i}", seed=str(i)) for i in range(asked)])
    assert counts["cached"] >= asked - 4  # two were under way, or answered and not yet kept
    assert len(fake.requests) == asked + counts["requests"] and counts["cached"] + counts["requests"] == asked


# ---- keys


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.setenv("OWN_KEY", "own-secret")


def test_a_server_gets_its_own_key_or_none(serve: Any, ask: Ask, keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = serve(red)
    ask(fake, [question(seed="0")])
    ask(fake, [question(seed="1")], api_key_env="OWN_KEY")
    monkeypatch.setenv("OPENAI_BASE_URL", fake.url)
    ask(fake, [question(seed="2")])
    ask(fake, [question(seed="3")], base_url=fake.url.replace("//", "//me:pass@"))
    sent = [headers["authorization"] for headers in fake.headers]
    assert sent == ["Bearer none", "Bearer own-secret", "Bearer sk-of-openai", "Basic bWU6cGFzcw=="]


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_key_that_the_server_repeats_is_not_shown(
    serve: Any, ask: Ask, keys: None, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    said = json.dumps({"error": {"message": "bad key own-secret, or is it pass%word?"}}).encode()
    fake = serve(lambda body, n: Reply(status=status, body=said))
    url = fake.url.replace("//", "//me:pass%25word@")
    for settings in ({"api_key_env": "OWN_KEY"}, {"base_url": url}):
        caplog.clear()
        shown = ""
        try:
            ask(fake, [question()], retries=0, concurrency=1, **settings)
        except ServerError:
            shown += traceback.format_exc()
        secret = "own-secret" if "api_key_env" in settings else "pass%word"
        assert secret not in shown + caplog.text and "pass%25word" not in shown + caplog.text
        assert "bad key" in shown + caplog.text
    assert "pass" not in repr(Server(base_url=url))
    with pytest.raises(ValueError, match="timeout_s") as caught:
        Server(base_url=url, timeout_s=-1)
    assert "pass" not in str(caught.value)


def test_a_refused_key_says_what_to_do(serve: Any, ask: Ask, keys: None) -> None:
    with pytest.raises(ServerError, match=r"--api-key-env NAME"):
        ask(serve(lambda body, n: Reply(status=401)), [question()])


def test_prompts_and_keys_are_not_sent_on_to_another_server(serve: Any, ask: Ask, keys: None) -> None:
    other = serve(red)
    to = f"{other.url.replace('//', '//me:secret@')}/chat/completions?key=secret"
    fake = serve(lambda body, n: Reply(status=307, headers={"Location": to}))
    with pytest.raises(ServerError, match=rf"sends us on to {other.url}/chat/completions;") as caught:
        ask(fake, [question()], api_key_env="OWN_KEY")
    assert not other.requests and "secret" not in str(caught.value)
