"""Synthesis against a fake language model: what is asked, what becomes of each answer, and where each row went."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_llm import Body, FakeLLM, Reply, command

from embedwright.data.files.parts import Shard
from embedwright.data.files.tasks import read_tasks, tasks_file
from embedwright.data.schema import Example
from embedwright.data.tables.table import open_examples
from embedwright.llm.answers import tokens_paid
from embedwright.llm.client import Client, Server
from embedwright.synth.plan import KINDS, Kind, Plan
from embedwright.synth.synthesize import synthesize

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("ra", "ne", "lo")]
ALL: dict[Kind, int] = dict.fromkeys(KINDS, 4)
Serve = Callable[..., FakeLLM]


def words(seed: object, count: int = 12) -> str:
    return " ".join(random.Random(str(seed)).choices(WORDS, k=count))


def author(body: Body, n: int) -> Reply:
    """A model that does as it is asked: twenty tasks, or other words for each key of the example."""
    prompt, seed = body["messages"][0]["content"], body["seed"]
    if '"tasks"' in prompt:
        return Reply(json.dumps({"tasks": [f"Given {words((seed, i), 4)}, find it" for i in range(20)]}))
    return Reply(json.dumps({key: words((seed, key)) for key in asked_keys(prompt)}))


def asked_keys(prompt: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r'"(\w+)"', prompt)))


@pytest.fixture
def serve() -> Iterator[Serve]:
    running: list[FakeLLM] = []

    def start(reply: Callable[[Body, int], Reply] = author) -> FakeLLM:
        running.append(FakeLLM(reply).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__(None, None, None)


Run = Callable[..., tuple[dict[str, Any], list[Example]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))

    def call(fake: FakeLLM, counts: dict[Kind, int], name: str = "out.jsonl", **settings: Any) -> Any:
        plan = {key: settings.pop(key) for key in ("models", "per_task", "seed", "prompts") if key in settings}
        server = Server(base_url=fake.url, **{"attempts": 2, "concurrency": 4, **settings})
        with Client(server, tmp_path / f"{name}.answers.sqlite") as client:
            report = synthesize(
                tmp_path / name, client, Plan(counts, plan.pop("models", ("m",)), **plan), licence="mit"
            )
        assert report["asked"] == report["written"] + sum(sum(r.values()) for r in report["dropped"].values())
        return report, list(open_examples(tmp_path / name)) if report["written"] else []

    return call


def test_each_kind_becomes_what_it_should(serve: Serve, run: Run, tmp_path: Path) -> None:
    fake = serve()
    report, examples = run(fake, ALL)
    assert report["written"] == len(examples) == 24 and report["asked"] == 24
    assert [example.id for example in examples] == [f"synthetic-{kind}:{n}" for n in range(4) for kind in KINDS]

    answers = [json.loads(author(body, 0).text) for body in fake.requests]
    said = {text: answer for answer in answers if "tasks" not in answer for text in answer.values()}
    for example in examples:
        kind = example.id.removeprefix("synthetic-").split(":")[0]
        query, positive, negative = {
            "short-long": ("user_query", "positive_document", "hard_negative_document"),
            "long-short": ("input_text", "label", "misleading_label"),
            "short-short": ("input", "positive_document", None),
            "long-long": ("input", "positive_document", None),
            "sts": ("S1", "S2", "S3"),
            "bitext": ("S1", "S2", "S3"),
        }[kind]
        answer = said[example.query]
        assert answer[query] == example.query
        assert [p.text for p in example.positives] == [answer[positive]]
        assert [p.text for p in example.negatives] == ([answer[negative]] if negative else [])
        assert example.language == (None if kind == "bitext" else "en")

    tasks = read_tasks(tasks_file(tmp_path / "out.jsonl"))
    assert {example.task for example in examples} == set(tasks)
    of_kind = {kind: {e.task for e in examples if e.id.startswith(f"synthetic-{kind}:")} for kind in KINDS}
    assert {kind: len(names) for kind, names in of_kind.items()} == {**dict.fromkeys(KINDS, 2), "sts": 1, "bitext": 1}
    for name, task in tasks.items():
        assert task.symmetric == name.startswith(("synthetic-sts", "synthetic-bitext"))
        assert task.licence == "mit" and task.source == "synthetic: m"
    families = {kind: {tasks[name].family for name in names} for kind, names in of_kind.items()}
    assert families == {
        **{kind: {"retrieval"} for kind in ("short-long", "short-short", "long-long")},
        "long-short": {"classification"},
        "sts": {"sts"},
        "bitext": {"pair"},
    }


def test_the_brainstormed_task_is_in_the_prompt_and_is_the_instruction(serve: Serve, run: Run, tmp_path: Path) -> None:
    fake = serve()
    _, examples = run(fake, {"short-long": 6}, per_task=3)
    suggested = json.loads(author(fake.requests[0], 0).text)["tasks"]
    tasks = read_tasks(tasks_file(tmp_path / "out.jsonl"))
    assert [tasks[example.task].instruction for example in examples] == [*[suggested[0]] * 3, *[suggested[1]] * 3]
    assert [suggested[0] in prompt for prompt in fake.prompts[1:]].count(True) == 3
    assert len(fake.requests) == 7  # the second step is a session of its own: one message each
    assert all(len(body["messages"]) == 1 for body in fake.requests)


def test_a_model_that_is_drawn_is_asked(serve: Serve, run: Run) -> None:
    fake = serve()
    report, _ = run(fake, {"sts": 40}, models=("a", "b"))
    asked = Counter(body["model"] for body in fake.requests)
    assert set(asked) == {"a", "b"} and min(asked.values()) > 8
    assert report["diversity"]["sts"]["drawn"]["model"] == asked


def test_what_is_of_no_use_is_dropped_by_reason(serve: Serve, run: Run) -> None:
    useless = {
        "empty_or_not_text": {"input_text": "  ", "label": "x", "misleading_label": "y"},
        "query_is_positive": {"input_text": "Same, words!", "label": "same words", "misleading_label": "y"},
        "negative_is_query_or_positive": {"input_text": "some text", "label": "News", "misleading_label": "news."},
        "label_in_text": {"input_text": "All about Sports, today.", "label": "sports", "misleading_label": "y"},
    }
    misled = {"input_text": "rather dull fare", "label": "sports", "misleading_label": "Dull fare"}
    inside = {"input_text": "transportsection of goods", "label": "sports", "misleading_label": "port"}
    fine = {"input_text": "a text of its own kind", "label": "sports", "misleading_label": "port"}
    copy = {"input_text": "A text  of its OWN kind", "label": "other", "misleading_label": "port"}
    long = {"input_text": words(1, 60), "label": "thing", "misleading_label": "matter"}
    near = {"input_text": words(1, 60) + " besides", "label": "object", "misleading_label": "port"}
    garbled = {"input_text": "a \0 text", "label": "sports", "misleading_label": "port"}
    answers = [*useless.values(), misled, inside, fine, copy, long, near, garbled]
    order: list[int] = []

    def reply(body: Body, n: int) -> Reply:
        if '"tasks"' in body["messages"][0]["content"]:
            return author(body, n)
        order.append(n)
        return Reply(json.dumps(answers[len(order) - 1]))

    report, examples = run(serve(reply), {"long-short": len(answers)}, concurrency=1)
    assert report["dropped"]["long-short"] == {
        "empty_or_not_text": 2,
        "query_is_positive": 1,
        "negative_is_query_or_positive": 1,
        "label_in_text": 2,
        "duplicate": 1,
        "near_duplicate": 1,
    }
    assert [example.query for example in examples] == [inside["input_text"], fine["input_text"], long["input_text"]]


def test_a_label_may_be_in_the_text_of_other_kinds(serve: Serve, run: Run) -> None:
    def reply(body: Body, n: int) -> Reply:
        made = json.loads(author(body, n).text)
        if "S1" in made:
            made["S1"] = f"{made['S2']} and {made['S1']}"
        return Reply(json.dumps(made))

    assert run(serve(reply), {"sts": 3})[0]["written"] == 3


def test_faults_of_a_model_are_counted(serve: Serve, run: Run) -> None:
    def reply(body: Body, n: int) -> Reply:
        good = author(body, n)
        if '"tasks"' in body["messages"][0]["content"]:
            return good
        chance = body["seed"] % 5
        if chance == 0:
            return Reply("Sure! Here is an example.")
        if chance == 1:
            return Reply('{"input": "no document"}')
        return good

    fake = serve(reply)
    report, examples = run(fake, {"short-short": 60}, attempts=2)
    failed = report["dropped"]["short-short"]["no_valid_answer"]
    assert 0 < failed < 30 and len(examples) == 60 - failed
    assert report["client"]["bad_json"] > 0 and report["client"]["wrong_schema"] > 0
    assert report["client"]["bad_json"] + report["client"]["wrong_schema"] == len(fake.requests) - 2 - len(examples)


def test_a_model_that_repeats_itself(serve: Serve, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def parrot(body: Body, n: int) -> Reply:
        prompt = body["messages"][0]["content"]
        if '"tasks"' in prompt:
            return Reply(
                json.dumps({"tasks": ["Find it now.", "find  it NOW", "", "5.", "x y " * 51, "Find them too."]})
            )
        return Reply(json.dumps({key: f"always the same {key}" for key in asked_keys(prompt)}))

    fake = serve(parrot)
    report, _ = run(fake, {"short-long": 20}, per_task=2)
    assert report["tasks"]["short-long"] == {"prompts": 4, "tasks": 2, "repeated": 1 + 3 * 3, "unusable": 12}
    assert report["written"] == 1 and report["dropped"]["short-long"] == {"duplicate": 19}
    assert "2 tasks where 10 were wanted" in caplog.text
    assert sum("Find it now." in prompt for prompt in fake.prompts) == 10  # shared out evenly
    assert [task.instruction for task in read_tasks(tasks_file(tmp_path / "out.jsonl")).values()] == ["Find it now."]


def test_no_task_no_example(serve: Serve, run: Run, tmp_path: Path) -> None:
    fake = serve(lambda body, n: Reply("no") if '"tasks"' in body["messages"][0]["content"] else author(body, n))
    report, examples = run(fake, {"short-long": 3, "sts": 2})
    assert report["dropped"]["short-long"] == {"no_task": 3} and report["tasks"]["short-long"]["tasks"] == 0
    assert len(examples) == report["written"] == 2
    report, _ = run(fake, {"short-long": 3}, name="none.jsonl")
    assert report["written"] == 0 and not (tmp_path / "none.jsonl").exists()


def test_the_same_again_costs_nothing_and_more_costs_the_rest(serve: Serve, run: Run, tmp_path: Path) -> None:
    fake = serve()
    _, first = run(fake, {"short-long": 8, "sts": 5})
    content, asked = (tmp_path / "out.jsonl").read_bytes(), len(fake.requests)
    report, _ = run(fake, {"short-long": 8, "sts": 5})
    assert len(fake.requests) == asked and (tmp_path / "out.jsonl").read_bytes() == content
    assert report["client"] == {"cached": asked - 1}  # the brainstorm's prompt is in a file of its own
    _, more = run(fake, {"short-long": 60, "sts": 10})
    assert len(fake.requests) == asked + 52 + 5 + 1  # thirty tasks take a second brainstorm
    by_id = {example.id: example for example in more}
    assert [by_id[example.id] for example in first] == first

    other = serve()
    run(other, {"short-long": 8, "sts": 5}, name="parallel.jsonl", concurrency=1)
    assert (tmp_path / "parallel.jsonl").read_bytes() == content  # the order of the answers is of no matter


def test_a_brainstorm_that_failed_has_no_example_paid_for_again(serve: Serve, run: Run) -> None:
    """120 examples of 60 tasks; of the three prompts for these the first fails, and another makes up for it."""
    ill = set[int]()

    def reply(body: Body, n: int) -> Reply:
        if n == 0:
            ill.add(body["seed"])
        return Reply(status=500) if body["seed"] in ill else author(body, n)

    fake = serve(reply)
    _, first = run(fake, {"short-long": 120}, retries=0, concurrency=1)
    ill.clear()
    asked = len(fake.requests)
    report, again = run(fake, {"short-long": 120}, retries=0, concurrency=1)
    assert len(fake.requests) == asked and report["client"] == {"cached": 120} and again == first


def test_the_budget_ends_it_with_what_there_is(serve: Serve, run: Run) -> None:
    fake = serve(lambda body, n: Reply(author(body, n).text, tokens=1000))
    report, examples = run(fake, {"sts": 10, "bitext": 10}, token_budget=6000, max_tokens=950)
    assert report["client"]["tokens"] == 5000  # another answer of 950, with its prompt, could pass 6,000
    assert report["written"] == len(examples) == len(fake.requests) == 5
    assert report["dropped"]["sts"]["budget"] + report["dropped"]["bitext"]["budget"] == 15
    assert len({example.id.split(":")[0] for example in examples}) == 2  # some of each


def test_a_part_that_lacks_answers_is_not_done(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, out = serve(), tmp_path / "parts"
    options = ("synth", "--out", out, "--base-url", fake.url, "--model", "a", "--count", 12, "--types", "sts")
    assert command(monkeypatch, *options, "--shard", "0/2", "--token-budget", 1) == 1
    assert "6 questions have no answer yet" in capsys.readouterr().err and not fake.requests
    for _ in range(2):  # the second time it is done
        assert command(monkeypatch, *options, "--shard", "0/2") == 0
        assert '"written": 6' in capsys.readouterr().out and len(fake.requests) == 6


def test_parts_share_the_budget_and_what_was_paid_for_other_parts(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, out = serve(lambda body, n: Reply(author(body, n).text, tokens=1000)), tmp_path / "parts"
    options = ("synth", "--out", out, "--base-url", fake.url, "--model", "a", "--count", 12, "--types", "sts")
    limits = ("--token-budget", 8000, "--max-tokens", 900, "--concurrency", 1)

    def run_all(count: int, *more: object) -> list[int]:
        return [command(monkeypatch, *options, *limits, *more, "--shard", f"{i}/{count}") for i in range(count)]

    assert run_all(2) == [1, 1] and len(fake.requests) == 6  # three of each: a fourth could pass 4,000
    assert run_all(2) == [1, 1] and len(fake.requests) == 6  # over all runs
    for file in [*out.glob("*.jsonl"), *out.glob("*.json")]:  # all but what was paid for
        file.unlink()
    assert run_all(3) == [1, 1, 1] and len(fake.requests) == 6  # of the 2,000 that are left, a third pays nothing
    assert run_all(3, "--token-budget", 90000) == [0, 0, 0] and len(fake.requests) == 12
    examples = list(open_examples(out, cache=tmp_path / "cache"))
    assert [example.id for example in examples] == [f"synthetic-sts:{i}" for i in range(12)]


def test_the_tasks_of_all_parts_are_paid_for_by_none_of_them(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """40 examples of 40 tasks: two prompts for these and 40 for examples, of 1,000 tokens each."""
    fake, out = serve(lambda body, n: Reply(author(body, n).text, tokens=1000)), tmp_path / "parts"
    options = ("synth", "--out", out, "--base-url", fake.url, "--model", "a", "--count", 40, "--types", "short-long")
    options = (*options, "--per-task", 1, "--max-tokens", 300, "--concurrency", 1)

    def run(*more: object) -> int:
        return command(monkeypatch, *options, *more)

    def paid() -> int:
        return sum(tokens_paid(file) for file in tmp_path.rglob("*.answers.sqlite"))

    tasks = -(-40 // Plan({"short-long": 40}, ("a",)).prompts.tasks_per_prompt)
    enough = ("--token-budget", 1000 * (40 + tasks) + 4 * 700)  # what an answer might take is kept free
    assert [run("--shard", f"{index}/4", *enough) for index in (2, 0, 1, 3)] == [0] * 4
    assert len(fake.requests) == 40 + tasks and paid() == 1000 * (40 + tasks)
    assert len(list(open_examples(out, cache=tmp_path / "cache"))) == 40
    asked = len(fake.requests)
    assert run("--shard", "1/4", "--seed", 1) == 2 and len(fake.requests) == asked  # refused before it pays
    assert run("--shard", "1/4") == 0 and len(fake.requests) == asked


def test_a_part_whose_brainstorm_failed_is_not_done(serve: Serve, tmp_path: Path) -> None:
    """Of two parts, the second finds the tasks; a task that the server gave nothing usable for is not waited for."""
    replies: list[Callable[[Body, int], Reply]] = [lambda body, n: Reply(status=500)]
    fake, plan = serve(lambda body, n: replies[-1](body, n)), Plan({"short-long": 4}, ("m",))

    def part(index: int) -> dict[str, Any]:
        with Client(Server(base_url=fake.url, retries=0), tmp_path / f"{index}.sqlite") as client:
            return synthesize(tmp_path / "parts", client, plan, shard=Shard(index, 2))

    report = part(0)
    assert report["dropped"]["short-long"] == {"no_task": 2} and report["unanswered"] == 4
    replies.append(author)
    for index in (0, 1, 0):
        report = part(index)
        assert report["written"] == 2 and report["unanswered"] == 0
    assert len(fake.requests) == 4 + 1 + 4
    assert len(list(open_examples(tmp_path / "parts", cache=tmp_path / "cache"))) == 4


def test_a_part_whose_tasks_were_cut_off_is_made_again_under_a_larger_limit(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reasoning(body: Body, n: int) -> Reply:
        return author(body, n) if body["max_tokens"] > 2048 else Reply("<think>Well", finish="length")

    fake, out = serve(reasoning), tmp_path / "parts"
    options = ("synth", "--out", out, "--base-url", fake.url, "--model", "a", "--count", 6, "--types", "short-long")
    for asked in (12, 12):  # the second time for nothing
        assert command(monkeypatch, *options, "--shard", "0/2") == 1 and len(fake.requests) == asked
        assert "3 questions have no answer yet" in (said := capsys.readouterr().err) and "--max-tokens" in said
    assert command(monkeypatch, *options, "--shard", "0/2", "--max-tokens", 8192) == 0
    assert '"written": 3' in capsys.readouterr().out


def test_the_command(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made.parquet"
    options = ("--out", out, "--base-url", serve().url, "--model", "a", "--model", "b", "--count", 12)
    assert command(monkeypatch, "synth", *options) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["written"] == 12 and {kind: row["examples"] for kind, row in report["diversity"].items()} == {
        "short-long": 4,
        "long-short": 4,
        "short-short": 4,
    }
    assert "12/12 examples" in printed.err
    assert len(list(open_examples(out, cache=tmp_path / "cache"))) == 12
    assert set(path.name for path in tmp_path.iterdir()) == {
        *("made.parquet", "made.parquet.tasks.jsonl", "made.parquet.answers.sqlite", "cache"),
        "made.parquet.brainstorm.jsonl",
    }
    assert len(list(open_examples(out.parent, cache=tmp_path / "cache"))) == 12  # what lies beside is no data
    assert command(monkeypatch, "synth", *options, "--types", "short-long,long") == 2
    assert "no kind of task 'long'" in capsys.readouterr().err
    useless = serve(lambda body, n: Reply("no"))
    options = ("--out", tmp_path / "none.jsonl", "--base-url", useless.url, "--model", "a", "--count", 3)
    assert command(monkeypatch, "synth", *options) == 1
    assert "no usable example" in capsys.readouterr().err
