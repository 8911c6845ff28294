"""Relabelling: every negative is asked about, those that are positives go or move, and everything is counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_llm import Body, FakeLLM, Reply, command

from embedwright.data.files.parts import Shard
from embedwright.data.schema import Example, Passage, Task
from embedwright.data.tables.table import open_examples, write_examples
from embedwright.llm.client import Client, Server
from embedwright.synth.relabel import Action, Candidate, Judge, judge_by_model, judge_by_scores, relabel_file
from embedwright.synth.relabel import relabel as stream


def example(i: int, negatives: str, scored: bool = True, **other: Any) -> Example:
    """Negatives that begin with `yes` are in truth positives, of those with `huh` nobody knows."""
    names = negatives.split()
    scores = {"positive_scores": (0.9,), "negative_scores": tuple(0.1 * (n + 1) for n in range(len(names)))}
    passages = tuple(Passage(f"{name} to {i}", f"{name}{i}") for name in names)
    return Example(f"{i}", "t", f"query {i}", (Passage(f"gold {i}"),), passages, **(scores if scored else {}), **other)


def oracle(candidates: Sequence[Candidate]) -> list[bool | None]:
    verdicts: dict[str, bool | None] = {"yes": True, "no": False, "huh": None}
    return [verdicts[c.passage.split()[0].rstrip("0123456789")] for c in candidates]


def relabel(rows: list[Example], judge: Judge, action: Action = "drop") -> tuple[list[Example], Counter[str]]:
    count: Counter[str] = Counter()
    return list(stream(rows, judge, action, count)), count


EXAMPLES = [
    example(0, "no1 yes1 huh no2 yes2", language="en"),
    example(1, ""),
    example(2, "yes"),
    example(3, "no", scored=False),
    example(4, "yes no", scored=False),
]


def texts(passages: Sequence[Passage]) -> list[str]:
    return [passage.text.split()[0] for passage in passages]


def test_drop() -> None:
    found, report = relabel(EXAMPLES, oracle)
    assert report == Counter(examples=5, negatives=9, positive=4, kept=5, undecided=1, without_negatives=1)
    assert [texts(e.negatives) for e in found] == [["no1", "huh", "no2"], [], [], ["no"], ["no"]]
    assert found[0].negative_scores == pytest.approx((0.1, 0.3, 0.4)) and found[0].positive_scores == (0.9,)
    assert found[2].negative_scores == () and found[4].negative_scores is None
    for before, after in zip(EXAMPLES, found, strict=True):
        same = ("id", "task", "query", "positives", "language", "positive_scores")
        assert all(getattr(before, name) == getattr(after, name) for name in same)
    assert found[1] is EXAMPLES[1] and found[3] is EXAMPLES[3]


def test_what_answers_the_question_in_another_row_is_known_without_asking() -> None:
    """By text in any look, by document, and of a judged pair read the other way; of its own task alone."""
    q, looks = "how do tides work", "How do  Tides work"
    wrong = ("The MOON ", "other words of document 7", "who asks", "no relation", "a film", "gravity")
    passages = tuple(Passage(text, "7" if "7" in text else None) for text in wrong)
    rows = [
        Example("1", "t", q, (Passage("gravity"),), passages, (0.9,), tuple(0.1 * n for n in range(6))),
        Example("2", "t", looks, (Passage("the moon"),)),
        Example("3", "t", q, (Passage("document 7", "7"),)),
        Example("4", "t", "who asks", (Passage(looks),)),
        Example("5", "u", q, (Passage("a film"),)),
    ]
    asked: list[str] = []

    def judge(candidates: Sequence[Candidate]) -> list[bool | None]:
        asked.extend(c.passage for c in candidates)
        return [False] * len(candidates)

    found, report = relabel(rows, judge)
    assert asked == ["no relation", "a film"] and found[1:] == rows[1:]
    assert report == Counter(examples=5, negatives=6, positive=4, known=4, kept=2)
    assert [p.text for p in found[0].negatives] == asked
    assert found[0].negative_scores == pytest.approx((0.3, 0.4))
    promoted = relabel(rows, judge, "promote")[0][0]
    assert [p.text for p in promoted.positives] == ["gravity", *wrong[:3]]  # what it has already comes once
    assert promoted.positive_scores == pytest.approx((0.9, 0.0, 0.1, 0.2))


@pytest.mark.parametrize("apart", [0, 300])
def test_a_positive_beside_one_answer_is_a_positive_beside_all_answers_of_the_question(apart: int) -> None:
    """As the judge sees one answer of a row. Both looks of X are the same text; in another task it is another thing."""
    between = [example(i, "no") for i in range(apart)]
    a = Example("A", "t", "q", (Passage("A"),), (Passage("X"), Passage("C")))
    b = Example("B", "t", "Q ", (Passage("B"),), (Passage("x "), Passage("C")))
    other = Example("D", "u", "q", (Passage("D"),), (Passage("X"), Passage("C")))

    def judge(candidates: Sequence[Candidate]) -> list[bool | None]:
        return [None if c.passage == "C" else c.positive == "B" for c in candidates]

    rows = [a, *between, other, b]
    found, report = relabel(rows, judge)
    by_id = {row.id: [p.text for p in row.negatives] for row in found}
    assert by_id["A"] == by_id["B"] == ["C"] and by_id["D"] == ["X", "C"]
    assert report["positive"] == 2 and report["undecided"] == 3
    by_id = {row.id: [p.text for p in row.positives] for row in relabel(rows, judge, "promote")[0]}
    assert by_id["A"] == ["A", "X"] and by_id["B"] == ["B", "x "] and by_id["D"] == ["D"]


def test_a_text_that_was_mined_twice_is_one_positive() -> None:
    negatives = ("yes x", "no", "Yes  X", "yes x", "yes y")
    row = Example("0", "t", "q", (Passage("p"),), tuple(map(Passage, negatives)), (0.9,), (0.1, 0.2, 0.3, 0.4, 0.5))
    found, report = relabel([row], lambda candidates: [c.passage.lower() != "no" for c in candidates], "promote")
    assert [p.text for p in found[0].positives] == ["p", "yes x", "yes y"] and report["positive"] == 4
    assert found[0].positive_scores == pytest.approx((0.9, 0.1, 0.5)) and texts(found[0].negatives) == ["no"]


def test_promote() -> None:
    found, report = relabel(EXAMPLES, oracle, "promote")
    assert (report["positive"], report["kept"], report["scores_removed"]) == (4, 5, 0)
    assert texts(found[0].positives) == ["gold", "yes1", "yes2"] and texts(found[0].negatives) == ["no1", "huh", "no2"]
    assert found[0].positive_scores == pytest.approx((0.9, 0.2, 0.5))
    assert found[0].negative_scores == pytest.approx((0.1, 0.3, 0.4))
    assert found[0].positives[1].id == "yes10"
    assert found[4].positive_scores is None

    odd = Example("5", "t", "q", (Passage("p"),), (Passage("yes x"),), positive_scores=(0.9,))
    found, report = relabel([odd], oracle, "promote")
    assert found[0].positive_scores is None and report["scores_removed"] == 1


def test_scored_pairs_without_a_positive_stay_as_they_are() -> None:
    low = Example("low", "t", "query 0", (), (Passage("yes to low"),), score=1.0)
    for action in ("drop", "promote"):
        found, report = relabel([low, example(0, "yes1 no1")], oracle, action)  # type: ignore[arg-type]
        assert found[0] is low and report["examples"] == 2 and report["negatives"] == 2


def test_another_action_is_refused() -> None:
    with pytest.raises(ValueError, match="drop or promote, not 'remove'"):
        relabel(EXAMPLES, oracle, "remove")


def test_order_and_chunks() -> None:
    many = [example(i, "no yes") for i in range(600)]
    asked: list[int] = []

    def judge(candidates: Sequence[Candidate]) -> list[bool | None]:
        asked.append(len(candidates))
        return oracle(candidates)

    found, report = relabel(many, judge)
    assert [e.id for e in found] == [e.id for e in many] and all(texts(e.negatives) == ["no"] for e in found)
    assert asked == [512, 512, 176] and report["negatives"] == 1200


def test_an_equal_candidate_is_asked_about_once() -> None:
    asked: list[Candidate] = []

    def judge(candidates: Sequence[Candidate]) -> list[bool | None]:
        asked.extend(candidates)
        return oracle(candidates)

    relabel([EXAMPLES[0], EXAMPLES[0]], judge)
    assert len(asked) == 5


class WordOverlap:
    """A cross-encoder that gives the share of the query's words."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []

    def predict(self, sentences: list[tuple[str, str]], /) -> np.ndarray:
        self.pairs += sentences
        return np.array([len(set(q.split()) & set(p.split())) / len(q.split()) for q, p in sentences], np.float32)


