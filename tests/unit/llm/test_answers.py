"""Which of a model's words are its answer, and under what an answer is kept."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel

from embedwright.llm.answers import AnswerFile, BadAnswerError, Completion, answer_key, read_answer


class Colour(BaseModel):
    name: str
    kind: Literal["warm", "cold"] = "warm"


RED = {"name": "red", "kind": "warm"}
DRAFT, FINAL = '{"name": "blue"}', '{"name": "red"}'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"name": "red"}', RED),
        ('```json\n{"name": "red", "kind": "cold"}\n```', {"name": "red", "kind": "cold"}),
        (f"I think {{this}} is it: {DRAFT} or {FINAL}", RED),
        (f"Draft:\n```json\n{DRAFT}\n```\nFinal:\n```json\n{FINAL}\n```\nI hope {{it}} helps.", RED),
        (f'{FINAL} {{"confidence": 1}}', RED),  # the last one that fits
        ('{"thought": {"name": 1}} {"name": "red", "why": "warm"}', RED),
        ('{"name": "two\nlines"}', {"name": "two\nlines", "kind": "warm"}),
        ('{"name": "a {brace}"}', {"name": "a {brace}", "kind": "warm"}),
        ('{"name": 3}', "wrong_schema"),
        ('{"colour": "red"}', "wrong_schema"),
        ('["red"]', "bad_json"),
        ('{"name": "red"', "bad_json"),
        ("", "bad_json"),
        ("{" * 3_000, "bad_json"),
        ('{"a":' * 3_000, "bad_json"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_json_is_found_in_what_a_model_says(text: str, found: object) -> None:
    check(text, found)


def check(text: str, found: object) -> None:
    if isinstance(found, str):
        with pytest.raises(BadAnswerError, match=f"^{found}$"):
            read_answer(text, Colour)
    else:
        assert read_answer(text, Colour) == found


PAIRS = [
    ("<think>", "</think>"),
    ("<THINK>\n", "</Think >"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ('<think type="long">', "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
]


@pytest.mark.parametrize(("opened", "closed"), PAIRS, ids=[opened for opened, _ in PAIRS])
def test_the_answer_stands_after_the_reasoning(opened: str, closed: str) -> None:
    check(f"{opened}Perhaps {DRAFT}, or {{so.{closed}\n\n{FINAL}", RED)
    check(f"Perhaps {DRAFT}.{closed}{FINAL}", RED)  # a chat template that begins the reasoning itself
    check(f"{opened}a{closed}{DRAFT}{opened}no{closed}{FINAL}", RED)
    check(f"{opened}Perhaps {FINAL}{closed} I cannot tell.", "bad_json")
    check(f"{opened}Perhaps {FINAL}", "only_reasoning")
    check(f"{opened}a{closed}{opened}Perhaps {FINAL}", "only_reasoning")
    check(json.dumps({"name": f"how {opened} works"}), {"name": f"how {opened} works", "kind": "warm"})
    check(f"{opened}so{closed}" + json.dumps({"name": f"a {closed} b"}), {"name": f"a {closed} b", "kind": "warm"})


def test_the_key_of_an_answer_never_changes() -> None:
    """Another value here has every user pay for all answers again."""
    assert answer_key("m", "a colour", 1, "0", 0) == (
        "cacf89c7e45c246073fba64ee03c17902092d3f0769f8c0a328a336f01bd9ad4"
    )
    others = [("n", "p", 0.0, "s", 0), ("m", "q", 0.0, "s", 0), ("m", "p", 0.5, "s", 0), ("m", "p", 0.0, "t", 0)]
    keys = [answer_key(*named) for named in [*others, ("m", "p", 0.0, "s", 0), ("m", "p", 0.0, "s", 1)]]
    assert len(set(keys)) == 6


def test_answers_are_kept_and_all_their_tokens_counted(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.sqlite"
    first = AnswerFile(path)
    first.put("a", Completion("one", 0, 3))
    first.put("b", Completion("tw", 50, 4))
    first.put("b", Completion("two", 0, 5))
    first.close()
    again = AnswerFile(path)
    assert again.get("a") == ("one", 0, 3) and again.get("c") is None
    assert again.get("b") == ("two", 0, 9) and again.tokens() == 12
    again.close()


def test_a_file_that_holds_no_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    path.write_text("something else, and long enough to be read as a header of a database")
    with pytest.raises(ValueError, match=r"answers\.sqlite: not a file of answers"):
        AnswerFile(path)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes here")
def test_the_file_belongs_to_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers.sqlite"
    old = os.umask(0)
    try:
        kept = AnswerFile(path)
        kept.put("a", Completion("one", 0, 1))
        files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    finally:
        os.umask(old)
    assert files == dict.fromkeys(("answers.sqlite", "answers.sqlite-wal", "answers.sqlite-shm"), 0o600)
    kept.close()
    path.chmod(0o666)
    with pytest.raises(ValueError, match=r"answers\.sqlite can be written by other users"):
        AnswerFile(path)
    path.chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(ValueError, match="belongs to another user"):
        AnswerFile(path)
    monkeypatch.undo()
    for part in ("-wal", "-shm", "-journal"):
        planted = tmp_path / f"answers.sqlite{part}"
        planted.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=f"answers.sqlite{part} is a link"):
            AnswerFile(path)
        planted.unlink()
    AnswerFile(path).close()