def test_a_cross_encoder() -> None:
    row = Example("0", "t", "a b", (Passage("p"),), tuple(map(Passage, ("a x", "a b", "x"))))
    model = WordOverlap()
    found, _ = relabel([row], judge_by_scores(model, 0.5))
    assert [p.text for p in found[0].negatives] == ["x"] and model.pairs[0] == ("a b", "a x")
    found, _ = relabel([row], judge_by_scores(model, 0.51))
    assert [p.text for p in found[0].negatives] == ["a x", "x"]
    relabel([example(1, "")], judge_by_scores(model, 0.5))  # nothing to ask


@pytest.mark.parametrize(
    ("scores", "reason"),
    [([[0.1, 0.2], [0.3, 0.4]], r"\(2, 2\) for 2 pairs"), ([0.1], r"\(1,\) for 2 pairs"), ([0.1, np.nan], "yes to 0")],
)
def test_a_cross_encoder_that_gives_something_else(scores: Any, reason: str) -> None:
    class Odd:
        def predict(self, sentences: list[tuple[str, str]], /) -> Any:
            return scores

    with pytest.raises(ValueError, match=reason):
        relabel([example(0, "no yes")], judge_by_scores(Odd(), 0.5))


def verdict(body: Body, n: int) -> Reply:
    other = body["messages"][0]["content"].split("Another text:\n")[1].split()[0]
    if other.startswith("huh"):
        return Reply("It depends.")
    return Reply(json.dumps({"verdict": "positive" if other.startswith("yes") else "negative"}))


@pytest.fixture
def fake() -> Iterator[FakeLLM]:
    with FakeLLM(verdict) as server:
        yield server


def test_a_language_model(fake: FakeLLM, tmp_path: Path) -> None:
    server = Server(base_url=fake.url, attempts=2, concurrency=1)
    tasks = {"t": Task(name="t", instruction="Find the number.")}
    with Client(server, tmp_path / "a.sqlite") as client:
        found, report = relabel(EXAMPLES, judge_by_model(client, "m", tasks))
    assert (found, report) == relabel(EXAMPLES, oracle)
    assert len(fake.requests) == 10  # nine candidates, and one answer that was asked for again
    first = fake.prompts[0]
    assert all(part in first for part in ("Find the number.", "query 0", "gold 0", "no1 to 0"))
    body = fake.requests[0]
    assert body["temperature"] == 0.0 and body["model"] == "m"
    verdicts = body["response_format"]["json_schema"]["schema"]["properties"]["verdict"]
    assert verdicts["enum"] == ["positive", "negative"]

    with Client(server, tmp_path / "a.sqlite") as client:  # a restart
        assert relabel([*EXAMPLES, example(6, "no yes")], judge_by_model(client, "m", tasks))[1]["positive"] == 5
    assert len(fake.requests) == 12
    with Client(server, tmp_path / "a.sqlite") as client:  # told nothing of a task
        relabel(EXAMPLES[3:4], judge_by_model(client, "m"))
    assert "The task" not in fake.prompts[-1] and len(fake.requests) == 13


def test_a_text_that_is_too_long_is_named_or_cut_and_costs_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def short_sighted(body: Body, n: int) -> Reply:
        return Reply(status=400) if len(body["messages"][0]["content"]) > 1500 else verdict(body, n)

    rows = [example(i, f"no {'yes' * (400 if i == 3 else 1)} yes") for i in range(5)]
    with FakeLLM(short_sighted) as fake, Client(Server(base_url=fake.url), tmp_path / "a.sqlite") as client:
        found, report = relabel(rows, judge_by_model(client, "m"))
        assert [len(one.negatives) for one in found] == [1, 1, 1, 2, 1] and report["undecided"] == 1
        assert "example '3': no verdict on a negative of 1205 characters: 'yesyesyes" in caplog.text
        found, report = relabel(rows, judge_by_model(client, "m", max_chars=50))
        assert [len(one.negatives) for one in found] == [1] * 5 and report["undecided"] == 0


def test_a_part_that_lacks_verdicts_is_not_done(fake: FakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget leaves questions for the next run; what the model answers without a verdict is left as it is."""
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    write_examples(tmp_path / "in.jsonl", EXAMPLES)

    def part(budget: int | None) -> dict[str, Any]:
        server = Server(base_url=fake.url, attempts=2, token_budget=budget)
        with Client(server, tmp_path / "a.sqlite") as client:
            judge, where = judge_by_model(client, "m"), (tmp_path / "in.jsonl", tmp_path / "parts")
            return relabel_file(*where, judge, shard=Shard(0, 1), client=client)

    report = part(budget=1)
    assert report["undecided"] == report["unanswered"] == 9 and not fake.requests
    for _ in range(2):  # the second time it is done
        report = part(budget=None)
        assert report["undecided"] == 1 and report["unanswered"] == 0 and len(fake.requests) == 10
    assert list(open_examples(tmp_path / "parts")) == relabel(EXAMPLES, oracle)[0]


def test_parts_of_another_action_cost_no_answer_again(
    fake: FakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "parts"
    write_examples(tmp_path / "in.jsonl", EXAMPLES)
    options = ("data", "relabel", tmp_path / "in.jsonl", "--out", out, "--base-url", fake.url, "--model", "m")
    assert command(monkeypatch, *options, "--shard", "0/1") == 0
    asked = len(fake.requests)
    options = (*options, "--shard", "0/1", "--action", "promote")
    assert command(monkeypatch, *options) == 2 and "but for its *.answers.sqlite" in capsys.readouterr().err
    for file in out.iterdir():
        if not file.match("*.answers.sqlite*"):
            file.unlink()
    assert command(monkeypatch, *options) == 0 and len(fake.requests) == asked
    assert list(open_examples(out)) == relabel(EXAMPLES, oracle, "promote")[0]


def test_a_draft_does_not_flip_a_verdict(tmp_path: Path) -> None:
    """A reasoning model drafts the opposite first, and once never comes to its end."""

    def reasoning(body: Body, n: int) -> Reply:
        said = verdict(body, n).text
        opposite = json.dumps({"verdict": "negative" if "positive" in said else "positive"})
        return Reply(f"<think>Perhaps {opposite}?" + (f" No.</think>\n{said}" if n else ""))

    with FakeLLM(reasoning) as fake:
        server = Server(base_url=fake.url, attempts=2, concurrency=1)
        with Client(server, tmp_path / "a.sqlite") as client:
            found, report = relabel(EXAMPLES, judge_by_model(client, "m"))
    assert (found, report) == relabel(EXAMPLES, oracle) and client.counts["only_reasoning"] == 1


def test_no_command_shows_a_key(
    fake: FakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a password in an address nor a key, in any file or line that the commands write."""
    fake.reply = lambda body, n: verdict(body, n) if "messages" in body else Reply(status=400)
    monkeypatch.setenv("OWN_KEY", "own-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "openai-secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    path = tmp_path / "in" / "mined.jsonl"
    path.parent.mkdir()
    write_examples(path, EXAMPLES)
    with_password = fake.url.replace("//", "//me:pass-secret@")
    nowhere = "http://me:pass-secret@127.0.0.1:1/v1"
    said = ""

    def run(code: int, *arguments: object) -> None:
        nonlocal said
        assert command(monkeypatch, *arguments) == code
        output = capsys.readouterr()
        said += output.out + output.err

    def judge(url: str, *options: str) -> tuple[object, ...]:
        return ("data", "relabel", path, "--out", tmp_path / "out.jsonl", "--base-url", url, "--model", "m", *options)

    run(0, *judge(fake.url, "--api-key-env", "OWN_KEY"))
    assert {headers["authorization"] for headers in fake.headers} == {"Bearer own-secret"}
    (tmp_path / "out.jsonl.answers.sqlite").unlink()
    run(0, *judge(with_password))
    run(2, *judge(with_password, "--api-key-env", "OWN_KEY"))
    run(2, *judge(f"{fake.url}?api_key=query-secret"))
    run(2, *judge(fake.url, "--api-key-env", "UNSET"))
    made = ("synth", "--out", tmp_path / "made.jsonl", "--model", "m", "--count", 3, "--base-url")
    run(2, *made, f"{with_password}?key=query-secret")
    mined = ("mine", path, "--out", tmp_path / "mined.jsonl", "--teacher")
    run(1, *mined, f"{fake.url}#m", "--task", "t", "--api-key-env", "OWN_KEY")  # it speaks no /embeddings
    assert fake.headers[-1]["authorization"] == "Bearer own-secret"
    run(2, *mined, nowhere)
    run(2, *mined, f"{nowhere}#m", "--teacher", f"{with_password}#m", "--task", "t", "--api-key-env", "OWN_KEY")
    run(1, *mined, f"{with_password}#m", "--task", "t", "--shard", "0/1", "--out", tmp_path / "parts")
    run(1, *mined, f"{fake.url}#m", "--task", "t", "--shard", "0/1", "--out", tmp_path / "parts")  # the same teacher
    run(2, *mined, f"{with_password}#m", "--task", "t", "--dtype", "float32")
    run(2, "train", "--data", path, "--out", tmp_path / "run", "--teacher", f"{nowhere}#m")
    run(2, "eval", f"{nowhere}#m", "dev")
    kept = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert "secret" not in said and b"secret" not in kept
    assert "127.0.0.1:1" in said and "$UNSET" in said


def test_the_command(
    fake: FakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    path, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    write_examples(path, EXAMPLES)
    options = ("--out", out, "--base-url", fake.url, "--model", "m", "--action", "promote")
    assert command(monkeypatch, "data", "relabel", path, *options) == 0
    printed = capsys.readouterr().out
    report = json.loads(printed)
    assert report["positive"] == 4 and report["read"]["examples"] == 5 and report["client"]["requests"] == 11
    assert list(open_examples(out)) == relabel(list(open_examples(path)), oracle, "promote")[0]

    judges: dict[float, Any] = {}

    class Loaded(WordOverlap):
        def __init__(self, name: str, trust_remote_code: bool) -> None:
            super().__init__()
            assert not trust_remote_code
            judges[0] = name

    monkeypatch.setattr("sentence_transformers.CrossEncoder", Loaded)
    assert (
        command(monkeypatch, "data", "relabel", path, "--out", out, "--cross-encoder", "some/model", "--threshold", 0.5)
        == 0
    )
    assert judges[0] == "some/model"
    printed = capsys.readouterr().out
    assert json.loads(printed)["positive"] == 9  # all share the number with their query
    for wrong in (
        ("--base-url", fake.url),
        ("--cross-encoder", "x"),
        ("--cross-encoder", "x", "--threshold", 1, *options[2:4]),
        (),
    ):
        assert command(monkeypatch, "data", "relabel", path, "--out", out, *wrong) == 2
        assert "name the judge" in capsys.readouterr().err
    scored = ("data", "relabel", path, "--out", out, "--cross-encoder", "some/model", "--threshold", 0.5)
    limits = {"max-chars": 9, "concurrency": 8, "token-budget": 1, "max-tokens": 512, "timeout": 9, "api-key-env": "K"}
    for name, value in limits.items():  # with its default value, too
        assert command(monkeypatch, *scored, f"--{name}", value) == 2
        assert f"--{name}: no server is asked here" in capsys.readouterr().err


def test_tasks_that_are_given_reach_rows_without_a_task_and_those_that_fit_no_row_are_refused(
    fake: FakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    path, out, tasks = tmp_path / "mined.jsonl", tmp_path / "out.jsonl", tmp_path / "t.jsonl"
    row = {"id": "1", "query": "q", "positives": ["p"], "negatives": ["no x"]}
    options = ("data", "relabel", path, "--out", out, "--base-url", fake.url, "--model", "m", "--tasks", tasks)
    for rows, said in (([row], "rows name none; 'mined'"), ([row | {"task": "u"}], "(other, another); rows name 'u'")):
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        tasks.write_text('{"name": "other", "instruction": "Find"}\n{"name": "another", "instruction": "Find"}\n')
        assert command(monkeypatch, *options) == 2 and said in capsys.readouterr().err and not fake.requests
    path.write_text(json.dumps(row) + "\n")
    tasks.write_text('{"name": "mined", "instruction": "Find the number."}\n{"name": "other"}\n')
    assert command(monkeypatch, *options) == 0 and "Find the number." in fake.prompts[0]
    table = open_examples(out)
    assert [one.task for one in table] == ["mined"] and table.tasks.keys() == {"mined"}
